"""Uncertainty of a mean over queries: bootstrap intervals (Efron 1979), percentile method.

As many queries as there are are drawn with replacement; the middle 95 % of the means of many such
draws is the interval. It estimates the result on other queries of the same kind. It does not cover
another training run, or queries of another kind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float64, Int64

RESAMPLES: Final = 10_000
_LEVEL: Final = 0.95
_DRAWS_AT_ONCE: Final = 1 << 22  # of one block of resamples: 32 MB of row numbers


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its interval, with all that is needed to reproduce it."""

    mean: float
    low: float
    high: float
    queries: int
    resamples: int = RESAMPLES
    seed: int = 0
    level: float = _LEVEL

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def signed(self) -> str:
        """Format a difference, with the signs of its numbers."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def excludes_zero(self) -> bool:
        """Return whether the interval is on one side of zero."""
        return self.low > 0 or self.high < 0


def metrics_of(rows: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """Return all metrics of some systems, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def interval(
    values: Float64[np.ndarray, "queries"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = _LEVEL,
) -> Interval:
    """Return the mean of one number a query, and its bootstrap interval.

    The seed decides the draws: equal input, equal interval. Too narrow below about 30 queries, and
    if queries depend on one another. Without queries all numbers are NaN.
    """
    count = len(values)
    if not count:
        return Interval(np.nan, np.nan, np.nan, 0, resamples, seed, level)
    means = _drawn_means(values, np.random.default_rng(seed), resamples)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high), count, resamples, seed, level)


def _middle(draws: Float64[np.ndarray, "resamples"]) -> tuple[float, float]:
    """Return the bounds of the middle 95 % of draws, without those that are NaN."""
    tail = (1 - _LEVEL) / 2
    if np.isnan(draws).all():
        return np.nan, np.nan
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(
    after: Float64[np.ndarray, "queries"],
    before: Float64[np.ndarray, "queries"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return by how much ``after`` is better than ``before`` on the same queries.

    It is computed query by query, so that their difficulty cancels out.
    """
    return interval(after - before, resamples=resamples, seed=seed)


def relative_change(
    after: Sequence[Float64[np.ndarray, "_"]],
    before: Sequence[Float64[np.ndarray, "_"]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the relative change of a mean, and its interval: -0.1 is a tenth less than before.

    For several sets, the mean is that of their means, so that each has equal weight, and the
    queries of each are drawn separately, in the same order for ``after`` and ``before``. NaN if the
    mean before is zero.
    """
    random = np.random.default_rng(seed)
    both = [np.stack(pair, axis=1) for pair in zip(after, before, strict=True)]
    count = sum(map(len, both))
    if not both or not min(map(len, both)):
        return Interval(np.nan, np.nan, np.nan, count, resamples, seed)
    draws = np.sum([_drawn_means(each, random, resamples) for each in both], axis=0)
    whole = float(_share_changed(np.sum([each.mean(axis=0) for each in both], axis=0)))
    return Interval(whole, *_middle(_share_changed(draws)), count, resamples, seed)


def _share_changed(sums: np.ndarray) -> np.ndarray:
    """Return the relative change of pairs (after, before) along the last axis."""
    after, before = sums[..., 0], sums[..., 1]
    return np.divide(after - before, before, out=np.full_like(before, np.nan), where=before > 0)


def _drawn_means(values: np.ndarray, random: np.random.Generator, resamples: int) -> np.ndarray:
    """Return the mean over queries, the first axis, of each of ``resamples`` draws."""
    count = len(values)
    return in_blocks(
        lambda draws: values[random.integers(0, count, (draws, count))].mean(axis=1),
        resamples,
        at_once=_DRAWS_AT_ONCE // count,
    )


def in_blocks(figures: Callable[[int], np.ndarray], resamples: int, *, at_once: int) -> np.ndarray:
    """Return the figures of all resamples, of which about ``at_once`` are computed together."""
    size = max(1, at_once)
    blocks = [figures(min(size, resamples - start)) for start in range(0, resamples, size)]
    return np.concatenate(blocks, dtype=np.float64)


def counted(codes: Int64[np.ndarray, "draws items"], kinds: int) -> Int64[np.ndarray, "draws _"]:
    """Return how often each code below ``kinds`` occurs in each draw."""
    places = codes + kinds * np.arange(len(codes))[:, None]
    counts = np.bincount(places.ravel(), minlength=len(codes) * kinds)
    return counts.reshape(len(codes), kinds)


def pooled_interval(
    counts: Float64[np.ndarray, "queries counts"],
    statistic: Callable[[Float64[np.ndarray, "draws counts"]], Float64[np.ndarray, "draws"]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return a figure of summed counts, such as an F1, and its bootstrap interval.

    For items that come in groups and depend on each other within a group, such as the words of a
    sentence: a row holds the counts of one group, and whole groups are drawn. ``statistic`` maps
    each row of summed counts to a figure. A draw whose figure is NaN is left out.
    """
    groups = len(counts)
    if not groups:
        return Interval(np.nan, np.nan, np.nan, 0, resamples, seed)
    random = np.random.default_rng(seed)
    figures = in_blocks(
        lambda n: statistic(counted(random.integers(0, groups, (n, groups)), groups) @ counts),
        resamples,
        at_once=_DRAWS_AT_ONCE // groups,
    )
    whole = float(statistic(counts.sum(axis=0, keepdims=True))[0])
    return Interval(whole, *_middle(figures), groups, resamples, seed)
