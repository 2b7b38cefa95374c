"""Answers of cells by language: English, the others together and each, against one of the cells."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tercet.evaluate.report.intervals import Interval, interval, paired_difference
from tercet.evaluate.suites.suite import average
from tercet.studies.languages import Language
from tercet.studies.tables import Found, Table, signed

ENGLISH: Final = "en"
OTHERS: Final = "others"


@dataclass(frozen=True, slots=True)
class Column:
    """What a column of a table shows: which sets, after which stage, at which width."""

    part: str
    stage: int = -1
    width: int | None = None  # the place of a width in the answers; None: these have one alone
    title: str = ""


def parts_of(languages: Sequence[Language]) -> dict[str, list[str]]:
    """English, the others together, and each of them: names of sets; empty parts are left out."""
    names = [each.name for each in languages]
    english = [name for name in names if name.partition("_")[0] == ENGLISH]
    others = [name for name in names if name not in english]
    parts = {ENGLISH: english, OTHERS: others, **{name: [name] for name in others}}
    return {name: sets for name, sets in parts.items() if sets}


@dataclass(frozen=True, slots=True, eq=False)
class ByPart:
    """What cells are worth in each part, and their lead over one of them on the same queries.

    Of several seeds, scores of a query are the mean over them. A part of several sets is the mean
    of these, whose errors are taken to be independent.
    """

    found: Found
    parts: Mapping[str, Sequence[str]]
    against: str

    def scores(self, cell: str, column: Column, name: str) -> np.ndarray:
        """Of each query of a set."""
        answers = [cells[cell][column.stage][name] for cells in self.found.cells]
        mean = np.mean(answers, axis=0)
        return mean if column.width is None else mean[:, column.width]

    def figure(self, cell: str, column: Column) -> Interval:
        """The mean over queries."""
        seed = self.found.seed
        each = [
            interval(self.scores(cell, column, name), seed=seed) for name in self.parts[column.part]
        ]
        return each[0] if len(each) == 1 else average(each)

    def lead(self, cell: str, column: Column) -> Interval:
        """How much better it is than the cell that all are compared with."""
        each = [
            paired_difference(
                self.scores(cell, column, name),
                self.scores(self.against, column, name),
                seed=self.found.seed,
            )
            for name in self.parts[column.part]
        ]
        return each[0] if len(each) == 1 else average(each)

    def table(self, cells: Sequence[str], columns: Sequence[Column]) -> Table:
        """A row a cell, then a row for the lead of each over the one compared with."""
        rows = [["nDCG@10", *(column.title for column in columns)]]
        for cell in cells:
            rows.append([cell, *(f"{self.figure(cell, each).mean:.3f}" for each in columns)])
        for cell in cells:
            if cell != self.against:
                leads = (signed(self.lead(cell, each)) for each in columns)
                rows.append([f"{cell} - {self.against}", *leads])
        return rows

    def rows(self, cells: Sequence[str], columns: Sequence[Column]) -> Iterator[dict[str, Any]]:
        """All figures and leads, for the record."""
        for cell in cells:
            for column in columns:
                figure, lead = self.figure(cell, column), self.lead(cell, column)
                yield {
                    "cell": cell,
                    "part": column.part,
                    "column": column.title,
                    "mean": figure.mean,
                    "low": figure.low,
                    "high": figure.high,
                    f"minus {self.against}": [lead.mean, lead.low, lead.high],
                }
