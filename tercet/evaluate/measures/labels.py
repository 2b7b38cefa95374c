"""How well vectors separate labels: classification and clustering of texts.

Classification fits a linear classifier to the vectors of training texts and predicts the labels of
others. Clustering runs k-means with as many groups as there are labels, and measures how well they
agree. The baseline of both uses a text's weighted words (TF-IDF) instead of a model's vector.
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
from tercet.evaluate.measures.sts import check_finite
from tercet.evaluate.report.intervals import RESAMPLES, Interval, counted, in_blocks
from tercet.evaluate.sets.label_sets import ClassificationSet, ClusteringSet, LabelledRows
from tercet.models.embedder import Embedder

ClassificationMetric: TypeAlias = Literal["accuracy", "macro F1"]
METRICS: Final[tuple[ClassificationMetric, ...]] = ("accuracy", "macro F1")
ClusteringMetric: TypeAlias = Literal["v-measure"]
CLUSTERING_METRICS: Final[tuple[ClusteringMetric, ...]] = ("v-measure",)

Draws: TypeAlias = Int64[np.ndarray, "draws texts"]
Statistic: TypeAlias = Callable[[Draws], Float64[np.ndarray, "draws"]]

RUNS: Final = 5  # of k-means, from different initial centres
V_RESAMPLES: Final = 2_000  # each counts all texts once a run
_CELLS: Final = 1 << 20  # of one block of draws: 8 MB an array


# ---- classification --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ClassificationResult:
    """The labels that a classifier predicted for the test texts of a set."""

    data: ClassificationSet
    predicted: Int64[np.ndarray, "texts"]

    def score(self, metric: ClassificationMetric = "accuracy") -> float:
        """Return the share of correct labels, or the mean F1 of the labels in the test texts."""
        return float(self._statistic(metric)(_each_once(self.data.test))[0])

    def interval(
        self,
        metric: ClassificationMetric = "accuracy",
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """Return the score with its bootstrap interval over test texts, the classifier fixed."""
        return _drawn_interval(self.data.test, self._statistic(metric), resamples, seed)

    def minus(
        self,
        other: "ClassificationResult",
        metric: ClassificationMetric = "accuracy",
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """Return by how much this score is higher than another one, on the same draws of texts."""
        assert self.data.test.texts == other.data.test.texts, "two classifiers on one set"
        one, two = self._statistic(metric), other._statistic(metric)
        return _drawn_interval(
            self.data.test, lambda drawn: one(drawn) - two(drawn), resamples, seed
        )

    def _statistic(self, metric: ClassificationMetric) -> Statistic:
        truth, predicted, wrong = self.data.test.labels, self.predicted, len(self.data.labels)
        right = truth == predicted
        if metric == "accuracy":
            return lambda drawn: right[drawn].mean(axis=1)
        used = self.data.test.used
        codes = (np.where(right, truth, wrong), truth, predicted)

        def macro_f1(drawn: Draws) -> Float64[np.ndarray, "draws"]:
            counts = [counted(each[drawn], wrong + 1)[:, used] for each in codes]
            return mean_f1(np.stack(counts, axis=-1).astype(np.float64))

        return macro_f1


def evaluate_classification(
    data: ClassificationSet,
    train: Float[np.ndarray, "train dim"],
    test: Float[np.ndarray, "test dim"],
) -> ClassificationResult:
    """Fit a logistic regression to vectors of the train texts, and predict the test labels.

    Raises:
        RecipeError: if the train texts have fewer than two labels.
        ModelError: if a vector is not finite.
        MissingExtraError: if scikit-learn is not installed.
    """
    _need_labels(data)
    for vectors in (train, test):
        check_finite(vectors)
    model = regression("classification", train.shape[1])
    classify = vector_probe(model, train.astype(np.float32), data.train.labels)
    return ClassificationResult(data, classify(test.astype(np.float32)))


def measure_classification(
    embedder: Embedder,
    data: ClassificationSet,
    *,
    task: str | None = None,
    dims: int | None = None,
    progress: bool = False,
) -> ClassificationResult:
    """Encode all texts as queries, with the prompt of the task or the default one, and classify.

    Raises:
        RecipeError: if the model has no prompts for the task, or the train texts have one label.
        MissingExtraError: if scikit-learn is not installed.
    """
    regression("classification")  # raises for a missing package before minutes of encoding
    texts = (*data.train.texts, *data.test.texts)
    vectors = encode_alike(embedder, texts, task=task, dims=dims, progress=progress)
    return evaluate_classification(data, *np.split(vectors, [len(data.train.texts)]))


def measure_classification_by_words(data: ClassificationSet) -> ClassificationResult:
    """Measure the baseline without a model: the same classifier on the TF-IDF of each text.

    Raises:
        RecipeError: if the train texts have fewer than two labels, or no words.
        MissingExtraError: if scikit-learn is not installed.
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
        once = _each_once(self.data.rows)
        return tuple(float(self._v_measure(each)(once)[0]) for each in self.clusters)

    def score(self) -> float:
        """Return the mean v-measure of the runs (Rosenberg and Hirschberg 2007).

        The v-measure is the harmonic mean of homogeneity and completeness: the mutual information
        of groups and labels, divided by the mean of both entropies. 1 if they are the same.
        """
        return float(np.mean(self.runs))

    def interval(
        self,
        metric: ClusteringMetric = "v-measure",
        *,
        resamples: int = V_RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """Return the score with its bootstrap interval over texts, the groups fixed.

        A draw has fewer different texts than the set, and so its v-measure is too high; the draws
        are shifted so that their mean is the score. Below about 30 texts a label the interval is
        slightly too narrow.
        """
        return _drawn_interval(self.data.rows, self._mean, resamples, seed, centred=True)

    def minus(
        self,
        other: "ClusteringResult",
        metric: ClusteringMetric = "v-measure",
        *,
        resamples: int = V_RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """Return by how much this score is higher than another one, on the same draws of texts."""
        assert self.data.rows.texts == other.data.rows.texts, "two clusterings of one set"
        return _drawn_interval(
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
        logs = np.arange(texts + 1) * np.log(np.maximum(np.arange(texts + 1), 1))  # n log n

        def entropy(counts: Int64[np.ndarray, "draws cells"]) -> Float64[np.ndarray, "draws"]:
            return np.log(texts) - logs[counts].sum(axis=1) / texts

        def v_measure(drawn: Draws) -> Float64[np.ndarray, "draws"]:
            counts = counted((truth * width + clusters)[drawn], height * width)
            table = counts.reshape(-1, height, width)
            both = entropy(table.sum(axis=2)) + entropy(table.sum(axis=1))
            shared = both - entropy(counts)
            # One label in one group counts as perfect.
            return np.divide(2 * shared, both, out=np.ones(len(both)), where=both > 1e-12)

        return v_measure


def evaluate_clustering(
    data: ClusteringSet, vectors: Any, *, runs: int = RUNS, seed: int = 0
) -> ClusteringResult:
    """Group vectors (or the rows of a sparse matrix) by k-means, k being the number of labels.

    Raises:
        ModelError: if a vector is not finite.
        MissingExtraError: if scikit-learn is not installed.
    """
    _need_sklearn()
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if isinstance(vectors, np.ndarray):
        check_finite(vectors)
    once: dict[str, Any] = {"n_init": 1}  # scikit-learn annotates it as a string only
    found = []
    for run in range(runs):
        means = KMeans(len(data.labels), **once, random_state=seed + run)
        with warnings.catch_warnings():  # about fewer distinct vectors than labels
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
        RecipeError: if the model has no prompts for the task.
        MissingExtraError: if scikit-learn is not installed.
    """
    _need_sklearn()
    texts = data.rows.texts
    vectors = encode_alike(embedder, texts, task=task, dims=dims, progress=progress)
    return evaluate_clustering(data, vectors)


def measure_clustering_by_words(data: ClusteringSet) -> ClusteringResult:
    """Measure the baseline without a model: k-means of the TF-IDF of each text.

    Raises:
        RecipeError: if the texts have no words.
        MissingExtraError: if scikit-learn is not installed.
    """
    _need_sklearn()
    return evaluate_clustering(data, _word_weights(data.rows.texts)(data.rows.texts))


# ---- shared by both --------------------------------------------------------------------------


def _each_once(rows: LabelledRows) -> Draws:
    """Return one draw that has each text once."""
    return np.arange(len(rows.texts))[None]


def _drawn_interval(
    rows: LabelledRows, figure: Statistic, resamples: int, seed: int, *, centred: bool = False
) -> Interval:
    """Return a figure of all texts, and its bootstrap interval (percentile method).

    ``centred`` draws are shifted so that their mean is the figure of all texts.
    """
    texts, random = len(rows.texts), np.random.default_rng(seed)
    cells = (int(rows.labels.max()) + 1) ** 2  # of the table of labels and groups
    found = in_blocks(
        lambda draws: figure(random.integers(0, texts, (draws, texts))),
        resamples,
        at_once=_CELLS // max(texts, cells),
    )
    whole = float(figure(_each_once(rows))[0])
    if centred:
        found += whole - found.mean()
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(whole, float(low), float(high), texts, resamples, seed)


def _need_labels(data: ClassificationSet) -> None:
    if len(data.train.used) < 2:
        raise RecipeError("the train texts have only one label; at least two are needed")


def _need_sklearn() -> None:
    try:
        import sklearn.cluster  # noqa: F401 (is it there?)
    except ImportError as error:
        raise MissingExtraError("clustering", "probe") from error


def _word_weights(texts: Sequence[str]) -> Callable[[Sequence[str]], Any]:
    """Return a function from texts to sparse rows: sublinear word counts by inverse frequency."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(words(text) for text in texts):
        raise RecipeError("no text contains a word; leave out the baseline of words (--no-bm25)")
    how: dict[str, Any] = {"analyzer": words, "sublinear_tf": True, "dtype": np.float32}
    weighing = TfidfVectorizer(**how)
    return weighing.fit(texts).transform
