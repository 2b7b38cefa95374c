"""Measure an embedder on a retrieval set, and what a baseline without a model gets there."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tercet.evaluate.measures.bm25 import Split, bm25_top_k, by_words
from tercet.evaluate.measures.by_kind import (
    KindsResult,
    ProtocolName,
    feasible,
    search_kinds,
)
from tercet.evaluate.measures.prompts import known_task, warn_unprompted
from tercet.evaluate.measures.tuned_weights import candidates
from tercet.evaluate.sets.retrieval_set import (
    RetrievalResult,
    RetrievalSet,
    evaluate_hits,
    evaluate_retrieval,
    pair_scores,
)
from tercet.files.progress import Advance, bar
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings
from tercet.rank.hybrid import HybridHits
from tercet.segments import batches_within
from tercet.vectors import Kind, Vectors, Weights

DEPTH: Final = 100  # of the rankings that BM25 gives; as deep as the metrics look
_BLOCK_LETTERS: Final = 200_000  # of documents whose token vectors are in memory together
_SAMPLE: Final = 100  # documents whose tokens are counted, to guess how many all of them have

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """An embedder's result, the scores of its relevant and of random pairs, and its vectors."""

    result: RetrievalResult
    documents: np.ndarray  # [documents, dim], to index them without encoding them again
    positives: np.ndarray  # scores of relevant pairs
    negatives: np.ndarray  # scores of their queries with random documents


def measure(
    embedder: Embedder,
    data: RetrievalSet,
    *,
    task: str | None = None,
    dims: int | None = None,
    progress: bool = False,
) -> Measured:
    """Encode both sides with the model's own prompts, search exactly, and score the rankings.

    The prompts are those of the ``task``, or the default ones.

    Raises:
        RecipeError: for a task that the model has no prompts for.
    """
    warn_unprompted(embedder.settings, "query", task)
    queries = embedder.encode(data.queries, "query", task=task, dims=dims, progress=progress)
    documents = embedder.encode(data.documents, "document", task=task, dims=dims, progress=progress)
    result = evaluate_retrieval(data, queries, documents)
    positives, negatives = pair_scores(data, queries, documents)
    return Measured(result, documents, positives, negatives)


def measure_kinds(  # noqa: PLR0913 (each is a choice of its own, with a default)
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
    Weights of None are those that the model was tuned to for the task, or the usual ones. The
    ``protocol`` None is *exact*, unless comparing all tokens takes very long.

    Raises:
        RecipeError: for a task that the model has no prompts for, or a kind that it does not make.
    """
    warn_unprompted(embedder.settings, "query", task)
    chosen = tuple(kinds or embedder.kinds)
    weights = weights or tuned_weights(embedder.settings, (task or data.name, data.name))
    how = {"task": task, "dims": dims}
    queries = embedder.encode_vectors(data.queries, "query", kinds=chosen, **how)
    with bar("search", len(data.documents), shown=progress) as advance:
        corpus = Encoding(embedder, data.documents, how, advance)
        protocol = protocol or feasible(queries, corpus.tokens())
        return search_kinds(data, queries, corpus, weights=weights, protocol=protocol, names=names)


@dataclass(slots=True, eq=False)
class Encoding:
    """Documents that are encoded whenever their vectors are asked for, block by block."""

    embedder: Embedder
    texts: Sequence[str]
    how: Mapping[str, Any]
    advance: Advance
    counts: list[Tensor] = field(default_factory=list)

    def blocks(
        self, kinds: Sequence[Kind], rows: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Vectors]]:
        """Vectors of these kinds of these documents, or of all."""
        chosen = range(len(self.texts)) if rows is None else rows.tolist()
        limit = 8 * self.embedder.settings.document_tokens  # longer documents are truncated anyway
        for block in batches_within(
            chosen, _BLOCK_LETTERS, lambda row: min(len(self.texts[row]), limit), overshoot=True
        ):
            texts = [self.texts[row] for row in block]
            found = self.embedder.encode_vectors(texts, "document", kinds=kinds, **self.how)
            if found.sparse is not None and rows is None:
                self.counts.append(found.sparse.offsets.diff())
            yield torch.tensor(block), found
            if rows is None:
                self.advance(len(block))

    def terms(self) -> Tensor | None:
        """The number of terms of each document that was encoded."""
        return torch.cat(self.counts) if self.counts else None

    def tokens(self) -> int:
        """About how many tokens all documents have together."""
        step = max(1, len(self.texts) // _SAMPLE)
        some = self.texts[::step]
        lengths = self.embedder.tokenize(some, "document").lengths
        return sum(lengths) * len(self.texts) // max(len(some), 1)


def dev_candidates(
    embedder: Embedder,
    data: RetrievalSet,
    *,
    tasks: Sequence[str],
    kinds: Sequence[Kind],
    depth: int,
    progress: bool = False,
) -> HybridHits:
    """What weights are to rank: the best documents of each query, with their scores by every kind.

    The prompts are those of the first task that the model has some for, or the default ones.
    """
    task = known_task(embedder.settings, tasks)
    warn_unprompted(embedder.settings, "query", task)
    queries = embedder.encode_vectors(data.queries, "query", kinds=kinds, task=task)
    with bar("search", len(data.documents), shown=progress) as advance:
        corpus = Encoding(embedder, data.documents, {"task": task}, advance)
        return candidates(queries, corpus, depth=depth)


def tuned_weights(settings: Settings, tasks: Sequence[str]) -> Weights:
    """The weights that the model was tuned to for the first of these tasks, or its usual ones."""
    known = (settings.weights[name] for name in (*tasks, "") if name in settings.weights)
    return next(known, Weights())


def measure_bm25(data: RetrievalSet, split: Split = by_words) -> RetrievalResult:
    """What word overlap gets: the baseline that needs no model."""
    hits = bm25_top_k(data.queries, data.documents, DEPTH, split)
    return evaluate_hits(data, hits)


def dev_score(
    data: RetrievalSet, task: str | None = None
) -> Callable[[Embedder], float | Mapping[str, float]]:
    """nDCG@10 on a dev set, for the training loop to choose the best weights by.

    The prompts are those of the ``task``, or of the set's name, or the default ones. Of a model
    with several kinds of vectors it is that of their weighted sum, under ``dev_score``; beside it
    are that of each kind, and how many texts have no sparse term.
    """

    def score(embedder: Embedder) -> float | Mapping[str, float]:
        known = known_task(embedder.settings, (task or "", data.name))
        if embedder.kinds != ("dense",):
            return _by_name(measure_kinds(embedder, data, task=known, names=("ndcg@10",)))
        queries = embedder.encode(data.queries, "query", task=known)
        documents = embedder.encode(data.documents, "document", task=known)
        return evaluate_retrieval(data, queries, documents, names=("ndcg@10",)).mean("ndcg@10")

    return score


def _by_name(found: KindsResult) -> dict[str, float]:
    """The figures of a dev set, as a log has them."""
    figures = {"dev_score": found.results[found.total].mean("ndcg@10")}
    figures |= {f"dev_{k}": r.mean("ndcg@10") for k, r in found.results.items()}
    for role, counts in found.terms.items():
        figures |= {f"dev_{role}_terms": counts.mean, f"dev_{role}_empty": counts.empty}
    return figures
