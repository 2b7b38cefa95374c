import numpy as np
import pytest

from tercet.rank.topk import Best


@pytest.fixture
def random():
    return np.random.default_rng(0)


def by_sorting(scores, k):
    """The obvious slow formula: a stable sort of all scores."""
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


def in_blocks(scores, k, block, first=0):
    best = Best(len(scores), k)
    for start in range(0, scores.shape[1], block):
        best.add(np.ascontiguousarray(scores[:, start : start + block]), first + start)
    return best.hits()


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10, 100, 400])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_the_best_are_those_of_a_full_sort_whatever_the_blocks(random, block, k, levels):
    scores = (random.integers(-levels, levels, (30, 400)) / levels).astype(np.float32)
    found, rows = in_blocks(scores, k, block)
    expected = by_sorting(scores, k)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_array_equal(found, expected[0])


@pytest.mark.parametrize("block", [50, 1000])
def test_documents_that_come_by_rising_score_need_more_room_and_get_it(block):
    scores = np.arange(3000, dtype=np.float32)[None].repeat(2, axis=0)
    assert in_blocks(scores, 5, block)[1].tolist() == [[2999, 2998, 2997, 2996, 2995]] * 2


def test_zero_and_minus_zero_are_equal_and_infinities_have_their_place():
    scores = np.array([[-0.0, 0.0, -np.inf, np.inf, -1e-45, 1e-45, -0.0]], np.float32)
    for block in (1, 3, 7):
        assert in_blocks(scores, 7, block)[1].tolist() == [[3, 5, 0, 1, 6, 4, 2]]


def test_rows_beyond_two_to_the_31_are_told():
    scores = np.array([[0.1, 0.3, 0.2]], np.float32)
    assert in_blocks(scores, 2, 2, first=2**31 + 5)[1].tolist() == [[2**31 + 6, 2**31 + 7]]
