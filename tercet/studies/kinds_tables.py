"""What an ablation of BGE-M3 found: each kind of vectors and their sum, cell by cell."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from tercet.evaluate.report.figures import bars, drawing, write_png
from tercet.evaluate.report.intervals import Interval
from tercet.evaluate.suites.suite import COLUMNS, EvaluationSet
from tercet.studies.cells import FULL, M3_CELLS, M3Part
from tercet.studies.tables import AVERAGE, Found, Table, signed, write_tables

TITLES: Final[Mapping[M3Part, str]] = {
    "distillation": "Self-distillation",
    "stages": "Stages",
    "kinds": "Kinds trained together",
    "teacher": "Weight of self-distillation",
}
_NONE: Final = "-"  # of a kind that a cell's model does not make


def of_column(found: Found, column: int) -> Found:
    """The same answers, of one kind of vectors or of the sum."""
    return replace(found, sets=[_of_column(each, column) for each in found.sets])


def kinds_table(found: Found, cells: tuple[str, ...]) -> Table:
    """nDCG@10 by cell and kind, the mean of all sets, with 95 % intervals."""
    rows = [["nDCG@10", *COLUMNS]]
    for cell in cells:
        figures = [_figure(found, cell, column) for column in range(len(COLUMNS))]
        rows.append([cell, *(_NONE if figure is None else str(figure) for figure in figures)])
        if len(found.cells) > 1:
            rows.append([f"{cell}, spread over seeds", *_spreads(found, cell)])
    words = found.of_words()[AVERAGE]
    return [*rows, ["words (BM25)", *[_NONE] * (len(COLUMNS) - 1), str(words)]]


def differences_table(found: Found, cells: tuple[str, ...]) -> Table:
    """How much better the full cell is, kind by kind, on the same queries."""
    rows = [[f"{FULL} minus", *COLUMNS]]
    for cell in cells:
        row = [cell]
        for column in range(len(COLUMNS)):
            if _makes(found, cell, column):
                lead = of_column(found, column).differences(FULL, cell, (-1, -1))[AVERAGE]
                row.append(signed(lead))
            else:
                row.append(_NONE)
        rows.append(row)
    return rows


def kinds_tables(found: Found) -> Iterator[tuple[str, Table]]:
    """All tables that the cells fill, with their titles."""
    for part, title in TITLES.items():
        others = M3_CELLS[part]
        if found.has(FULL, *others):
            yield title, kinds_table(found, (FULL, *others))
            yield (
                f"{title}: differences on the same queries, with 95 % intervals",
                differences_table(found, others),
            )


def write_kinds_findings(out: Path, found: Found, facts: Mapping[str, Any]) -> None:
    """Write ``table.md``, ``results.json`` and a figure of each part into the folder."""
    write_tables(out, found, facts, dict(kinds_tables(found)), _rows(found))
    with drawing():
        for part, others in M3_CELLS.items():
            if found.has(FULL, *others):
                shown = {cell: _by_column(found, cell) for cell in (FULL, *others)}
                write_png(out / f"{part}.png", bars(shown))


def _of_column(examined: EvaluationSet, column: int) -> EvaluationSet:
    return replace(
        examined,
        figure=lambda answers, seed: examined.figure(answers[:, column], seed),
        minus=lambda one, other, seed: examined.minus(one[:, column], other[:, column], seed),
    )


def _makes(found: Found, cell: str, column: int) -> bool:
    """Whether the model of a cell makes this kind of vectors, after its last stage."""
    return not any(
        np.isnan(seed[cell][-1][examined.name][:, column]).any()
        for seed in found.cells
        for examined in found.sets
    )


def _figure(found: Found, cell: str, column: int) -> Interval | None:
    if not _makes(found, cell, column):
        return None
    return of_column(found, column).figures(cell)[AVERAGE]


def _by_column(found: Found, cell: str) -> dict[str, Interval]:
    figures = {name: _figure(found, cell, column) for column, name in enumerate(COLUMNS)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _spreads(found: Found, cell: str) -> Iterator[str]:
    for column in range(len(COLUMNS)):
        made = _makes(found, cell, column)
        yield f"{of_column(found, column).spread(cell):.3f}" if made else _NONE


def _rows(found: Found) -> Iterator[dict[str, Any]]:
    for cell in found.cells[0]:
        for kind, figure in _by_column(found, cell).items():
            column = COLUMNS.index(kind)
            yield {
                "cell": cell,
                "kind": kind,
                "figure": "nDCG@10",
                "mean": round(figure.mean, 4),
                "low": round(figure.low, 4),
                "high": round(figure.high, 4),
                "spread_over_seeds": of_column(found, column).spread(cell),
            }
    yield {"cell": "words", "mean": round(found.of_words()[AVERAGE].mean, 4)}
