"""The kinds of vectors, and how much each counts in a sum of scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["dense", "sparse", "multi"]
KINDS: Final[tuple[Kind, ...]] = ("dense", "sparse", "multi")


@dataclass(frozen=True, slots=True)
class Weights:
    """Weight of each kind of score in their sum (arXiv 2402.03216, section 3.3)."""

    dense: float = 1.0
    sparse: float = 0.3
    multi: float = 1.0

    def of(self, kind: Kind) -> float:
        """Return the weight of one kind."""
        return {"dense": self.dense, "sparse": self.sparse, "multi": self.multi}[kind]

    def only(self, kinds: Sequence[Kind]) -> "Weights":
        """Return these weights with zero for the kinds that are not named."""
        return Weights(*(self.of(kind) if kind in kinds else 0.0 for kind in KINDS))
