"""Fusion of the scores and ranks of several kinds into one ranking, the same for all engines."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, TypeAlias, TypeVar

from tercet.errors import RecipeError
from tercet.kinds import KINDS, Kind, Weights
from tercet.search.engine.engine import Fusion, ReciprocalRank, Rerank, Weighted

Name = TypeVar("Name", bound=Hashable)
FusionName: TypeAlias = Literal["weighted", "rrf", "rerank"]


def fusion_of(
    name: FusionName, given: Mapping[Kind, float] | None, usual: Weights, candidates: int
) -> Fusion:
    """Return the fusion of a name, with the usual weights and those that are given.

    By ranks, kinds with a weight count, or the usual ones where none is given. 0 candidates are all
    documents.

    Raises:
        RecipeError: for weights that cannot be, or no candidates where some are needed.
    """
    weights = usual.changed(given or {})
    if name == "weighted":
        return Weighted(weights=weights, candidates=candidates or None)
    if candidates == 0:
        raise RecipeError(
            f"candidates must be 1 or more with {name}; got 0; only weighted can look at all"
        )
    if name == "rerank":
        return Rerank(weights=weights, candidates=candidates)
    kinds: tuple[Kind, ...] = ReciprocalRank().kinds
    if given is not None:
        kinds = tuple(kind for kind in KINDS if weights.of(kind))
    return ReciprocalRank(kinds=kinds, candidates=candidates)


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
