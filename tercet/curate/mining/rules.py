"""Which candidates may become mined negatives: rules on a teacher's scores alone.

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

# Verdicts on a candidate. What is not LEFT was dropped, by the first reason that holds.
LEFT: Final = 0
REASONS: Final = ("positive", "query", "already", "shifted", "too close")
POSITIVE, QUERY, ALREADY, SHIFTED, TOO_CLOSE = range(1, 6)
ABSENT: Final = 6  # no candidate: fewer documents were found than looked for

_USUAL: Final[dict[RuleName, float]] = {
    "naive": 0.0,  # not read
    "percent": 0.95,
    "margin": 0.05,
    "absolute": 0.7,
    "relative": 0.95,
}
_DECIMALS: Final = 9  # 0.8 - 0.05 * 0.8 is 0.76, not a little more, and 0.76 is not below it


@dataclass(frozen=True, slots=True, kw_only=True)
class MiningRule:
    """How near a negative may come, and which of those that are left are taken.

    Kinds, by the most that a negative may score where the positive scores ``s`` (strictly below):

    - ``naive``: anything
    - ``percent`` (TopK-PercPos): ``s - (1 - value) * |s|``. That is ``value * s``, and stays below
      ``s`` where ``s`` is negative
    - ``margin`` (TopK-MarginPos): ``s - value``
    - ``absolute`` (TopK-Abs): ``value``
    - ``quantile``: the ``value``-quantile of all ``s`` of the source. For teachers whose cosines
      all lie close together, where 95 percent means nothing
    - ``relative``: ``s - (1 - value) * |s - m|``, with ``m`` the median score of the query's own
      candidates. For such teachers too: adding a number to all scores changes nothing

    ``shift`` leaves out that many of the nearest that are no known positives, whatever they score.
    ``sample_from`` draws from so many of the best that are left, without replacement, by the
    softmax of score / temperature; None takes the best.

    Raises:
        RecipeError: for a number out of range.
    """

    kind: RuleName = "percent"
    value: float | None = None  # None: the paper's 0.95, 0.05 or 0.7
    shift: int = 0
    sample_from: int | None = None
    temperature: float = 1.0
    seed: int = 0  # of what is drawn; each query has its own numbers

    def __post_init__(self) -> None:
        self._check_value()
        if self.shift < 0:
            raise RecipeError(f"shift is {self.shift}; it should be 0 or more")
        if self.sample_from is not None and self.sample_from < 1:
            raise RecipeError(f"sample_from is {self.sample_from}; it should be 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise RecipeError(f"the temperature is {self.temperature}; it should be above 0")
        if self.seed < 0:
            raise RecipeError(f"the seed is {self.seed}; it should be 0 or more")

    def _check_value(self) -> None:
        if self.value is None:
            if self.kind not in _USUAL:
                raise RecipeError(f"the rule {self.kind} has no usual value; give one")
            return
        if self.kind == "naive":
            raise RecipeError("the rule naive takes no value; leave it out")
        if not math.isfinite(self.value):
            raise RecipeError(f"the value of the rule is {self.value}; it should be a number")
        if self.kind in ("percent", "quantile", "relative") and not 0 <= self.value <= 1:
            raise RecipeError(
                f"the value of the rule {self.kind} is {self.value}; it should be between 0 and 1, "
                "as in 0.95"
            )
        if self.kind == "margin" and self.value < 0:
            raise RecipeError(f"the margin is {self.value}; it should be 0 or more")

    @property
    def used_value(self) -> float:
        """The value, or the usual one."""
        return _USUAL[self.kind] if self.value is None else self.value

    def cut(
        self,
        positives: Float[np.ndarray, "queries"],
        usual: Float[np.ndarray, "queries"] | float = 0.0,
    ) -> Float64[np.ndarray, "queries"]:
        """The score that a negative of each query has to stay below.

        ``positives`` has the score of each query's positive, the lowest of several; ``usual`` the
        median score of its candidates.
        """
        scores, value = positives.astype(np.float64), self.used_value
        cuts = {
            "naive": np.full_like(scores, np.inf),
            "percent": scores - (1 - value) * np.abs(scores),
            "margin": scores - value,
            "absolute": np.full_like(scores, value),
            "relative": scores - (1 - value) * np.abs(scores - usual),
        }
        assert self.kind in cuts, "a quantile is settled before it is used"
        return np.round(cuts[self.kind], _DECIMALS)


def judge(
    rule: MiningRule,
    scores: Float[np.ndarray, "queries ranks"],
    positives: Float[np.ndarray, "queries"],
    barred: Int8[np.ndarray, "queries ranks"],
) -> Int8[np.ndarray, "queries ranks"]:
    """LEFT, or why it was dropped, for each candidate of each query, best candidate first.

    ``barred`` has the verdicts that do not hang on scores; the others are LEFT there.
    """
    verdicts = barred.copy()
    free = verdicts == LEFT
    verdicts[free & (free.cumsum(axis=1) <= rule.shift)] = SHIFTED
    exact = np.round(scores.astype(np.float64), _DECIMALS)
    usual = _medians(exact, barred != ABSENT) if rule.kind == "relative" else 0.0
    near = ~(exact < rule.cut(positives, usual)[:, None])
    verdicts[(verdicts == LEFT) & near] = TOO_CLOSE
    return verdicts


def _medians(
    scores: Float64[np.ndarray, "queries ranks"], there: Bool[np.ndarray, "queries ranks"]
) -> Float64[np.ndarray, "queries"]:
    """The median of each query's scores, of those that are there; 0 where none is."""
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
    """Those of the candidates ``left`` that are taken: ``counts`` a query, or all there are.

    What is drawn for a query hangs on the seed, its key and its candidates, on nothing else.
    """
    place = left.cumsum(axis=1)  # from 1
    if rule.sample_from is None:
        return left & (place <= counts[:, None])
    open_to = left & (place <= rule.sample_from)
    # The largest of logit + Gumbel noise are a draw without replacement (arXiv 1903.06059).
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
    order = np.argsort(-lots, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None, :], axis=1)
    return open_to & (ranks < counts[:, None])
