"""One HTML page about a training, an evaluation or an analysis, in one design.

The file is self-contained: no scripts, no fonts, no downloads. It is light or dark as the reader's
system is, and readable on a telephone. Equal pages give equal bytes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from tercet.evaluate.report.charts import Html
from tercet.evaluate.report.intervals import Interval, metrics_of
from tercet.files.atomic import replacing_file


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what is below it; a section without parts is left out."""

    title: str
    parts: Sequence[Html]


@dataclass(frozen=True, slots=True)
class Page:
    """A title, what was done with which result in a paragraph each, and sections."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section] = ()


def write_page(path: Path | str, page: Page) -> None:
    """Write the page; the file appears whole or not at all.

    Raises:
        StorageError: if the disk refuses.
    """
    with replacing_file(Path(path)) as fresh:
        fresh.write_text(_whole(page), encoding="utf-8")


def _whole(page: Page) -> str:
    body = [
        f"<h1>{escape(page.title)}</h1>",
        *(f'<p class="lead">{escape(paragraph)}</p>' for paragraph in page.summary),
    ]
    for section in page.sections:
        if section.parts:
            heading = f"<h2>{escape(section.title)}</h2>"
            body.append("<section>" + "\n".join([heading, *section.parts]) + "</section>")
    return _FRAME.format(title=escape(page.title), css=_CSS, body="\n".join(body))


# ---- parts of a section --------------------------------------------------------------------------


def paragraph(text: str) -> Html:
    """Return a paragraph."""
    return Html(f"<p>{escape(text)}</p>")


def note(text: str) -> Html:
    """Return a remark in small letters."""
    return Html(f'<p class="note">{escape(text)}</p>')


def heading(text: str) -> Html:
    """Return a heading inside a section."""
    return Html(f"<h3>{escape(text)}</h3>")


def figure(drawing: Html, caption: str) -> Html:
    """Return a chart with the sentence below it."""
    return Html(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>")


def side_by_side(parts: Iterable[Html]) -> Html:
    """Return parts beside each other, where there is room."""
    return Html(f'<div class="beside">{"".join(parts)}</div>')


def facts(rows: Mapping[str, str]) -> Html:
    """Return names with their values."""
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return _scrolled(f'<table class="facts">{lines}</table>', "facts")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Return a table; numbers stand at the right of their columns."""
    rows = [list(row) for row in rows]
    counts = [all(_is_number(row[place]) for row in rows) for place in range(len(header))]
    kinds = [' class="count"' if is_count and rows else "" for is_count in counts]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for name, kind in zip(header, kinds, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return _scrolled(f"<table><tr>{head}</tr>{lines}</table>", ", ".join(header))


def interval_table(
    corner: str,
    rows: Mapping[str, Mapping[str, Interval]],
    *,
    signed: bool = False,
    over: str = "queries",
) -> Html:
    """Return a table with a row for each system, and a note on how the intervals were computed."""
    names = metrics_of(rows)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = [
        f'<tr><th scope="row">{escape(label)}</th>'
        f"{''.join(_cell(row.get(n), signed) for n in names)}</tr>"
        for label, row in rows.items()
    ]
    body = f'<table><tr><th scope="col">{escape(corner)}</th>{head}</tr>{"".join(lines)}</table>'
    made = sorted({_how_made(each, over) for row in rows.values() for each in row.values()})
    bold = "Bold: the interval excludes zero. " if signed else ""
    return Html(_scrolled(body, corner) + note(bold + "; ".join(made) + "."))


def commands(lines: Iterable[str]) -> Html:
    """Return commands to copy."""
    return Html(f'<pre tabindex="0">{escape(chr(10).join(lines))}</pre>')


def messages(lines: Iterable[tuple[str, str]]) -> Html:
    """Return a list of messages, each with its kind, of which a warning stands out."""
    items = "".join(
        f'<li class="{escape(kind)}">'
        + (f"<b>{escape(kind)}:</b> " if kind != "note" else "")
        + f"{escape(text)}</li>"
        for kind, text in lines
    )
    return Html(f'<ul class="messages">{items}</ul>')


def ranked(query: str, found: Iterable[tuple[str, float]]) -> Html:
    """Return a query with the titles that it found, best first, and their scores."""
    items = "".join(
        f'<li><span class="score">{score:.3f}</span> {escape(title)}</li>' for title, score in found
    )
    return Html(f'<h3 class="query">{escape(query)}</h3><ol>{items}</ol>')


@dataclass(frozen=True, slots=True)
class Quoted:
    """A text, its figures in a few words, and texts that belong to it by what they are."""

    text: str
    figures: str
    others: Sequence[tuple[str, str]]


def example(shown: Quoted) -> Html:
    """Return an example from the data."""
    others = "".join(
        f'<p><span class="what">{escape(what)}:</span> {escape(text)}</p>'
        for what, text in shown.others
    )
    figures = f'<p class="what">{escape(shown.figures)}</p>' if shown.figures else ""
    return Html(
        f'<div class="example"><p class="query">{escape(shown.text)}</p>{figures}{others}</div>'
    )


def folded(title: str, parts: Iterable[Html]) -> Html:
    """Return parts that are shown once the reader opens them."""
    inside = "".join(parts)
    return Html(f"<details><summary>{escape(title)}</summary>{inside}</details>")


def flat(record: Mapping[str, object], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings one by one, such as ``model.base``, without those that are None."""
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{name}.")
        elif value not in (None, {}, [], ()):
            yield f"{before}{name}", str(value)


def _scrolled(table_: str, name: str) -> Html:
    """Return a table that scrolls inside itself, also by the keyboard."""
    label = escape(f"table: {name}")
    return Html(f'<div class="wide" tabindex="0" role="region" aria-label="{label}">{table_}</div>')


def _is_number(text: str) -> bool:
    return not text or text == "-" or text.strip("%").replace(",", "").replace(".", "", 1).isdigit()


def _cell(value: Interval | None, signed: bool) -> str:
    if value is None or value.mean != value.mean:
        return "<td>-</td>"
    form = "+.3f" if signed else ".3f"
    mean = f"{value.mean:{form}}"
    if signed and value.excludes_zero():
        mean = f"<b>{mean}</b>"
    return f"<td>{mean} <span>[{value.low:{form}}, {value.high:{form}}]</span></td>"


def _how_made(value: Interval, over: str) -> str:
    return (
        f"Over {value.queries:,} {over}, with {value.level:.0%} bootstrap intervals "
        f"({value.resamples:,} resamples of the {over}, seed {value.seed})"
    )


_CSS: Final = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2126; --soft: #56606a; --line: #d9dee3;
  --panel: #f5f7f9; --own: #0b62b0; --faint: #a9c9e8; --other: #7c858e; --second: #c65300;
  --third: #00805e; --fourth: #a4447c; --fifth: #7a6400; --warn: #9a4a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e8eb; --soft: #a2acb5;
  --line: #343b42; --panel: #1d2226; --own: #62b0f5; --faint: #2f5273; --other: #959ea7;
  --second: #f29b5c; --third: #45c9a0; --fourth: #e28bbd; --fifth: #d8c34f; --warn: #f0ac5f; } }
* { box-sizing: border-box; }
body { max-width: 52rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .35rem 1.3rem .35rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td span, .score { color: var(--soft); white-space: nowrap; }
th.count, td.count { text-align: right; }
table:not(.facts) td { white-space: nowrap; }
.facts th { font-weight: 400; color: var(--soft); min-width: 7rem; max-width: 16rem; }
.facts td { overflow-wrap: anywhere; white-space: pre-line; }
.wide { overflow-x: auto; margin: .5rem 0; }
.wide:focus-visible, pre:focus-visible, summary:focus-visible { outline: 2px solid var(--own);
  outline-offset: 2px; }
.note, figcaption { color: var(--soft); font-size: .86rem; }
figure { margin: 1rem 0 1.4rem; }
figcaption { margin-top: .3rem; }
figure > svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
pre { background: var(--panel); padding: .8rem 1rem; overflow-x: auto; font-size: .86rem;
  line-height: 1.5; border-radius: 4px; }
ol { margin: 0; padding-left: 1.6rem; }
li { padding: .1rem 0; }
.score { font-variant-numeric: tabular-nums; margin-right: .5rem; }
.messages { padding-left: 1.2rem; font-size: .9rem; }
.messages .warning b { color: var(--warn); }
details { margin: .8rem 0; }
summary { cursor: pointer; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: 0 2rem; }
.chart { margin: .6rem 0 1rem; }
.axes { font-size: .86rem; margin: 0 0 .5rem; }
.axes b { font-weight: 600; margin-right: 1rem; }
.across { font-size: .8rem; color: var(--soft); text-align: center; margin: 1.4rem 0 0 3.4rem; }
.key { display: inline-block; margin-right: 1rem; color: var(--soft); }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%;
  margin-right: .35rem; background: currentColor; }
.key i.other { border-radius: 0; }
svg.plot { overflow: visible; margin-left: 3.4rem; width: calc(100% - 4rem); display: block; }
svg.plot text, .foot text { font-size: 12px; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
.plot path { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }
.plot path.faint { stroke-width: 1; }
.plot path.filled { fill: currentColor; fill-opacity: .25; }
.plot circle, .rows circle, .rows rect { fill: currentColor; }
line.grid { stroke: var(--line); }
line.zero { stroke: var(--soft); stroke-width: 1.5; }
.rows line.own, .rows line.other { stroke: currentColor; stroke-width: 2.5; }
.own { color: var(--own); } .faint { color: var(--faint); } .other { color: var(--other); }
.second { color: var(--second); } .third { color: var(--third); } .fourth { color: var(--fourth); }
.fifth { color: var(--fifth); }
.rows { display: grid; grid-template-columns: minmax(4rem, max-content) 1fr auto;
  align-items: center; gap: 0 1rem; font-size: .9rem; }
.rows .name { max-width: 16rem; overflow-wrap: anywhere; line-height: 1.25; }
.rows .number { font-variant-numeric: tabular-nums; }
.rows svg { width: 100%; overflow: visible; display: block; }
.example { border-left: 3px solid var(--line); padding-left: .9rem; margin: 1rem 0;
  font-size: .92rem; }
.example p { margin: .25rem 0; }
.example .query { font-weight: 600; }
.example .what { color: var(--soft); }
@media (max-width: 34rem) { body { padding: 1.2rem .9rem 3rem; }
  .rows { grid-template-columns: 1fr auto; } .rows .name { grid-column: 1 / -1; max-width: none; }
  .rows .name:empty { display: none; } }
@media print { body { padding: 0; max-width: none; } figure, ol, .example { break-inside: avoid; } }
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
<main>
{body}
</main>
</body>
</html>
"""
