"""NV-Embed (arXiv 2405.17428), test 15: mining rules on a table of scores worked by hand."""

import numpy as np
import pytest

from tercet.curate.mining.rules import LEFT, POSITIVE, REASONS, MiningRule, choose, judge

# The score of the (lowest) positive, and those of six candidates, best first. P is a known
# positive, whatever it scores. The third query has two positives, at 0.9 and 0.5: 0.5 is anchor.
TABLE = {
    "usual": (0.80, [0.90, 0.80, 0.7601, 0.76, 0.75, 0.20], "P....."),
    "negative": (-0.40, [0.10, -0.40, -0.41, -0.42, -0.421, -0.50], ".P...."),
    "several": (0.50, [0.90, 0.60, 0.50, 0.47, 0.45, 0.44], "P.P..."),
    "zero": (0.0, [0.20, 0.0, -0.01, -0.05, -0.051, -0.3], ".P...."),
}
# Of each query the candidates that are left, counted from 0.
EXPECTED = {
    # cuts 0.8 - 0.04 = 0.76, -0.4 - 0.02 = -0.42, 0.5 - 0.025 = 0.475, 0; equal is not below
    "percent": (0.95, {"usual": [4, 5], "negative": [4, 5], "several": [3, 4, 5], "zero": [2, 3, 4, 5]}),  # noqa: E501
    # cuts 0.75, -0.45, 0.45, -0.05
    "margin": (0.05, {"usual": [5], "negative": [5], "several": [5], "zero": [4, 5]}),
    "absolute": (0.45, {"usual": [5], "negative": [0, 2, 3, 4, 5], "several": [5], "zero": [0, 2, 3, 4, 5]}),  # noqa: E501
    "naive": (None, {"usual": [1, 2, 3, 4, 5], "negative": [0, 2, 3, 4, 5], "several": [1, 3, 4, 5], "zero": [0, 2, 3, 4, 5]}),  # noqa: E501
}  # fmt: skip


def table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, anchors, and which candidates are known positives."""
    scores = np.array([row[1] for row in TABLE.values()])
    anchors = np.array([row[0] for row in TABLE.values()])
    marks = np.array([[mark == "P" for mark in row[2]] for row in TABLE.values()])
    return scores, anchors, np.where(marks, POSITIVE, LEFT).astype(np.int8)


def left(rule: MiningRule) -> dict[str, list[int]]:
    scores, anchors, barred = table()
    verdicts = judge(rule, scores, anchors, barred)
    return {
        name: np.flatnonzero(row == LEFT).tolist()
        for name, row in zip(TABLE, verdicts, strict=True)
    }


@pytest.mark.parametrize("kind", EXPECTED)
def test_each_rule_leaves_what_it_leaves_by_hand(kind):
    """Test 15 of NV-Embed."""
    value, expected = EXPECTED[kind]
    assert left(MiningRule(kind=kind, value=value)) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_negative_positive_score_makes_the_cut_lower_not_higher(dtype):
    """Test 15 of NV-Embed."""
    anchors = np.array([0.8, -0.4, 0.0, 1.0], dtype)
    np.testing.assert_allclose(MiningRule().limit(anchors), [0.76, -0.42, 0.0, 0.95], atol=1e-7)
    assert (MiningRule().limit(anchors) <= anchors).all()


def test_equal_to_the_cut_is_not_below_it():
    """Test 15 of NV-Embed."""
    anchors, open_to = np.array([0.8, -0.4, 0.0, 0.1]), np.zeros((4, 1), np.int8)
    cuts = np.array([[0.76], [-0.42], [0.0], [0.095]])
    assert (judge(MiningRule(), cuts, anchors, open_to) != LEFT).all()
    assert (judge(MiningRule(), cuts - 1e-6, anchors, open_to) == LEFT).all()
    for scores in (anchors, anchors.astype(np.float32)):
        assert (judge(MiningRule(value=1.0), scores[:, None], scores, open_to) != LEFT).all()


def test_a_shift_counts_candidates_that_are_no_positives():
    """Test 15 of NV-Embed."""
    # The nearest two that are not P are gone, whatever they score; then the rule.
    assert left(MiningRule(kind="naive", shift=2)) == {
        "usual": [3, 4, 5],
        "negative": [3, 4, 5],
        "several": [4, 5],
        "zero": [3, 4, 5],
    }
    assert left(MiningRule(shift=2)) == {
        "usual": [4, 5],
        "negative": [4, 5],
        "several": [4, 5],
        "zero": [3, 4, 5],
    }


def test_every_candidate_dropped_has_one_reason():
    """Test 15 of NV-Embed."""
    scores, anchors, barred = table()
    verdicts = judge(MiningRule(shift=1), scores, anchors, barred)
    found = [[("left", *REASONS)[verdict] for verdict in row] for row in verdicts]
    assert found[0] == ["positive", "shifted", "too close", "too close", "left", "left"]
    assert found[2] == ["positive", "shifted", "positive", "left", "left", "left"]


def test_the_best_are_taken_and_no_more_than_there_are():
    """Test 15 of NV-Embed."""
    scores, anchors, barred = table()
    verdicts = judge(MiningRule(), scores, anchors, barred)
    counts, keys = np.array([1, 7, 2, 0]), np.arange(4, dtype=np.uint64)
    chosen = choose(MiningRule(), scores, verdicts == LEFT, counts, keys)
    assert [np.flatnonzero(row).tolist() for row in chosen] == [[4], [4, 5], [3, 4], []]


def test_what_is_drawn_follows_the_softmax_of_the_scores_that_are_left():
    """Test 15 of NV-Embed."""
    rule = MiningRule(kind="naive", sample_from=3, temperature=0.1)
    scores, draws = np.array([[0.9, 0.8, 0.75, 0.7, 0.6]]), 6000
    barred = np.array([[POSITIVE, LEFT, LEFT, LEFT, LEFT]], np.int8)
    verdicts = judge(rule, scores, np.array([0.9]), barred).repeat(draws, axis=0)
    ones, keys = np.ones(draws, np.int64), np.arange(draws, dtype=np.uint64)
    chosen = choose(rule, scores.repeat(draws, axis=0), verdicts == LEFT, ones, keys)
    weights = np.exp(np.array([0.8, 0.75, 0.7]) / 0.1)  # neither the positive nor the fourth
    np.testing.assert_allclose(chosen.mean(axis=0)[1:4], weights / weights.sum(), atol=0.02)
    assert chosen.sum() == draws and not chosen[:, [0, 4]].any()
