"""Figures: plain matplotlib in one style, with equal bytes for equal numbers.

Draw inside :func:`drawing`, which sets the style, and raises if matplotlib is not installed.
"""

import logging
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from math import isfinite, isnan
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from jaxtyping import Float64

from tercet.errors import MissingExtraError
from tercet.evaluate.report.charts import Html
from tercet.evaluate.report.fonts import fitted, give_fonts, width
from tercet.evaluate.report.intervals import Interval, metrics_of
from tercet.files.atomic import replacing_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, which is safe for the colour-blind; the user's model has the first one.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GREYS: Final = ("#6B747D", "#A3ABB3", "#43494F", "#C6CCD1")  # of baselines
_MARKS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")  # tell systems apart without colours
_POSITIVE, _NEGATIVE, _CURVE = "#0072B2", "#E69F00", "#0072B2"
_INK, GRID, _EDGE = "#222222", "#DDDDDD", "#888888"
_OF_PAGE: Final = {_INK: "ink", GRID: "line", _EDGE: "other", COLOURS[0]: "own"}
_WIDTH: Final = 7.2  # inches of every figure; the page scales it
_DPI: Final = 200  # of a PNG
_TITLE_CHARACTERS: Final = 75  # that fit across a figure
MOST_SOURCES: Final = 40  # of a mixture, the largest; those after them share one bar
_COLOURED: Final = 20  # languages of a mixture with their own colour
_NAMED_SHARE: Final = 0.07  # of a row, to have room for the name of a language
_PANEL_COLUMNS: Final = 4
_PANEL_HEIGHT: Final = 1.75  # inches of a row
_PANEL_CHARACTERS: Final = 24  # of a title, in a line
_ROW_CHARACTERS: Final = 30  # of a name at the left of a figure
_LEGEND_CHARACTERS: Final = 100  # of all names in a line of a legend
_UPRIGHT_CHARACTERS: Final = 80  # below a figure; wider names are turned
_BAR_COLUMNS: Final = 3
_LABELLED_TOKENS: Final = 80  # below a heat map; more labels cannot be read
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _EDGE,
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
        raise MissingExtraError("drawing pictures", "plot") from error
    log = logging.getLogger("matplotlib.font_manager")  # it remarks on each bold font it lacks
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with matplotlib.rc_context(_STYLE):
            yield
    finally:
        log.setLevel(level)


@dataclass(frozen=True, slots=True)
class _Look:
    colour: str
    mark: str


def _looks(names: Iterable[str], baselines: Collection[str]) -> dict[str, _Look]:
    """Return colour and mark of each system: strong ones, and grey ones of baselines."""
    names = list(dict.fromkeys(names))
    strong = [name for name in names if name not in baselines]
    grey = [name for name in names if name in baselines]
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(strong)}
    colours |= {name: GREYS[place % len(GREYS)] for place, name in enumerate(grey)}
    return {n: _Look(colours[n], _MARKS[place % len(_MARKS)]) for place, n in enumerate(names)}


def bars(
    results: Mapping[str, Mapping[str, Interval]], *, baselines: Collection[str] = ()
) -> "Figure":
    """Draw a panel for each metric, in it a bar for each system; baselines are grey."""
    names = metrics_of(results)
    rows = max(-(-len(names) // _BAR_COLUMNS), 1)
    columns = max(-(-len(names) // rows), 1)
    figure = new_figure(height=rows * (0.75 + 0.27 * len(results)))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    looks = _looks(results, baselines)
    for axes, metric in zip(grid.flat, names, strict=False):
        for place, (label, row) in enumerate(results.items()):
            value = row.get(metric)
            if value is not None and not isnan(value.mean):
                _bar(axes, place, value, looks[label].colour)
        axes.set_title(fill(metric, _TITLE_CHARACTERS // columns), loc="left")
        axes.set_yticks(range(len(results)), [fitted(name, _ROW_CHARACTERS) for name in results])
        axes.set_ylim(len(results) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(min(axes.get_xlim()[0], 0), max(axes.get_xlim()[1] * 1.28, 0.1))
        axes.grid(axis="x", color=GRID, linewidth=0.7)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    return figure


def _bar(axes: "Axes", place: int, value: Interval, colour: str) -> None:
    axes.barh(
        place,
        value.mean,
        0.7,
        color=colour,
        xerr=_whiskers([value]),
        error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2},
    )
    axes.annotate(
        f"{value.mean:.3f}",
        (max(value.high, value.mean) if isfinite(value.high) else value.mean, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A point of a curve, with its interval and a label beside it."""

    x: float | int
    value: Interval
    label: str = ""


Curves: TypeAlias = Mapping[str, Sequence[CurvePoint]]
"""Points by the name of a curve."""


def curves(lines: Curves, *, x: str, y: str) -> "Figure":
    """Draw a curve for each name over a logarithmic axis, with the interval of each point."""
    figure = new_figure(height=3.8)
    axes = figure.add_subplot()
    looks = _looks(lines, ())
    for number, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: point.x)
        axes.errorbar(
            [point.x for point in points],
            [point.value.mean for point in points],
            yerr=_whiskers([point.value for point in points]),
            label=name,
            color=looks[name].colour,
            marker=looks[name].mark,
            linewidth=1.8,
            elinewidth=0.8,
            capsize=3,
        )
        for point in points:
            place = (point.x, point.value.mean)
            above = number % 2 == 0  # neighbours of one width would cover each other
            axes.annotate(
                point.label,
                place,
                xytext=(5, 5) if above else (-5, -5),
                ha="left" if above else "right",
                va="bottom" if above else "top",
                textcoords="offset points",
                fontsize=8,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")  # at powers of two, which never collide
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=GRID, linewidth=0.7)
    _legend(figure, axes)
    return figure


def dots(
    panels: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    *,
    y: str = "nDCG@10",
    baselines: Collection[str] = (),
) -> "Figure":
    """Draw a panel for each title, with a dot and its interval for each language and system."""
    figure = new_figure(height=0.9 + 2.2 * len(panels))
    grid = figure.subplots(len(panels), 1, sharey=True, squeeze=False)[:, 0]
    systems = dict.fromkeys(s for rows in panels.values() for row in rows.values() for s in row)
    looks = _looks(systems, baselines)
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        for number, system in reversed(list(enumerate(systems))):  # the first one on top
            beside = (number - (len(systems) - 1) / 2) * 0.6 / len(systems)
            shown = [(p + beside, r[system]) for p, r in enumerate(rows.values()) if system in r]
            axes.errorbar(
                [place for place, _ in shown],
                [value.mean for _, value in shown],
                yerr=_whiskers([value for _, value in shown]),
                label=system,
                color=looks[system].colour,
                fmt=looks[system].mark,
                markersize=4.5 if system in baselines else 6,
                elinewidth=1,
            )
        names = [fitted(name, _ROW_CHARACTERS) for name in rows]
        turned = (max(map(width, names), default=0) + 1) * len(names) > _UPRIGHT_CHARACTERS
        axes.set_xticks(range(len(rows)), names, rotation=90 if turned else 0)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_ylabel(y)
        axes.set_title(fill(title, _TITLE_CHARACTERS), loc="left")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
    _legend(figure, grid[0], reverse=True)
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
    longest = 100 * max(sum(of_source.values()) for of_source in rows.values())
    few = len(langs) <= len(COLOURS)
    for number, lang in enumerate(sorted(langs, key=lambda lang: -langs[lang])):
        widths = np.array([100 * of_source.get(lang, 0.0) for of_source in rows.values()])
        strong = COLOURS[number] if few else colormaps["tab20"](number)
        colour = strong if number < _COLOURED else "#BBBBBB"
        name = lang or "unknown"
        segments = axes.barh(
            range(len(rows)),
            widths,
            left=left,
            height=0.7,
            color=colour,
            label=name if number < _COLOURED else f"_{lang}",
            edgecolor="white",
            linewidth=0.6,
        )
        named = [name if part >= _NAMED_SHARE * longest else "" for part in widths]
        ink = "white" if _is_dark(colour) else _INK
        axes.bar_label(segments, named, label_type="center", fontsize=7, color=ink)
        left += widths
    axes.set_yticks(range(len(rows)), [fitted(name, _ROW_CHARACTERS) for name in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("% of the rows")
    _legend(figure, axes)
    return figure


def _is_dark(colour: Any) -> bool:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.55


def panels(
    groups: Mapping[str, Mapping[str, Curves]],
    *,
    x: str,
    y: str,
    marked: float | int | None = None,
) -> "Figure":
    """Draw a heading for each group, and below it a panel for each name; bands are intervals.

    Panels of a group share one scale. ``marked`` is the place of a dotted line.
    """
    rows = [-(-len(group) // _PANEL_COLUMNS) for group in groups.values()]
    figure = new_figure(height=0.5 + _PANEL_HEIGHT * sum(rows) + 0.3 * len(rows))
    parts = figure.subfigures(len(groups), 1, height_ratios=rows, squeeze=False)[:, 0]
    handles, labels = [], []
    for part, (heading, group), count in zip(parts, groups.items(), rows, strict=True):
        title = fill(heading, _TITLE_CHARACTERS)
        part.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
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
    _legend_of(figure, handles, labels)
    return figure


def _draw_panel(axes: "Axes", lines: Curves, marked: float | int | None) -> None:
    looks = _looks(lines, ())
    for name, points in lines.items():
        steps = [point.x for point in points]
        colour, mark = looks[name].colour, looks[name].mark
        means = [point.value.mean for point in points]
        axes.plot(steps, means, color=colour, marker=mark, markersize=3, linewidth=1.5, label=name)
        low, high = ([getattr(p.value, side) for p in points] for side in ("low", "high"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    if marked is not None:
        axes.axvline(marked, color=_EDGE, linestyle=":", linewidth=1)
    axes.tick_params(labelsize=8)
    axes.grid(color=GRID, linewidth=0.7)


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
    _legend_of(figure, handles, labels)
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


def _legend(figure: "Figure", axes: "Axes", *, reverse: bool = False) -> None:
    """Put a legend above the figure, in as many lines as its names need."""
    handles, labels = axes.get_legend_handles_labels()
    step = -1 if reverse else 1
    _legend_of(figure, handles[::step], labels[::step])


def _legend_of(figure: "Figure", handles: Sequence[Any], labels: Sequence[str]) -> None:
    if not labels:
        return
    names = [fitted(label, _TITLE_CHARACTERS) for label in labels]
    columns = _LEGEND_CHARACTERS // (max(map(width, names)) + 6)
    columns = max(1, min(columns, len(names)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, fontsize=8)


def as_svg(figure: "Figure", name: str) -> Html:
    """Return a figure as part of a page, with a name for screen readers and the page's colours."""
    from matplotlib import rc_context

    out = StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    for axes in figure.axes:
        axes.set_facecolor("none")
    with rc_context({"svg.hashsalt": name}), _unmeasured():  # ids: the same in every run
        figure.savefig(out, format="svg", metadata=nothing, facecolor="none")
    drawing = out.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # Ids such as axes_1 would be repeated in every drawing; nothing refers to them.
    drawing = re.sub(r' id="([A-Za-z0-9.]+_\d+|image[0-9a-f]+)"', "", drawing)
    drawing = re.sub(r' (width|height)="[\d.]+pt"', "", drawing, count=2)
    for colour, of_page in _OF_PAGE.items():
        drawing = drawing.replace(colour.lower(), f"var(--{of_page})")
    return Html(drawing.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1))


def write_png(path: Path, figure: "Figure") -> None:
    """Write a figure as a file, which appears whole or not at all.

    Raises:
        StorageError: if the disk refuses.
    """
    give_fonts(figure)
    with replacing_file(path) as fresh:
        figure.savefig(fresh, format="png", dpi=_DPI, metadata={"Software": None})


@contextmanager
def _unmeasured() -> Iterator[None]:
    """Ignore warnings about letters that matplotlib cannot measure; the browser draws them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
