import numpy as np
import pytest

from tercet.evaluate.report import intervals
from tercet.evaluate.report.intervals import (
    Interval,
    interval,
    paired_difference,
    pooled_interval,
    relative_change,
)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say(random):
    # 95 % of 400 is 380, with a standard deviation of 4.4; 60 skewed values cover a little less.
    held = 0
    for trial in range(400):
        found = interval(random.exponential(1.0, 60), resamples=400, seed=trial)
        held += found.low <= 1.0 <= found.high
    assert 355 <= held <= 393


def test_an_interval_is_as_wide_as_the_normal_approximation(random):
    values = random.random(2000)
    found = interval(values)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=half / 20)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 20)


def test_a_lower_level_is_a_narrower_interval(random):
    values = random.random(300)
    wide, narrow = interval(values), interval(values, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_a_paired_difference_is_narrower_than_the_two_intervals(random):
    hardness = random.random(300)
    before = hardness + 0.05 * random.random(300)
    after = hardness + 0.05 * random.random(300) + 0.02
    paired = paired_difference(after, before)
    assert paired.low > 0
    assert paired.excludes_zero()
    apart = interval(after).high - interval(before).low, interval(after).low - interval(before).high
    assert paired.high - paired.low < 0.2 * (apart[0] - apart[1])


def test_the_difference_is_the_first_minus_the_second():
    found = paired_difference(np.ones(5), np.zeros(5))
    assert (found.mean, found.low, found.high) == (1, 1, 1)
    assert paired_difference(np.zeros(5), np.ones(5)).excludes_zero()


def test_equal_inputs_differ_by_zero_to_zero(random):
    values = random.random(40)
    found = paired_difference(values, values)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.excludes_zero()


def test_the_seed_alone_decides_the_draws(random):
    values = random.random(50)
    assert interval(values, seed=3) == interval(values, seed=3)
    assert interval(values, seed=3).low != interval(values, seed=4).low


def test_blocks_of_draws_do_not_change_the_interval(random, monkeypatch):
    values = random.random(50)
    whole = interval(values, resamples=999)
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 50 * 7)
    assert interval(values, resamples=999) == whole


def test_an_interval_says_how_it_was_made():
    found = interval(np.array([0.25, 0.75]), resamples=100, seed=9)
    assert (found.queries, found.resamples, found.seed, found.level) == (2, 100, 9, 0.95)
    assert str(Interval(0.5, 0.25, 0.75, 2)) == "0.500 [0.250, 0.750]"


def test_no_queries_have_no_mean():
    found = interval(np.zeros(0))
    assert found.queries == 0
    assert np.isnan([found.mean, found.low, found.high]).all()
    assert not found.excludes_zero()


def share(sums):
    with np.errstate(invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def test_a_pooled_figure_of_groups_of_one_is_a_mean(random):
    values = random.random(70)
    pooled = pooled_interval(np.stack([values, np.ones(70)], axis=1), share, seed=5)
    plain = interval(values, seed=5)
    assert (pooled.mean, pooled.low, pooled.high) == pytest.approx(
        (plain.mean, plain.low, plain.high)
    )


def test_a_pooled_figure_is_of_the_sums_and_groups_are_drawn_whole():
    # 9 of 10 and 0 of 2: not the mean of 0.9 and 0. Draws are one group twice, or both.
    found = pooled_interval(np.array([[9.0, 10.0], [0.0, 2.0]]), share)
    assert (found.mean, found.low, found.high) == pytest.approx((9 / 12, 0, 0.9))
    assert found.queries == 2


def test_blocks_of_draws_do_not_change_a_pooled_interval(random, monkeypatch):
    counts = random.integers(1, 9, (50, 2)).astype(np.float64)
    whole = pooled_interval(counts, share, resamples=999)
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 50 * 7)
    assert pooled_interval(counts, share, resamples=999) == whole


def test_draws_without_a_figure_are_left_out():
    found = pooled_interval(np.array([[1.0, 1.0], [0.0, 0.0]]), share)
    assert (found.mean, found.low, found.high) == (1, 1, 1)
    assert np.isnan(pooled_interval(np.zeros((3, 2)), share).low)
    assert np.isnan(pooled_interval(np.zeros((0, 2)), share).mean)


def test_a_relative_change_is_that_of_the_means_and_pairs_stay_together():
    random = np.random.default_rng(3)
    before, after = random.random(40), random.random(40)
    found = relative_change([after], [before], resamples=500, seed=2)
    assert found.mean == pytest.approx(after.mean() / before.mean() - 1)
    draws = np.random.default_rng(2).integers(0, 40, (500, 40))
    changes = [after[draw].mean() / before[draw].mean() - 1 for draw in draws]
    assert (found.low, found.high) == pytest.approx(np.quantile(changes, [0.025, 0.975]))
    same = relative_change([2 * before], [before])
    assert (same.low, same.mean, same.high) == pytest.approx((1, 1, 1))


def test_of_several_sets_each_counts_alike_in_a_relative_change():
    large, small = np.full(90, 0.5), np.full(10, 1.0)
    found = relative_change([large * 1.2, small], [large, small])
    assert found.mean == pytest.approx((0.6 + 1) / 1.5 - 1)
    assert found.queries == 100


def test_a_relative_change_from_nothing_is_no_number():
    for after, before in ([np.ones(3)], [np.zeros(3)]), ([], []), ([np.ones(0)], [np.ones(0)]):
        assert np.isnan(relative_change(after, before).mean)
