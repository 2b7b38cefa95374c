import re

import numpy as np
import pytest

from tercet.evaluate.report.charts import (
    Line,
    histogram,
    interval_chart,
    line_chart,
    running_mean,
    with_mean,
)
from tercet.evaluate.report.intervals import Interval
from tests.evaluate.report.pages import spoken, text_of

NAN = float("nan")


def points(chart):
    """The points of each curve, in thousandths of the chart's width and height from above."""
    paths = re.findall(r'<path class="\w+(?: filled)?" d="([^"]*)"', chart)
    return [
        [tuple(map(float, place.split())) for place in re.split("[ML]", path) if place]
        for path in paths
    ]


def test_a_curve_goes_through_its_points():
    chart = line_chart([Line("a", [0, 5, 10], [1, 3, 2])], name="n", x="x", y="y")
    (curve,) = points(chart)
    (left, low), (middle, high), (right, between) = curve
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert between == pytest.approx((low + high) / 2, abs=0.1)
    assert 0 < left < right < 1000
    assert 0 < high < low < 1000


def test_a_value_that_is_no_number_leaves_a_gap():
    chart = line_chart([Line("a", [1, 2, 3, 4], [1, NAN, 3, 4])], name="n", x="x", y="y")
    (path,) = re.findall(r' d="([^"]*)"', chart)
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert "nan" not in chart


@pytest.mark.parametrize("values", [[], [NAN], [1.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 2e-9], [1e9]])
def test_odd_values_are_drawn(values):
    steps = list(range(len(values)))
    chart = line_chart([Line("a", steps, values)], name="n", x="step", y="y")
    assert spoken(chart)[0].startswith("n: a, ")
    text_of(chart)


def test_a_single_value_is_a_dot():
    chart = line_chart([Line("a", [3], [0.5])], name="n", x="step", y="y")
    assert chart.count("<circle") == 1


def test_steps_have_whole_numbers():
    chart = line_chart([Line("a", [1, 2], [0.1, 0.2])], name="n", x="step", y="y")
    assert [text for text in re.findall(r'middle">([^<]*)<', chart)] == ["1", "2"]


def test_an_axis_of_powers_shows_the_powers():
    lines = [Line("a", [3, 4, 5], [0.1, 0.2, 0.3])]
    chart = line_chart(lines, name="n", x="bytes", y="y", powers=2)
    assert re.findall(r'middle">([^<]*)<', chart) == ["8", "16", "32"]


def test_a_chart_says_its_first_and_last_values():
    chart = line_chart([Line("loss", [1, 2], [2.5, 0.25])], name="training", x="step", y="loss")
    assert spoken(chart) == ["training: loss, first 2.5, last 0.25"]


def test_a_histogram_is_in_percent_of_each_sample():
    chart = histogram({"a": [0.0] * 9 + [1.0], "b": [1.0]}, name="n", x="score", bins=2)
    many, one = points(chart)
    floor = many[0][1]
    heights = [round(floor - y) for _, y in many[1:5]]
    tallest = max(round(floor - y) for _, y in one)
    assert heights[0] == heights[1] == pytest.approx(0.9 * tallest, abs=1)
    assert heights[2] == heights[3] == pytest.approx(0.1 * tallest, abs=1)


def test_two_histograms_can_have_one_axis():
    both = [
        histogram({"a": values}, name="n", x="score", reach=(0.0, 10.0))
        for values in ([1.0, 2.0], [8.0, 9.0])
    ]
    ticks = [re.findall(r'middle">([^<]*)<', chart) for chart in both]
    assert ticks[0] == ticks[1] == ["0", "2", "4", "6", "8", "10"]


@pytest.mark.parametrize("samples", [{"a": [], "b": []}, {"a": [1.0, 1.0]}, {"a": [NAN]}])
def test_a_histogram_of_little_is_drawn(samples):
    assert spoken(histogram(samples, name="n", x="score"))


def test_the_measured_model_is_a_dot_and_baselines_are_grey_squares():
    rows = {
        "mine": {"mine": Interval(0.8, 0.7, 0.9, 10)},
        "BM25": {"BM25": Interval(0.6, 0.5, 0.7, 10)},
    }
    chart = interval_chart(rows, name="ndcg@10", baselines=["BM25"])
    assert re.findall(r'<(circle|rect) class="(\w+)"', chart) == [
        ("circle", "own"),
        ("rect", "other"),
    ]
    assert spoken(chart) == ["ndcg@10: mine 0.800; BM25 0.600"]


def test_the_parts_of_an_interval_are_in_place():
    rows = {"a": {"a": Interval(0.5, 0.0, 1.0, 10)}}
    chart = interval_chart(rows, name="n")
    low, high = map(float, re.findall(r'class="own" x1="([\d.]+)%" x2="([\d.]+)%"', chart)[0])
    (mean,) = re.findall(r'cx="([\d.]+)%"', chart)
    assert float(mean) == pytest.approx((low + high) / 2, abs=0.01)


def test_differences_show_zero_and_their_signs():
    rows = {"a": {"a": Interval(-0.2, -0.3, -0.1, 10)}}
    chart = interval_chart(rows, name="n", signed=True)
    assert 'class="zero"' in chart
    assert '<span class="number">-0.200</span>' in chart


def test_systems_of_a_row_stand_below_each_other():
    rows = {"ko": {"mine": Interval(0.8, 0.7, 0.9, 10), "base": Interval(0.8, 0.7, 0.9, 10)}}
    chart = interval_chart(rows, name="n", baselines=["base"])
    heights = re.findall(r'y1="(\d+)" y2="\1"', chart)
    assert len(set(heights)) == 2
    assert "mine" in text_of(chart)
    assert "ko 0.800 (mine); ko 0.800 (base)" in spoken(chart)[0]


def test_an_interval_without_a_value_is_a_dash():
    rows = {"a": {"a": Interval(NAN, NAN, NAN, 0)}, "b": {"b": Interval(0.5, NAN, NAN, 1)}}
    chart = interval_chart(rows, name="n")
    assert "nan" not in chart
    assert '<span class="number">-</span>' in chart


def test_a_running_mean_takes_as_many_on_either_side():
    # 60 values: two on either side.
    values = np.arange(60.0) ** 2
    expected = [values[max(i - 2, 0) : i + 3].mean() for i in range(60)]
    np.testing.assert_allclose(running_mean(values), expected)
    values[10] = np.nan
    assert running_mean(values)[11] == pytest.approx(np.mean([81, 121, 144, 169]))
    assert np.isnan(running_mean(np.full(3, np.nan))).all()


def test_a_curve_with_its_mean_is_two_lines():
    each, mean = with_mean("each step", [1, 2, 3], [3.0, 2.0, 1.0])
    assert (each.ink, mean.ink) == ("faint", "own")
    assert list(mean.y) == [3.0, 2.0, 1.0]  # too few to average
