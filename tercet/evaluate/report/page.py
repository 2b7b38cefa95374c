"""One HTML page about a training run and what it gained.

The file is self-contained: no scripts, no fonts, no downloads. Equal reports give equal bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from tercet.evaluate.report.figures import (
    ScoreSample,
    as_svg,
    bars,
    drawing,
    histograms,
    loss_curve,
    metrics_of,
)
from tercet.evaluate.report.intervals import Interval
from tercet.files.atomic import replacing_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class ExampleSearch:
    """A query and the titles that it found, best first, with their scores."""

    query: str
    found: Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class PageFigure:
    """A figure that is drawn when the page is written."""

    draw: Callable[[], "Figure"]
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page about another analysis. Empty fields are left out."""

    title: str
    text: Sequence[str] = ()  # a paragraph each
    rows: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)  # of one table
    drawings: Sequence[PageFigure] = ()


@dataclass(frozen=True, slots=True)
class RunReport:
    """The contents of the page. Empty fields are left out."""

    title: str
    summary: Sequence[str]  # what was done with which result, a paragraph each
    results: Mapping[str, Mapping[str, Interval]]  # by system, such as "BM25", then by metric
    differences: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)  # paired
    losses: Sequence[float] = ()  # of each logged step
    learning_rates: Sequence[float] = ()  # of the same steps
    steps_apart: int = 1  # from one logged step to the next
    scores: Mapping[str, ScoreSample] = field(default_factory=dict)  # by model: before, after
    searches: Sequence[ExampleSearch] = ()
    sections: Sequence[Section] = ()
    settings: Mapping[str, str] = field(default_factory=dict)  # seed, split, versions, budget


def write_report(path: Path | str, report: RunReport) -> None:
    """Write the page; the file appears whole or not at all.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        StorageError: if the disk refuses.
    """
    with drawing():
        page = _page(report)
    with replacing_file(Path(path)) as fresh:
        fresh.write_text(page, encoding="utf-8")


def _page(report: RunReport) -> str:
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        *(f"<p>{escape(paragraph)}</p>" for paragraph in report.summary),
        *_results(report),
        *_searches(report),
        *(part for section in report.sections for part in _section(section)),
        *_settings(report),
    ]
    return _FRAME.format(title=escape(report.title), css=_CSS, body="\n".join(parts))


def _results(report: RunReport) -> Iterator[str]:
    if report.results:
        yield "<h2>Results</h2>"
        yield _interval_table("system", report.results)
        yield _figure(
            bars(report.results),
            "Each metric by system; the whiskers are the intervals of the table. "
            "Overlapping whiskers do not show equality: see the paired differences.",
        )
    if report.differences:
        yield "<h3>Differences, query by query</h3>"
        yield _interval_table("difference", report.differences, signed=True)
        yield "<p class=note>Bold: the interval excludes zero.</p>"
    if len(report.losses):
        yield "<h2>Training</h2>"
        losses = np.asarray(report.losses, dtype=np.float64)
        rates = np.asarray(report.learning_rates, dtype=np.float64)
        yield _figure(
            loss_curve(losses, rates, report.steps_apart),
            "Training loss of each step (light) and its running mean (dark).",
        )
    if report.scores:
        yield "<h2>Scores of relevant and other documents</h2>"
        yield _figure(
            histograms(report.scores),
            "Scores of queries with the documents that answer them, and with other documents. The "
            "less the two histograms overlap, the better.",
        )


def _interval_table(
    head: str, rows: Mapping[str, Mapping[str, Interval]], *, signed: bool = False
) -> str:
    """Return a table with a row for each system, and a note on how the intervals were computed."""
    names = metrics_of(rows)
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


def _searches(report: RunReport) -> Iterator[str]:
    if report.searches:
        yield "<h2>Example searches</h2>"
    for search in report.searches:
        found = "".join(
            f"<li><span class=score>{score:.3f}</span> {escape(title)}</li>"
            for title, score in search.found
        )
        yield f"<h3 class=query>{escape(search.query)}</h3><ol>{found}</ol>"


def _section(section: Section) -> Iterator[str]:
    yield f"<h2>{escape(section.title)}</h2>"
    yield from (f"<p>{escape(paragraph)}</p>" for paragraph in section.text)
    if section.rows:
        yield _interval_table("model", section.rows)
    yield from (_figure(each.draw(), each.caption) for each in section.drawings)


def _settings(report: RunReport) -> Iterator[str]:
    if report.settings:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in report.settings.items()
        )
        yield f"<h2>Settings</h2><div class=wide><table class=settings>{rows}</table></div>"


def _figure(figure: "Figure", caption: str) -> str:
    return f"<figure>{as_svg(figure, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


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
