"""Measure an embedder on a retrieval set, and what a baseline without a model gets there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from tercet.evaluate.bm25 import bm25_top_k
from tercet.evaluate.prompts import known_task, warn_unprompted
from tercet.evaluate.retrieval import (
    METRICS,
    RetrievalResult,
    RetrievalSet,
    evaluate_hits,
    evaluate_retrieval,
    pair_scores,
)
from tercet.nn.embedder import Embedder

DEPTH: Final = 100  # of the rankings that BM25 gives; as deep as the metrics look


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


def measure_bm25(data: RetrievalSet) -> RetrievalResult:
    """What word overlap gets: the baseline that needs no model."""
    hits = bm25_top_k(data.queries, data.documents, DEPTH)
    return evaluate_hits(data, hits, names=METRICS)


def dev_score(data: RetrievalSet, task: str | None = None) -> Callable[[Embedder], float]:
    """nDCG@10 on a dev set, for the training loop to choose the best weights by.

    The prompts are those of the ``task``, or of the set's name, or the default ones.
    """

    def score(embedder: Embedder) -> float:
        known = known_task(embedder.settings, (task or "", data.name))
        queries = embedder.encode(data.queries, "query", task=known)
        documents = embedder.encode(data.documents, "document", task=known)
        return evaluate_retrieval(data, queries, documents, names=("ndcg@10",)).mean("ndcg@10")

    return score
