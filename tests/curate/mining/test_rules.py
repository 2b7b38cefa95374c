import numpy as np
import pytest

from tercet.curate.mining.rules import LEFT, MiningRule, choose, judge
from tercet.errors import RecipeError


def draw(rule: MiningRule, scores: np.ndarray, left: np.ndarray, count: int, first: int = 0):
    keys = np.arange(first, first + len(scores), dtype=np.uint64)
    return choose(rule, scores, left, np.full(len(scores), count), keys)


@pytest.fixture
def scores():
    return -np.sort(-np.random.default_rng(0).normal(size=(5, 40)), axis=1)


def test_a_draw_is_without_replacement_and_from_the_best_that_are_left(scores):
    left = np.random.default_rng(1).random(scores.shape) < 0.5
    chosen = draw(MiningRule(kind="naive", sample_from=8, seed=3), scores, left, 5)
    assert (chosen.sum(axis=1) == 5).all()
    for row in range(5):
        assert set(np.flatnonzero(chosen[row])) <= set(np.flatnonzero(left[row])[:8])
    assert len({tuple(np.flatnonzero(row)) for row in chosen}) > 1


def test_what_is_drawn_for_a_query_depends_on_its_key_and_the_seed_alone(scores):
    left = np.ones(scores.shape, np.bool_)
    rule = MiningRule(kind="naive", sample_from=20, seed=3)
    chosen = draw(rule, scores, left, 5)
    np.testing.assert_array_equal(draw(rule, scores[2:3], left[2:3], 5, 2), chosen[2:3])
    np.testing.assert_array_equal(draw(rule, scores[:, :30], left[:, :30], 5), chosen[:, :30])
    other = MiningRule(kind="naive", sample_from=20, seed=4)
    assert (draw(other, scores, left, 5) != chosen).any()


def test_a_cold_draw_takes_the_best(scores):
    left = np.ones(scores.shape, np.bool_)
    chosen = draw(MiningRule(sample_from=20, temperature=1e-6), scores, left, 3)
    assert chosen[:, :3].all() and not chosen[:, 3:].any()


def test_fewer_left_than_wanted_are_all_drawn():
    scores, left = np.array([[0.3, 0.2, 0.1]]), np.array([[False, True, True]])
    assert draw(MiningRule(sample_from=9), scores, left, 4).tolist() == left.tolist()


def test_no_queries_and_no_candidates_are_no_problem():
    for shape in ((0, 4), (3, 0)):
        scores, barred = np.zeros(shape), np.zeros(shape, np.int8)
        verdicts = judge(MiningRule(), scores, np.zeros(shape[0]), barred)
        for rule in (MiningRule(), MiningRule(sample_from=2)):
            assert draw(rule, scores, verdicts == LEFT, 2).shape == shape


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"value": 95.0},
            "the value of the rule percent must be between 0 and 1, as in 0.95; got 95.0",
        ),
        (
            {"kind": "quantile", "value": -0.1},
            "the value of the rule quantile must be .*; got -0.1",
        ),
        ({"kind": "quantile"}, "the rule quantile has no default value; give one"),
        ({"kind": "margin", "value": -1.0}, "the margin must be at least 0; got -1.0"),
        ({"kind": "absolute", "value": float("nan")}, "must be finite; got nan"),
        ({"kind": "naive", "value": 0.9}, "the rule naive takes no value"),
        ({"shift": -1}, "shift must be at least 0; got -1"),
        ({"sample_from": 0}, "sample_from must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
    ],
)
def test_a_number_out_of_range_is_refused(wrong, said):
    with pytest.raises(RecipeError, match=said):
        MiningRule(**wrong)
