import pytest

from tercet.errors import RecipeError
from tercet.kinds import KINDS, Kind, Weights
from tercet.search.engine.engine import ReciprocalRank, Rerank, Weighted
from tercet.search.engine.fusion import proposing, reciprocal_ranks, wanted, weighted_sum


def test_reciprocal_ranks_worked_by_hand():
    sums = reciprocal_ranks([["a", "b", "c"], ["c", "a"]], k=60)
    # Of a, which is first and second: 1/61 + 1/62. Of b: 1/62. Of c: 1/63 + 1/61.
    assert sums == pytest.approx({"a": 0.0325225, "b": 0.0161290, "c": 0.0322664}, abs=1e-7)


def test_a_weighted_sum_worked_by_hand():
    scores: dict[Kind, float] = {"dense": 0.5, "sparse": 2.0, "multi": 0.25}
    assert weighted_sum(scores, Weights(1.0, 0.3, 2.0)) == pytest.approx(0.5 + 0.6 + 0.5)


@pytest.mark.parametrize(
    ("fusion", "present", "kinds"),
    [
        (Weighted(candidates=None), KINDS, ()),
        (Weighted(), KINDS, ("dense", "sparse")),
        (Weighted(), ("sparse", "multi"), ("sparse",)),
        (Weighted(), ("multi",), ()),
        (ReciprocalRank(), KINDS, ("dense", "sparse")),
        (ReciprocalRank(kinds=("multi", "dense")), ("dense", "multi"), ("multi", "dense")),
        (Rerank(), KINDS, ("dense",)),
    ],
)
def test_which_kinds_propose_candidates(fusion, present, kinds):
    assert proposing(fusion, present) == kinds


def test_reranking_needs_dense_vectors():
    with pytest.raises(RecipeError, match="needs dense vectors to find its candidates"):
        proposing(Rerank(), ("sparse", "multi"))


def test_there_are_at_least_as_many_candidates_as_hits():
    assert wanted(Weighted(candidates=3), 10) == 10
    assert wanted(Rerank(candidates=30), 10) == 30
    assert wanted(Weighted(candidates=None), 10) == 10
