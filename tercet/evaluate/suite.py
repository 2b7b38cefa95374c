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

from tercet.data.labelled import is_labelled_file
from tercet.data.similarity import SimilaritySet, is_similarity_file
from tercet.errors import RecipeError
from tercet.evaluate.bm25 import bm25_top_k
from tercet.evaluate.embedders import DEPTH
from tercet.evaluate.intervals import Interval, interval
from tercet.evaluate.label_sets import ClassificationSet, read_label_set
from tercet.evaluate.labels import (
    ClassificationResult,
    ClusteringResult,
    measure_classification,
    measure_classification_by_words,
    measure_clustering,
    measure_clustering_by_words,
)
from tercet.evaluate.prompts import known_task, task_names, warn_unprompted
from tercet.evaluate.retrieval import RetrievalSet, evaluate_hits, evaluate_retrieval
from tercet.evaluate.similarity import SimilarityResult, measure_overlap, measure_similarity
from tercet.nn.embedder import Embedder

Category: TypeAlias = Literal["Retrieval", "Classification", "Clustering", "STS"]
FIGURES: Final[Mapping[Category, str]] = {
    "Retrieval": "nDCG@10",
    "Classification": "accuracy",
    "Clustering": "v-measure",
    "STS": "Spearman",
}
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
    examined = _set_of(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.read_bytes())
    return replace(examined, fingerprint=digest.hexdigest())


def open_sets(paths: Sequence[Path]) -> list[EvaluationSet]:
    """The sets of these files, whose names have to differ.

    Raises:
        DataError: when one is no set.
        RecipeError: when two have the same name, or there is none.
    """
    sets = [open_set(path) for path in paths]
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
        return _retrieval(RetrievalSet.from_beir(path), task_names(path))
    if is_similarity_file(path):
        return _similarity(SimilaritySet.from_file(path), task_names(path))
    if is_labelled_file(path):
        found = read_label_set(path)
        if isinstance(found, ClassificationSet):
            return _classification(found.sampled(), task_names(path))
        return _clustering(found, task_names(path))
    return _retrieval(RetrievalSet.from_examples(path), task_names(path, examples=True))


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


def _retrieval(data: RetrievalSet, tasks: Sequence[str]) -> EvaluationSet:
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
