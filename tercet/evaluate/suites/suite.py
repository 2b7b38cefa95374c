"""Evaluation sets of every category behind one interface, so that models can be compared on all.

A model's answers to a set are a small array, such as the nDCG of each query or the label of each
text. They can be kept in a file, and their figures and differences computed later.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from tercet.data.files.examples import ExampleFields
from tercet.data.files.inputs import local_path
from tercet.data.files.similarity import SimilaritySet
from tercet.errors import RecipeError
from tercet.evaluate.measures import labels, sts
from tercet.evaluate.measures.by_kind import measure_kinds
from tercet.evaluate.measures.prompts import known_task, task_names
from tercet.evaluate.measures.retrieval import (
    encode_both,
    evaluate_retrieval,
    measure,
    measure_bm25,
)
from tercet.evaluate.report.intervals import Interval, interval
from tercet.evaluate.sets.label_sets import ClassificationSet, ClusteringSet, read_label_set
from tercet.evaluate.sets.location import format_of
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.artifacts import fingerprint_of_file
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
"""Measured for a model with several kinds of vectors: each kind, and their weighted sum."""

MAIN: Final = "ndcg@10"  # the metric of retrieval that averages and studies use


@runtime_checkable
class Result(Protocol):
    """What a model, or a baseline, reached on a set."""

    def interval(self, metric: Any, *, seed: int = 0) -> Interval:
        """Return a metric with its bootstrap interval."""
        ...

    def minus(self, other: Any, metric: Any, *, seed: int = 0) -> Interval:
        """Return by how much this result is better than another one on the same set."""
        ...


@runtime_checkable
class Evaluate(Protocol):
    """A function that measures an embedder on a set."""

    def __call__(
        self,
        embedder: Embedder,
        *,
        task: str | None = None,
        dims: int | None = None,
        progress: bool = False,
    ) -> Result:
        """Return the result with the prompts of a task, or the default ones."""
        ...


AnyResult = TypeVar("AnyResult", bound=Result)


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationSet:
    """A set, how models and a baseline are measured on it, and what their answers are worth."""

    name: str
    category: Category
    data: RetrievalSet | ClassificationSet | ClusteringSet | SimilaritySet
    metrics: Sequence[str]
    tasks: Sequence[str]  # names under which a model may know its prompts
    evaluate: Evaluate
    baseline: Callable[[], Result]  # without a model
    baseline_name: str
    answers: Callable[[Embedder, str | None], np.ndarray]  # of a model, by the prompts of a task
    words: Callable[[], np.ndarray]  # answers of the baseline
    figure: Callable[[np.ndarray, int], Interval]  # of answers, with a seed
    minus: Callable[[np.ndarray, np.ndarray, int], Interval]
    fingerprint: str = ""  # of the files

    @property
    def size(self) -> str:
        """The numbers of its texts, for people."""
        if isinstance(self.data, SimilaritySet):
            return f"{len(self.data.pairs):,} pairs of {len(self.data.texts):,} texts"
        return self.data.size

    def measure(self, embedder: Embedder) -> np.ndarray:
        """Return a model's answers, with the prompts that it has for this task."""
        return self.answers(embedder, known_task(embedder.settings, self.tasks))


def open_set(
    path: Path | str,
    *,
    split: str | None = None,
    fields: ExampleFields | None = None,
    per_label: int | None = None,
    seed: int = 0,
) -> EvaluationSet:
    """Open the set in a file (examples, scored pairs, labelled texts) or a folder like BEIR's.

    ``split`` is that of a folder, and ``fields`` are those of a file, which holds examples then.
    ``per_label`` limits the train texts of each label; ``seed`` selects them.

    Raises:
        DataError: if it cannot be read.
        RecipeError: if a split of a file is requested.
    """
    path = local_path(path)
    found = "examples" if fields is not None and path.is_file() else format_of(path)
    if found == "retrieval folder" or split is not None:
        data = RetrievalSet.from_path(path, split)
    elif found == "scored pairs":
        data = SimilaritySet.from_file(path)
    elif found == "labelled texts":
        data = read_label_set(path)
        if isinstance(data, ClassificationSet):
            data = data.sampled(per_label, seed=seed)
    else:
        data = RetrievalSet.from_examples(path, fields=fields)
    names = task_names(path, examples=found == "examples", fields=fields)
    return as_evaluation_set(data, names)


def open_judged_set(path: Path | str) -> EvaluationSet:
    """Open the set of a path with a fingerprint of its files; retrieval needs judgements.

    Raises:
        DataError: if it cannot be read.
        RecipeError: if it has answers but no judged documents.
    """
    found = open_set(path)
    if isinstance(found.data, RetrievalSet):
        found.data.require_judgements(f"its {FIGURES['Retrieval']}")
    return replace(found, fingerprint=fingerprint_of_file(Path(path)))


def open_kinds_set(path: Path | str) -> EvaluationSet:
    """Open a retrieval set whose answers have a column for each of ``COLUMNS``.

    A column is NaN if the model does not make this kind of vectors.

    Raises:
        DataError: if the file cannot be read.
        RecipeError: if it is not a retrieval set with judgements.
    """
    found = open_judged_set(path)
    if not isinstance(found.data, RetrievalSet):
        raise RecipeError(f"{path}: must be a retrieval set to compare kinds of vectors on")
    return replace(found, answers=partial(_by_kinds, found.data))


def open_sets(
    paths: Sequence[Path], read: Callable[[Path], EvaluationSet] = open_judged_set
) -> list[EvaluationSet]:
    """Open the sets of these paths, whose names must differ.

    Raises:
        DataError: if one cannot be read.
        RecipeError: if two have the same name, or there is none.
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


def average(figures: Sequence[Interval]) -> Interval:
    """Return the mean of figures of different sets, whose errors are taken to be independent.

    The interval is that of a normal distribution: half widths are added in quadrature. A single
    figure keeps its interval.
    """
    count = len(figures)
    if count == 1:
        return figures[0]
    mean = sum(each.mean for each in figures) / count
    half = sqrt(sum(((each.high - each.low) / 2) ** 2 for each in figures)) / count
    first = figures[0]
    return Interval(
        mean, mean - half, mean + half, sum(each.queries for each in figures), seed=first.seed
    )


def as_evaluation_set(
    data: RetrievalSet | ClassificationSet | ClusteringSet | SimilaritySet, tasks: Sequence[str]
) -> EvaluationSet:
    """Return the evaluation set of some data; ``tasks`` name it for models with prompts."""
    if isinstance(data, RetrievalSet):
        return _retrieval(data, tasks)
    if isinstance(data, ClassificationSet):
        return _of_results(
            ("Classification", data, labels.METRICS, tasks),
            partial(labels.measure_classification, data=data),
            ("TF-IDF", partial(labels.measure_classification_by_words, data)),
            lambda result: result.predicted,
            partial(labels.ClassificationResult, data),
        )
    if isinstance(data, ClusteringSet):
        return _of_results(
            ("Clustering", data, labels.CLUSTERING_METRICS, tasks),
            partial(labels.measure_clustering, data=data),
            ("TF-IDF", partial(labels.measure_clustering_by_words, data)),
            lambda result: result.clusters,
            partial(labels.ClusteringResult, data),
        )
    return _of_results(
        ("STS", data, sts.METRICS, tasks),
        partial(sts.measure_similarity, data=data),
        ("word overlap", partial(sts.measure_overlap, data)),
        lambda result: result.cosines,
        partial(sts.SimilarityResult, data),
    )


def _of_results(
    about: tuple[
        Category, ClassificationSet | ClusteringSet | SimilaritySet, Sequence[str], Sequence[str]
    ],
    evaluate: Callable[..., AnyResult],
    baseline: tuple[str, Callable[[], AnyResult]],
    answers_of: Callable[[AnyResult], np.ndarray],
    result_of: Callable[[np.ndarray], AnyResult],
) -> EvaluationSet:
    """Return a set whose results can be restored from a model's answers."""
    category, data, metrics, tasks = about
    name, by_words = baseline
    main = metrics[0]
    return EvaluationSet(
        data.name,
        category,
        data,
        metrics,
        tasks,
        evaluate,
        by_words,
        name,
        answers=lambda embedder, task: answers_of(evaluate(embedder, task=task)),
        words=lambda: answers_of(by_words()),
        figure=lambda answers, seed: result_of(answers).interval(main, seed=seed),
        minus=lambda one, other, seed: result_of(one).minus(result_of(other), main, seed=seed),
    )


def _retrieval(data: RetrievalSet, tasks: Sequence[str]) -> EvaluationSet:
    """Return a set whose answers are the nDCG@10 of each query."""

    def answers(embedder: Embedder, task: str | None) -> np.ndarray:
        sides = encode_both(embedder, data, task=task)
        return np.asarray(evaluate_retrieval(data, *sides, names=[MAIN]).scores[MAIN])

    return EvaluationSet(
        data.name,
        "Retrieval",
        data,
        data.metrics,
        tasks,
        lambda embedder, **options: measure(embedder, data, **options).result,
        partial(measure_bm25, data),
        "BM25",
        answers=answers,
        words=lambda: np.asarray(measure_bm25(data, names=[MAIN]).scores[MAIN]),
        figure=lambda scores, seed: interval(scores, seed=seed),
        minus=lambda one, other, seed: interval(one - other, seed=seed),
    )


def _by_kinds(data: RetrievalSet, embedder: Embedder, task: str | None) -> np.ndarray:
    found = measure_kinds(embedder, data, task=task, names=[MAIN])
    answers = np.full((len(data.queries), len(COLUMNS)), np.nan)
    for column, name in enumerate((*KINDS, found.total)):
        if name in found.results:
            answers[:, column] = found.results[name].scores[MAIN]
    return answers
