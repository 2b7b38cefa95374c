"""One page that says what a training run did and what it gained, for people.

A file of its own: no scripts, no fonts, nothing is fetched. The same report gives the same bytes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float64, Int64

from tercet.errors import MissingExtraError
from tercet.evaluate.intervals import Interval
from tercet.files import replacing_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, which the colour-blind can tell apart; systems take them in this order.
_COLOURS: Final = ("#999999", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#D55E00")
_POSITIVE, _NEGATIVE, _CURVE, _FAINT = "#0072B2", "#E69F00", "#0072B2", "#A9C9E2"
_INK, _LINES = "#222222", "#DDDDDD"
_WIDTH: Final = 7.2  # inches of every figure; the page scales it
_POINTS: Final = 1_500  # of a curve; more cannot be seen and make the page heavy
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
    """Scores of relevant pairs, and of pairs that are not, by one model."""

    positives: Sequence[float]
    negatives: Sequence[float]


@dataclass(frozen=True, slots=True)
class ExampleSearch:
    """A query and the titles it found, best first, with their scores."""

    query: str
    found: Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class RunReport:
    """What the page shows. A part that is left empty is left out."""

    title: str
    summary: Sequence[str]  # what was done and what came of it, a paragraph each
    results: Mapping[str, Mapping[str, Interval]]  # by system, such as "BM25", then by metric
    differences: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)  # paired
    losses: Sequence[float] = ()  # of each logged step
    learning_rates: Sequence[float] = ()  # of the same steps
    steps_apart: int = 1  # from one logged step to the next
    scores: Mapping[str, ScoreSample] = field(default_factory=dict)  # by model: before, after
    searches: Sequence[ExampleSearch] = ()
    settings: Mapping[str, str] = field(default_factory=dict)  # seed, split, versions, budget


def write_report(path: Path | str, report: RunReport) -> None:
    """Write the page; the file appears whole or not at all.

    Raises:
        MissingExtraError: when matplotlib is not installed.
        StorageError: when the disk refuses.
    """
    with _drawing():
        page = _page(report)
    with replacing_file(Path(path)) as fresh:
        fresh.write_text(page, encoding="utf-8")


@contextmanager
def _drawing() -> Iterator[None]:
    """Our style while the figures are drawn; the user's own comes back after."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("the report", "plot") from error
    with matplotlib.rc_context(_STYLE):
        yield


def _page(report: RunReport) -> str:
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        *(f"<p>{escape(paragraph)}</p>" for paragraph in report.summary),
        *_results(report),
        *_training(report),
        *_score_histograms(report),
        *_searches(report),
        *_settings(report),
    ]
    return _FRAME.format(title=escape(report.title), css=_CSS, body="\n".join(parts))


def _results(report: RunReport) -> Iterator[str]:
    if report.results:
        yield "<h2>Results</h2>"
        yield _interval_table("system", report.results)
        yield _figure(
            _bars(report.results),
            "Each metric by system; the whiskers are the intervals of the table. "
            "Overlapping whiskers do not show equality: see the paired differences.",
        )
    if report.differences:
        yield "<h3>Differences, query by query</h3>"
        yield _interval_table("difference", report.differences, signed=True)
        yield "<p class=note>Bold: the interval excludes zero.</p>"


def _interval_table(
    head: str, rows: Mapping[str, Mapping[str, Interval]], *, signed: bool = False
) -> str:
    """A row a system, a column a metric, and below how the intervals were made."""
    names = _metrics_of(rows)
    header = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = [
        f"<tr><th>{escape(label)}</th>{''.join(_cell(row.get(n), signed) for n in names)}</tr>"
        for label, row in rows.items()
    ]
    made = sorted({_how_made(each) for row in rows.values() for each in row.values()})
    return (
        f"<div class=wide><table><tr><th>{escape(head)}</th>{header}</tr>{''.join(lines)}</table>"
        f"</div><p class=note>{escape('; '.join(made))}</p>"
    )


def _cell(value: Interval | None, signed: bool) -> str:
    if value is None:
        return "<td>-</td>"
    form = "+.3f" if signed else ".3f"
    mean = f"{value.mean:{form}}"
    if signed and value.excludes_zero():
        mean = f"<b>{mean}</b>"
    return f"<td>{mean} <span>[{value.low:{form}}, {value.high:{form}}]</span></td>"


def _how_made(value: Interval) -> str:
    return (
        f"Mean over {value.queries:,} queries and {value.level:.0%} bootstrap interval "
        f"({value.resamples:,} resamples of the queries, seed {value.seed})"
    )


def _metrics_of(rows: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """All metrics, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def _training(report: RunReport) -> Iterator[str]:
    if len(report.losses):
        yield "<h2>Training</h2>"
        yield _figure(
            _loss_curve(report), "Training loss of each step (light) and its running mean (dark)."
        )


def _score_histograms(report: RunReport) -> Iterator[str]:
    if report.scores:
        yield "<h2>Scores of right and wrong documents</h2>"
        yield _figure(
            _histograms(report.scores),
            "How alike a model finds queries and the documents that answer them, and queries and "
            "other documents. The less the two hills overlap, the better.",
        )


def _searches(report: RunReport) -> Iterator[str]:
    if report.searches:
        yield "<h2>Example searches</h2>"
    for search in report.searches:
        found = "".join(
            f"<li><span class=score>{score:.3f}</span> {escape(title)}</li>"
            for title, score in search.found
        )
        yield f"<h3 class=query>{escape(search.query)}</h3><ol>{found}</ol>"


def _settings(report: RunReport) -> Iterator[str]:
    if report.settings:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in report.settings.items()
        )
        yield f"<h2>Settings</h2><div class=wide><table class=settings>{rows}</table></div>"


def _bars(results: Mapping[str, Mapping[str, Interval]]) -> "Figure":
    """A group of bars a metric, a colour a system."""
    figure = _new_figure(height=3.2)
    axes = figure.add_subplot()
    names, width = _metrics_of(results), 0.8 / len(results)
    for number, (label, row) in enumerate(results.items()):
        shown = [(place, row[name]) for place, name in enumerate(names) if name in row]
        places = [place + (number - (len(results) - 1) / 2) * width for place, _ in shown]
        means = np.array([value.mean for _, value in shown])
        low = means - [value.low for _, value in shown]
        high = [value.high for _, value in shown] - means
        axes.bar(
            places,
            means,
            width * 0.92,
            label=label,
            color=_COLOURS[number % len(_COLOURS)],
            yerr=np.maximum([low, high], 0),
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
    axes.grid(axis="y", color=_LINES, linewidth=0.7)
    _legend_above(axes, len(results))
    return figure


def _loss_curve(report: RunReport) -> "Figure":
    """Losses and their running mean; below them the learning rate, if it is given."""
    with_rates = len(report.learning_rates) > 0
    figure = _new_figure(height=3.8 if with_rates else 2.8)
    shares = {"height_ratios": [3, 1]} if with_rates else {}
    grid = figure.subplots(1 + with_rates, 1, sharex=True, squeeze=False, gridspec_kw=shares)
    axes = grid[0, 0]
    losses = np.asarray(report.losses, dtype=np.float64)
    steps = report.steps_apart * np.arange(1, len(losses) + 1)
    every = _thinned(len(losses))
    axes.plot(steps[every], losses[every], color=_FAINT, linewidth=0.8, label="each step")
    smooth = running_mean(losses)[every]
    axes.plot(steps[every], smooth, color=_CURVE, linewidth=1.8, label="running mean")
    axes.set_ylabel("loss")
    _legend_above(axes, 2)
    if with_rates:
        rates = np.asarray(report.learning_rates, dtype=np.float64)
        every = _thinned(len(rates))
        at = report.steps_apart * (1 + every)
        grid[1, 0].plot(at, rates[every], color=_INK, linewidth=1.2)
        grid[1, 0].set_ylabel("learning rate")
        grid[1, 0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        grid[1, 0].set_ylim(bottom=0)
    grid[-1, 0].set_xlabel("step")
    for each in grid[:, 0]:
        each.grid(color=_LINES, linewidth=0.7)
    return figure


def running_mean(values: Float64[np.ndarray, "steps"]) -> Float64[np.ndarray, "steps"]:
    """The mean of the values around each, a thirtieth of all on either side, so it lags nowhere.

    Values that are not finite are left out; where there are no others, it is NaN.
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
    """Places of at most so many points as can be seen, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(np.int64))


def _histograms(scores: Mapping[str, ScoreSample]) -> "Figure":
    """A panel a model on one scale, so that the panels can be compared."""
    figure = _new_figure(height=2.6)
    panels = figure.subplots(1, len(scores), sharex=True, sharey=True, squeeze=False)[0]
    everything = np.concatenate(
        [np.r_[sample.positives, sample.negatives] for sample in scores.values()]
    )
    low, high = (everything.min(), everything.max()) if len(everything) else (0.0, 1.0)
    bins = np.linspace(low, high if high > low else low + 1, 41)
    for axes, (label, sample) in zip(panels, scores.items(), strict=True):
        kinds = (("other", sample.negatives, _NEGATIVE), ("relevant", sample.positives, _POSITIVE))
        for name, values, colour in kinds:
            weights = np.full(len(values), 100 / max(len(values), 1))
            axes.hist(values, bins, weights=weights, color=colour, alpha=0.55, label=name)
            axes.hist(values, bins, weights=weights, color=colour, histtype="step")
        axes.set_title(label, loc="left")
        axes.set_xlabel("score")
        axes.grid(axis="y", color=_LINES, linewidth=0.7)
    panels[0].set_ylabel("% of pairs")
    _legend_above(panels[-1], 2)
    return figure


def _new_figure(height: float) -> "Figure":
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)  # this figure only: the user's backend stays what it is
    return figure


def _legend_above(axes: "Axes", columns: int) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, fontsize=9)


def _figure(figure: "Figure", caption: str) -> str:
    """The drawing as part of the page."""
    from matplotlib import rc_context

    out = StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context({"svg.hashsalt": caption}):  # names of parts: the same in every run
        figure.savefig(out, format="svg", metadata=nothing)
    drawing = out.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # Names such as axes_1 would stand in every drawing; nothing refers to them.
    drawing = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", drawing)
    drawing = re.sub(r' (width|height)="[\d.]+pt"', "", drawing, count=2)
    label = f'<svg role="img" aria-label="{escape(caption)}"'
    drawing = drawing.replace("<svg", label, 1)
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


_CSS: Final = """
body { max-width: 46rem; margin: 3rem auto; padding: 0 1.2rem; color: #222; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; padding: .35rem 1.2rem .35rem 0; vertical-align: top;
  border-bottom: 1px solid #ddd; }
th { font-weight: 600; }
td span, .score { color: #666; white-space: nowrap; }
.settings th { font-weight: 400; color: #555; white-space: nowrap; }
.settings td { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.note, figcaption { color: #555; font-size: .87rem; margin: .4rem 0 0; }
figure { margin: 1.4rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
.query { font-weight: 600; }
ol { margin: 0; padding-left: 1.6rem; }
li { padding: .1rem 0; }
.score { font-variant-numeric: tabular-nums; margin-right: .5rem; }
@media print { body { margin: 0; max-width: none; } figure, ol { break-inside: avoid; } }
"""

_FRAME: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""
