"""What a transfer diagnosis found: a table, curves over steps, and a page, with intervals."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tercet.evaluate.report.figures import CurvePoint, Curves, drawing, panels, write_png
from tercet.evaluate.report.intervals import Interval
from tercet.evaluate.report.page import PageFigure, RunReport, Section, write_report
from tercet.files.atomic import replacing_file
from tercet.studies.tables import Table
from tercet.studies.transfer import JUDGED, Group, Judged, Transfer

NAMES: Final[Mapping[Judged, str]] = {"raw": "raw", "finetuned": "fine-tuned"}
FAMILIES: Final = "Families"
SEEN, UNSEEN = "Languages seen in pretraining", "Languages not seen in pretraining"
NOTE: Final = (
    "Raw figures mislead: a short fine-tuning brings back what a long pretraining harms. Judge by "
    "the fine-tuned ones. Intervals are bootstraps over queries, which say nothing of other seeds, "
    "and those of families take their languages to be independent."
)


def by_heading(found: Transfer) -> dict[str, list[Group]]:
    """The groups under their headings, unseen languages apart; empty headings are left out."""
    headings: dict[str, list[Group]] = {SEEN: [], UNSEEN: [], FAMILIES: []}
    for group in found.groups:
        headings[FAMILIES if group.is_family else SEEN if group.seen else UNSEEN].append(group)
    return {heading: groups for heading, groups in headings.items() if groups}


def transfer_table(found: Transfer, groups: Sequence[Group]) -> Table:
    """A row a group: both checkpoints, by how much the last one changed, and the best step.

    The change is a share of the reference checkpoint, in percent, raw and fine-tuned.
    """
    first, last = found.steps[found.reference], found.steps[-1]
    header = ["nDCG@10", "family", "seen"]
    for judged in JUDGED:
        header += [f"{NAMES[judged]} {first}", f"{NAMES[judged]} {last}", "change"]
    rows = [[*header, "best step"]]
    for group in groups:
        row = [group.name, _family(found, group), "yes" if group.seen else "no"]
        for judged in JUDGED:
            places = (found.reference, len(found.steps) - 1)
            row += [f"{found.figure(judged, place, group).mean:.3f}" for place in places]
            row.append(in_percent(found.change(judged, group)))
        rows.append([*row, str(found.best(group))])
    return rows


def in_percent(change: Interval) -> str:
    """A relative change with its interval, for people."""
    mean, low, high = (100 * value for value in (change.mean, change.low, change.high))
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"


def write_transfer(out: Path, found: Transfer, facts: Mapping[str, Any]) -> None:
    """Write ``transfer.json``, ``transfer.png`` and ``report.html`` into the folder.

    Raises:
        MissingExtraError: when matplotlib is not installed; the figures are written before.
    """
    record = {
        **facts,
        "steps": list(found.steps),
        "reference": found.steps[found.reference],
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "note": NOTE,
        "sets": {
            each.name: {
                "family": each.family,
                "seen": each.seen,
                "size": each.examined.size,
                "data": each.examined.fingerprint,
            }
            for each in found.languages
        },
        "rows": [_row(found, group) for group in found.groups],
    }
    with replacing_file(out / "transfer.json") as fresh:
        text = json.dumps(record, indent=2, ensure_ascii=False)
        fresh.write_text(text + "\n", encoding="utf-8")
    drawn = _drawn(found)
    step = float(found.steps[found.reference])
    with drawing():
        write_png(out / "transfer.png", panels(drawn, x="step", y="nDCG@10", marked=step))
    write_report(out / "report.html", _report(found, facts))


def _report(found: Transfer, facts: Mapping[str, Any]) -> RunReport:
    step, drawn = found.steps[found.reference], _drawn(found)
    sections = []
    for heading, groups in by_heading(found).items():
        rows = {
            group.title: {
                **{f"{NAMES[j]}, step {found.steps[-1]}": _last(found, j, group) for j in JUDGED},
                **{f"{NAMES[j]}, minus step {step}": found.difference(j, group) for j in JUDGED},
            }
            for group in groups
        }
        shown = {heading: drawn[heading]}
        caption = f"nDCG@10 over steps; the dotted line is the reference, step {step}."
        drawings = [
            PageFigure(
                lambda shown=shown: panels(shown, x="step", y="nDCG@10", marked=float(step)),
                caption,
            )
        ]
        sections.append(Section(heading, rows=rows, drawings=drawings))
    return RunReport(
        title="Transfer over a series of checkpoints",
        summary=[NOTE],
        results={},
        sections=sections,
        settings={name: str(value) for name, value in facts.items()},
    )


def _drawn(found: Transfer) -> dict[str, dict[str, Curves]]:
    return {
        heading: {group.title: _curves(found, group) for group in groups}
        for heading, groups in by_heading(found).items()
    }


def _curves(found: Transfer, group: Group) -> Curves:
    return {
        NAMES[judged]: [
            CurvePoint(float(step), found.figure(judged, place, group))
            for place, step in enumerate(found.steps)
        ]
        for judged in JUDGED
    }


def _row(found: Transfer, group: Group) -> dict[str, Any]:
    places = range(len(found.steps))
    return {
        "group": group.name,
        "kind": "family" if group.is_family else "language",
        "languages": list(group.languages),
        "family": _family(found, group),
        "seen": group.seen,
        **{j: [_plain(found.figure(j, place, group)) for place in places] for j in JUDGED},
        "spread_over_seeds": [found.spread(place, group) for place in places],
        "best_step": found.best(group),
        "difference": {j: _plain(found.difference(j, group)) for j in JUDGED},
        "relative_change": {j: _plain(found.change(j, group)) for j in JUDGED},
    }


def _plain(figure: Interval) -> dict[str, Any]:
    return {
        name: None if value != value else value  # JSON has no NaN
        for name, value in asdict(figure).items()
        if name in ("mean", "low", "high", "queries")
    }


def _family(found: Transfer, group: Group) -> str:
    return next(each.family for each in found.languages if each.name in group.languages)


def _last(found: Transfer, judged: Judged, group: Group) -> Interval:
    return found.figure(judged, len(found.steps) - 1, group)
