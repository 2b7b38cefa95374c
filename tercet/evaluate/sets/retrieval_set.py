"""How well vectors (or any ranking) find the documents that people judged relevant."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float, Float64, Int64

from tercet import metrics
from tercet.data.files.languages import named_pair
from tercet.data.files.sources import iter_examples
from tercet.errors import RecipeError
from tercet.evaluate.report.intervals import Interval, interval
from tercet.evaluate.sets.answers import with_answers
from tercet.evaluate.sets.beir import read_folder
from tercet.metrics import Judgements
from tercet.rank.topk import Hits, top_k
from tercet.types import Example

METRICS: Final = ("ndcg@10", "recall@100", "mrr@10", "map@100")
ANSWER_METRICS: Final = ("answer@20", "answer@100")  # MKQA's Recall@20 and Recall@100

_METRICS: Final[dict[str, Callable[[np.ndarray, Judgements, int], np.ndarray]]] = {
    "ndcg": metrics.ndcg,
    "recall": metrics.recall,
    "mrr": metrics.reciprocal_rank,
    "map": metrics.average_precision,
    "success": metrics.success,
    "answer": metrics.success,  # of documents that hold an answer, whoever judged them
}


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """Queries, the documents to search, and which documents answer which query."""

    name: str
    queries: tuple[str, ...]
    query_ids: tuple[str, ...]
    documents: tuple[str, ...]
    document_ids: tuple[str, ...]
    judgements: Judgements
    answers: tuple[tuple[str, ...], ...] = ()  # of each query; none: judgements alone count
    query_langs: tuple[str, ...] = ()  # of each; empty texts, or none at all: not told
    document_langs: tuple[str, ...] = ()

    @classmethod
    def from_examples(
        cls, source: Path | str | Iterable[Example], name: str | None = None
    ) -> "RetrievalSet":
        """From training examples: their positives are relevant, all their texts are searched.

        Equal texts are one document and equal queries one query, so that a positive of one
        example is not counted wrong for its twin. Ids are numbers in order of appearance, from
        1, after ``q`` and ``d``. Prompts in the examples are not used: the model's own are. The
        language of an example is that of its texts; ``ko-en`` means a Korean query and English
        documents.

        Raises:
            DataError: at the first record that is not an example, naming file and line.
        """
        from_file = isinstance(source, Path | str)
        examples = iter_examples(source) if from_file else source
        documents: dict[str, int] = {}
        relevant: dict[str, dict[int, int]] = {}
        langs: tuple[list[str], list[str]] = ([], [])  # of queries and of documents
        for example in examples:
            asked, found = _langs_of(example.lang)
            grades = relevant.setdefault(example.query, {})
            for text in example.positives:
                grades[documents.setdefault(text, len(documents))] = 1
            for text in example.negatives:
                documents.setdefault(text, len(documents))
            langs[0].extend([asked] * (len(relevant) - len(langs[0])))  # of those that are new
            langs[1].extend([found] * (len(documents) - len(langs[1])))
        return cls(
            name=name or (Path(source).stem if from_file else "examples"),
            queries=tuple(relevant),
            query_ids=tuple(f"q{i}" for i in range(1, len(relevant) + 1)),
            documents=tuple(documents),
            document_ids=tuple(f"d{i}" for i in range(1, len(documents) + 1)),
            judgements=Judgements.of(list(relevant.values())),
            query_langs=tuple(langs[0]),
            document_langs=tuple(langs[1]),
        )

    @classmethod
    def from_folder(cls, folder: Path | str, split: str | None = None) -> "RetrievalSet":
        """From a folder as BEIR or FlagEmbedding lay it out; see :mod:`tercet.evaluate.sets.beir`.

        Only queries that this split judges are kept, in the order of their file.

        Raises:
            DataError: where the split is missing or not clear, and at the first line that cannot
                be read, or names an unknown id.
        """
        found = read_folder(folder, split)
        return cls(
            name=Path(folder).name,
            queries=tuple(found.queries.values()),
            query_ids=tuple(found.queries),
            documents=tuple(found.documents.values()),
            document_ids=tuple(found.documents),
            judgements=Judgements.of([found.grades.get(name, {}) for name in found.queries]),
            answers=tuple(found.answers[name] for name in found.queries) if found.answers else (),
            query_langs=found.query_langs,
            document_langs=found.document_langs,
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """What there is to measure: by judgements, by answers, or by both."""
        judged = METRICS if len(self.judgements.docs) or not self.answers else ()
        return (*judged, *(ANSWER_METRICS if self.answers else ()))

    def require_judgements(self, use: str) -> None:
        """Check that documents were judged, and not answers alone given.

        Raises:
            RecipeError: saying what needs the judgements.
        """
        if not len(self.judgements.docs) and self.answers:
            raise RecipeError(
                f"{self.name}: its queries have answers and no judged documents, which {use} "
                "needs; give it judgements (qrels)"
            )


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """What an evaluation found: each metric for each query, and the ranking itself."""

    name: str
    scores: Mapping[str, Float64[np.ndarray, "queries"]]  # by metric, such as "ndcg@10"
    hits: Hits

    def mean(self, metric: str) -> float:
        """The mean over queries: the figure that is published."""
        return float(self.scores[metric].mean()) if len(self.scores[metric]) else np.nan

    def interval(self, metric: str, seed: int = 0) -> Interval:
        """The mean with its bootstrap interval over queries."""
        return interval(self.scores[metric], seed=seed)


def evaluate_retrieval(
    data: RetrievalSet,
    query_vectors: Float[np.ndarray, "queries dim"],
    doc_vectors: Float[np.ndarray, "docs doc_dim"],
    *,
    names: Sequence[str] | None = None,
    exclude_same_id: bool = False,
) -> RetrievalResult:
    """Search exactly by inner product and score the rankings.

    The metrics are those of the set (``data.metrics``) if none are named. The search goes as deep
    as the deepest metric asks. A document equal to the query is not
    left out, unless ``exclude_same_id``: then the document that has the query's own id is.

    Raises:
        ModelError: when queries and documents differ in width, or hold NaN.
        RecipeError: for a metric that does not exist.
    """
    assert len(query_vectors) == len(data.queries), "one vector for each query"
    assert len(doc_vectors) == len(data.documents), "one vector for each document"
    names = names or data.metrics
    depth = max(map(depth_of, names))
    hits = top_k(query_vectors, doc_vectors, depth + exclude_same_id)
    return evaluate_hits(data, hits, names=names, exclude_same_id=exclude_same_id)


def depth_of(metric: str) -> int:
    """How many places of a ranking a metric looks at: 10 of ``ndcg@10``.

    Raises:
        RecipeError: for a metric that does not exist.
    """
    return _parse_metric(metric)[1]


def evaluate_hits(
    data: RetrievalSet,
    hits: Hits,
    *,
    names: Sequence[str] | None = None,
    exclude_same_id: bool = False,
) -> RetrievalResult:
    """Score rankings from anywhere, such as BM25; a row of -1 means that no more were found.

    ``answer@20`` is 1 where one of the first 20 documents holds an answer to the query: Recall@20
    in the tables of MKQA.

    Raises:
        RecipeError: for a metric that does not exist, or that needs answers where there are none.
    """
    names = names or data.metrics
    if exclude_same_id:
        hits = _without_own(data, hits)
    parsed = {name: _parse_metric(name) for name in names}
    deepest = max((k for metric, k in parsed.values() if metric == "answer"), default=0)
    if deepest and not data.answers:
        raise RecipeError(
            f'{data.name}: its queries have no "answers" to look for; choose a metric of judged '
            "documents, such as ndcg@10"
        )
    held = with_answers(hits.rows[:, :deepest], data.documents, data.answers) if deepest else None
    scores = {}
    for name, (metric, k) in parsed.items():
        judged = held if metric == "answer" and held is not None else data.judgements
        scores[name] = _METRICS[metric](hits.rows, judged, k)
    return RetrievalResult(data.name, scores, hits)


def pair_scores(
    data: RetrievalSet,
    query_vectors: Float[np.ndarray, "queries dim"],
    doc_vectors: Float[np.ndarray, "docs dim"],
    *,
    pairs: int = 5_000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "positives"], Float[np.ndarray, "negatives"]]:
    """Scores of relevant pairs, and of their queries with a document drawn at random.

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
    """The inner product of each pair, numbered as query * documents + document."""
    query, doc = np.divmod(pairs, max(len(docs), 1))
    return np.einsum("pd,pd->p", queries[query], docs[doc])


def _langs_of(lang: str) -> tuple[str, str]:
    """The languages of an example's query and of its documents."""
    asked, found = named_pair(lang) if "-" in lang else (lang, lang)
    return (asked, found) if asked else (lang, lang)


def _parse_metric(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"([a-z]+)@([1-9]\d*)", name)
    if not found or found[1] not in _METRICS:
        known = ", ".join(f"{metric}@K" for metric in _METRICS)
        raise RecipeError(f'there is no metric "{name}"; choose from {known}, such as ndcg@10')
    return found[1], int(found[2])


def _without_own(data: RetrievalSet, hits: Hits) -> Hits:
    """The same rankings without the document that bears the query's id; the rest move up."""
    row_of = {name: row for row, name in enumerate(data.document_ids)}
    own = np.array([row_of.get(name, -1) for name in data.query_ids], dtype=np.int64)
    dropped = (hits.rows == own[:, None]) & (hits.rows >= 0)
    order = np.argsort(dropped, axis=1, kind="stable")
    rows = np.where(dropped, -1, hits.rows)
    return Hits(
        np.take_along_axis(np.where(dropped, np.float32(0), hits.scores), order, axis=1),
        np.take_along_axis(rows, order, axis=1),
    )
