"""Fusion of the scores and ranks of several kinds into one ranking, the same for all engines."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from tercet.errors import RecipeError
from tercet.kinds import Kind, Weights
from tercet.search.engine.engine import Fusion, ReciprocalRank, Rerank

Name = TypeVar("Name", bound=Hashable)


def proposing(fusion: Fusion, present: Sequence[Kind]) -> tuple[Kind, ...]:
    """Return the kinds that propose candidates; empty if all records are ranked.

    Raises:
        RecipeError: when candidates must come from dense vectors, and the queries have none.
    """
    if isinstance(fusion, Rerank):
        if "dense" not in present:
            raise RecipeError(
                "reranking needs dense vectors to find its candidates; "
                "rank by the weighted sum instead"
            )
        return ("dense",)
    if isinstance(fusion, ReciprocalRank):
        return tuple(kind for kind in fusion.kinds if kind in present)
    if fusion.candidates is None:
        return ()
    return tuple(kind for kind in present if kind != "multi")


def wanted(fusion: Fusion, k: int) -> int:
    """Return how many candidates each kind proposes for ``k`` hits."""
    return k if fusion.candidates is None else max(k, fusion.candidates)


def weighted_sum(scores: Mapping[Kind, float], weights: Weights) -> float:
    """Return the weighted sum of the scores (arXiv 2402.03216, section 3.3)."""
    return sum(weights.of(kind) * score for kind, score in scores.items())


def reciprocal_ranks(lists: Sequence[Sequence[Name]], k: int) -> dict[Name, float]:
    """Return the sum of 1 / (k + rank) over lists, from rank 1 (Cormack et al. 2009)."""
    sums: dict[Name, float] = {}
    for names in lists:
        for rank, name in enumerate(names, start=1):
            sums[name] = sums.get(name, 0.0) + 1 / (k + rank)
    return sums
