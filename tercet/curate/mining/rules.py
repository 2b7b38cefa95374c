"""Rules that select which candidates may become negatives, by the teacher's scores alone.

The nearest documents of a query are often unlabelled positives. Positive-aware rules compare a
candidate with the query's own positive (NV-Retriever, arXiv 2407.15831, sec. 3).
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int8, UInt64

from tercet.errors import RecipeError

RuleName: TypeAlias = Literal["naive", "percent", "margin", "absolute", "quantile", "relative"]

# Verdicts on a candidate: LEFT, or the first reason for which it is dropped.
LEFT: Final = 0
REASONS: Final = ("positive", "query", "already", "shifted", "too close")
POSITIVE, QUERY, ALREADY, SHIFTED, TOO_CLOSE = range(1, 6)
ABSENT: Final = 6  # no candidate: fewer documents were found than asked for

_DEFAULTS: Final[dict[RuleName, float]] = {
    "naive": 0.0,  # not used
    "percent": 0.95,
    "margin": 0.05,
    "absolute": 0.7,
    "relative": 0.95,
}
_DECIMALS: Final = 9  # so that 0.8 - 0.05 * 0.8 is 0.76 exactly, and 0.76 is not below it


@dataclass(frozen=True, slots=True, kw_only=True)
class MiningRule:
    """An upper limit for the scores of negatives, and how negatives are taken from those below it.

    A negative must score strictly below the limit; the query's positive scores ``s``. Kinds:

    - ``naive``: no limit
    - ``percent`` (TopK-PercPos): ``s - (1 - value) * |s|``, which is ``value * s`` for positive
      ``s`` and stays below ``s`` for negative ``s``
    - ``margin`` (TopK-MarginPos): ``s - value``
    - ``absolute`` (TopK-Abs): ``value``
    - ``quantile``: the ``value``-quantile of all ``s`` of the source; for teachers whose cosines
      all lie close together, for which 95 percent means nothing
    - ``relative``: ``s - (1 - value) * |s - m|``, with ``m`` the median score of the query's
      candidates; for such teachers too, as it is invariant to adding a constant to all scores

    ``shift`` skips that many of the nearest documents that are no known positives. ``sample_from``
    draws without replacement from that many of the best remaining candidates, by the softmax of
    score / temperature; None takes the best.

    Raises:
        RecipeError: for a number out of range.
    """

    kind: RuleName = "percent"
    value: float | None = None  # None: the paper's 0.95, 0.05 or 0.7
    shift: int = 0
    sample_from: int | None = None
    temperature: float = 1.0
    seed: int = 0  # of the draws; each query has its own random numbers

    def __post_init__(self) -> None:
        self._check_value()
        if self.shift < 0:
            raise RecipeError(f"shift must be at least 0; got {self.shift}")
        if self.sample_from is not None and self.sample_from < 1:
            raise RecipeError(f"sample_from must be at least 1; got {self.sample_from}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise RecipeError(f"temperature must be above 0; got {self.temperature}")
        if self.seed < 0:
            raise RecipeError(f"seed must be at least 0; got {self.seed}")

    def _check_value(self) -> None:
        if self.value is None:
            if self.kind not in _DEFAULTS:
                raise RecipeError(f"the rule {self.kind} has no default value; give one")
            return
        if self.kind == "naive":
            raise RecipeError("the rule naive takes no value; leave it out")
        if not math.isfinite(self.value):
            raise RecipeError(f"the value of the rule must be finite; got {self.value}")
        if self.kind in ("percent", "quantile", "relative") and not 0 <= self.value <= 1:
            raise RecipeError(
                f"the value of the rule {self.kind} must be between 0 and 1, as in 0.95; got "
                f"{self.value}"
            )
        if self.kind == "margin" and self.value < 0:
            raise RecipeError(f"the margin must be at least 0; got {self.value}")

    @property
    def used_value(self) -> float:
        """The value, or the default of the kind."""
        return _DEFAULTS[self.kind] if self.value is None else self.value

    def limit(
        self,
        positives: Float[np.ndarray, "queries"],
        medians: Float[np.ndarray, "queries"] | float = 0.0,
    ) -> Float64[np.ndarray, "queries"]:
        """Return the limit for the negatives of each query (arXiv 2407.15831, sec. 3).

        ``positives`` are the scores of each query's positive, the lowest of several; ``medians``
        those of its candidates.
        """
        scores, value = positives.astype(np.float64), self.used_value
        limits = {
            "naive": np.full_like(scores, np.inf),
            "percent": scores - (1 - value) * np.abs(scores),
            "margin": scores - value,
            "absolute": np.full_like(scores, value),
            "relative": scores - (1 - value) * np.abs(scores - medians),
        }
        assert self.kind in limits, "a quantile is replaced by its score before it is used"
        return np.round(limits[self.kind], _DECIMALS)


def judge(
    rule: MiningRule,
    scores: Float[np.ndarray, "queries ranks"],
    positives: Float[np.ndarray, "queries"],
    barred: Int8[np.ndarray, "queries ranks"],
) -> Int8[np.ndarray, "queries ranks"]:
    """Return the verdict on each candidate of each query, best candidate first.

    ``barred`` has the verdicts that do not depend on scores; the others are LEFT there.
    """
    verdicts = barred.copy()
    free = verdicts == LEFT
    verdicts[free & (free.cumsum(axis=1) <= rule.shift)] = SHIFTED
    exact = np.round(scores.astype(np.float64), _DECIMALS)
    medians = _medians(exact, barred != ABSENT) if rule.kind == "relative" else 0.0
    near = ~(exact < rule.limit(positives, medians)[:, None])
    verdicts[(verdicts == LEFT) & near] = TOO_CLOSE
    return verdicts


def _medians(
    scores: Float64[np.ndarray, "queries ranks"], there: Bool[np.ndarray, "queries ranks"]
) -> Float64[np.ndarray, "queries"]:
    """Return the median of each query's present scores; 0 without any."""
    counts = there.sum(axis=1)
    ordered = np.sort(np.where(there, scores, np.inf), axis=1)
    middle = np.stack([(counts - 1) // 2, np.minimum(counts // 2, counts - 1)], axis=1)
    found = np.take_along_axis(ordered, np.maximum(middle, 0), axis=1).mean(axis=1)
    return np.where(counts > 0, found, 0.0)


def choose(
    rule: MiningRule,
    scores: Float[np.ndarray, "queries ranks"],
    left: Bool[np.ndarray, "queries ranks"],
    counts: Int[np.ndarray, "queries"],
    keys: UInt64[np.ndarray, "queries"],
) -> Bool[np.ndarray, "queries ranks"]:
    """Take up to ``counts`` of the candidates ``left`` of each query.

    The draw of a query depends only on the seed, its key and its candidates.
    """
    place = left.cumsum(axis=1)  # from 1
    if rule.sample_from is None:
        return left & (place <= counts[:, None])
    open_to = left & (place <= rule.sample_from)
    # The largest values of logit + Gumbel noise sample without replacement (arXiv 1903.06059).
    noise = np.stack(
        [np.random.default_rng((rule.seed, key)).gumbel(size=rule.sample_from) for key in keys]
        or [np.zeros(rule.sample_from)]
    )
    rows, columns = np.nonzero(open_to)
    lots = np.full(scores.shape, -np.inf)
    lots[rows, columns] = (
        scores[rows, columns].astype(np.float64) / rule.temperature
        + noise[rows, place[rows, columns] - 1]
    )
    ranks = np.argsort(-lots, axis=1, kind="stable").argsort(axis=1)
    return open_to & (ranks < counts[:, None])
