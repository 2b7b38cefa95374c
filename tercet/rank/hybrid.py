"""Rankings by several kinds of vectors (arXiv 2402.03216, section 3.3).

A hybrid ranking takes the best documents by dense and by sparse vectors as candidates, gives each
its true score by every kind, and ranks them by the weighted sum. A document that is missing in the
list of one kind does not score zero there.

Documents come in blocks, so that the token vectors of a large corpus are never in memory together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tercet.errors import BROKEN_MODEL, ModelError
from tercet.kinds import Kind, Weights
from tercet.rank.scoring import late_interaction, lexical_sums, listed_late_interaction
from tercet.rank.topk import Hits, largest
from tercet.segments import runs_within
from tercet.vectors import Vectors

QUERY_TERMS: Final = 4_096  # of queries, terms or tokens, compared with a block of documents

Name = TypeVar("Name", bound=str)
VectorBlocks: TypeAlias = Iterable[tuple[Tensor, Vectors]]
"""Rows of documents, in rising order, and their vectors."""


@runtime_checkable
class VectorSource(Protocol):
    """Documents whose vectors can be read block by block, any number of times."""

    def blocks(self, kinds: Sequence[Kind], rows: Tensor | None = None) -> VectorBlocks:
        """Yield the vectors of these kinds of these documents, or of all."""
        ...


@dataclass(frozen=True, slots=True)
class HybridHits:
    """Documents of each query, and their true scores by every kind."""

    kinds: tuple[Kind, ...]
    rows: Int[Tensor, "queries ranks"]  # -1 where there is none
    parts: Float[Tensor, "kinds queries ranks"]  # not weighted

    def sums(self, weights: Weights) -> Float[Tensor, "queries ranks"]:
        """Return the weighted sum of the scores, minus infinity where there is no document."""
        return _weighted_sum(self.parts, self.kinds, weights).masked_fill(self.rows < 0, -inf)

    def take(self, columns: Int[Tensor, "queries chosen"]) -> "HybridHits":
        """Return the documents at these places of each list."""
        wide = columns.expand(len(self.kinds), *columns.shape)
        return HybridHits(self.kinds, self.rows.gather(1, columns), self.parts.gather(2, wide))

    def best(self, weights: Weights, k: int) -> "HybridHits":
        """Return the ``k`` of largest sum, best first; equal sums keep their order."""
        return self.take(largest(self.sums(weights), k)[1])

    def by_row(self) -> "HybridHits":
        """Return the same documents by rising row, so that equal sums are ranked by lower row."""
        return self.take(self.rows.argsort(dim=1, stable=True))

    def hits(self, weights: Weights, k: int) -> Hits:
        """Return the ``k`` best as plain hits. By terms alone, a score of zero is no hit."""
        best = self.best(weights, k)
        sums = best.sums(weights)
        found = sums > (0 if _is_by_terms_alone(self.kinds, weights) else -inf)
        rows = torch.where(found, best.rows, -1)
        return Hits(
            torch.where(found, sums, 0).float().numpy(), rows.numpy().astype(np.int64, copy=False)
        )

    @staticmethod
    def union(lists: Iterable["HybridHits"]) -> "HybridHits":
        """Return the documents of all lists, each once, by rising row."""
        joined = _joined(list(lists)).by_row()
        rows = joined.rows.clone()
        rows[:, 1:][joined.rows[:, 1:] == joined.rows[:, :-1]] = -1
        joined = HybridHits(joined.kinds, rows, joined.parts).by_row()
        empty = int((joined.rows < 0).sum(dim=1).min()) if len(rows) else 0  # leading, in all
        return HybridHits(joined.kinds, joined.rows[:, empty:], joined.parts[:, :, empty:])

    def among(self, other: "HybridHits") -> Bool[Tensor, "queries ranks"]:
        """Return which documents are in the other's list of the same query."""
        width = 2 + int(max(self.rows.max(), other.rows.max())) if self.rows.numel() else 1
        query = torch.arange(len(self.rows))[:, None] * width
        return torch.isin(query + self.rows, (query + other.rows)[other.rows >= 0])


def _joined(lists: Sequence[HybridHits]) -> HybridHits:
    rows = torch.cat([each.rows for each in lists], dim=1)
    return HybridHits(lists[0].kinds, rows, torch.cat([each.parts for each in lists], dim=2))


@dataclass(slots=True)
class BestBySum:
    """The ``k`` documents of largest weighted sum for each query, from blocks of scores."""

    queries: int
    k: int
    kinds: tuple[Kind, ...]
    weights: Weights
    found: HybridHits = field(init=False)

    def __post_init__(self) -> None:
        none = torch.zeros(self.queries, 0, dtype=torch.int64)
        self.found = HybridHits(self.kinds, none, torch.zeros(len(self.kinds), self.queries, 0))

    def add(
        self,
        rows: Int[Tensor, "queries docs"],
        parts: Float[Tensor, "kinds queries docs"],
        excluded: Bool[Tensor, "queries docs"] | None = None,
    ) -> None:
        """Add the scores of more documents, of higher rows than all before."""
        sums = _weighted_sum(parts, self.kinds, self.weights)
        if excluded is not None:
            sums = sums.masked_fill(excluded, -inf)
        sums, columns = largest(sums, self.k)
        # By terms alone, a document that shares no term is not found.
        missing = sums <= (0 if _is_by_terms_alone(self.kinds, self.weights) else -inf)
        block = HybridHits(self.kinds, rows, parts).take(columns)
        block = HybridHits(self.kinds, block.rows.masked_fill(missing, -1), block.parts)
        if not self.found.rows.shape[1]:
            self.found = block
            return
        # At equal sums the lower row is to the left.
        self.found = _joined([self.found, block]).best(self.weights, self.k)


def each_alone(kinds: Sequence[Kind]) -> dict[Kind, Weights]:
    """Return, for each kind, the weights by which it counts alone."""
    return {kind: Weights(1.0, 1.0, 1.0).only((kind,)) for kind in kinds}


def ranked(
    queries: Vectors, blocks: VectorBlocks, sums: Mapping[Name, Weights], k: int
) -> dict[Name, HybridHits]:
    """Return the ``k`` best documents by each of these weighted sums, with scores by every kind.

    Raises:
        ModelError: when a score is NaN or infinity.
    """
    queries = merged(queries)
    found = {name: BestBySum(len(queries), k, queries.kinds, by) for name, by in sums.items()}
    for rows, docs in blocks:
        parts = kind_scores(queries, docs)
        for best in found.values():
            best.add(rows.expand(len(queries), -1), parts)
    return {name: best.found for name, best in found.items()}


def candidates(queries: Vectors, blocks: VectorBlocks, k: int) -> dict[Kind, HybridHits]:
    """Return the ``k`` best documents by each kind of ``queries``, with scores by all of them.

    Raises:
        ModelError: when a score is NaN or infinity.
    """
    return ranked(queries, blocks, each_alone(queries.kinds), k)


def hybrid_ranking(queries: Vectors, docs: VectorSource, weights: Weights, k: int) -> HybridHits:
    """Return the ``k`` best documents by the weighted sum of all kinds of ``queries``.

    Candidates are the ``k`` best by dense and by sparse vectors. With one kind only, all documents
    are compared.

    Raises:
        ModelError: when a score is NaN or infinity.
    """
    if len(queries.kinds) == 1:
        return ranked(queries, docs.blocks(queries.kinds), {"": weights}, k)[""]
    proposing: tuple[Kind, ...] = tuple(kind for kind in queries.kinds if kind != "multi")
    lists = candidates(queries.only(proposing), docs.blocks(proposing), k)
    union = with_token_scores(HybridHits.union(lists.values()), queries, docs)
    return union.best(weights, k)


def with_token_scores(found: HybridHits, queries: Vectors, docs: VectorSource) -> HybridHits:
    """Add the scores by token vectors; without those of queries, return the same."""
    if queries.multi is None:
        return found
    scores = torch.zeros(found.rows.shape)
    for rows, block in docs.blocks(("multi",), found.rows[found.rows >= 0].unique()):
        assert block.multi is not None
        scores += listed_late_interaction(queries.multi, block.multi, rows, found.rows)
    return HybridHits((*found.kinds, "multi"), found.rows, torch.cat([found.parts, scores[None]]))


@torch.no_grad()
def kind_scores(queries: Vectors, docs: Vectors) -> Float[Tensor, "kinds queries docs"]:
    """Return the scores of all pairs by every kind of the queries.

    Raises:
        ModelError: when a score is NaN or infinity.
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
        for low, high in runs_within(of_queries.offsets.tolist(), QUERY_TERMS):
            some = queries.take(slice(low, high))
            if kind == "sparse":
                assert some.sparse is not None and docs.sparse is not None
                part[low:high] = lexical_sums(some.sparse, docs.sparse)
            else:
                assert some.multi is not None and docs.multi is not None
                part[low:high] = late_interaction(some.multi, docs.multi)
    if not parts.isfinite().all():
        raise ModelError(f"a score is NaN or infinity; {BROKEN_MODEL}")
    return parts


def merged(vectors: Vectors) -> Vectors:
    """Return the same vectors with each term of a text once."""
    terms = None if vectors.sparse is None else vectors.sparse.merged()
    return Vectors(vectors.dense, terms, vectors.multi)


def _weighted_sum(
    parts: Float[Tensor, "kinds queries docs"], kinds: Sequence[Kind], weights: Weights
) -> Float[Tensor, "queries docs"]:
    total = torch.zeros(parts.shape[1:], dtype=parts.dtype)
    for part, kind in zip(parts, kinds, strict=True):
        if weights.of(kind):
            total = total + part * weights.of(kind)
    return total


def _is_by_terms_alone(kinds: Sequence[Kind], weights: Weights) -> bool:
    return [kind for kind in kinds if weights.of(kind)] == ["sparse"]
