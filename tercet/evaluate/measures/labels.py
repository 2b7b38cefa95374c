"""How well vectors tell the labels of texts: learned from some of them, or found by clustering.

Classification fits a linear classifier to the vectors of training texts and asks it for the labels
of others. Clustering asks k-means for as many groups as there are labels, and how well these fit
them. The baseline of both has a text's weighted words (TF-IDF) in place of a model's vector.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Float64, Int64

from tercet.errors import MissingExtraError, RecipeError
from tercet.evaluate.measures.bm25 import words
from tercet.evaluate.measures.probe import mean_f1, regression, settle, vector_probe
from tercet.evaluate.measures.prompts import encode_alike
from tercet.evaluate.measures.similarity import check_finite
from tercet.evaluate.report.intervals import RESAMPLES, Interval
from tercet.evaluate.sets.label_sets import (
    ClassificationSet,
    ClusteringSet,
    Draws,
    Statistic,
    counted,
    drawn_interval,
)
from tercet.models.embedder import Embedder

Metric: TypeAlias = Literal["accuracy", "macro F1"]
METRICS: Final[tuple[Metric, ...]] = ("accuracy", "macro F1")
ClusteringMetric: TypeAlias = Literal["v-measure"]
CLUSTERING_METRICS: Final[tuple[ClusteringMetric, ...]] = ("v-measure",)

RUNS: Final = 5  # of k-means, from different beginnings
V_RESAMPLES: Final = 2_000  # each counts all texts once a run


# ---- classification --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ClassificationResult:
    """The labels that a classifier told of the test texts of a set."""

    data: ClassificationSet
    predicted: Int64[np.ndarray, "texts"]

    def score(self, metric: Metric = "accuracy") -> float:
        """The share of labels told right, or the mean F1 of the labels that occur in the test."""
        return float(self._statistic(metric)(self.data.test.once)[0])

    def interval(
        self, metric: Metric = "accuracy", *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Interval:
        """The score with its bootstrap interval over test texts; what was learned stays."""
        return drawn_interval(self.data.test, self._statistic(metric), resamples, seed)

    def minus(
        self,
        other: "ClassificationResult",
        metric: Metric = "accuracy",
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """How much higher this score is than another one on the same texts: both of each draw."""
        assert self.data.test.texts == other.data.test.texts, "two classifiers on one set"
        one, two = self._statistic(metric), other._statistic(metric)
        return drawn_interval(
            self.data.test, lambda drawn: one(drawn) - two(drawn), resamples, seed
        )

    def _statistic(self, metric: Metric) -> Statistic:
        truth, told, none = self.data.test.labels, self.predicted, len(self.data.labels)
        right = truth == told
        if metric == "accuracy":
            return lambda drawn: right[drawn].mean(axis=1)
        used = self.data.test.used
        codes = (np.where(right, truth, none), truth, told)

        def macro_f1(drawn: Draws) -> Float64[np.ndarray, "draws"]:
            counts = [counted(each, drawn, none + 1)[:, used] for each in codes]
            return mean_f1(np.stack(counts, axis=-1).astype(np.float64))

        return macro_f1


def evaluate_classification(
    data: ClassificationSet,
    train: Float[np.ndarray, "train dim"],
    test: Float[np.ndarray, "test dim"],
) -> ClassificationResult:
    """Learn from vectors of the train texts, by logistic regression, and tell the test labels.

    Raises:
        RecipeError: when the train texts have one label only.
        ModelError: when a vector is not finite.
        MissingExtraError: when scikit-learn is not installed.
    """
    _need_labels(data)
    for vectors in (train, test):
        check_finite(vectors)
    model = regression("classification", train.shape[1])
    tell = vector_probe(model, train.astype(np.float32), data.train.labels)
    return ClassificationResult(data, tell(test.astype(np.float32)))


def measure_classification(
    embedder: Embedder,
    data: ClassificationSet,
    *,
    task: str | None = None,
    dims: int | None = None,
    progress: bool = False,
) -> ClassificationResult:
    """Encode all texts as queries, with the prompt of the ``task`` or the default one, and learn.

    Raises:
        RecipeError: for a task that the model has no prompts for, or train texts of one label.
        MissingExtraError: when scikit-learn is not installed.
    """
    regression("classification")  # a missing package is told before the encoder works for minutes
    texts = (*data.train.texts, *data.test.texts)
    vectors = encode_alike(embedder, texts, task=task, dims=dims, progress=progress)
    return evaluate_classification(data, *np.split(vectors, [len(data.train.texts)]))


def measure_classification_by_words(data: ClassificationSet) -> ClassificationResult:
    """The baseline without a model: the same classifier on the weighted words of each text.

    Raises:
        RecipeError: when the train texts have one label only, or no words.
        MissingExtraError: when scikit-learn is not installed.
    """
    _need_labels(data)
    model, weights = regression("classification"), _word_weights(data.train.texts)
    settle(model, weights(data.train.texts), data.train.labels)
    return ClassificationResult(data, np.asarray(model.predict(weights(data.test.texts))))


# ---- clustering ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ClusteringResult:
    """The groups that k-means put the texts of a set into, in several runs."""

    data: ClusteringSet
    clusters: Int64[np.ndarray, "runs texts"]

    @property
    def runs(self) -> tuple[float, ...]:
        """The v-measure of each run."""
        once = self.data.rows.once
        return tuple(float(self._v_measure(each)(once)[0]) for each in self.clusters)

    def score(self) -> float:
        """The mean v-measure of the runs (Rosenberg and Hirschberg 2007).

        It is the harmonic mean of how pure the groups are and how whole the labels stay: their
        mutual information, divided by the mean of both entropies. 1 where groups are the labels.
        """
        return float(np.mean(self.runs))

    def interval(
        self,
        metric: ClusteringMetric = "v-measure",
        *,
        resamples: int = V_RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """The score with its bootstrap interval over texts; the groups stay as they are.

        A draw has fewer different texts than the set, and so a v-measure that is too high; the
        draws are moved until their mean is the score. Below some 30 texts a label the interval is
        a little too narrow.
        """
        return drawn_interval(self.data.rows, self._mean, resamples, seed, centred=True)

    def minus(
        self,
        other: "ClusteringResult",
        metric: ClusteringMetric = "v-measure",
        *,
        resamples: int = V_RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """How much higher this score is than another one on the same texts: both of each draw."""
        assert self.data.rows.texts == other.data.rows.texts, "two clusterings of one set"
        return drawn_interval(
            self.data.rows,
            lambda drawn: self._mean(drawn) - other._mean(drawn),
            resamples,
            seed,
            centred=True,
        )

    def _mean(self, drawn: Draws) -> Float64[np.ndarray, "draws"]:
        return np.mean([self._v_measure(each)(drawn) for each in self.clusters], axis=0)

    def _v_measure(self, clusters: Int64[np.ndarray, "texts"]) -> Statistic:
        truth, width = self.data.rows.labels, int(clusters.max()) + 1
        height, texts = len(self.data.labels), len(truth)
        logs = np.arange(texts + 1) * np.log(np.maximum(np.arange(texts + 1), 1))  # of n, n log n

        def entropy(counts: Int64[np.ndarray, "draws cells"]) -> Float64[np.ndarray, "draws"]:
            return np.log(texts) - logs[counts].sum(axis=1) / texts

        def v_measure(drawn: Draws) -> Float64[np.ndarray, "draws"]:
            counts = counted(truth * width + clusters, drawn, height * width)
            table = counts.reshape(-1, height, width)
            both = entropy(table.sum(axis=2)) + entropy(table.sum(axis=1))
            shared = both - entropy(counts)
            # One label in one group: nothing is mixed, and nothing torn apart.
            return np.divide(2 * shared, both, out=np.ones(len(both)), where=both > 1e-12)

        return v_measure


def evaluate_clustering(
    data: ClusteringSet, vectors: Any, *, runs: int = RUNS, seed: int = 0
) -> ClusteringResult:
    """Group vectors (or the rows of a sparse matrix) by k-means, k being the number of labels.

    Raises:
        ModelError: when a vector is not finite.
        MissingExtraError: when scikit-learn is not installed.
    """
    _need_sklearn()
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if isinstance(vectors, np.ndarray):
        check_finite(vectors)
    once: dict[str, Any] = {"n_init": 1}  # its annotation knows texts only
    found = []
    for run in range(runs):
        means = KMeans(len(data.labels), **once, random_state=seed + run)
        with warnings.catch_warnings():  # of fewer different vectors than labels
            warnings.simplefilter("ignore", ConvergenceWarning)
            found.append(means.fit_predict(vectors).astype(np.int64))
    return ClusteringResult(data, np.stack(found))


def measure_clustering(
    embedder: Embedder,
    data: ClusteringSet,
    *,
    task: str | None = None,
    dims: int | None = None,
    progress: bool = False,
) -> ClusteringResult:
    """Encode all texts as queries, with the prompt of the ``task`` or the default one, and group.

    Raises:
        RecipeError: for a task that the model has no prompts for.
        MissingExtraError: when scikit-learn is not installed.
    """
    _need_sklearn()
    texts = data.rows.texts
    vectors = encode_alike(embedder, texts, task=task, dims=dims, progress=progress)
    return evaluate_clustering(data, vectors)


def measure_clustering_by_words(data: ClusteringSet) -> ClusteringResult:
    """The baseline without a model: k-means of the weighted words of each text.

    Raises:
        RecipeError: when the texts have no words.
        MissingExtraError: when scikit-learn is not installed.
    """
    _need_sklearn()
    return evaluate_clustering(data, _word_weights(data.rows.texts)(data.rows.texts))


# ---- what both share -------------------------------------------------------------------------


def _need_labels(data: ClassificationSet) -> None:
    if len(data.train.used) < 2:
        raise RecipeError("the train texts have one label only; two are needed to tell apart")


def _need_sklearn() -> None:
    try:
        import sklearn.cluster  # noqa: F401 (is it there?)
    except ImportError as error:
        raise MissingExtraError("clustering", "probe") from error


def _word_weights(texts: Sequence[str]) -> Callable[[Sequence[str]], Any]:
    """A function from texts to sparse rows: word counts, damped, rare words weighing more."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(words(text) for text in texts):
        raise RecipeError("no text holds a word; leave the comparison with words out (--no-bm25)")
    how: dict[str, Any] = {"analyzer": words, "sublinear_tf": True, "dtype": np.float32}
    weighing = TfidfVectorizer(**how)
    return weighing.fit(texts).transform
