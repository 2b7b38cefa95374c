"""The rule by which likely false negatives are ignored: they score too near to the positive.

In a large batch some documents of other examples answer a query too, and the loss would push them
away from it. Thresholds that compare a document with the query's own positive find many of them.
"""

from dataclasses import dataclass
from math import inf, isfinite
from typing import Final, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tercet.errors import RecipeError

IgnoreRuleName: TypeAlias = Literal["margin", "percent"]

_DEFAULTS: Final[dict[IgnoreRuleName, float]] = {"margin": 0.1, "percent": 0.95}


@dataclass(frozen=True, slots=True, kw_only=True)
class IgnoreRule:
    """An upper limit for the scores of negatives; a document above it is ignored in the loss.

    The query's positive scores ``s``, the lowest of several positives in the batch. Kinds:

    - ``margin``: ``s + value`` (Qwen3-Embedding, arXiv 2506.05176, eq. 1, with 0.1); a value below
      0 is the distance that mining calls a margin
    - ``percent``: ``s - (1 - value) * |s|``, which is ``value * s`` for positive ``s``
      (NV-Retriever, arXiv 2407.15831, sec. 3, with 0.95)

    Scores are cosines, so the temperature does not matter. The mined negatives of a query stay
    unless ``own`` is set.

    Raises:
        RecipeError: for a value out of range.
    """

    kind: IgnoreRuleName = "margin"
    value: float | None = None  # None: 0.1, or 0.95 of percent
    own: bool = False

    def __post_init__(self) -> None:
        if self.value is None:
            return
        if not isfinite(self.value):
            raise RecipeError(f"ignore_value must be finite; got {self.value}")
        if self.kind == "margin" and abs(self.value) > 2:
            raise RecipeError(
                "ignore_value must be between -2 and 2 for the rule margin, since cosines are at "
                f"most 2 apart; got {self.value}"
            )
        if self.kind == "percent" and not 0 < self.value <= 2:
            raise RecipeError(
                "ignore_value must be above 0 and at most 2 for the rule percent, as in 0.95; got "
                f"{self.value}"
            )

    def limit(self, positives: Float[Tensor, "queries"]) -> Float[Tensor, "queries"]:
        """Return the limit for the negatives of each query; infinite for an infinite score."""
        value = _DEFAULTS[self.kind] if self.value is None else self.value
        if self.kind == "margin":
            return positives + value
        limits = positives - (1 - value) * positives.abs()
        return torch.where(positives == inf, positives, limits)
