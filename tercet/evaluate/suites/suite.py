"""Evaluation sets of any kind behind one face, so that models can be compared over all of them.

What a model answers to a set is a small array, such as the nDCG of each query or the label of each
text. It can be kept in a file, and its figures and differences computed later.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from tercet.data.files.labelled import is_labelled_file
from tercet.data.files.similarity import SimilaritySet, is_similarity_file
from tercet.errors import RecipeError
from tercet.evaluate.measures.bm25 import bm25_top_k
from tercet.evaluate.measures.labels import (
    ClassificationResult,
    ClusteringResult,
    measure_classification,
    measure_classification_by_words,
    measure_clustering,
    measure_clustering_by_words,
)
from tercet.evaluate.measures.prompts import known_task, task_names, warn_unprompted
from tercet.evaluate.measures.retrieval import DEPTH, measure_kinds
from tercet.evaluate.measures.similarity import (
    SimilarityResult,
    measure_overlap,
    measure_similarity,
)
from tercet.evaluate.report.intervals import Interval, interval
from tercet.evaluate.sets.label_sets import ClassificationSet, read_label_set
from tercet.evaluate.sets.retrieval_set import RetrievalSet, evaluate_hits, evaluate_retrieval
from tercet.kinds import KINDS
from tercet.models.embedder import Embedder

Category: TypeAlias = Literal["Retrieval", "Classification", "Clustering", "STS"]
FIGURES: Final[Mapping[Category, str]] = {
    "Retrieval": "nDCG@10",
    "Classification": "accuracy",
    "Clustering": "v-measure",
    "STS": "Spearman",
}
COLUMNS: Final = (*KINDS, "sum")
"""What a model with several kinds of vectors is measured by: each kind, and their weighted sum."""

_MAIN: Final = "ndcg@10"


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationSet:
    """A set, how a model or a baseline answers it, and what the answers are worth."""

    name: str
    category: Category
    size: str  # for people
    answers: Callable[[Embedder, str | None], np.ndarray]
    words: Callable[[], np.ndarray]  # of the baseline without a model
    figure: Callable[[np.ndarray, int], Interval]  # answers and a seed
    minus: Callable[[np.ndarray, np.ndarray, int], Interval]
    tasks: Sequence[str]  # names under which a model may know its prompts
    fingerprint: str = ""  # of the files

    def measure(self, embedder: Embedder) -> np.ndarray:
        """What a model answers, with the prompts that it was trained with for this task."""
        return self.answers(embedder, known_task(embedder.settings, self.tasks))


def open_set(path: Path | str) -> EvaluationSet:
    """The set of a file: examples, scored pairs of texts, or texts with labels; or BEIR's folder.

    Raises:
        DataError: when it is none of these.
    """
    path = Path(path)
    return _marked(path, _set_of(path))


def open_kinds_set(path: Path | str) -> EvaluationSet:
    """A retrieval set whose answers have a column for each of ``COLUMNS``.

    A column is NaN where the model does not make this kind of vectors. Figures and differences are
    of one column; what words answer has one only.

    Raises:
        DataError: when the file cannot be read.
        RecipeError: when it is no retrieval set.
    """
    path = Path(path)
    if not path.is_dir() and (is_similarity_file(path) or is_labelled_file(path)):
        raise RecipeError(f"{path}: is no retrieval set, so kinds of vectors say nothing of it")
    data = _retrieval_set(path)
    examined = as_evaluation_set(data, task_names(path, examples=not path.is_dir()))
    return _marked(path, replace(examined, answers=partial(_by_kinds, data)))


def _marked(path: Path, examined: EvaluationSet) -> EvaluationSet:
    """The same, with a fingerprint of its files."""
    return replace(examined, fingerprint=digest_of(path))


def digest_of(path: Path) -> str:
    """Changes when a file does, or any file of a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def open_sets(
    paths: Sequence[Path], read: Callable[[Path], EvaluationSet] = open_set
) -> list[EvaluationSet]:
    """The sets of these files, whose names have to differ.

    Raises:
        DataError: when one is no set.
        RecipeError: when two have the same name, or there is none.
    """
    sets = [read(path) for path in paths]
    names = [examined.name for examined in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not sets:
        raise RecipeError(
            f"two evaluation sets are named {twice[0]!r}; rename one of the files"
            if twice
            else "there is no evaluation set; give one or more"
        )
    return sets


def _set_of(path: Path) -> EvaluationSet:
    if path.is_dir():
        return as_evaluation_set(_retrieval_set(path), task_names(path))
    if is_similarity_file(path):
        return _similarity(SimilaritySet.from_file(path), task_names(path))
    if is_labelled_file(path):
        found = read_label_set(path)
        if isinstance(found, ClassificationSet):
            return _classification(found.sampled(), task_names(path))
        return _clustering(found, task_names(path))
    return as_evaluation_set(_retrieval_set(path), task_names(path, examples=True))


def _retrieval_set(path: Path) -> RetrievalSet:
    is_folder = path.is_dir()
    data = RetrievalSet.from_folder(path) if is_folder else RetrievalSet.from_examples(path)
    data.require_judgements(f"its {FIGURES['Retrieval']}")
    return data


def average(figures: Sequence[Interval]) -> Interval:
    """The mean of figures of different sets, whose errors are taken to be independent.

    The interval is that of a normal distribution: the half widths are added as squares.
    """
    count = len(figures)
    mean = sum(each.mean for each in figures) / count
    half = sqrt(sum(((each.high - each.low) / 2) ** 2 for each in figures)) / count
    first = figures[0]
    return Interval(
        mean, mean - half, mean + half, sum(each.queries for each in figures), seed=first.seed
    )


def as_evaluation_set(data: RetrievalSet, tasks: Sequence[str]) -> EvaluationSet:
    """Queries and documents behind the face of all sets; answers are the nDCG@10 of each query."""

    def answers(embedder: Embedder, task: str | None) -> np.ndarray:
        warn_unprompted(embedder.settings, "query", task)
        queries = embedder.encode(data.queries, "query", task=task)
        documents = embedder.encode(data.documents, "document", task=task)
        return np.asarray(evaluate_retrieval(data, queries, documents, names=[_MAIN]).scores[_MAIN])

    def words() -> np.ndarray:
        hits = bm25_top_k(data.queries, data.documents, DEPTH)
        return np.asarray(evaluate_hits(data, hits, names=[_MAIN]).scores[_MAIN])

    return EvaluationSet(
        data.name,
        "Retrieval",
        f"{len(data.queries):,} queries, {len(data.documents):,} documents",
        answers,
        words,
        lambda scores, seed: interval(scores, seed=seed),
        lambda one, other, seed: interval(one - other, seed=seed),
        tasks,
    )


def _by_kinds(data: RetrievalSet, embedder: Embedder, task: str | None) -> np.ndarray:
    found = measure_kinds(embedder, data, task=task, names=[_MAIN])
    answers = np.full((len(data.queries), len(COLUMNS)), np.nan)
    for column, name in enumerate((*KINDS, found.total)):
        if name in found.results:
            answers[:, column] = found.results[name].scores[_MAIN]
    return answers


def _classification(data: ClassificationSet, tasks: Sequence[str]) -> EvaluationSet:
    result = partial(ClassificationResult, data)
    return EvaluationSet(
        data.name,
        "Classification",
        f"{len(data.test.texts):,} texts, {len(data.labels)} labels, "
        f"learned from {len(data.train.texts):,}",
        lambda embedder, task: measure_classification(embedder, data, task=task).predicted,
        lambda: measure_classification_by_words(data).predicted,
        lambda told, seed: result(told).interval(seed=seed),
        lambda one, other, seed: result(one).minus(result(other), seed=seed),
        tasks,
    )


def _clustering(data: Any, tasks: Sequence[str]) -> EvaluationSet:
    result = partial(ClusteringResult, data)
    return EvaluationSet(
        data.name,
        "Clustering",
        f"{len(data.rows.texts):,} texts, {len(data.labels)} labels",
        lambda embedder, task: measure_clustering(embedder, data, task=task).clusters,
        lambda: measure_clustering_by_words(data).clusters,
        lambda found, seed: result(found).interval(seed=seed),
        lambda one, other, seed: result(one).minus(result(other), seed=seed),
        tasks,
    )


def _similarity(data: SimilaritySet, tasks: Sequence[str]) -> EvaluationSet:
    result = partial(SimilarityResult, data)
    return EvaluationSet(
        data.name,
        "STS",
        f"{len(data.pairs):,} pairs of {len(data.texts):,} texts",
        lambda embedder, task: measure_similarity(embedder, data, task=task).cosines,
        lambda: measure_overlap(data).cosines,
        lambda cosines, seed: result(cosines).interval(seed=seed),
        lambda one, other, seed: result(one).minus(result(other), seed=seed),
        tasks,
    )
