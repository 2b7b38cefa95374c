"""The kinds of vectors, and how much each counts in a sum of scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Literal, TypeAlias

from tercet.errors import RecipeError

Kind: TypeAlias = Literal["dense", "sparse", "multi"]
KINDS: Final[tuple[Kind, ...]] = ("dense", "sparse", "multi")


def parse_kinds(text: str) -> tuple[Kind, ...]:
    """Return the kinds in a text such as ``"sparse,dense"``, in the order of ``KINDS``.

    Raises:
        RecipeError: if a kind is unknown or given twice, or there is none.
    """
    named = [name.strip() for name in text.split(",")]
    if set(named) - set(KINDS) or len(set(named)) < len(named):
        raise RecipeError(f"kinds are {text!r}; choose from {', '.join(KINDS)}, each once")
    return tuple(kind for kind in KINDS if kind in named)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weight of each kind of score in their sum (arXiv 2402.03216, section 3.3)."""

    dense: float = 1.0
    sparse: float = 0.3
    multi: float = 1.0

    @staticmethod
    def parse(text: str) -> "Weights":
        """Return the weights in a text such as ``"1,0.3,1"``.

        Raises:
            RecipeError: unless it has three numbers of 0 or more.
        """
        try:
            numbers = [float(number) for number in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != len(KINDS) or not all(0 <= number < inf for number in numbers):
            raise RecipeError(
                f"weights are {text!r}; give three numbers of 0 or more, for dense, sparse and "
                "multi, such as 1,0.3,1"
            )
        return Weights(*numbers)

    def changed(self, given: Mapping[Kind, float]) -> "Weights":
        """Return these weights with others for some kinds.

        Raises:
            RecipeError: unless each is 0 or more and one is above 0.
        """
        weights = {kind: given.get(kind, self.of(kind)) for kind in KINDS}
        for kind, weight in weights.items():
            if not 0 <= weight < inf:
                raise RecipeError(f"the weight of {kind} must be 0 or more; got {weight}")
        if not any(weights.values()):
            raise RecipeError("all kinds have the weight 0; give one of them a number above 0")
        return Weights(**weights)

    def of(self, kind: Kind) -> float:
        """Return the weight of one kind."""
        return {"dense": self.dense, "sparse": self.sparse, "multi": self.multi}[kind]

    def only(self, kinds: Sequence[Kind]) -> "Weights":
        """Return these weights with zero for the kinds that are not named."""
        return Weights(*(self.of(kind) if kind in kinds else 0.0 for kind in KINDS))
