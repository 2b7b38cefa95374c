"""How the scores and ranks of several kinds become one ranking, the same for every engine."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from tercet.errors import RecipeError
from tercet.kinds import Kind, Weights
from tercet.search.engine.engine import Fusion, ReciprocalRank, Rerank

Name = TypeVar("Name", bound=Hashable)


def proposing(fusion: Fusion, present: Sequence[Kind]) -> tuple[Kind, ...]:
    """The kinds whose best records are candidates, of those present; none: all records are.

    Raises:
        RecipeError: when candidates are to be found by dense vectors, and there are none.
    """
    if isinstance(fusion, Rerank):
        if "dense" not in present:
            raise RecipeError(
                "reranking finds its candidates by dense vectors, and there are none; "
                "rank by the weighted sum instead"
            )
        return ("dense",)
    if isinstance(fusion, ReciprocalRank):
        return tuple(kind for kind in fusion.kinds if kind in present)
    if fusion.candidates is None:
        return ()
    return tuple(kind for kind in present if kind != "multi")


def wanted(fusion: Fusion, k: int) -> int:
    """How many candidates each kind proposes for ``k`` hits."""
    return k if fusion.candidates is None else max(k, fusion.candidates)


def weighted_sum(scores: Mapping[Kind, float], weights: Weights) -> float:
    """The sum of the scores, each times its weight (arXiv 2402.03216, section 3.3)."""
    return sum(weights.of(kind) * score for kind, score in scores.items())


def reciprocal_ranks(lists: Sequence[Sequence[Name]], k: int) -> dict[Name, float]:
    """The sum of 1 / (k + rank) over the lists that name a record; the first rank is 1."""
    sums: dict[Name, float] = {}
    for names in lists:
        for rank, name in enumerate(names, start=1):
            sums[name] = sums.get(name, 0.0) + 1 / (k + rank)
    return sums
