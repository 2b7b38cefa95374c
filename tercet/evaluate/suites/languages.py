"""Retrieval sets of many languages: which there are in a folder, and how each is answered.

A folder holds files of examples (``de.jsonl``) and folders in the layout of BEIR or FlagEmbedding
(``ko-en``: Korean queries, English documents), and may hold them in groups, such as ``clef/de``.
Their language is what their records say (``lang``), or else what they are called. A set is on one
of three axes, which say different things and are never averaged together:

- monolingual: queries and documents in one language
- cross-lingual: all documents in one language, and queries in others
- mixed: documents in many languages. Here a model may prefer documents in the query's language to
  those that answer it; see :attr:`SetScores.same`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64

from tercet.data.files.labelled import is_labelled_file
from tercet.data.files.languages import named_pair
from tercet.data.files.similarity import is_similarity_file
from tercet.errors import DataError
from tercet.evaluate.measures.bm25 import Split, bm25_top_k, by_letters, by_words
from tercet.evaluate.measures.prompts import known_task, require_prompt, task_names
from tercet.evaluate.measures.retention import Stored, Storing
from tercet.evaluate.measures.retrieval import DEPTH
from tercet.evaluate.sets.retrieval_set import RetrievalResult, RetrievalSet, evaluate_hits
from tercet.files.progress import bar
from tercet.metrics import Judgements
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings
from tercet.rank.coded import FACTOR

Axis: TypeAlias = Literal["monolingual", "cross-lingual", "mixed", "not told"]
METRICS: Final = ("ndcg@10", "recall@100")
BASELINES: Final[Mapping[str, Split]] = {"BM25": by_words, "BM25 of 3 letters": by_letters}
"""What needs no model: words in common, and runs of letters in common."""

_BIAS_DEPTH: Final = 10
_SUFFIXES: Final = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class Place:
    """A set of a folder: ``clef/de`` is the set ``de`` of the group ``clef``."""

    name: str
    group: str  # sets of different groups are not averaged together; empty: there are none
    path: Path

    def open(self, split: str | None = None) -> RetrievalSet:
        """The set, whose queries and documents have a language each unless nothing tells it.

        Raises:
            DataError: when it cannot be read.
            RecipeError: when no documents are judged.
        """
        if self.path.is_dir():
            data = RetrievalSet.from_folder(self.path, split)
        else:
            data = RetrievalSet.from_examples(self.path)
        data.require_judgements("its figures by language")
        asked, found = named_pair(self.path.stem)
        return replace(
            data,
            name=self.name,
            query_langs=tuple(lang or asked for lang in data.query_langs),
            document_langs=tuple(lang or found for lang in data.document_langs),
        )


def places_in(folder: Path) -> list[Place]:
    """The retrieval sets of a folder of sets, by name; none where it is a set itself, or no folder.

    Files that hold no examples (labelled texts, scored pairs) are left out.

    Raises:
        DataError: for two sets of one name.
    """
    if not folder.is_dir() or _is_set(folder):
        return []
    found = [Place(path.stem, "", path) for path in _sets_in(folder)]
    for group in sorted(path for path in folder.iterdir() if path.is_dir() and not _is_set(path)):
        inside = _sets_in(group)
        found += [Place(f"{group.name}/{path.stem}", group.name, path) for path in inside]
    for name, count in Counter(place.name for place in found).items():
        if count > 1:
            raise DataError(folder, None, f"holds {count} sets of the name {name}; rename one")
    return sorted(found, key=lambda place: place.name)


def _sets_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if _is_set(path) or _is_file(path)]


def _is_set(path: Path) -> bool:
    """Whether a folder has the files of one set, or looks as if it should."""
    return path.is_dir() and (
        (path / "corpus.jsonl").exists()
        or (path / "queries.jsonl").exists()
        or (path / "qrels").exists()
        or any(path.glob("*qrels.*"))
    )


def _is_file(path: Path) -> bool:
    if path.suffix not in _SUFFIXES or not path.is_file():
        return False
    return not is_similarity_file(path) and not is_labelled_file(path)


@dataclass(frozen=True, slots=True, eq=False)
class SetScores:
    """What one model, or a baseline, is worth on a set, query by query."""

    name: str
    group: str
    axis: Axis
    languages: str  # for people, such as ``ko -> en``
    documents: int
    langs: tuple[str, ...]  # of the queries
    scores: Mapping[str, Float64[np.ndarray, "queries"]]  # by metric
    same: Float64[np.ndarray, "queries"]  # of the first 10, the share in the query's language
    chance: Float64[np.ndarray, "queries"]  # the same share of the whole corpus
    own: Bool[np.ndarray, "queries"]  # whether a relevant document is in the query's language

    def of(self, lang: str) -> Bool[np.ndarray, "queries"]:
        """Which queries are in this language."""
        return np.array([each == lang for each in self.langs], dtype=bool)

    @property
    def bias(self) -> Float64[np.ndarray, "queries"]:
        """By how much documents in the query's own language are preferred; NaN: none was found.

        Above zero they stand among the first 10 more often than their share of the corpus. That
        says something where languages were drawn at random; a corpus in which each language
        tells of other things has them apart for a good reason.
        """
        return self.same - self.chance


@runtime_checkable
class Kept(Protocol):
    """Where what was measured is found again; see :mod:`tercet.evaluate.suites.kept_scores`."""

    def find(self, place: Place) -> SetScores | None:
        """What was measured on a set before."""
        ...

    def keep(self, place: Place, found: SetScores) -> None:
        """Remember it."""
        ...


def measure_sets(  # noqa: PLR0913 (each is a choice of its own, with a default)
    embedder: Embedder,
    places: Sequence[Place],
    *,
    split: str | None = None,
    task: str | None = None,
    dims: int | None = None,
    stored: Stored = "float32",
    kept: Kept | None = None,
) -> Iterator[SetScores]:
    """Encode and search every set; documents that two sets in turn share are encoded once.

    What is ``kept`` of an earlier run is not measured again.

    The prompts are those of the ``task`` where the model knows it, or of the set's own name, or
    the default ones. Sets come in an order of their own.

    Raises:
        RecipeError: for a set whose queries would get no prompt, though the model learned some.
    """
    tasks = [_task(embedder.settings, place, task) for place in places]
    ordered = sorted(zip(places, tasks, strict=True), key=lambda it: _documents_first(it[0]))
    encoded: tuple[str | None, tuple[str, ...], np.ndarray] | None = None
    with bar("sets", len(ordered)) as advance:
        for place, known in ordered:
            advance(0, place.name)
            if kept is not None and (before := kept.find(place)) is not None:
                yield before
                advance(1)
                continue
            data = place.open(split)
            how = {"task": known, "dims": dims}
            queries = embedder.encode(data.queries, "query", **how)
            if encoded is None or encoded[:2] != (known, data.documents):
                vectors = embedder.encode(data.documents, "document", **how)
                encoded = known, data.documents, vectors
            way = Storing(data, queries, encoded[2], embedder.settings, METRICS, FACTOR)
            found = scores_of(place, data, way.measured(stored).result)
            if kept is not None:
                kept.keep(place, found)
            yield found
            advance(1)


def _documents_first(place: Place) -> tuple[str, str, str]:
    """An order in which sets of one corpus follow one another: en, de-en, ko-en, ko."""
    asked, found = named_pair(place.path.stem)
    return found, "" if asked == found else asked, place.name


def _task(settings: Settings, place: Place, task: str | None) -> str | None:
    """The task whose prompts a set is measured with."""
    if not settings.task_prompts:
        return None
    names = (task,) if task else task_names(place.path, examples=place.path.is_file())
    known = known_task(settings, names)
    require_prompt(settings, "query", known, what=place.name)
    return known


def measure_words(
    places: Sequence[Place], words: Split = by_words, *, split: str | None = None
) -> Iterator[SetScores]:
    """What a baseline without a model finds, by words or runs of letters in common.

    Raises:
        MissingExtraError: when bm25s is not installed.
    """
    for place in places:
        data = place.open(split)
        hits = bm25_top_k(data.queries, data.documents, DEPTH, words)
        yield scores_of(place, data, evaluate_hits(data, hits, names=METRICS))


def scores_of(place: Place, data: RetrievalSet, result: RetrievalResult) -> SetScores:
    """A ranking's scores with what there is to know of languages."""
    asked, found = np.array(data.query_langs), np.array(data.document_langs)
    axis, languages = axis_of(data)
    rows = result.hits.rows[:, :_BIAS_DEPTH]
    there = rows >= 0
    alike = (found[rows] == asked[:, None]) & there
    counts = there.sum(axis=1)
    share = Counter(data.document_langs)
    total = max(len(found), 1)
    return SetScores(
        place.name,
        place.group,
        axis,
        languages,
        len(data.documents),
        data.query_langs,
        {name: result.scores[name] for name in METRICS},
        np.divide(alike.sum(axis=1), counts, out=np.full(len(rows), np.nan), where=counts > 0),
        np.array([share[lang] / total for lang in data.query_langs], dtype=np.float64),
        _own(data.judgements, asked, found),
    )


def _own(judged: Judgements, asked: np.ndarray, found: np.ndarray) -> Bool[np.ndarray, "queries"]:
    relevant = judged.grades > 0
    query = judged.query_of()[relevant]
    alike = asked[query] == found[judged.docs[relevant]]
    return np.bincount(query[alike], minlength=len(asked)).astype(bool)


def axis_of(data: RetrievalSet) -> tuple[Axis, str]:
    """What a set is for, and its languages, for people."""
    asked, found = (list(dict.fromkeys(it)) for it in (data.query_langs, data.document_langs))
    if "" in asked or "" in found:
        return "not told", "?"
    if len(found) > 1:
        return "mixed", f"{len(asked)} -> {len(found)} languages"
    if asked == found:
        return "monolingual", asked[0]
    return (
        "cross-lingual",
        f"{asked[0] if len(asked) == 1 else f'{len(asked)} languages'} -> {found[0]}",
    )
