"""Semantic textual similarity (STS): how well a model's cosines agree with people's scores."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Float64, Int64

from tercet.data.files.similarity import BootstrapUnit, SimilaritySet
from tercet.errors import BROKEN_MODEL, ModelError
from tercet.evaluate.measures.bm25 import words
from tercet.evaluate.measures.prompts import encode_alike
from tercet.evaluate.report.intervals import RESAMPLES, Interval, counted, in_blocks
from tercet.models.embedder import Embedder
from tercet.types import Role

Correlation: TypeAlias = Literal["spearman", "pearson"]

METRICS: Final[tuple[Correlation, ...]] = ("spearman", "pearson")
_CELLS: Final = 1 << 19  # draws times pairs of one block: 4 MB an array


@dataclass(frozen=True, slots=True, eq=False)
class SimilarityResult:
    """A set, and a model's cosine for each of its pairs."""

    data: SimilaritySet
    cosines: Float64[np.ndarray, "pairs"]

    def correlation(self, metric: Correlation = "spearman") -> float:
        """Return the correlation with people's scores: of ranks (Spearman) or values (Pearson).

        Equal values share their mean rank. NaN if all cosines are equal, or below two pairs.
        """
        once = np.ones((1, len(self.cosines)))
        return float(_correlations(once, self.cosines, self.data.scores, metric)[0])

    def interval(
        self,
        metric: Correlation = "spearman",
        *,
        unit: BootstrapUnit | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """Return the correlation, and its bootstrap interval by the percentile method.

        ``unit`` is what is drawn with replacement; None takes :attr:`SimilaritySet.unit`. If texts
        are drawn, a pair counts as often as the draws of its first text times those of its second,
        and a text that is drawn twice makes no pair with itself. This is conservative: the interval
        is too wide if pairs vary more than texts do (Owen 2007, "The pigeonhole bootstrap"). A draw
        in which one side does not vary is left out.
        """
        unit = unit or self.data.unit
        drawn = _resampled(self, metric, unit, resamples, seed)
        return _percentiles(self.correlation(metric), drawn, self.data.count(unit), seed)

    def minus(
        self,
        other: "SimilarityResult",
        metric: Correlation = "spearman",
        *,
        unit: BootstrapUnit | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """Return by how much this correlation is higher than another one on the same set.

        Both are computed on the same draws, so that the difficulty of pairs cancels out.
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
    """Compare the cosine of each pair with its score; the vectors need not have unit length.

    Raises:
        ModelError: if a vector is not finite.
    """
    assert len(vectors) == len(data.texts), "one vector for each text"
    check_finite(vectors)
    wide = vectors.astype(np.float64)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return SimilarityResult(data, np.einsum("pd,pd->p", *wide[data.pairs].swapaxes(0, 1)))


def check_finite(vectors: Float[np.ndarray, "texts dim"]) -> None:
    """Raise if a vector contains NaN or infinity.

    Raises:
        ModelError: naming the first such vector.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ModelError(
            f"the vector of text {int(finite.argmin())} contains NaN or infinity; {BROKEN_MODEL}"
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
    """Encode each text once and compare; both sides get the prompt of one role.

    It is the prompt of the ``task``, or the default one.

    Raises:
        RecipeError: if the model has no prompts for the task.
    """
    vectors = encode_alike(embedder, data.texts, role, task=task, dims=dims, progress=progress)
    return evaluate_similarity(data, vectors)


def measure_overlap(data: SimilaritySet) -> SimilarityResult:
    """Measure the baseline without a model: the cosine of the two texts' sets of words.

    |A & B| / sqrt(|A| |B|); 0 for a text without words.
    """
    sets = [frozenset(words(text)) for text in data.texts]
    overlaps = [
        len(sets[i] & sets[j]) / np.sqrt(max(len(sets[i]) * len(sets[j]), 1)) for i, j in data.pairs
    ]
    return SimilarityResult(data, np.array(overlaps, dtype=np.float64))


def _resampled(
    result: SimilarityResult, metric: Correlation, unit: BootstrapUnit, resamples: int, seed: int
) -> Float64[np.ndarray, "resamples"]:
    """Return the correlation of each draw; equal seeds give equal draws for all models of a set."""
    data, random = result.data, np.random.default_rng(seed)

    def figures(draws: int) -> Float64[np.ndarray, "draws"]:
        weights = _drawn(data, unit, draws, random).astype(np.float64)
        return _correlations(weights, result.cosines, data.scores, metric)

    return in_blocks(figures, resamples, at_once=_CELLS // max(len(data.pairs), 1))


def _percentiles(
    whole: float, drawn: Float64[np.ndarray, "resamples"], count: int, seed: int
) -> Interval:
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return Interval(whole, float(low), float(high), count, len(drawn), seed)


def _drawn(
    data: SimilaritySet, unit: BootstrapUnit, draws: int, random: np.random.Generator
) -> Int64[np.ndarray, "draws pairs"]:
    """Return how often each draw contains each pair."""
    if unit == "pairs":
        return _times(len(data.pairs), draws, random)
    times = _times(len(data.texts), draws, random)
    first, second = data.pairs.T
    # A pair of a text with itself is one draw of that text, not two.
    return times[:, first] * np.where(first == second, 1, times[:, second])


def _times(count: int, draws: int, random: np.random.Generator) -> Int64[np.ndarray, "draws count"]:
    """Return how often each of ``count`` things is drawn in ``count`` draws with replacement."""
    drawn = random.integers(0, count, (draws, count)) if count else np.zeros((draws, 0), np.int64)
    return counted(drawn, count)


def _correlations(
    weights: Float64[np.ndarray, "draws pairs"],
    cosines: Float64[np.ndarray, "pairs"],
    scores: Float64[np.ndarray, "pairs"],
    metric: Correlation,
) -> Float64[np.ndarray, "draws"]:
    """Return the correlation of each draw, with pairs weighted; NaN if a side is constant."""
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
    # Equal values leave only rounding errors, which correlate with anything.
    centred[np.abs(centred) < 1e-12 * np.abs(values).max(initial=0)] = 0
    return centred


def _centred_ranks(
    weights: Float64[np.ndarray, "draws pairs"], values: Float64[np.ndarray, "pairs"]
) -> Float64[np.ndarray, "draws pairs"]:
    """Return twice the rank of each pair within its draw, minus the mean.

    Equal values share their mean rank. All draws share the order of the values, so nothing is
    sorted again: ranks are running sums of weights.
    """
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[order], np.arange(len(distinct)), side="right")
    upto = np.cumsum(weights[:, order], axis=1)[:, ends - 1]  # [draws, distinct]
    before = np.concatenate([np.zeros((len(weights), 1)), upto[:, :-1]], axis=1)
    return (before + upto - weights.sum(axis=1, keepdims=True))[:, group]
