"""How well vectors (or any ranking) find the documents that people judged relevant."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Float64, Int64

from tercet import metrics
from tercet.data.examples import as_object, nonblank, shown, text_of
from tercet.data.records import Record, decoded, iter_lines, iter_records, parsed
from tercet.data.sources import iter_examples
from tercet.errors import DataError, RecipeError
from tercet.evaluate.intervals import Interval, interval
from tercet.metrics import Judgements
from tercet.search.exact import Hits, top_k
from tercet.types import Example

METRICS: Final = ("ndcg@10", "recall@100", "mrr@10", "map@100")

_METRICS: Final[dict[str, Callable[[np.ndarray, Judgements, int], np.ndarray]]] = {
    "ndcg": metrics.ndcg,
    "recall": metrics.recall,
    "mrr": metrics.reciprocal_rank,
    "map": metrics.average_precision,
    "success": metrics.success,
}
_ID: Final = ("_id", "id")
_QUERY_ID: Final = ("qid", "query-id", "query_id")
_DOCUMENT_ID: Final = ("docid", "corpus-id", "doc_id")
_GRADE: Final = ("relevance", "score")


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """Queries, the documents to search, and which documents answer which query."""

    name: str
    queries: tuple[str, ...]
    query_ids: tuple[str, ...]
    documents: tuple[str, ...]
    document_ids: tuple[str, ...]
    judgements: Judgements

    @classmethod
    def from_examples(
        cls, source: Path | str | Iterable[Example], name: str | None = None
    ) -> "RetrievalSet":
        """From training examples: their positives are relevant, all their texts are searched.

        Equal texts are one document and equal queries one query, so that a positive of one
        example is not counted wrong for its twin. Ids are numbers in order of appearance, from
        1, after ``q`` and ``d``. Prompts in the examples are not used: the model's own are.

        Raises:
            DataError: at the first record that is not an example, naming file and line.
        """
        from_file = isinstance(source, Path | str)
        examples = iter_examples(source) if from_file else source
        documents: dict[str, int] = {}
        relevant: dict[str, dict[int, int]] = {}
        for example in examples:
            grades = relevant.setdefault(example.query, {})
            for text in example.positives:
                grades[documents.setdefault(text, len(documents))] = 1
            for text in example.negatives:
                documents.setdefault(text, len(documents))
        return cls(
            name=name or (Path(source).stem if from_file else "examples"),
            queries=tuple(relevant),
            query_ids=tuple(f"q{i}" for i in range(1, len(relevant) + 1)),
            documents=tuple(documents),
            document_ids=tuple(f"d{i}" for i in range(1, len(documents) + 1)),
            judgements=Judgements.of(list(relevant.values())),
        )

    @classmethod
    def from_beir(cls, folder: Path | str, split: str = "test") -> "RetrievalSet":
        """From ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv`` or ``qrels.jsonl``.

        A document is its title, a space, and its text. Only queries with a judgement in this
        split are kept, in the order of ``queries.jsonl``.

        Raises:
            DataError: at the first line that cannot be read, or names an unknown id.
        """
        folder = Path(folder)
        corpus, queries = folder / "corpus.jsonl", folder / "queries.jsonl"
        documents = dict(_texts_by_id(corpus, _document_text))
        texts = dict(_texts_by_id(queries, _query_text))
        row_of = {name: row for row, name in enumerate(documents)}
        grades: dict[str, dict[int, int]] = {}
        qrels = _qrels_path(folder, split)
        for line, query, document, grade in _judgements(qrels):
            for name, known, file in ((query, texts, queries), (document, row_of, corpus)):
                if name not in known:
                    raise DataError(
                        qrels, line, f"id {name!r} is not in {file.name}; add it or drop this line"
                    )
            grades.setdefault(query, {})[row_of[document]] = grade
        kept = [name for name in texts if name in grades]
        return cls(
            name=folder.name,
            queries=tuple(texts[name] for name in kept),
            query_ids=tuple(kept),
            documents=tuple(documents.values()),
            document_ids=tuple(documents),
            judgements=Judgements.of([grades[name] for name in kept]),
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
    names: Sequence[str] = METRICS,
    exclude_same_id: bool = False,
) -> RetrievalResult:
    """Search exactly by inner product and score the rankings.

    The search goes as deep as the deepest metric asks. A document equal to the query is not
    left out, unless ``exclude_same_id``: then the document that has the query's own id is.

    Raises:
        ModelError: when queries and documents differ in width, or hold NaN.
        RecipeError: for a metric that does not exist.
    """
    assert len(query_vectors) == len(data.queries), "one vector for each query"
    assert len(doc_vectors) == len(data.documents), "one vector for each document"
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
    names: Sequence[str] = METRICS,
    exclude_same_id: bool = False,
) -> RetrievalResult:
    """Score rankings from anywhere, such as BM25; a row of -1 means that no more were found.

    Raises:
        RecipeError: for a metric that does not exist.
    """
    if exclude_same_id:
        hits = _without_own(data, hits)
    scores = {}
    for name in names:
        metric, k = _parse_metric(name)
        scores[name] = _METRICS[metric](hits.rows, data.judgements, k)
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


def _texts_by_id(path: Path, text: Callable[[Mapping[str, Any]], str]) -> Iterator[tuple[str, str]]:
    """Ids and texts of a file, each id once."""
    seen: set[str] = set()

    def entry(record: Record) -> tuple[str, str]:
        fields = as_object(record.value)
        name = _id_of(fields, _ID)
        if name in seen:
            raise ValueError(f"id {name!r} occurs twice; give each record its own")
        seen.add(name)
        return name, text(fields)

    for record in iter_records(path, (*_ID, "title", "text"), needs=(_ID, ("text",))):
        yield parsed(path, record, entry)


def _document_text(fields: Mapping[str, Any]) -> str:
    title = text_of(fields.get("title") or "", "title")
    return f"{title} {text_of(fields.get('text'), 'text')}".strip()


def _query_text(fields: Mapping[str, Any]) -> str:
    return nonblank(text_of(fields.get("text"), "text"), "text")


def _qrels_path(folder: Path, split: str) -> Path:
    names = (f"qrels/{split}.tsv", f"qrels/{split}.jsonl", "qrels.jsonl", "qrels.tsv")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(folder, None, f"has no judgements; write one of {', '.join(names)}")


def _judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Line, query id, document id and grade, from .jsonl or tab-separated columns."""
    if path.suffix == ".jsonl":
        for record in iter_records(path, (), needs=()):
            yield record.line, *parsed(path, record, _judgement)
        return
    for number, offset, content in iter_lines(path):
        try:
            columns = decoded(content, offset).split("\t")
            if not content.strip() or (number == 1 and columns[-1].strip() in _GRADE):
                continue  # BEIR's files begin with the names of the columns
            if len(columns) != 3:
                raise ValueError(
                    f"has {len(columns)} columns; write query id, document id and grade, "
                    "with tabs between"
                )
            yield number, columns[0], columns[1], _grade(columns[2])
        except ValueError as error:
            raise DataError(path, number, str(error)) from error


def _judgement(record: Record) -> tuple[str, str, int]:
    fields = as_object(record.value)
    grade = next((fields[name] for name in _GRADE if name in fields), None)
    return _id_of(fields, _QUERY_ID), _id_of(fields, _DOCUMENT_ID), _grade(grade)


def _id_of(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """The id, by the first of its names that is there; a whole number counts as its digits."""
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return nonblank(text_of(value, names[0]), names[0])


def _grade(value: object) -> int:
    try:
        number = float(value) if isinstance(value, str | int | float) else np.nan
    except ValueError:
        number = np.nan
    if not number.is_integer():
        raise ValueError(f'"{_GRADE[0]}" must be a whole number, got {shown(value)}')
    return int(number)
