import pytest
import torch

from tercet.segments import batches_by_length, batches_within, ragged_places, runs_within


def no_longer_than(budget):
    return list(batches_within(["aa", "b", "cccc", "", "d"], budget, len))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, [[1], [2], [0], [3]]),
        (6, [[1], [2], [0, 3]]),
        (9, [[1], [2, 0], [3]]),
        (17, [[1, 2, 0], [3]]),
        (18, [[1, 2, 0, 3]]),
    ],
)
def test_batches_by_length_are_whole_rows_longest_first(budget, expected):
    assert batches_by_length([4, 8, 5, 1], budget) == expected


def test_no_rows_make_no_batches():
    assert batches_by_length([], 10) == []
    assert list(runs_within([0], 10)) == []


def test_a_batch_ends_before_the_item_that_would_exceed_the_budget():
    assert no_longer_than(3) == [["aa", "b"], ["cccc"], ["", "d"]]
    assert no_longer_than(4) == [["aa", "b"], ["cccc", ""], ["d"]]
    assert no_longer_than(8) == [["aa", "b", "cccc", "", "d"]]


def test_with_overshoot_a_batch_ends_with_the_item_that_reaches_the_budget():
    words = ["aa", "b", "cccc", "", "d"]
    assert list(batches_within(words, 3, len, overshoot=True)) == [["aa", "b"], ["cccc"], ["", "d"]]
    assert list(batches_within(words, 4, len, overshoot=True)) == [["aa", "b", "cccc"], ["", "d"]]


@pytest.mark.parametrize("overshoot", [False, True])
def test_a_batch_has_no_more_than_the_largest_number_of_items(overshoot):
    found = batches_within(range(5), 100, lambda _: 1, most=2, overshoot=overshoot)
    assert list(found) == [[0, 1], [2, 3], [4]]


def test_runs_are_neighbouring_rows_and_a_larger_row_is_alone():
    assert list(runs_within([0, 2, 3, 9, 9, 10], 3)) == [(0, 2), (2, 3), (3, 5)]
    assert list(runs_within([0, 2, 3, 9, 9, 10], 100, most=2)) == [(0, 2), (2, 4), (4, 5)]


def test_ragged_places_are_those_of_each_row_in_order():
    places, offsets = ragged_places(torch.tensor([5, 0, 9]), torch.tensor([7, 0, 12]))
    assert places.tolist() == [5, 6, 9, 10, 11]
    assert offsets.tolist() == [0, 2, 2, 5]
