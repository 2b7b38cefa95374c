"""How well a model's cosines order pairs of texts the way that people do."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Float64, Int64

from tercet.data.files.similarity import BootstrapUnit, SimilaritySet
from tercet.errors import ModelError
from tercet.evaluate.measures.bm25 import words
from tercet.evaluate.measures.prompts import encode_alike
from tercet.evaluate.report.intervals import RESAMPLES, Interval
from tercet.models.embedder import Embedder
from tercet.types import Role

Metric: TypeAlias = Literal["spearman", "pearson"]

METRICS: Final[tuple[Metric, ...]] = ("spearman", "pearson")
_CELLS: Final = 1 << 19  # draws times pairs of one block: 4 MB an array


@dataclass(frozen=True, slots=True, eq=False)
class SimilarityResult:
    """A set, and how alike a model finds the texts of each of its pairs."""

    data: SimilaritySet
    cosines: Float64[np.ndarray, "pairs"]

    def correlation(self, metric: Metric = "spearman") -> float:
        """With people's scores: of ranks (Spearman, equal values share their mean rank) or values.

        NaN where all cosines are equal, and below two pairs.
        """
        once = np.ones((1, len(self.cosines)))
        return float(_correlations(once, self.cosines, self.data.scores, metric)[0])

    def interval(
        self,
        metric: Metric = "spearman",
        *,
        unit: BootstrapUnit | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """The correlation, and its bootstrap interval by the percentile method.

        ``unit`` is what is drawn with replacement; None takes :attr:`SimilaritySet.unit`. Where
        texts are drawn, a pair counts as often as the draws of its one text times those of its
        other, and a text that is drawn twice makes no pair with itself. This is cautious: where
        pairs differ more than texts do, the interval is too wide (Owen 2007, "The pigeonhole
        bootstrap"). A draw in which one side does not vary is left out.
        """
        unit = unit or self.data.unit
        drawn = _resampled(self, metric, unit, resamples, seed)
        return _percentiles(self.correlation(metric), drawn, self.data.count(unit), seed)

    def minus(
        self,
        other: "SimilarityResult",
        metric: Metric = "spearman",
        *,
        unit: BootstrapUnit | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """How much higher this correlation is than another model's on the same set.

        Both are taken of the same draws, so that hard pairs drop out.
        """
        assert np.array_equal(self.data.pairs, other.data.pairs), "two models on one set"
        unit = unit or self.data.unit
        drawn = _resampled(self, metric, unit, resamples, seed)
        drawn -= _resampled(other, metric, unit, resamples, seed)
        difference = self.correlation(metric) - other.correlation(metric)
        return _percentiles(difference, drawn, self.data.count(unit), seed)


def evaluate_similarity(
    data: SimilaritySet, vectors: Float[np.ndarray, "texts dim"]
) -> SimilarityResult:
    """Compare the cosine of each pair with its score; the vectors need not be of unit length.

    Raises:
        ModelError: when a vector is not finite.
    """
    assert len(vectors) == len(data.texts), "one vector for each text"
    check_finite(vectors)
    wide = vectors.astype(np.float64)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return SimilarityResult(data, np.einsum("pd,pd->p", *wide[data.pairs].swapaxes(0, 1)))


def check_finite(vectors: Float[np.ndarray, "texts dim"]) -> None:
    """Refuse vectors that no text can have.

    Raises:
        ModelError: when a vector is not finite, naming the first.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ModelError(
            f"the vector of text {int(finite.argmin())} holds NaN or infinity; "
            "the model is damaged, or its training diverged"
        )


def measure_similarity(
    embedder: Embedder,
    data: SimilaritySet,
    *,
    role: Role = "query",
    task: str | None = None,
    dims: int | None = None,
    progress: bool = False,
) -> SimilarityResult:
    """Encode each text once and compare: neither side is searched, so both get one role's prompt.

    It is that of the ``task``, or the default one. For another way of reading, hand the vectors
    of ``embedder.encode`` to ``evaluate_similarity``.

    Raises:
        RecipeError: for a task that the model has no prompts for.
    """
    vectors = encode_alike(embedder, data.texts, role, task=task, dims=dims, progress=progress)
    return evaluate_similarity(data, vectors)


def measure_overlap(data: SimilaritySet) -> SimilarityResult:
    """The baseline without a model: the cosine of the two texts' sets of words.

    |A & B| / sqrt(|A| |B|); 0 for a text without a word.
    """
    sets = [frozenset(words(text)) for text in data.texts]
    overlaps = [
        len(sets[i] & sets[j]) / np.sqrt(max(len(sets[i]) * len(sets[j]), 1)) for i, j in data.pairs
    ]
    return SimilarityResult(data, np.array(overlaps, dtype=np.float64))


def _resampled(
    result: SimilarityResult, metric: Metric, unit: BootstrapUnit, resamples: int, seed: int
) -> Float64[np.ndarray, "resamples"]:
    """The correlation of each draw. Equal seeds draw the same for every model of a set."""
    data, random = result.data, np.random.default_rng(seed)
    found = np.empty(resamples)
    at_once = max(1, _CELLS // max(len(data.pairs), 1))
    for start in range(0, resamples, at_once):
        part = found[start : start + at_once]
        weights = _drawn(data, unit, len(part), random).astype(np.float64)
        part[:] = _correlations(weights, result.cosines, data.scores, metric)
    return found


def _percentiles(
    whole: float, drawn: Float64[np.ndarray, "resamples"], count: int, seed: int
) -> Interval:
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return Interval(whole, float(low), float(high), count, len(drawn), seed)


def _drawn(
    data: SimilaritySet, unit: BootstrapUnit, draws: int, random: np.random.Generator
) -> Int64[np.ndarray, "draws pairs"]:
    """How often each draw holds each pair."""
    if unit == "pairs":
        return _times(len(data.pairs), draws, random)
    times = _times(len(data.texts), draws, random)
    first, second = data.pairs.T
    # A text that people were given twice is one text, not two draws that met.
    return times[:, first] * np.where(first == second, 1, times[:, second])


def _times(count: int, draws: int, random: np.random.Generator) -> Int64[np.ndarray, "draws count"]:
    """How often each of ``count`` things comes up when as many are drawn with replacement."""
    drawn = random.integers(0, count, (draws, count)) if count else np.zeros((draws, 0), np.int64)
    drawn += count * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count)


def _correlations(
    weights: Float64[np.ndarray, "draws pairs"],
    cosines: Float64[np.ndarray, "pairs"],
    scores: Float64[np.ndarray, "pairs"],
    metric: Metric,
) -> Float64[np.ndarray, "draws"]:
    """Of each draw, in which a pair counts as often as its weight; NaN where a side is constant."""
    centred = _centred_ranks if metric == "spearman" else _centred
    x, y = centred(weights, cosines), centred(weights, scores)
    products = np.einsum("dp,dp,dp->d", weights, x, y)
    spread = np.sqrt(
        np.einsum("dp,dp,dp->d", weights, x, x) * np.einsum("dp,dp,dp->d", weights, y, y)
    )
    nothing = np.full(len(weights), np.nan)
    return np.divide(products, spread, out=nothing, where=spread > 0)


def _centred(
    weights: Float64[np.ndarray, "draws pairs"], values: Float64[np.ndarray, "pairs"]
) -> Float64[np.ndarray, "draws pairs"]:
    means = (weights @ values) / np.maximum(weights.sum(axis=1), 1)
    centred = values - means[:, None]
    # Of equal values, what is left is rounding, which correlates with anything.
    centred[np.abs(centred) < 1e-12 * np.abs(values).max(initial=0)] = 0
    return centred


def _centred_ranks(
    weights: Float64[np.ndarray, "draws pairs"], values: Float64[np.ndarray, "pairs"]
) -> Float64[np.ndarray, "draws pairs"]:
    """Twice the rank of each pair among those of its draw, less the mean.

    Equal values share the mean of their ranks. The order of the values is that of all draws, so
    nothing is sorted again: ranks are running sums of weights.
    """
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[order], np.arange(len(distinct)), side="right")
    upto = np.cumsum(weights[:, order], axis=1)[:, ends - 1]  # [draws, distinct]
    before = np.concatenate([np.zeros((len(weights), 1)), upto[:, :-1]], axis=1)
    return (before + upto - weights.sum(axis=1, keepdims=True))[:, group]
