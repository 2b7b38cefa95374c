"""How sure a mean over queries is: bootstrap intervals (Efron 1979), percentile method.

Queries are drawn again, with replacement, as often as there are; the mean is taken; the middle
95 % of many such means is the interval. It says what other queries of the same kind would have
given. It says nothing of another training run, or of queries of another kind.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float64

RESAMPLES: Final = 10_000
_DRAWS_AT_ONCE: Final = 1 << 22  # of one block of resamples: 32 MB of row numbers


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its interval, with all that is needed to compute it again."""

    mean: float
    low: float
    high: float
    queries: int
    resamples: int = RESAMPLES
    seed: int = 0
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero: of a difference, that it is real."""
        return self.low > 0 or self.high < 0


def interval(
    values: Float64[np.ndarray, "queries"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The mean of one number a query, and its bootstrap interval.

    The seed decides the draws: equal input, equal interval. Too narrow below some 30 queries,
    and when queries depend on one another. Without queries everything is NaN.
    """
    count = len(values)
    if not count:
        return Interval(np.nan, np.nan, np.nan, 0, resamples, seed, level)
    means = _drawn_means(values, np.random.default_rng(seed), resamples)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    mean = float(values.mean())
    return Interval(mean, float(low), float(high), count, resamples, seed, level)


def paired_difference(
    after: Float64[np.ndarray, "queries"],
    before: Float64[np.ndarray, "queries"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """How much better ``after`` is than ``before`` on the same queries, and its interval.

    Query by query: what makes a query hard for both drops out, so this is far narrower than the
    distance of two intervals. Above zero means that ``after`` is the better one.
    """
    return interval(after - before, resamples=resamples, seed=seed, level=level)


def relative_change(
    after: Sequence[Float64[np.ndarray, "_"]],
    before: Sequence[Float64[np.ndarray, "_"]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """By which share the mean has changed, and its interval: -0.1 is a tenth less than before.

    Of several sets, it is the mean of their means, so that each counts alike, and the queries of
    each are drawn apart. The same queries are drawn of ``after`` and ``before``, in the same order.
    NaN where the mean before is zero.
    """
    random = np.random.default_rng(seed)
    both = [np.stack(pair, axis=1) for pair in zip(after, before, strict=True)]
    count = sum(map(len, both))
    if not both or not min(map(len, both)):
        return Interval(np.nan, np.nan, np.nan, count, resamples, seed, level)
    draws = np.sum([_drawn_means(each, random, resamples) for each in both], axis=0)
    changes = _share_changed(draws)
    tail = (1 - level) / 2
    low, high = np.full(2, np.nan)
    if not np.isnan(changes).all():
        low, high = np.nanquantile(changes, [tail, 1 - tail])
    whole = float(_share_changed(np.sum([each.mean(axis=0) for each in both], axis=0)))
    return Interval(whole, float(low), float(high), count, resamples, seed, level)


def _share_changed(sums: np.ndarray) -> np.ndarray:
    """Of pairs of what is now and what was, along the last axis."""
    now, was = sums[..., 0], sums[..., 1]
    return np.divide(now - was, was, out=np.full_like(was, np.nan), where=was > 0)


def _drawn_means(values: np.ndarray, random: np.random.Generator, resamples: int) -> np.ndarray:
    """The mean over queries, the first axis, of each of so many draws of them."""
    count = len(values)
    means = np.empty((resamples, *values.shape[1:]))
    at_once = max(1, _DRAWS_AT_ONCE // count)
    for start in range(0, resamples, at_once):
        part = means[start : start + at_once]
        part[:] = values[random.integers(0, count, (len(part), count))].mean(axis=1)
    return means


def pooled_interval(
    counts: Float64[np.ndarray, "queries counts"],
    statistic: Callable[[Float64[np.ndarray, "draws counts"]], Float64[np.ndarray, "draws"]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A figure of the summed counts, such as an F1, and its bootstrap interval.

    For items that come in groups and are not independent inside them, such as the words of a
    sentence: a row holds the counts of one group, and groups are drawn whole. ``statistic`` makes
    one figure of each row of summed counts. A draw whose figure is NaN is left out.
    """
    groups = len(counts)
    if not groups:
        return Interval(np.nan, np.nan, np.nan, 0, resamples, seed, level)
    random = np.random.default_rng(seed)
    figures = np.empty(resamples)
    at_once = max(1, _DRAWS_AT_ONCE // groups)
    for start in range(0, resamples, at_once):
        part = figures[start : start + at_once]
        drawn = random.integers(0, groups, (len(part), groups))
        drawn += groups * np.arange(len(part))[:, None]
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        part[:] = statistic(times @ counts)
    tail = (1 - level) / 2
    low, high = np.full(2, np.nan)
    if not np.isnan(figures).all():
        low, high = np.nanquantile(figures, [tail, 1 - tail])
    whole = float(statistic(counts.sum(axis=0, keepdims=True))[0])
    return Interval(whole, float(low), float(high), groups, resamples, seed, level)
