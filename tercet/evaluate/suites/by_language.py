"""Measure a model on retrieval sets of many languages.

The language of a text is the one in its record (``lang``), or else the one in the name of its set:
``de.jsonl``, or ``ko-en`` for Korean queries and English documents. Each set is on one of three
axes, which mean different things and are never averaged together:

- monolingual: queries and documents in one language
- cross-lingual: all documents in one language, and queries in others
- mixed: documents in many languages. Here a model may prefer documents in the query's language to
  those that answer it; see :attr:`SetScores.bias`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float64

from tercet.data.files.languages import named_pair
from tercet.evaluate.measures.bm25 import WordsOf, by_letters, by_words
from tercet.evaluate.measures.prompts import known_task, require_prompt, task_names
from tercet.evaluate.measures.retention import StoredDocuments
from tercet.evaluate.measures.retrieval import RetrievalResult, measure_bm25
from tercet.evaluate.sets.location import SetLocation
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.artifacts import KeptResults, fingerprint_of_file
from tercet.files.forms import bare_name
from tercet.files.progress import bar
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings
from tercet.rank.coded import FACTOR
from tercet.rank.quantized import Stored

Axis: TypeAlias = Literal["monolingual", "cross-lingual", "mixed", "unknown"]
METRICS: Final = ("ndcg@10", "recall@100")
BASELINES: Final[Mapping[str, WordsOf]] = {"BM25": by_words, "BM25 of 3 letters": by_letters}
"""Systems without a model: by common words, and by common character trigrams."""

SCORES_VERSION: Final = 2  # of the way figures are computed; a change invalidates kept scores
_BIAS_DEPTH: Final = 10
_ARRAYS: Final = ("same", "chance", "own")


@dataclass(frozen=True, slots=True, eq=False)
class SetScores:
    """What one model, or a baseline, reached on a set, query by query."""

    name: str
    group: str
    axis: Axis
    languages: str  # for people, such as ``ko -> en``
    documents: int
    langs: tuple[str, ...]  # of the queries
    scores: Mapping[str, Float64[np.ndarray, "queries"]]  # by metric
    same: Float64[np.ndarray, "queries"]  # share of the first 10 in the query's language
    chance: Float64[np.ndarray, "queries"]  # share of the whole corpus in the query's language
    own: Bool[np.ndarray, "queries"]  # whether a relevant document is in the query's language

    def of(self, lang: str) -> Bool[np.ndarray, "queries"]:
        """Return which queries are in this language."""
        return np.array([each == lang for each in self.langs], dtype=bool)

    @property
    def bias(self) -> Float64[np.ndarray, "queries"]:
        """How much documents in the query's language are preferred; NaN if nothing was found.

        This is meaningful only if languages were assigned at random: where they are about
        different topics, documents in the query's language are rightly preferred.
        """
        return self.same - self.chance


def measure_sets(  # noqa: PLR0913 (independent choices, each with a default)
    embedder: Embedder,
    locations: Sequence[SetLocation],
    *,
    split: str | None = None,
    task: str | None = None,
    dims: int | None = None,
    stored: Stored = "float32",
    kept: KeptResults | None = None,
) -> Iterator[SetScores]:
    """Encode and search every set; documents that successive sets share are encoded once.

    Scores that are ``kept`` from an earlier run are not measured again. The prompts are those of
    the ``task`` if the model knows it, or of the set's own name, or the default ones.

    Raises:
        RecipeError: for a set whose queries would get no prompt, although the model was trained
            with some.
    """
    tasks = [_task(embedder.settings, location, task) for location in locations]
    ordered = sorted(zip(locations, tasks, strict=True), key=lambda it: _documents_first(it[0]))
    encoded: tuple[str | None, tuple[str, ...], np.ndarray] | None = None
    with bar("sets", len(ordered)) as advance:
        for location, known in ordered:
            advance(0, location.name)
            key = () if kept is None else (location.name, fingerprint_of_file(location.path))
            if kept is not None and (before := kept.find(*key)) is not None:
                yield _restored(*before)
                advance(1)
                continue
            data = location.open(split)
            queries = embedder.encode(data.queries, "query", task=known, dims=dims)
            if encoded is None or encoded[:2] != (known, data.documents):
                vectors = embedder.encode(data.documents, "document", task=known, dims=dims)
                encoded = known, data.documents, vectors
            sides = (queries, encoded[2])
            storage = StoredDocuments(data, *sides, embedder.settings, METRICS, FACTOR)
            found = scores_of(location, data, storage.measured(stored).result)
            if kept is not None:
                keep_scores(kept, found, *key)
            yield found
            advance(1)


def keep_scores(kept: KeptResults, found: SetScores, *key: str) -> None:
    """Write the scores of a set, to be found again by its key.

    Raises:
        StorageError: if the disk refuses.
    """
    facts = asdict(found)
    arrays = {name: facts.pop(name) for name in _ARRAYS}
    scores = facts.pop("scores")
    arrays |= {f"scores {name}": values for name, values in scores.items()}
    kept.keep(facts | {"metrics": list(scores)}, arrays, *key)


def _restored(facts: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> SetScores:
    scores = {name: arrays[f"scores {name}"] for name in facts.pop("metrics")}
    langs = tuple(facts.pop("langs"))
    own = {name: arrays[name] for name in _ARRAYS}
    return SetScores(langs=langs, scores=scores, **facts, **own)  # pyright: ignore[reportArgumentType]


def _documents_first(location: SetLocation) -> tuple[str, str, str]:
    """Return a key that sorts sets of one corpus together: en, de-en, ko-en, ko."""
    of_queries, of_documents = named_pair(bare_name(location.path))
    return of_documents, "" if of_queries == of_documents else of_queries, location.name


def _task(settings: Settings, location: SetLocation, task: str | None) -> str | None:
    """Return the task whose prompts are used for a set."""
    if not settings.task_prompts:
        return None
    names = (task,) if task else task_names(location.path, examples=location.path.is_file())
    known = known_task(settings, names)
    require_prompt(settings, "query", known, what=location.name)
    return known


def measure_words(
    locations: Sequence[SetLocation], words_of: WordsOf = by_words, *, split: str | None = None
) -> Iterator[SetScores]:
    """Measure a baseline without a model, by common words or character trigrams.

    Raises:
        MissingExtraError: if bm25s is not installed.
    """
    for location in locations:
        data = location.open(split)
        yield scores_of(location, data, measure_bm25(data, words_of, names=METRICS))


def scores_of(location: SetLocation, data: RetrievalSet, result: RetrievalResult) -> SetScores:
    """Combine a ranking's scores with the languages of its queries and documents."""
    of_queries, of_documents = np.array(data.query_langs), np.array(data.document_langs)
    axis, languages = axis_of(data)
    rows = result.hits.rows[:, :_BIAS_DEPTH]
    there = rows >= 0
    alike = (of_documents[rows] == of_queries[:, None]) & there
    counts = there.sum(axis=1)
    judged = data.judgements
    relevant = judged.grades > 0
    query = judged.query_of()[relevant]
    own = of_queries[query] == of_documents[judged.docs[relevant]]
    share = Counter(data.document_langs)
    total = max(len(of_documents), 1)
    return SetScores(
        location.name,
        location.group,
        axis,
        languages,
        len(data.documents),
        data.query_langs,
        {name: result.scores[name] for name in METRICS},
        np.divide(alike.sum(axis=1), counts, out=np.full(len(rows), np.nan), where=counts > 0),
        np.array([share[lang] / total for lang in data.query_langs], dtype=np.float64),
        np.bincount(query[own], minlength=len(of_queries)).astype(bool),
    )


def axis_of(data: RetrievalSet) -> tuple[Axis, str]:
    """Return the axis of a set, and its languages for people."""
    of_queries, of_documents = (
        list(dict.fromkeys(langs)) for langs in (data.query_langs, data.document_langs)
    )
    if "" in of_queries or "" in of_documents:
        return "unknown", "?"
    if len(of_documents) > 1:
        return "mixed", f"{len(of_queries)} -> {len(of_documents)} languages"
    if of_queries == of_documents:
        return "monolingual", of_queries[0]
    several = of_queries[0] if len(of_queries) == 1 else f"{len(of_queries)} languages"
    return "cross-lingual", f"{several} -> {of_documents[0]}"
