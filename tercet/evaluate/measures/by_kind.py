"""How well each kind of vectors, and every weighted sum of kinds, finds documents.

Three protocols (arXiv 2402.03216, section 4 and its code):

- *exact*: every document gets its true score by every kind;
- *paper*: dense and sparse look at all documents and their sum at both best 1,000; where token
  vectors take part, the best 200 of dense are re-ranked. Scores missing in a list are computed;
- *reference*: as the paper's code has it: terms weigh whole hundredths, rounded up, and a document
  that is missing in the list of a kind gets no score by it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from tercet.errors import RecipeError
from tercet.evaluate.measures.retrieval import RetrievalResult, depth_of, evaluate_hits
from tercet.evaluate.report.intervals import Interval, paired_difference
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.kinds import KINDS, Kind, Weights
from tercet.rank.hybrid import (
    HybridHits,
    VectorBlocks,
    VectorSource,
    candidates,
    each_alone,
    ranked,
    with_token_scores,
)
from tercet.types import Role
from tercet.vectors import Terms, Vectors

ProtocolName: TypeAlias = Literal["exact", "paper", "reference"]

DEPTH: Final = 1_000  # of the lists of dense and sparse in the paper's protocol
RERANKED: Final = 200  # of dense, where token vectors take part
EXACT_WORK: Final = 1e14  # multiplications of token vectors: an hour of one core, more or less
EMPTY: Final = 0.05  # share of texts without a term above which the sparse head may be dying
_BLOCK: Final = 1_024  # documents scored together

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True)
class TermCounts:
    """Numbers of terms in the sparse vectors of some texts."""

    texts: int
    empty: float  # share of texts without any
    mean: float

    @classmethod
    def of(cls, lengths: Tensor) -> "TermCounts":
        """Make it from the number of terms of each text."""
        counts = lengths.double()
        if not len(counts):
            return cls(0, 0.0, 0.0)
        return cls(len(counts), float((counts == 0).double().mean()), float(counts.mean()))

    def __str__(self) -> str:
        return f"{self.mean:.1f} terms each, {self.empty:.1%} of {self.texts:,} have none"


@dataclass(frozen=True, slots=True, eq=False)
class KindsResult:
    """Results of every kind and every sum, and how documents were searched."""

    results: Mapping[str, RetrievalResult]  # "dense", "sparse", ..., "dense+sparse+multi"
    weights: Weights
    protocol: ProtocolName
    terms: Mapping[Role, TermCounts]  # empty where there are no sparse vectors

    @property
    def total(self) -> str:
        """Name of the sum of all kinds with a weight."""
        return "+".join(kind for kind in KINDS if kind in self.results and self.weights.of(kind))

    def minus(self, name: str, other: str, metric: str, seed: int = 0) -> Interval:
        """Return by how much one is better than another on the same queries."""
        after, before = (self.results[each].scores[metric] for each in (name, other))
        return paired_difference(after, before, seed=seed)

    def how(self) -> str:
        """Describe how documents were searched."""
        if self.protocol == "exact":
            return "every document scored by every kind"
        known = f"best {DEPTH:,} of dense and of sparse; with multi, best {RERANKED} of dense"
        zero = "; a score that a list lacks is zero" if self.protocol == "reference" else ""
        return f"{known}{zero}"


def sums_of(kinds: Sequence[Kind], weights: Weights) -> dict[str, Weights]:
    """Return each kind alone, then every sum of the kinds with a weight, the fullest last."""
    counted: list[Kind] = [kind for kind in kinds if weights.of(kind)]
    several = {
        "+".join(some): weights.only(some)
        for size in range(2, len(counted) + 1)
        for some in combinations(counted, size)
    }
    return {**each_alone(kinds), **several}


def evaluate_kinds(
    data: RetrievalSet,
    queries: Vectors,
    docs: Vectors,
    *,
    weights: Weights | None = None,
    protocol: ProtocolName | None = None,
    names: Sequence[str] | None = None,
) -> KindsResult:
    """Search by every kind that both sides have and by every sum, and score the rankings.

    ``protocol`` None is *exact*, unless that takes token vectors more than ``EXACT_WORK``
    multiplications: then *paper*.

    Raises:
        ModelError: when a score is not a number.
        RecipeError: for a metric that does not exist, or without any kind of vectors.
    """
    assert len(queries) == len(data.queries), "vectors of each query"
    assert len(docs) == len(data.documents), "vectors of each document"
    kinds: tuple[Kind, ...] = tuple(kind for kind in queries.kinds if kind in docs.kinds)
    queries, docs = queries.only(kinds), docs.only(kinds)
    rows = 0 if docs.multi is None else len(docs.multi.vectors)
    corpus = InMemory(docs)
    protocol = protocol or feasible(queries, rows)
    return search_kinds(data, queries, corpus, weights=weights, protocol=protocol, names=names)


def feasible(queries: Vectors, doc_tokens: int) -> ProtocolName:
    """Return *exact* if comparing all token vectors is cheap enough, otherwise *paper*."""
    if queries.multi is None:
        return "exact"
    work = queries.multi.vectors.numel() * doc_tokens
    return "exact" if work <= EXACT_WORK else "paper"


@runtime_checkable
class Corpus(VectorSource, Protocol):
    """Documents whose vectors can be read block by block, and how many terms they have."""

    def terms(self) -> Tensor | None:
        """Return the number of terms of each document, once known."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """Documents whose vectors are all in memory."""

    vectors: Vectors

    def blocks(self, kinds: Sequence[Kind], rows: Tensor | None = None) -> VectorBlocks:
        """Yield the vectors of these kinds of these documents, or of all."""
        chosen = torch.arange(len(self.vectors)) if rows is None else rows
        some = self.vectors.only(kinds)
        for part in chosen.split(_BLOCK):
            if len(part):
                yield part, some.take(part)

    def terms(self) -> Tensor | None:
        """Return the number of terms of each document."""
        return None if self.vectors.sparse is None else _lengths(self.vectors.sparse)


def search_kinds(
    data: RetrievalSet,
    queries: Vectors,
    corpus: Corpus,
    *,
    weights: Weights | None = None,
    protocol: ProtocolName = "exact",
    names: Sequence[str] | None = None,
) -> KindsResult:
    """Search a corpus whose vectors come in blocks; see :func:`evaluate_kinds`."""
    kinds = queries.kinds
    if not kinds:
        raise RecipeError("queries and documents share no kind of vectors; name one that both have")
    weights = weights or Weights()
    if not any(weights.of(kind) for kind in kinds):
        raise RecipeError(f"none of {', '.join(kinds)} has a weight; give one of them more than 0")
    names = names or data.metrics
    depth = max(map(depth_of, names))
    sums = sums_of(kinds, weights)
    first: Kind | None = next((kind for kind in kinds if kind != "multi"), None)
    if protocol == "exact" or first is None:
        protocol = "exact"
        lists = ranked(queries, corpus.blocks(kinds), sums, depth)
    else:
        lists = _by_candidates(queries, corpus, first, sums, rounded=protocol == "reference")
    results = {
        name: evaluate_hits(data, lists[name].hits(sums[name], depth), names=names) for name in sums
    }
    counts: dict[Role, TermCounts] = {}
    of_documents = corpus.terms()
    if queries.sparse is not None and of_documents is not None:
        counts = {
            "query": TermCounts.of(_lengths(queries.sparse)),
            "document": TermCounts.of(of_documents),
        }
    found = KindsResult(results, weights, protocol, counts)
    warn_empty(found.terms)
    return found


def warn_empty(terms: Mapping[Role, TermCounts]) -> None:
    """Warn if many texts have no term, so that no word finds them."""
    for role, counts in terms.items():
        if counts.empty > EMPTY:
            log.warning(
                "%.1f %% of %s texts have no sparse term, so no word of theirs can be found; the "
                "sparse head may be dying: give it less weight in the loss at first, or a lower "
                "learning rate",
                100 * counts.empty,
                role,
            )


def _by_candidates(
    queries: Vectors,
    corpus: Corpus,
    first: Kind,
    sums: Mapping[str, Weights],
    *,
    rounded: bool,
) -> dict[str, HybridHits]:
    """Return the documents that each sum may rank: the paper's candidates."""
    single: tuple[Kind, ...] = tuple(kind for kind in queries.kinds if kind != "multi")
    of_queries, blocks = queries.only(single), corpus.blocks(single)
    if rounded:
        of_queries = _hundredths(of_queries)
        blocks = ((rows, _hundredths(docs)) for rows, docs in blocks)
    lists = candidates(of_queries, blocks, DEPTH)
    union = HybridHits.union(lists.values())
    few = lists[first].best(each_alone(single)[first], RERANKED).by_row()
    if rounded:
        union, few = _without_missing(union, lists), _without_missing(few, lists)
    few = with_token_scores(few, queries, corpus)
    by_name = {str(kind): found for kind, found in lists.items()}
    return {
        name: few if weights.multi else by_name.get(name, union) for name, weights in sums.items()
    }


def _without_missing(some: HybridHits, lists: Mapping[Kind, HybridHits]) -> HybridHits:
    """Set to zero the scores by a kind whose list lacks the document."""
    parts = [
        part * some.among(lists[kind]) for kind, part in zip(some.kinds, some.parts, strict=True)
    ]
    return HybridHits(some.kinds, some.rows, torch.stack(parts))


def _hundredths(vectors: Vectors) -> Vectors:
    """Round the weights of terms up to hundredths, as an index of integers stores them."""
    terms = vectors.sparse
    if terms is None:
        return vectors
    return replace(
        vectors, sparse=Terms(terms.ids, (100 * terms.weights).ceil() / 100, terms.offsets)
    )


def _lengths(terms: Terms) -> Tensor:
    return terms.merged().offsets.diff()
