"""Figures: plain matplotlib in one style, with equal bytes for equal numbers.

Draw inside :func:`drawing`, which sets the style, and raises if matplotlib is not installed.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64

from tercet.errors import MissingExtraError
from tercet.evaluate.report.intervals import Interval
from tercet.files.atomic import replacing_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, which is safe for the colour-blind; systems use it in this order.
COLOURS: Final = ("#999999", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#D55E00")
_POSITIVE, _NEGATIVE, _CURVE, _FAINT = "#0072B2", "#E69F00", "#0072B2", "#A9C9E2"
_INK, GRID = "#222222", "#DDDDDD"
_WIDTH: Final = 7.2  # inches of every figure; the page scales it
_DPI: Final = 200  # of a PNG
_POINTS: Final = 1_500  # of a curve; more cannot be seen and make the page heavy
_TITLE_CHARACTERS: Final = 75  # that fit across a figure
MOST_SOURCES: Final = 40  # of a mixture, the largest; those after them share one bar
_COLOURED: Final = 20  # languages of a mixture with their own colour
_PANEL_COLUMNS: Final = 4
_PANEL_HEIGHT: Final = 1.75  # inches of a row
_PANEL_CHARACTERS: Final = 24  # of a title, in a line
_LABELLED_TOKENS: Final = 80  # below a heat map; more labels cannot be read
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class ScoreSample:
    """Scores of relevant and of other pairs, by one model."""

    positives: Sequence[float]
    negatives: Sequence[float]


@dataclass(frozen=True, slots=True, eq=False)
class HeatMap:
    """A number between 0 and 1 for each layer and token, and each layer's mean over more tokens."""

    tokens: Sequence[str]
    values: Float64[np.ndarray, "layers tokens"]
    layer_means: Float64[np.ndarray, "layers"]


@contextmanager
def drawing() -> Iterator[None]:
    """Set our style while figures are drawn; the user's is restored afterwards.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("the report", "plot") from error
    with matplotlib.rc_context(_STYLE):
        yield


def bars(results: Mapping[str, Mapping[str, Interval]]) -> "Figure":
    """Draw a group of bars for each metric, and a colour for each system."""
    figure = new_figure(height=3.2)
    axes = figure.add_subplot()
    names, width = metrics_of(results), 0.8 / len(results)
    for number, (label, row) in enumerate(results.items()):
        shown = [(place, row[name]) for place, name in enumerate(names) if name in row]
        places = [place + (number - (len(results) - 1) / 2) * width for place, _ in shown]
        axes.bar(
            places,
            [value.mean for _, value in shown],
            width * 0.92,
            label=label,
            color=COLOURS[number % len(COLOURS)],
            yerr=_whiskers([value for _, value in shown]),
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 3},
        )
        for place, (_, value) in zip(places, shown, strict=True):
            axes.annotate(
                f"{value.mean:.3f}",
                (place, value.high),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, max(axes.get_ylim()[1] * 1.05, 0.1))
    axes.set_ylabel("mean over queries")
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    _legend_above(axes, len(results))
    return figure


def loss_curve(
    losses: Float64[np.ndarray, "steps"],
    learning_rates: Float64[np.ndarray, "rates"],
    steps_apart: int,
) -> "Figure":
    """Draw losses and their running mean; below them the learning rate, if it is given."""
    with_rates = len(learning_rates) > 0
    figure = new_figure(height=3.8 if with_rates else 2.8)
    shares = {"height_ratios": [3, 1]} if with_rates else {}
    grid = figure.subplots(1 + with_rates, 1, sharex=True, squeeze=False, gridspec_kw=shares)
    axes = grid[0, 0]
    steps = steps_apart * np.arange(1, len(losses) + 1)
    every = _thinned(len(losses))
    axes.plot(steps[every], losses[every], color=_FAINT, linewidth=0.8, label="each step")
    smooth = running_mean(losses)[every]
    axes.plot(steps[every], smooth, color=_CURVE, linewidth=1.8, label="running mean")
    axes.set_ylabel("loss")
    _legend_above(axes, 2)
    if with_rates:
        every = _thinned(len(learning_rates))
        at = steps_apart * (1 + every)
        grid[1, 0].plot(at, learning_rates[every], color=_INK, linewidth=1.2)
        grid[1, 0].set_ylabel("learning rate")
        grid[1, 0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        grid[1, 0].set_ylim(bottom=0)
    grid[-1, 0].set_xlabel("step")
    for each in grid[:, 0]:
        each.grid(color=GRID, linewidth=0.7)
    return figure


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A point of a curve, with its interval and a label beside it."""

    x: float
    value: Interval
    label: str = ""


Curves: TypeAlias = Mapping[str, Sequence[CurvePoint]]
"""Points by the name of a curve."""


def curves(lines: Curves, *, x: str, y: str) -> "Figure":
    """Draw a curve for each name over a logarithmic axis, with the interval of each point."""
    figure = new_figure(height=3.8)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: point.x)
        axes.errorbar(
            [point.x for point in points],
            [point.value.mean for point in points],
            yerr=_whiskers([point.value for point in points]),
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker="o",
            linewidth=1.8,
            elinewidth=0.8,
            capsize=3,
        )
        for point in points:
            place = (point.x, point.value.mean)
            beside = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(point.label, place, **beside)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")  # at powers of two, which never collide
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=GRID, linewidth=0.7)
    _legend_above(axes, len(lines))
    return figure


def dots(
    panels: Mapping[str, Mapping[str, Mapping[str, Interval]]], *, y: str = "nDCG@10"
) -> "Figure":
    """Draw a panel for each title, with a dot and its interval for each language and system."""
    figure = new_figure(height=0.6 + 2.2 * len(panels))
    grid = figure.subplots(len(panels), 1, sharey=True, squeeze=False)[:, 0]
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        systems = list(dict.fromkeys(system for row in rows.values() for system in row))
        for number, system in enumerate(systems):
            beside = (number - (len(systems) - 1) / 2) * 0.6 / len(systems)
            shown = [(p + beside, row[system]) for p, row in enumerate(rows.values())]
            axes.errorbar(
                [place for place, _ in shown],
                [value.mean for _, value in shown],
                yerr=_whiskers([value for _, value in shown]),
                label=system,
                color=COLOURS[number % len(COLOURS)],
                fmt="o",
                markersize=4,
                elinewidth=1,
            )
        axes.set_xticks(range(len(rows)), list(rows))
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_ylabel(y)
        axes.set_title(title, loc="left")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
    grid[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8)
    return figure


def _whiskers(values: Sequence[Interval]) -> Float64[np.ndarray, "2 values"]:
    """Return the distances of means from both ends of their intervals."""
    ends = [[each.mean - each.low for each in values], [each.high - each.mean for each in values]]
    return np.maximum(ends, 0)


def mixture_bars(shares: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Draw the shares of a mixture by source and language, the largest source on top."""
    from matplotlib import colormaps

    totals = {source: sum(langs.values()) for source, langs in shares.items()}
    names = sorted(totals, key=lambda name: -totals[name])
    rows = {name: dict(shares[name]) for name in names[:MOST_SOURCES]}
    for name in names[MOST_SOURCES:]:
        rest = rows.setdefault(f"{len(names) - MOST_SOURCES} others", {})
        for lang, share in shares[name].items():
            rest[lang] = rest.get(lang, 0.0) + share
    langs: dict[str, float] = {}
    for of_source in rows.values():
        for lang, share in of_source.items():
            langs[lang] = langs.get(lang, 0.0) + share
    figure = new_figure(height=1.2 + 0.28 * len(rows))
    axes = figure.add_subplot()
    left = np.zeros(len(rows))
    for number, lang in enumerate(sorted(langs, key=lambda lang: -langs[lang])):
        widths = np.array([100 * of_source.get(lang, 0.0) for of_source in rows.values()])
        colour = colormaps["tab20"](number) if number < _COLOURED else "#BBBBBB"
        label = (lang or "unknown") if number < _COLOURED else f"_{lang}"
        axes.barh(range(len(rows)), widths, left=left, height=0.7, color=colour, label=label)
        left += widths
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("% of the rows")
    axes.legend(ncols=min(len(langs), 8), fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def panels(
    groups: Mapping[str, Mapping[str, Curves]],
    *,
    x: str,
    y: str,
    marked: float | None = None,
) -> "Figure":
    """Draw a heading for each group, and below it a panel for each name; bands are intervals.

    Panels of a group share one scale. ``marked`` is the place of a dotted line.
    """
    rows = [-(-len(group) // _PANEL_COLUMNS) for group in groups.values()]
    figure = new_figure(height=0.5 + _PANEL_HEIGHT * sum(rows) + 0.3 * len(rows))
    parts = figure.subfigures(len(groups), 1, height_ratios=rows, squeeze=False)[:, 0]
    handles, labels = [], []
    for part, (heading, group), count in zip(parts, groups.items(), rows, strict=True):
        part.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold")
        grid = part.subplots(count, _PANEL_COLUMNS, sharex=True, sharey=True, squeeze=False)
        for axes, (title, lines) in zip(grid.flat, group.items(), strict=False):
            _draw_panel(axes, lines, marked)
            axes.set_title(fill(title, _PANEL_CHARACTERS), loc="left", fontsize=9)
            handles, labels = axes.get_legend_handles_labels()
        for axes in grid.flat[len(group) :]:
            axes.set_visible(False)
        for axes in grid.flat[max(len(group) - _PANEL_COLUMNS, 0) : len(group)]:
            axes.set_xlabel(x, fontsize=8)
            axes.tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel(y, fontsize=8)
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=9)
    return figure


def _draw_panel(axes: "Axes", lines: Curves, marked: float | None) -> None:
    for number, (name, points) in enumerate(lines.items()):
        steps = [point.x for point in points]
        colour = COLOURS[2 * number % len(COLOURS)]
        means = [point.value.mean for point in points]
        axes.plot(steps, means, color=colour, marker="o", markersize=3, linewidth=1.5, label=name)
        low, high = ([getattr(p.value, side) for p in points] for side in ("low", "high"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    if marked is not None:
        axes.axvline(marked, color="#888888", linestyle=":", linewidth=1)
    axes.tick_params(labelsize=8)
    axes.grid(color=GRID, linewidth=0.7)


def metrics_of(rows: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """Return all metrics, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def running_mean(values: Float64[np.ndarray, "steps"]) -> Float64[np.ndarray, "steps"]:
    """Return the mean of the values around each, a thirtieth of all on either side.

    Values that are not finite are left out; NaN if there are no others.
    """
    reach, finite = len(values) // 30, np.isfinite(values)
    sums = np.concatenate([[0.0], np.where(finite, values, 0.0).cumsum()])
    counts = np.concatenate([[0], finite.cumsum()])
    place = np.arange(len(values))
    first, end = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    number = counts[end] - counts[first]
    nothing = np.full(len(values), np.nan)
    return np.divide(sums[end] - sums[first], number, out=nothing, where=number > 0)


def _thinned(count: int) -> Int64[np.ndarray, "points"]:
    """Return the indices of at most ``_POINTS`` points, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(np.int64))


def histograms(
    scores: Mapping[str, ScoreSample],
    *,
    names: tuple[str, str] = ("relevant", "other"),
    score: str = "score",
    counted: str = "pairs",
    bins: int = 40,
) -> "Figure":
    """Draw a panel for each model on a common scale; ``names`` are those of the histograms."""
    rows = -(-len(scores) // 3)
    columns = -(-len(scores) // rows)
    figure = new_figure(height=0.6 + 2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    edges = _edges(scores, bins)
    for axes, (label, sample) in zip(grid.flat, scores.items(), strict=False):
        kinds = ((sample.negatives, _NEGATIVE, names[1]), (sample.positives, _POSITIVE, names[0]))
        for values, colour, name in kinds:
            weights = np.full(len(values), 100 / max(len(values), 1))
            axes.hist(values, edges, weights=weights, color=colour, alpha=0.55, label=name)
            axes.hist(values, edges, weights=weights, color=colour, histtype="step")
        axes.set_title(fill(label, _TITLE_CHARACTERS // columns), loc="left")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"% of {counted}")
    for axes in grid.flat[len(scores) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(len(scores) - columns, 0) : len(scores)]:  # nothing below them
        axes.set_xlabel(score)
        axes.tick_params(labelbottom=True)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=9)
    return figure


def _edges(scores: Mapping[str, ScoreSample], bins: int) -> Float64[np.ndarray, "edges"]:
    """Return the edges of bins over all scores; one unit altogether if the scores are equal."""
    everything = np.concatenate(
        [np.r_[sample.positives, sample.negatives] for sample in scores.values()]
    )
    low, high = (everything.min(), everything.max()) if len(everything) else (0.0, 1.0)
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


@dataclass(frozen=True, slots=True)
class MapLabels:
    """The names of rows, columns, numbers and the curve of a heat map."""

    row: str = "layer"
    column: str = "token"
    number: str = "cosine of the causal and the bidirectional state"
    curve: str = "mean"


def heat_maps(maps: Mapping[str, HeatMap], labels: MapLabels | None = None) -> "Figure":
    """Draw a row for each model: layers upwards, tokens to the right, and the mean of each layer.

    All numbers are on one scale from 0 to 1. Tokens are shown below the last map, and below one
    whose tokens differ from those of the next.
    """
    labels = labels or MapLabels()
    figure = new_figure(height=0.8 + 2.5 * len(maps))
    shares = {"width_ratios": [5, 1]}
    grid = figure.subplots(len(maps), 2, squeeze=False, sharey="row", gridspec_kw=shares)
    every = list(maps.values())
    image = None
    for number, (label, shown) in enumerate(maps.items()):
        left, right = grid[number]
        image = left.imshow(
            shown.values,
            aspect="auto",
            origin="lower",
            interpolation="none",
            vmin=0,
            vmax=1,
        )
        left.set_title(fill(label, _TITLE_CHARACTERS), loc="left")
        left.set_ylabel(labels.row)
        left.locator_params(axis="y", integer=True)
        if shown is every[-1] or shown.tokens != every[number + 1].tokens:
            _name_tokens(left, shown.tokens, labels.column)
        else:
            left.set_xticks([])
        right.plot(shown.layer_means, range(len(shown.layer_means)), color=_CURVE, linewidth=1.8)
        right.set_xlim(0, 1.03)
        right.set_title(labels.curve, loc="left")
        right.grid(color=GRID, linewidth=0.7)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, location="bottom", shrink=0.5, aspect=40, pad=0.02)
        bar.set_label(labels.number, fontsize=9)
        bar.ax.tick_params(labelsize=8)
    return figure


def _name_tokens(axes: "Axes", tokens: Sequence[str], name: str) -> None:
    if len(tokens) > _LABELLED_TOKENS:
        axes.set_xlabel(name)
        return
    size = min(8.0, 330 / max(len(tokens), 1))  # points: as high as a column is wide
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=size)
    axes.tick_params(axis="x", length=0, pad=2)


def new_figure(height: float) -> "Figure":
    """Return an empty figure of the common width and of this height in inches."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)  # of this figure only: the user's backend does not change
    return figure


def _legend_above(axes: "Axes", columns: int) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, fontsize=9)


def as_svg(figure: "Figure", name: str) -> str:
    """Return a figure as part of a page, with a name for screen readers."""
    from matplotlib import rc_context

    out = StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context({"svg.hashsalt": name}), _any_script():  # ids: the same in every run
        figure.savefig(out, format="svg", metadata=nothing)
    drawing = out.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # Ids such as axes_1 would be repeated in every drawing; nothing refers to them.
    drawing = re.sub(r' id="([A-Za-z0-9.]+_\d+|image[0-9a-f]+)"', "", drawing)
    drawing = re.sub(r' (width|height)="[\d.]+pt"', "", drawing, count=2)
    return drawing.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)


def write_png(path: Path, figure: "Figure") -> None:
    """Write a figure as a file, which appears whole or not at all.

    Raises:
        StorageError: if the disk refuses.
    """
    with replacing_file(path) as fresh, _any_script():
        figure.savefig(fresh, format="png", dpi=_DPI, metadata={"Software": None})


@contextmanager
def _any_script() -> Iterator[None]:
    """Ignore warnings about characters that matplotlib's font lacks; they become boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
