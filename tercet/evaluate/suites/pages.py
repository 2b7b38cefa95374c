"""The pages about evaluations: ``report.html`` in a folder, with pictures where they can be drawn.

A page never needs matplotlib; with it, the pictures are PNG files beside the page as well.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tercet.data.files.similarity import SimilaritySet
from tercet.errors import MissingExtraError
from tercet.evaluate.measures.labels import ClassificationResult
from tercet.evaluate.measures.retention import Retained
from tercet.evaluate.measures.retrieval import RetrievalResult, versions
from tercet.evaluate.measures.sts import SimilarityResult
from tercet.evaluate.report.charts import SERIES, Html, Line, interval_chart, line_chart
from tercet.evaluate.report.figures import CurvePoint, bars, curves, dots, drawing, write_png
from tercet.evaluate.report.intervals import interval
from tercet.evaluate.report.page import (
    Page,
    Quoted,
    Section,
    commands,
    example,
    facts,
    figure,
    flat,
    heading,
    interval_table,
    paragraph,
    table,
    write_page,
)
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.averages import Averages
from tercet.evaluate.suites.comparison import (
    SCORES,
    LanguageComparison,
    SetComparison,
    main_scores,
)
from tercet.evaluate.suites.suite import MAIN, Result
from tercet.files.artifacts import write_json
from tercet.files.secrets import redacted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT: Final = "report.html"
EXAMPLES: Final = 5  # queries that gained and lost most
_HERE: Final = "here"  # by the measured model
_CHARACTERS: Final = 280  # of a text in an example
_OVERLAP: Final = (
    "Dots with 95 % intervals: the measured model in the strong colour, what it is compared with "
    "as grey squares. Overlapping intervals do not show equality: see the differences."
)


@dataclass(frozen=True, slots=True)
class ReportPlace:
    """The folder of a report, what was measured, and the command that repeats it."""

    out: Path
    data: Path | str
    command: str = ""
    say: Callable[[str], None] = lambda line: None


def write_set_report(place: ReportPlace, found: SetComparison) -> Path:
    """Write the page about one set, its figures as ``scores.json``, and ``results.png``.

    Raises:
        StorageError: if the disk refuses.
    """
    own = found.own
    metric, over = found.metrics[0], _unit(found)
    others = [name for name in found.figures if name not in own]
    rows = {name: {name: row[metric]} for name, row in found.figures.items()}
    results = [
        figure(interval_chart(rows, name=metric, baselines=others), f"{metric}. {_OVERLAP}"),
        interval_table("model", found.figures, over=over),
    ]
    minus = []
    if found.differences:
        leads = {name: {name: row[metric]} for name, row in found.differences.items()}
        minus = [
            figure(
                interval_chart(leads, name=f"{found.title}, {metric}", signed=True),
                f"{metric}: {found.title} each of these, on the same {over}."
                if len(own) == 1
                else f"{metric}: each of these {found.title}, on the same {over}.",
            ),
            interval_table(found.title, found.differences, signed=True, over=over),
        ]
    page = Page(
        f"Evaluation of {next(iter(found.models), own[0])} on {Path(place.data).name}",
        [found.size[0].upper() + found.size[1:] + ".", *_verdict(found, others, metric)],
        [
            Section("Results", results),
            Section("Differences", minus),
            *_example_sections(found, others, metric),
            Section("Conditions", list(_conditions(found.models, found.search))),
            Section("How to repeat it", _repeat(place.command)),
        ],
    )
    pictures = {"results": lambda: bars(found.figures, baselines=others)}
    return _written(place, page, found.record(Path(place.data)), pictures)


def write_language_report(place: ReportPlace, found: LanguageComparison) -> Path:
    """Write the page about a folder of sets, its figures, and ``languages.png``.

    Raises:
        StorageError: if the disk refuses.
    """
    names, others = list(found.scores), found.others
    panels = {
        label: {
            lang: {name: each.languages[lang] for name, each in axis.figures.items()}
            for lang in next(iter(axis.figures.values())).languages
        }
        for label, axis in found.axes.items()
    }
    sections = [Section("All sets", [_set_table(found)])]
    for label, rows in panels.items():
        axis = found.axes[label]
        parts = [
            figure(
                interval_chart(rows, name=f"{MAIN} by language, {label}", baselines=others),
                f"{MAIN} of each language, for the systems in this order; numbers are those of "
                f"{names[0]}.",
            ),
            _average_table(axis.figures, signed=False),
        ]
        if axis.differences:
            parts += [heading(f"{names[0]} minus"), _average_table(axis.differences, signed=True)]
        sections.append(Section(f"By language: {label}", parts))
    if examples := list(_language_examples(found)):
        sections.append(Section("Sets that gained and lost most", examples))
    queries = sum(len(each.langs) for each in found.first)
    page = Page(
        f"Evaluation of {names[0]} on {Path(place.data).name}",
        [f"{len(found.first):,} sets with {queries:,} queries in all, by {MAIN}."],
        [
            *sections,
            Section("Conditions", list(_conditions(found.models, {}))),
            Section("How to repeat it", _repeat(place.command)),
        ],
    )
    pictures = {"languages": lambda: dots(panels, baselines=others)} if panels else {}
    return _written(place, page, found.record(Path(place.data)), pictures)


def write_sizes_report(
    place: ReportPlace,
    found: Sequence[Retained],
    model: str,
    *,
    metric: str,
    seed: int = 0,
    conditions: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page about one model whose vectors are stored in several ways, and ``sizes.png``.

    Raises:
        StorageError: if the disk refuses.
    """
    values = {each.name: each.result.interval(metric, seed=seed) for each in found}
    losses = {each.name: {metric: each.minus(found[0], metric, seed)} for each in found[1:]}
    best = values[found[0].name].mean
    rows = [
        [
            str(each.dims),
            each.stored,
            f"{each.bytes:,}",
            str(values[each.name]),
            "" if each is found[0] else losses[each.name][metric].signed(),
            f"{values[each.name].mean / best:.1%}" if best else "",
        ]
        for each in found
    ]
    head = ("coordinates", "stored as", "bytes", metric, "minus the first", "kept")
    stored = dict.fromkeys(each.stored for each in found)
    lines = [
        Line(
            kind,
            [float(np.log2(each.bytes)) for each in found if each.stored == kind],
            [values[each.name].mean for each in found if each.stored == kind],
            ink,
            dots=True,
        )
        for kind, ink in zip(stored, SERIES, strict=False)
    ]
    chart = line_chart(lines, name=metric, x="bytes a vector (logarithmic)", y=metric, powers=2)
    parts = [
        figure(chart, f"{metric} by the bytes of a stored vector."),
        table(head, rows),
    ]
    if losses:
        drawn = {name: {name: row[metric]} for name, row in losses.items()}
        name = f"{metric} minus {found[0].name}"
        parts.append(figure(interval_chart(drawn, name=name, signed=True), f"{name}, by query."))
    page = Page(
        f"Compressed vectors of {model} on {Path(place.data).name}",
        [
            f"Documents are stored in fewer bytes, queries stay in full. In full, {metric} is "
            f"{values[found[0].name]}."
        ],
        [
            Section("Results", parts),
            Section("Conditions", list(_conditions({model: dict(conditions or {})}, {}))),
            Section("How to repeat it", _repeat(place.command)),
        ],
    )
    record = sizes_record(found, data=place.data, model=model, metric=metric, seed=seed)
    pictures = {"sizes": lambda: sizes_figure(found, metric, seed)}
    return _written(place, page, record, pictures)


def sizes_record(
    found: Sequence[Retained], *, data: Path | str, model: str, metric: str, seed: int = 0
) -> dict[str, Any]:
    """Return the figures of vectors that are stored in several ways, for a JSON file."""
    rows = [
        {
            "dims": each.dims,
            "stored": each.stored,
            "bytes": each.bytes,
            "limit": each.limit,
            "learned_here": each.learned,
            metric: each.result.interval(metric, seed=seed),
            "minus_first": each.minus(found[0], metric, seed),
        }
        for each in found
    ]
    return {"data": str(data), "model": model, "metric": metric, "rows": rows}


def write_tasks_report(place: ReportPlace, record: Mapping[str, Any]) -> Path:
    """Write the page about tasks of mteb; ``record`` has models, results by model, and versions.

    Raises:
        StorageError: if the disk refuses.
    """
    head = ("model", "task", "part", "figure", "score")
    rows = [
        [
            name,
            each["task"],
            each["part"],
            each["figure"],
            f"skipped: {each['skipped']}" if each["skipped"] else f"{each['score']:.3f}",
        ]
        for name, scores in record["results"].items()
        for each in scores
    ]
    page = Page(
        f"Evaluation of {next(iter(record['results']), 'no model')} on tasks of mteb",
        [],
        [
            Section("Results", [table(head, rows)]),
            Section("Conditions", list(_conditions(record["models"], {}))),
            Section("How to repeat it", _repeat(place.command)),
        ],
    )
    return _written(place, page, record, {})


def sizes_figure(found: Sequence[Retained], metric: str, seed: int = 0) -> "Figure":
    """Draw quality by bytes, a curve for each way to store vectors."""
    lines: dict[str, list[CurvePoint]] = {}
    for each in found:
        value = each.result.interval(metric, seed=seed)
        lines.setdefault(each.stored, []).append(
            CurvePoint(float(each.bytes), value, str(each.dims))
        )
    return curves(lines, x="bytes a vector", y=metric)


# ---- parts ---------------------------------------------------------------------------------------


def _written(
    place: ReportPlace,
    page: Page,
    record: Mapping[str, Any],
    pictures: Mapping[str, Callable[[], "Figure"]],
) -> Path:
    write_json(place.out / SCORES, record, default=asdict)
    path = place.out / REPORT
    write_page(path, page)
    try:
        with drawing():
            for name, draw in pictures.items():
                write_png(place.out / f"{name}.png", draw())
    except MissingExtraError as error:
        place.say(f"{path} has all charts; no PNG files were drawn: {error}")
    return path


def _unit(found: SetComparison) -> str:
    """Return what is drawn for an interval."""
    data = found.examined.data
    if isinstance(data, SimilaritySet):
        return data.unit
    return "queries" if isinstance(data, RetrievalSet) else "texts"


def _verdict(found: SetComparison, others: Sequence[str], metric: str) -> Iterator[str]:
    for name in others:
        lead = found.differences.get(name, {}).get(metric)
        if lead is None or len(found.own) > 1:
            continue
        how = "better than" if lead.low > 0 else "worse than" if lead.high < 0 else ""
        if how:
            yield f"{found.own[0]} is {how} {name}: {metric} {lead.signed()}."
        else:
            yield (
                f"No difference between {found.own[0]} and {name} is shown: {metric} "
                f"{lead.signed()}, an interval that contains zero."
            )


def _conditions(
    models: Mapping[str, Mapping[str, Any]], search: Mapping[str, Mapping[str, Any]]
) -> Iterator[Html]:
    for name, each in models.items():
        shown = dict(flat(each)) | {f"search.{k}": v for k, v in flat(search.get(name, {}))}
        if not shown:
            continue
        yield heading(name)
        yield facts({key.replace("_", " "): value for key, value in shown.items()})
    yield heading("Versions")
    yield facts(versions("bm25s", "scikit-learn"))


def _repeat(command: str) -> list[Html]:
    return [commands([redacted(command)])] if command else []


def _set_table(found: LanguageComparison) -> Html:
    seed = found.options.seed
    head = ("set", "axis", "languages", "queries", MAIN)
    return table(
        (*head, *(f"minus {name}" for name in found.others)),
        (
            [
                each.name,
                each.axis,
                each.languages,
                f"{len(each.langs):,}",
                str(interval(main_scores(each), seed=seed)),
                *(found.difference(each, name).signed() for name in found.others),
            ]
            for each in found.first
        ),
    )


def _average_table(parts: Mapping[str, Averages], *, signed: bool) -> Html:
    cells = {
        name: {
            row: f"{value.signed() if signed else value} {lang}".rstrip()
            for row, value, lang in each.rows()
        }
        for name, each in parts.items()
    }
    first = next(iter(cells.values()), {})
    return table(("mean over", *cells), ([row, *(c[row] for c in cells.values())] for row in first))


def _language_examples(found: LanguageComparison) -> Iterator[Html]:
    """Show sets by their difference to the first system that they are compared with."""
    if not found.others or len(found.first) < 2:
        return
    other = found.others[0]
    leads = {each.name: {each.name: found.difference(each, other)} for each in found.first}
    ordered = sorted(leads, key=lambda name: -leads[name][name].mean)
    shown = [*ordered[:EXAMPLES], *ordered[EXAMPLES:][-EXAMPLES:]]
    chart = interval_chart(
        {name: leads[name] for name in shown}, name=f"{MAIN} minus {other}", signed=True
    )
    yield figure(chart, f"{MAIN} minus that of {other}, the largest gain first.")


# ---- examples ------------------------------------------------------------------------------------


def _example_sections(
    found: SetComparison, others: Sequence[str], metric: str
) -> Iterator[Section]:
    """Yield what was found well and badly, beside the first system compared with, if any."""
    ours = found.measured[found.own[-1]]  # of several kinds, the sum of all
    theirs = found.measured[others[0]] if others else None
    name = others[0] if others else ""
    parts: list[Html] = []
    if isinstance(ours, RetrievalResult):
        parts = _searches(found, ours, theirs, name, metric)
    elif isinstance(ours, ClassificationResult):
        parts = _labels(ours, theirs, name)
    elif isinstance(ours, SimilarityResult):
        parts = _pairs(ours)
    yield Section("Examples", parts)


def _searches(
    found: SetComparison, ours: RetrievalResult, theirs: Result | None, name: str, metric: str
) -> list[Html]:
    data = found.examined.data
    assert isinstance(data, RetrievalSet)
    if not isinstance(theirs, RetrievalResult):
        theirs = None
    own = np.asarray(ours.scores[metric])
    gains = own - np.asarray(theirs.scores[metric]) if theirs is not None else own
    order = np.argsort(-gains, kind="stable")
    compared = theirs is not None
    best = [row for row in order[:EXAMPLES] if gains[row] > 0]
    worst = [
        row for row in order[::-1][:EXAMPLES] if (gains[row] < 0 if compared else own[row] < 1)
    ]
    titles = (
        (f"Gained most over {name}", f"Lost most to {name}")
        if compared
        else ("Found best", "Found worst")
    )
    parts: list[Html] = []
    for title, rows in zip(titles, (best, worst), strict=True):
        parts.append(heading(title))
        if not rows:
            parts.append(paragraph("No query."))
        parts += [
            _search(data, int(row), {_HERE: ours} | ({name: theirs} if theirs else {}), metric)
            for row in rows
        ]
    return parts


def _search(
    data: RetrievalSet, row: int, systems: Mapping[str, RetrievalResult], metric: str
) -> Html:
    """Return a query, its best relevant document with its ranks, and what was found first."""
    judged = data.judgements
    of_query = judged.query_of() == row
    relevant = judged.docs[of_query & (judged.grades > 0)]
    facts_: list[tuple[str, str]] = []
    ranks = {name: _rank(each, row, relevant) for name, each in systems.items()}
    scores = ", ".join(
        f"{each.scores[metric][row]:.2f} {_by(name)}" for name, each in systems.items()
    )
    if len(relevant):
        places = [f"{_place(rank)} {_by(name)}" for name, rank in ranks.items()]
        first = systems[_HERE].hits.rows[row]
        found = [doc for doc in first if doc in relevant] or list(relevant)
        facts_.append((f"relevant, {', '.join(places)}", _cut(data.documents[found[0]])))
    for name, each in systems.items():
        top = int(each.hits.rows[row, 0]) if each.hits.rows.shape[1] else -1
        if top >= 0 and top not in relevant:
            facts_.append((f"first {_by(name)}", _cut(data.documents[top])))
    return example(Quoted(_cut(data.queries[row]), f"{metric} {scores}", facts_))


def _by(name: str) -> str:
    return name if name == _HERE else f"by {name}"


def _rank(result: RetrievalResult, row: int, relevant: np.ndarray) -> int | None:
    places = np.flatnonzero(np.isin(result.hits.rows[row], relevant))
    return int(places[0]) + 1 if len(places) else None


def _place(rank: int | None) -> str:
    return "not found" if rank is None else f"at rank {rank:,}"


def _labels(ours: ClassificationResult, theirs: Result | None, name: str) -> list[Html]:
    data = ours.data
    truth, texts, labels = data.test.labels, data.test.texts, list(data.labels)
    right = ours.predicted == truth
    if isinstance(theirs, ClassificationResult):
        other = theirs.predicted == truth
        groups = {
            f"Right here, wrong by {name}": (right & ~other, theirs.predicted),
            f"Wrong here, right by {name}": (~right & other, ours.predicted),
        }
    else:
        groups = {"Wrong": (~right, ours.predicted)}
    parts: list[Html] = []
    for title, (rows, predicted) in groups.items():
        count = int(rows.sum())
        parts += [heading(f"{title}: {count:,} of {len(texts):,} texts")]
        parts += [
            example(
                Quoted(
                    _cut(texts[row]),
                    "",
                    [("label", labels[truth[row]]), ("predicted", labels[predicted[row]])],
                )
            )
            for row in np.flatnonzero(rows)[:EXAMPLES]
        ]
    return parts


def _pairs(ours: SimilarityResult) -> list[Html]:
    """Show the pairs whose place by cosine differs most from that by people's scores."""
    data = ours.data
    if not len(data.pairs):
        return []
    order = np.argsort(_ranks(ours.cosines) - _ranks(data.scores), kind="stable")
    parts: list[Html] = []
    groups = {"Too similar for the model": order[::-1], "Not similar enough": order}
    for title, rows in groups.items():
        parts.append(heading(title))
        parts += [
            example(
                Quoted(
                    _cut(data.texts[data.pairs[row][0]]),
                    f"score {data.scores[row]:g}, cosine {ours.cosines[row]:.3f}",
                    [("and", _cut(data.texts[data.pairs[row][1]]))],
                )
            )
            for row in rows[:EXAMPLES]
        ]
    return parts


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the place of each value from below; equal values share their mean place."""
    ordered = np.sort(values)
    return (ordered.searchsorted(values, "left") + ordered.searchsorted(values, "right")) / 2


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _CHARACTERS else line[: _CHARACTERS - 1] + "…"
