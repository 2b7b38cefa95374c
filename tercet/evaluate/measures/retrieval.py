"""How well vectors, or any ranking, find the documents that people judged relevant."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Float64, Int64

from tercet import metrics
from tercet.errors import RecipeError
from tercet.evaluate.measures.answer_match import with_answers
from tercet.evaluate.measures.bm25 import WordsOf, bm25_top_k, by_words
from tercet.evaluate.measures.prompts import warn_unprompted
from tercet.evaluate.report.intervals import Interval, interval, paired_difference
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.metrics import Judgements
from tercet.models.embedder import Embedder
from tercet.rank.quantized import Stored
from tercet.rank.topk import Hits, top_k

DEPTH: Final = 100  # of BM25's rankings: as deep as the metrics look
_PACKAGES: Final = ("tercet", "torch", "transformers", "tokenizers", "numpy")
_METRICS: Final[dict[str, Callable[[np.ndarray, Judgements, int], np.ndarray]]] = {
    "ndcg": metrics.ndcg,
    "recall": metrics.recall,
    "mrr": metrics.reciprocal_rank,
    "map": metrics.average_precision,
    "success": metrics.success,
    "answer": metrics.success,  # of documents that hold an answer, judged or not
}


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """The ranking of each query, and its score by each metric."""

    name: str
    scores: Mapping[str, Float64[np.ndarray, "queries"]]  # by metric, such as "ndcg@10"
    hits: Hits

    def mean(self, metric: str) -> float:
        """Return the mean over queries: the figure that is published."""
        return float(self.scores[metric].mean()) if len(self.scores[metric]) else np.nan

    def interval(self, metric: str, *, seed: int = 0) -> Interval:
        """Return the mean with its bootstrap interval over queries."""
        return interval(self.scores[metric], seed=seed)

    def minus(self, other: "RetrievalResult", metric: str, *, seed: int = 0) -> Interval:
        """Return by how much this is better than another result on the same queries."""
        return paired_difference(self.scores[metric], other.scores[metric], seed=seed)


def evaluate_retrieval(
    data: RetrievalSet,
    query_vectors: Float[np.ndarray, "queries dim"],
    doc_vectors: Float[np.ndarray, "docs doc_dim"],
    *,
    names: Sequence[str] | None = None,
) -> RetrievalResult:
    """Search exactly by inner product and score the rankings.

    ``names`` are metrics; by default those of the set (``data.metrics``). The search is as deep as
    the deepest metric needs.

    Raises:
        ModelError: if queries and documents differ in dimension, or contain NaN.
        RecipeError: for an unknown metric.
    """
    assert len(query_vectors) == len(data.queries), "one vector for each query"
    assert len(doc_vectors) == len(data.documents), "one vector for each document"
    names = names or data.metrics
    depth = data.depth(max(map(depth_of, names)))
    return evaluate_hits(data, top_k(query_vectors, doc_vectors, depth), names=names)


def depth_of(metric: str) -> int:
    """Return how many places of a ranking a metric looks at: 10 for ``ndcg@10``.

    Raises:
        RecipeError: for an unknown metric.
    """
    return _parse_metric(metric)[1]


def evaluate_hits(
    data: RetrievalSet, hits: Hits, *, names: Sequence[str] | None = None
) -> RetrievalResult:
    """Score rankings from any source, such as BM25; a row of -1 means that the list has ended.

    The document that has the query's own id is left out, as BEIR does; one whose text equals the
    query is kept. Rankings may be as deep as ``data.depth`` says, to have enough left.

    ``answer@20`` is 1 if one of the first 20 documents holds an answer to the query: Recall@20 in
    the tables of MKQA.

    Raises:
        RecipeError: for an unknown metric, or one that needs answers if the set has none.
    """
    names = names or data.metrics
    if data.own_rows is not None:
        hits = _without_own(data.own_rows, hits)
    parsed = {name: _parse_metric(name) for name in names}
    deepest = max((k for metric, k in parsed.values() if metric == "answer"), default=0)
    if deepest and not data.answers:
        raise RecipeError(
            f'{data.name}: its queries have no "answers" to look for; choose a metric of judged '
            "documents, such as ndcg@10"
        )
    matches = data.judgements
    if deepest:
        matches = with_answers(hits.rows[:, :deepest], data.documents, data.answers)
    scores = {
        name: _METRICS[metric](hits.rows, matches if metric == "answer" else data.judgements, k)
        for name, (metric, k) in parsed.items()
    }
    return RetrievalResult(data.name, scores, hits)


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

    Args:
        embedder: the model.
        data: queries, documents and judgements.
        task: the task whose prompts are used; None takes the model's default prompts.
        dims: number of leading coordinates to compare; None compares all.
        progress: show a progress bar.

    Raises:
        RecipeError: if the model has no prompts for the task.

    Examples:
        >>> measure(embedder, RetrievalSet.from_path("test.jsonl")).result.mean("ndcg@10")
        0.856
    """
    queries, documents = encode_both(embedder, data, task=task, dims=dims, progress=progress)
    result = evaluate_retrieval(data, queries, documents)
    positives, negatives = pair_scores(data, queries, documents)
    return Measured(result, documents, positives, negatives)


def encode_both(
    embedder: Embedder,
    data: RetrievalSet,
    *,
    task: str | None = None,
    dims: int | None = None,
    progress: bool = False,
) -> tuple[Float[np.ndarray, "queries dim"], Float[np.ndarray, "docs dim"]]:
    """Return the vectors of a set's queries and of its documents.

    Raises:
        RecipeError: if the model has no prompts for the task.
    """
    warn_unprompted(embedder.settings, "query", task)
    queries = embedder.encode(data.queries, "query", task=task, dims=dims, progress=progress)
    documents = embedder.encode(data.documents, "document", task=task, dims=dims, progress=progress)
    return queries, documents


def measure_bm25(
    data: RetrievalSet, words_of: WordsOf = by_words, *, names: Sequence[str] | None = None
) -> RetrievalResult:
    """Score the ranking of BM25: the baseline that needs no model.

    Raises:
        MissingExtraError: if bm25s is not installed.
    """
    hits = bm25_top_k(data.queries, data.documents, data.depth(DEPTH), words_of)
    return evaluate_hits(data, hits, names=names)


def pair_scores(
    data: RetrievalSet,
    query_vectors: Float[np.ndarray, "queries dim"],
    doc_vectors: Float[np.ndarray, "docs dim"],
    *,
    pairs: int = 5_000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "positives"], Float[np.ndarray, "negatives"]]:
    """Return scores of relevant pairs, and of their queries with a document drawn at random.

    At most ``pairs`` of each, for a histogram. A draw that hits a relevant document is dropped.
    """
    random = np.random.default_rng(seed)
    judged, width = data.judgements, max(len(data.documents), 1)
    relevant = np.flatnonzero(judged.grades > 0)
    known = judged.query_of()[relevant] * width + judged.docs[relevant]  # one number a pair
    chosen = known
    if len(known) > pairs:
        chosen = np.sort(random.choice(known, pairs, replace=False))
    others = chosen // width * width + random.integers(0, width, len(chosen))
    return (
        _inner(query_vectors, doc_vectors, chosen),
        _inner(query_vectors, doc_vectors, others[~np.isin(others, known)]),
    )


def _inner(
    queries: np.ndarray, docs: np.ndarray, pairs: Int64[np.ndarray, "pairs"]
) -> Float[np.ndarray, "pairs"]:
    """Return the inner product of each pair, numbered as query * documents + document."""
    query, doc = np.divmod(pairs, max(len(docs), 1))
    return np.einsum("pd,pd->p", queries[query], docs[doc])


def _parse_metric(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"([a-z]+)@([1-9]\d*)", name)
    if not found or found[1] not in _METRICS:
        known = ", ".join(f"{metric}@K" for metric in _METRICS)
        raise RecipeError(f'there is no metric "{name}"; choose from {known}, such as ndcg@10')
    return found[1], int(found[2])


def _without_own(own: Int64[np.ndarray, "queries"], hits: Hits) -> Hits:
    """Drop from each ranking the query's own document; the rest move up."""
    dropped = (hits.rows == own[:, None]) & (hits.rows >= 0)
    order = np.argsort(dropped, axis=1, kind="stable")
    rows = np.where(dropped, -1, hits.rows)
    return Hits(
        np.take_along_axis(np.where(dropped, np.float32(0), hits.scores), order, axis=1),
        np.take_along_axis(rows, order, axis=1),
    )


# ---- the conditions of a measurement -----------------------------------------------------------


def conditions(
    embedder: Embedder, *, dims: int | None = None, stored: Stored | None = None
) -> dict[str, Any]:
    """Return how a model encoded texts: length limits, prompts, pooling, and storage of vectors.

    Figures with different length limits cannot be compared: what was cut was not searched.
    """
    settings = embedder.settings
    return {
        "query_tokens": settings.query_tokens,
        "document_tokens": settings.document_tokens,
        "prompts": dict(settings.prompts),
        "task_prompts": {task: dict(each) for task, each in settings.task_prompts.items()},
        "suffixes": dict(settings.suffixes),
        "pooling": settings.pooling,
        "attention": embedder.backbone.attention,
        "dims": embedder.dim if dims is None else dims,
        "weights": str(next(embedder.parameters()).dtype).removeprefix("torch."),
        "stored": stored or "float32",
    }


def versions(*more: str) -> dict[str, str]:
    """Return the versions of the packages that figures depend on, if they are installed."""
    found: dict[str, str] = {}
    for name in (*_PACKAGES, *more):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
