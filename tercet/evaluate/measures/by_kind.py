"""How well each kind of vectors finds documents, and every weighted sum of their scores.

Three protocols (arXiv 2402.03216, section 4 and its code):

- *exact*: every document gets its true score by every kind;
- *paper*: dense and sparse search all documents, and their sum the best 1,000 of each; with token
  vectors, the best 200 of dense are re-scored. Scores that are missing from a list are computed;
- *reference*: like the paper's code: term weights are rounded up to hundredths, and a document that
  is missing from the list of a kind gets no score by it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from tercet.errors import RecipeError
from tercet.evaluate.measures.prompts import known_task, warn_unprompted
from tercet.evaluate.measures.retrieval import (
    RetrievalResult,
    depth_of,
    encode_both,
    evaluate_hits,
    evaluate_retrieval,
)
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.progress import Advance, bar
from tercet.kinds import KINDS, Kind, Weights
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings
from tercet.rank.hybrid import (
    HybridHits,
    VectorSource,
    candidates,
    each_alone,
    ranked,
    with_token_scores,
)
from tercet.segments import batches_within
from tercet.types import Role
from tercet.vectors import Terms, Vectors

ProtocolName: TypeAlias = Literal["exact", "paper", "reference"]

DEPTH: Final = 1_000  # of the lists of dense and sparse in the paper's protocol
RERANKED: Final = 200  # of dense, if token vectors take part
EXACT_WORK: Final = 1e14  # multiplications of token vectors: an about an hour of one core
EMPTY: Final = 0.05  # share of texts without a term above which the sparse head may be dying
_BLOCK_LETTERS: Final = 200_000  # of documents whose token vectors are in memory together
_SAMPLE: Final = 100  # documents whose tokens are counted, to estimate the total

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True)
class TermCounts:
    """Numbers of terms in the sparse vectors of some texts."""

    texts: int
    empty: float  # share of texts without any
    mean: float

    @classmethod
    def of(cls, lengths: Tensor) -> "TermCounts":
        """Summarise the number of terms of each text."""
        counts = lengths.double()
        if not len(counts):
            return cls(0, 0.0, 0.0)
        return cls(len(counts), float((counts == 0).double().mean()), float(counts.mean()))

    def __str__(self) -> str:
        return f"{self.mean:.1f} terms each, {self.empty:.1%} of {self.texts:,} have none"


@dataclass(frozen=True, slots=True, eq=False)
class KindsResult:
    """The results of every kind and every sum, and how they were searched."""

    results: Mapping[str, RetrievalResult]  # "dense", "sparse", ..., "dense+sparse+multi"
    weights: Weights
    protocol: ProtocolName
    terms: Mapping[Role, TermCounts]  # empty without sparse vectors

    @property
    def total(self) -> str:
        """The name of the sum of all kinds that count."""
        return "+".join(kind for kind in KINDS if kind in self.results and self.weights.of(kind))

    def how(self) -> str:
        """Return how documents were searched, for people."""
        if self.protocol == "exact":
            return "every document scored by every kind"
        known = f"best {DEPTH:,} of dense and of sparse; with multi, best {RERANKED} of dense"
        zero = "; a score that a list lacks is zero" if self.protocol == "reference" else ""
        return f"{known}{zero}"


def sums_of(kinds: Sequence[Kind], weights: Weights) -> dict[str, Weights]:
    """Return each kind alone, then every sum of the kinds that have a weight, the full one last."""
    counted: list[Kind] = [kind for kind in kinds if weights.of(kind)]
    several = {
        "+".join(some): weights.only(some)
        for size in range(2, len(counted) + 1)
        for some in combinations(counted, size)
    }
    return {**each_alone(kinds), **several}


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
        """Return the number of terms of each document, once they are known."""
        ...


def search_kinds(
    data: RetrievalSet,
    queries: Vectors,
    corpus: Corpus,
    *,
    weights: Weights | None = None,
    protocol: ProtocolName = "exact",
    names: Sequence[str] | None = None,
) -> KindsResult:
    """Search by every kind of vectors and by every sum, and score the rankings.

    Raises:
        ModelError: if a score is NaN.
        RecipeError: for an unknown metric, or without a common kind of vectors.
    """
    kinds = queries.kinds
    if not kinds:
        raise RecipeError("queries and documents have no kind of vectors in common")
    weights = weights or Weights()
    if not any(weights.of(kind) for kind in kinds):
        raise RecipeError(f"one of {', '.join(kinds)} must have a weight above 0")
    names = names or data.metrics
    depth = data.depth(max(map(depth_of, names)))
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
    """Log if many texts have no sparse term: none of their words can be found."""
    for role, counts in terms.items():
        if counts.empty > EMPTY:
            log.warning(
                "%.1f %% of %s texts have no sparse term, so none of their words can be found; the "
                "sparse head may be dying: lower its weight in the loss at first, or the learning "
                "rate",
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
    """Return for each sum the documents that it may rank: the paper's candidates."""
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
    """Round term weights up to hundredths, as in an index of integers."""
    terms = vectors.sparse
    if terms is None:
        return vectors
    return replace(
        vectors, sparse=Terms(terms.ids, (100 * terms.weights).ceil() / 100, terms.offsets)
    )


def _lengths(terms: Terms) -> Tensor:
    return terms.merged().offsets.diff()


# ---- of an embedder --------------------------------------------------------------------------


def measure_kinds(  # noqa: PLR0913 (independent choices, each with a default)
    embedder: Embedder,
    data: RetrievalSet,
    *,
    task: str | None = None,
    kinds: Sequence[Kind] | None = None,
    weights: Weights | None = None,
    protocol: ProtocolName | None = None,
    dims: int | None = None,
    names: Sequence[str] | None = None,
    progress: bool = False,
) -> KindsResult:
    """Encode both sides, and measure every kind of vectors and every sum of their scores.

    Documents are encoded block by block, so that their token vectors are never in memory together.

    Args:
        embedder: the model.
        data: queries, documents and judgements.
        task: the task whose prompts are used; None takes the model's default prompts.
        kinds: the kinds to measure; None takes all that the model makes.
        weights: those of the sums; None takes those tuned for the task, or the model's usual ones.
        protocol: how documents are searched; None takes *exact*, unless comparing all tokens takes
            very long.
        dims: number of leading coordinates of dense vectors to compare; None compares all.
        names: metrics; None takes those of the set.
        progress: show a progress bar.

    Raises:
        RecipeError: if the model has no prompts for the task, or does not make a kind.

    Examples:
        >>> found = measure_kinds(embedder, RetrievalSet.from_path("test.jsonl"))
        >>> found.results[found.total].mean("ndcg@10")
        0.871
    """
    warn_unprompted(embedder.settings, "query", task)
    weights = weights or weights_for(embedder.settings, (task or data.name, data.name))
    queries = embedder.encode_vectors(
        data.queries, "query", kinds=tuple(kinds or embedder.kinds), task=task, dims=dims
    )
    with bar("search", len(data.documents), shown=progress) as advance:
        corpus = CorpusEncoder(embedder, data.documents, advance, task, dims)
        protocol = protocol or feasible(queries, corpus.tokens())
        return search_kinds(data, queries, corpus, weights=weights, protocol=protocol, names=names)


@dataclass(slots=True, eq=False)
class CorpusEncoder:
    """Documents that are encoded block by block, each time that their vectors are needed."""

    embedder: Embedder
    texts: Sequence[str]
    advance: Advance
    task: str | None = None
    dims: int | None = None
    counts: list[Tensor] = field(default_factory=list)

    def blocks(
        self, kinds: Sequence[Kind], rows: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Vectors]]:
        """Yield vectors of these kinds, of the documents ``rows`` or of all."""
        chosen = range(len(self.texts)) if rows is None else rows.tolist()
        limit = 8 * self.embedder.settings.document_tokens  # longer documents are truncated anyway
        for block in batches_within(
            chosen, _BLOCK_LETTERS, lambda row: min(len(self.texts[row]), limit), overshoot=True
        ):
            texts = [self.texts[row] for row in block]
            found = self.embedder.encode_vectors(
                texts, "document", kinds=kinds, task=self.task, dims=self.dims
            )
            if found.sparse is not None and rows is None:
                self.counts.append(found.sparse.offsets.diff())
            yield torch.tensor(block), found
            if rows is None:
                self.advance(len(block))

    def terms(self) -> Tensor | None:
        """Return the number of terms of each document that was encoded."""
        return torch.cat(self.counts) if self.counts else None

    def tokens(self) -> int:
        """Estimate how many tokens all documents have together."""
        some = self.texts[:: max(1, len(self.texts) // _SAMPLE)]
        lengths = self.embedder.tokenize(some, "document").lengths
        return sum(lengths) * len(self.texts) // max(len(some), 1)


def weights_for(settings: Settings, tasks: Sequence[str]) -> Weights:
    """Return the weights tuned for the first task that has some, or the model's usual ones."""
    known = (settings.weights[name] for name in (*tasks, "") if name in settings.weights)
    return next(known, Weights())


def dev_score(
    data: RetrievalSet, task: str | None = None
) -> Callable[[Embedder], float | Mapping[str, float]]:
    """Return a function that computes nDCG@10 on a dev set, for training to select weights by.

    For a model with several kinds of vectors ``dev_score`` is that of their weighted sum; beside
    it are those of each kind, and how many texts have no sparse term.
    """

    def score(embedder: Embedder) -> float | Mapping[str, float]:
        known = known_task(embedder.settings, (task or "", data.name))
        if embedder.kinds != ("dense",):
            return _by_name(measure_kinds(embedder, data, task=known, names=("ndcg@10",)))
        sides = encode_both(embedder, data, task=known)
        return evaluate_retrieval(data, *sides, names=("ndcg@10",)).mean("ndcg@10")

    return score


def _by_name(found: KindsResult) -> dict[str, float]:
    """Return the figures of a dev set under the names that a training log uses."""
    figures = {"dev_score": found.results[found.total].mean("ndcg@10")}
    figures |= {f"dev_{k}": r.mean("ndcg@10") for k, r in found.results.items()}
    for role, counts in found.terms.items():
        figures |= {f"dev_{role}_terms": counts.mean, f"dev_{role}_empty": counts.empty}
    return figures
