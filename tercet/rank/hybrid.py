"""The best documents of each query, by each kind of vectors and by their weighted sums.

Documents come in blocks, so that the token vectors of a large corpus never lie in memory together:
a block is scored by every kind, each ranking keeps its best, and the block is dropped. All scores
are exact; nothing is as wide as the vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tercet.errors import ModelError
from tercet.kinds import Kind, Weights
from tercet.rank.scoring import late_interaction
from tercet.rank.topk import Hits, largest
from tercet.segments import offsets_of, row_of
from tercet.vectors import Terms, TokenRows, Vectors

QUERY_TERMS: Final = 4_096  # of queries, terms or tokens, compared with a block of documents

Blocks: TypeAlias = Iterable[tuple[Tensor, Vectors]]
"""Rows of documents, in rising order, and their vectors."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """Documents of each query, and their true scores by every kind."""

    kinds: tuple[Kind, ...]
    rows: Int[Tensor, "queries ranks"]  # -1 where there is none
    parts: Float[Tensor, "kinds queries ranks"]  # not weighted

    def sums(self, weights: Weights) -> Float[Tensor, "queries ranks"]:
        """The weighted sum of the scores, minus infinity where there is no document."""
        return _weighted(self.parts, self.kinds, weights).masked_fill(self.rows < 0, -inf)

    def take(self, columns: Int[Tensor, "queries chosen"]) -> "Ranked":
        """These places of each list."""
        wide = columns.expand(len(self.kinds), *columns.shape)
        return Ranked(self.kinds, self.rows.gather(1, columns), self.parts.gather(2, wide))

    def best(self, weights: Weights, k: int) -> "Ranked":
        """The ``k`` of largest sum, best first; equal sums are ranked as they stand here."""
        return self.take(largest(self.sums(weights), k)[1])

    def by_row(self) -> "Ranked":
        """The same by rising row, so that equal sums will be ranked by lower row."""
        return self.take(self.rows.argsort(dim=1, stable=True))

    def hits(self, weights: Weights, k: int) -> Hits:
        """The same as rankings to be measured. By terms alone, a score of zero is no hit."""
        best = self.best(weights, k)
        sums = best.sums(weights)
        found = sums > (0 if _by_terms_alone(self.kinds, weights) else -inf)
        rows = torch.where(found, best.rows, -1)
        return Hits(
            torch.where(found, sums, 0).float().numpy(), rows.numpy().astype(np.int64, copy=False)
        )

    @staticmethod
    def union(lists: Sequence["Ranked"]) -> "Ranked":
        """The documents that are in some list, each once, by rising row."""
        rows = torch.cat([each.rows for each in lists], dim=1)
        parts = torch.cat([each.parts for each in lists], dim=2)
        joined = Ranked(lists[0].kinds, rows, parts).by_row()
        rows = joined.rows.clone()
        rows[:, 1:][joined.rows[:, 1:] == joined.rows[:, :-1]] = -1
        joined = Ranked(joined.kinds, rows, joined.parts).by_row()
        empty = int((joined.rows < 0).sum(dim=1).min()) if len(rows) else 0  # leading, in all
        return Ranked(joined.kinds, joined.rows[:, empty:], joined.parts[:, :, empty:])

    def among(self, other: "Ranked") -> Tensor:
        """Which documents are in the other's list of the same query."""
        width = 2 + int(max(self.rows.max(), other.rows.max())) if self.rows.numel() else 1
        query = torch.arange(len(self.rows))[:, None] * width
        return torch.isin(query + self.rows, (query + other.rows)[other.rows >= 0])


def ranked(
    queries: Vectors, blocks: Blocks, sums: Mapping[str, Weights], k: int
) -> dict[str, Ranked]:
    """The ``k`` best documents by each of these weighted sums, with their scores by every kind.

    Raises:
        ModelError: when a score is not a number.
    """
    queries = merged(queries)
    found = {name: _Best(len(queries), k, queries.kinds, weights) for name, weights in sums.items()}
    for rows, docs in blocks:
        parts = kind_scores(queries, docs)
        for best in found.values():
            best.add(rows, parts)
    return {name: best.found for name, best in found.items()}


@torch.no_grad()
def kind_scores(queries: Vectors, docs: Vectors) -> Float[Tensor, "kinds queries docs"]:
    """The scores by every kind that the queries have.

    Raises:
        ModelError: when a score is not a number.
    """
    queries, docs = merged(queries), merged(docs)
    parts = torch.zeros(len(queries.kinds), len(queries), len(docs))
    for part, kind in zip(parts, queries.kinds, strict=True):
        if kind == "dense":
            assert queries.dense is not None and docs.dense is not None
            torch.mm(queries.dense, docs.dense.T, out=part)
            continue
        of_queries = queries.sparse if kind == "sparse" else queries.multi
        assert of_queries is not None
        for low, high in _runs(of_queries.offsets, QUERY_TERMS):
            some = queries.take(slice(low, high))
            if kind == "sparse":
                assert some.sparse is not None and docs.sparse is not None
                part[low:high] = lexical_sums(some.sparse, docs.sparse)
            else:
                assert some.multi is not None and docs.multi is not None
                part[low:high] = late_interaction(some.multi, docs.multi)
    if not parts.isfinite().all():
        raise ModelError(
            "a score is NaN or infinity; the model is broken, or it was run in a precision too "
            "low for it"
        )
    return parts


def lexical_sums(queries: Terms, docs: Terms) -> Float[Tensor, "queries docs"]:
    """The lexical scores of merged terms, by inverted lists: only matching terms are touched.

    Equal to :func:`tercet.rank.scoring.lexical_scores`, without a gradient.
    """
    order = docs.ids.argsort(stable=True)
    ids, weights = docs.ids[order], docs.weights[order]
    owner = row_of(docs.offsets)[order]
    low = torch.searchsorted(ids, queries.ids)
    lengths = torch.searchsorted(ids, queries.ids, right=True) - low
    bounds = offsets_of(lengths)
    place = torch.arange(int(bounds[-1])) + (low - bounds[:-1]).repeat_interleave(lengths)
    cell = row_of(queries.offsets).repeat_interleave(lengths) * len(docs) + owner[place]
    products = queries.weights.repeat_interleave(lengths) * weights[place]
    flat = products.new_zeros(len(queries) * len(docs)).index_add_(0, cell, products)
    return flat.view(len(queries), len(docs))


def pair_scores(queries: TokenRows, docs: TokenRows, rows: Tensor, wanted: Tensor) -> Tensor:
    """The late interaction of each query with the documents that its list names.

    ``rows`` says, in rising order, which documents these are; what is wanted of others is zero.
    """
    found = torch.zeros(wanted.shape)
    if not len(rows):
        return found
    place = torch.searchsorted(rows, wanted.clamp_min(0)).clamp_max(len(rows) - 1)
    here = rows[place] == wanted
    for query in here.any(dim=1).nonzero().ravel().tolist():
        some = docs.take(place[query][here[query]])
        scores = late_interaction(queries.take(torch.tensor([query])), some)
        found[query, here[query]] = scores[0]
    return found


def merged(vectors: Vectors) -> Vectors:
    """The same, each term of a text once."""
    terms = None if vectors.sparse is None else vectors.sparse.merged()
    return Vectors(vectors.dense, terms, vectors.multi)


@dataclass(slots=True)
class _Best:
    """The best documents so far, by a weighted sum."""

    queries: int
    k: int
    kinds: tuple[Kind, ...]
    weights: Weights
    found: Ranked = field(init=False)

    def __post_init__(self) -> None:
        none = torch.zeros(self.queries, 0, dtype=torch.int64)
        self.found = Ranked(self.kinds, none, torch.zeros(len(self.kinds), self.queries, 0))

    def add(self, rows: Tensor, parts: Tensor) -> None:
        """Look at more documents, of higher rows than all before."""
        everything = Ranked(
            self.kinds,
            torch.cat([self.found.rows, rows.expand(self.queries, -1)], dim=1),
            torch.cat([self.found.parts, parts], dim=2),
        )
        sums = everything.sums(self.weights)
        # Earlier documents stand to the left: at equal sums a lower column is a lower row.
        self.found = everything.take(largest(sums, self.k)[1])
        if _by_terms_alone(self.kinds, self.weights):  # what shares no term is in no such list
            rows = torch.where(self.found.sums(self.weights) > 0, self.found.rows, -1)
            self.found = Ranked(self.kinds, rows, self.found.parts)


def _weighted(parts: Tensor, kinds: Sequence[Kind], weights: Weights) -> Tensor:
    total = torch.zeros(parts.shape[1:], dtype=parts.dtype)
    for part, kind in zip(parts, kinds, strict=True):
        if weights.of(kind):
            total = total + part * weights.of(kind)
    return total


def _by_terms_alone(kinds: Sequence[Kind], weights: Weights) -> bool:
    return [kind for kind in kinds if weights.of(kind)] == ["sparse"]


def _runs(offsets: Tensor, size: int) -> list[tuple[int, int]]:
    """Runs of texts of at most ``size`` values together, or one text of more."""
    bounds, runs, low = offsets.tolist(), [], 0
    for high in range(1, len(bounds)):
        if high - low > 1 and bounds[high] - bounds[low] > size:
            runs.append((low, high - 1))
            low = high - 1
    if len(bounds) > 1:
        runs.append((low, len(bounds) - 1))
    return runs
