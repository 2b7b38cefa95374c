import logging
import sys
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from tercet.errors import MissingExtraError
from tercet.evaluate.report.figures import (
    COLOURS,
    GREYS,
    CurvePoint,
    ScoreSample,
    as_svg,
    bars,
    curves,
    dots,
    drawing,
    histograms,
    mixture_bars,
    panels,
    write_png,
)
from tercet.evaluate.report.intervals import Interval
from tests.evaluate.report.pages import text_of

VALUE = Interval(0.5, 0.4, 0.6, 10)
LONG = "/home/someone/projects/search/runs/a-very-long-name-of-a-run/3-supervised/model"


def hexadecimal(colours):
    return [to_hex(colour).upper() for colour in colours]


def test_the_users_model_is_strong_and_baselines_are_grey():
    rows = {"en": {"mine": VALUE, "base": VALUE, "BM25": VALUE}}
    with drawing():
        figure = dots({"monolingual": rows}, baselines=["base", "BM25"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["mine", "base", "BM25"]
    lines: list[Any] = list(figure.axes[0].containers)
    drawn = hexadecimal(each.lines[0].get_color() for each in lines)
    assert drawn[::-1] == [COLOURS[0], *GREYS[:2]]  # the first is drawn last, on top


def test_bars_of_baselines_are_grey_wherever_they_stand():
    with drawing():
        figure = bars({"BM25": {"ndcg@10": VALUE}, "mine": {"ndcg@10": VALUE}}, baselines=["BM25"])
    drawn = hexadecimal(bar.get_facecolor() for bar in figure.axes[0].patches)
    assert drawn == [GREYS[0], COLOURS[0]]


@pytest.mark.parametrize(("metrics", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_each_metric_has_its_panel(metrics, shape):
    with drawing():
        figure = bars({"mine": {f"metric {n}": VALUE for n in range(metrics)}})
    grid = figure.axes[0].get_gridspec()
    assert grid is not None
    assert (grid.nrows, grid.ncols) == shape
    assert sum(axes.get_visible() for axes in figure.axes) == metrics


def test_a_bar_without_a_value_is_left_out():
    empty = Interval(np.nan, np.nan, np.nan, 0)
    with drawing():
        figure = bars({"a": {"x": VALUE}, "b": {"x": empty}, "c": {}})
    assert len(figure.axes[0].patches) == 1


def outside(figure):
    """How far, in inches, what is drawn reaches beyond each side of the figure."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return [-box.x0, -box.y0, box.x1 - width, box.y1 - height]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: bars({LONG: {"x": VALUE}, LONG + "2": {"x": VALUE}}),
        lambda: dots({LONG: {LONG: {LONG: VALUE, "b": VALUE}}}),
        lambda: dots({"many": {f"l{n}-en": {"mine": VALUE} for n in range(40)}}),
        lambda: curves({LONG: [CurvePoint(64, VALUE)], "b": []}, x="bytes", y="y"),
        lambda: mixture_bars({LONG: {"en": 0.5, "ko": 0.5}}),
        lambda: histograms({LONG: ScoreSample([1.0], [0.0]), "b": ScoreSample([1.0], [0.0])}),
        lambda: panels({LONG: {LONG: {"a": [CurvePoint(1, VALUE)]}}}, x="x", y="y"),
    ],
    ids=["bars", "dots", "many", "curves", "mixture", "histograms", "panels"],
)
def test_long_names_fit_into_the_picture(draw):
    with drawing():
        figure = draw()
        FigureCanvasAgg(figure)
        assert max(outside(figure)) < 0.02


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 1), (4, 2), (5, 2), (7, 3)])
def test_many_histograms_stand_in_rows_of_at_most_three(count, rows):
    sample = ScoreSample([0.9, 0.8], [0.1, 0.3])
    with drawing():
        figure = histograms({f"model {i}": sample for i in range(count)})
    shown = [axes for axes in figure.axes if axes.get_visible()]
    grid = shown[0].get_gridspec()
    assert grid is not None
    assert (len(shown), grid.nrows) == (count, rows)
    assert all(axes.get_xlabel() == "score" for axes in shown[-grid.ncols :])


def test_a_dollar_sign_is_no_formula():
    with drawing():
        drawn = as_svg(bars({"costs $5": {"$x_1$": VALUE}}), "a name")
    assert "$x_1$" in text_of(drawn)
    assert "costs $5" in text_of(drawn)


def test_a_figure_in_a_page_takes_the_colours_of_the_page():
    with drawing():
        drawn = as_svg(bars({"mine": {"x": VALUE}}), "a name")
    assert "var(--ink)" in drawn
    assert "#222222" not in drawn
    assert 'role="img" aria-label="a name"' in drawn


def test_a_figure_in_a_page_keeps_names_in_every_script():
    with drawing():
        assert "한국어" in text_of(as_svg(bars({"한국어": {"x": VALUE}}), "a name"))


def test_matplotlib_is_left_as_it_was(tmp_path):
    backend, level = matplotlib.get_backend(), logging.getLogger("matplotlib.font_manager").level
    with matplotlib.rc_context({"font.size": 3, "svg.fonttype": "path", "svg.hashsalt": "mine"}):
        before = dict(matplotlib.rcParams)
        with drawing():
            write_png(tmp_path / "a.png", bars({"mine": {"x": VALUE}}))
        assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend
    assert logging.getLogger("matplotlib.font_manager").level == level
    plots = sys.modules.get("matplotlib.pyplot")
    assert plots is None or not plots.get_fignums()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with (
        pytest.raises(MissingExtraError, match=r"drawing pictures.*pip install 'tercet\[plot\]'"),
        drawing(),
    ):
        pass
