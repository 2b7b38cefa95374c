"""Figures, differences and tables of a study's cells, with intervals, and the files they go to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from tercet.evaluate.report.figures import bars, drawing, write_png
from tercet.evaluate.report.intervals import Interval, relative_change
from tercet.evaluate.suites.suite import FIGURES, Category, EvaluationSet, average
from tercet.files.artifacts import write_json
from tercet.files.atomic import replacing_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS: Final = "words"  # named like a cell: the baseline of each set that needs no model
NOTHING: Final = "-"  # in a table: the model makes no vectors of this kind

AnswersBySet = Mapping[str, np.ndarray]
"""What a model answers to each evaluation set, by the set's name."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: the mean over groups of sets, a group being the mean of its sets."""

    title: str
    groups: tuple[tuple[str, ...], ...]  # names of sets
    stage: int = -1  # after which the model is measured
    part: int | None = None  # which column of two-dimensional answers, such as a kind of vectors


FigureKey: TypeAlias = tuple[Literal["figure", "lead", "change"], str, str, Column, Column]
"""A cell, the cell that it is compared with, and the column of each."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts; the first one is the header."""

    title: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure that becomes the file ``NAME.png``."""

    name: str
    draw: Callable[[], "Figure"]


@dataclass(frozen=True, eq=False)
class Results:
    """The answers of the cells that were run, and figures of them.

    Of several seeds, the scores of a query are averaged before anything else; where answers are no
    scores, such as labels, figures and bounds of intervals are. Errors of different sets are taken
    to be independent. :data:`WORDS` is a cell as well.
    """

    sets: Mapping[str, EvaluationSet]
    answers: Mapping[str, Sequence[Sequence[AnswersBySet]]]  # by cell, seed and stage
    seed: int = 0  # of the bootstrap
    computed: dict[FigureKey, Interval] = field(default_factory=dict)
    words: dict[str, np.ndarray] = field(default_factory=dict)  # computed when first needed

    def has(self, *cells: str) -> bool:
        """Return whether all of these cells were run."""
        return all(cell in self.answers or cell == WORDS for cell in cells)

    def scores(self, cell: str, column: Column, name: str) -> list[np.ndarray]:
        """Return a cell's answers to a set: of each seed, or their mean if they are scores."""
        if cell == WORDS:
            if name not in self.words:
                self.words[name] = self.sets[name].words()
            return [self.words[name]]
        found = [stages[column.stage][name] for stages in self.answers[cell]]
        if column.part is not None:
            found = [answers[:, column.part] for answers in found]
        return [np.mean(found, axis=0)] if self._are_scores(name) else found

    def figure(self, cell: str, column: Column) -> Interval:
        """Return the mean of a cell, NaN if it makes no vectors of that kind."""

        def of_set(name: str) -> Interval:
            figure = self.sets[name].figure
            return _over_seeds([figure(one, self.seed) for one in self.scores(cell, column, name)])

        return self._once(("figure", cell, "", column, column), of_set)

    def lead(
        self, cell: str, other: str, column: Column, other_column: Column | None = None
    ) -> Interval:
        """Return by how much a cell is better than another one on the same texts."""

        def of_set(name: str) -> Interval:
            ours = self.scores(cell, column, name)
            theirs = self.scores(other, other_column or column, name)
            count = max(len(ours), len(theirs))  # a model that was not trained has no seeds
            pairs = zip(ours * (count // len(ours)), theirs * (count // len(theirs)), strict=True)
            return _over_seeds([self.sets[name].minus(*pair, self.seed) for pair in pairs])

        return self._once(("lead", cell, other, column, other_column or column), of_set)

    def change(self, cell: str, other: str, column: Column) -> Interval:
        """Return the lead of a cell as a share of the other one's mean, of retrieval sets."""
        names = [name for group in column.groups for name in group]
        key = ("change", cell, other, column, column)
        if key not in self.computed:
            both = ([self.scores(it, column, name)[0] for name in names] for it in (cell, other))
            self.computed[key] = relative_change(*both, seed=self.seed)
        return self.computed[key]

    def spread(self, cell: str, column: Column) -> float | None:
        """Return the standard deviation over seeds; None if a cell was run with one alone."""
        seeds = self.answers.get(cell, ())
        if len(seeds) < 2:
            return None
        alone = [replace(self, answers={cell: [each]}) for each in seeds]
        means = [
            np.mean([np.mean([one._point(cell, column, n) for n in g]) for g in column.groups])
            for one in alone
        ]
        return float(np.std(means, ddof=1))

    def table(
        self,
        title: str,
        cells: Mapping[str, str],
        columns: Sequence[Column],
        leads: Mapping[str, tuple[str, str]] | None = None,
        corner: str = "nDCG@10",
    ) -> Table:
        """Return a table: figures of cells, and below them the leads of some over others.

        Both are given by the title of their row. Rows of cells that were not run are left out.
        """
        rows = [[corner, *(column.title for column in columns)]]
        for label, cell in cells.items():
            if self.has(cell):
                rows.append([label, *(shown(self.figure(cell, column)) for column in columns)])
                found = [self.spread(cell, column) for column in columns]
                spreads = [NOTHING if isnan(s) else f"{s:.3f}" for s in found if s is not None]
                if spreads:
                    rows.append([f"{label}, spread over seeds", *spreads])
        for label, (one, other) in (leads or {}).items():
            if one != other and self.has(one, other):
                rows.append([label, *(signed(self.lead(one, other, each)) for each in columns)])
        return Table(title, rows)

    def bars(self, name: str, cells: Mapping[str, str], columns: Sequence[Column]) -> Picture:
        """Return a picture with a panel for each column, and a bar for each cell."""
        drawn = {
            label: {
                column.title: figure
                for column in columns
                if not isnan((figure := self.figure(cell, column)).mean)
            }
            for label, cell in cells.items()
            if self.has(cell)
        }
        baselines = [label for label, cell in cells.items() if cell == WORDS]
        return Picture(name, partial(bars, drawn, baselines=baselines))

    def _point(self, cell: str, column: Column, name: str) -> float:
        """Return a figure of one set and one seed without its interval, which takes time."""
        (found,) = self.scores(cell, column, name)
        if self._are_scores(name):
            return float(found.mean())
        return self.sets[name].figure(found, self.seed).mean

    def _are_scores(self, name: str) -> bool:
        return self.sets[name].category == "Retrieval"

    def _once(self, key: FigureKey, of_set: Callable[[str], Interval]) -> Interval:
        if key not in self.computed:
            groups = [[of_set(name) for name in group] for group in key[3].groups]
            self.computed[key] = average([average(group) for group in groups])
        return self.computed[key]


def columns_by_category(sets: Iterable[EvaluationSet], *, stage: int = -1) -> list[Column]:
    """Return a column of the average over categories, and one of each category."""
    names: dict[Category, list[str]] = {}
    for each in sets:
        names.setdefault(each.category, []).append(each.name)
    groups: dict[Category, tuple[str, ...]] = {
        name: tuple(names[name]) for name in FIGURES if name in names
    }
    return [
        Column("Average", tuple(groups.values()), stage),
        *(Column(f"{name}, {FIGURES[name]}", (group,), stage) for name, group in groups.items()),
    ]


def leads_over(other: str, cells: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return rows for :meth:`Results.table`: how much better each cell is than another one."""
    return {f"{cell} - {other}": (cell, other) for cell in cells if cell != other}


def shown(figure: Interval) -> str:
    """Return a figure with its interval as text."""
    return NOTHING if isnan(figure.mean) else str(figure)


def signed(lead: Interval) -> str:
    """Return a difference with its interval as text."""
    return NOTHING if isnan(lead.mean) else lead.signed()


def write_results(
    out: Path, results: Results, parts: Iterable[Table | Picture], facts: Mapping[str, Any]
) -> list[Table]:
    """Write ``table.md``, ``results.json`` and the pictures; return the tables that have rows.

    Of the facts, ``flags`` are for ``results.json`` alone.

    Raises:
        MissingExtraError: if matplotlib is not installed; the tables are written before.
    """
    parts = list(parts)
    tables = [part for part in parts if isinstance(part, Table) and len(part.rows) > 1]
    line = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "flags")
    text = f"{line}\n\n" + "".join(map(_markdown, tables))
    with replacing_file(out / "table.md") as fresh:
        fresh.write_text(text, encoding="utf-8")
    record = {
        **facts,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "sets": {
            each.name: {"category": each.category, "size": each.size, "data": each.fingerprint}
            for each in results.sets.values()
        },
        "tables": {table.title: table.rows for table in tables},
        "figures": [
            {
                "what": what,
                "cell": cell,
                **({"compared_with": other, "its_stage": theirs.stage} if other else {}),
                "column": column.title,
                "stage": column.stage,
                **{name: getattr(figure, name) for name in ("mean", "low", "high", "queries")},
                **({} if other else {"spread_over_seeds": results.spread(cell, column)}),
            }
            for (what, cell, other, column, theirs), figure in results.computed.items()
            if not isnan(figure.mean)
        ],
    }
    write_json(out / "results.json", record, default=str)
    with drawing():
        for part in parts:
            if isinstance(part, Picture):
                write_png(out / f"{part.name}.png", part.draw())
    return tables


def _markdown(table: Table) -> str:
    lines = ["| " + " | ".join(row) + " |\n" for row in table.rows]
    body = "".join([lines[0], "|---" * len(table.rows[0]) + "|\n", *lines[1:]])
    return f"## {table.title}\n\n{body}\n"


def _over_seeds(figures: Sequence[Interval]) -> Interval:
    """Return the mean over seeds; each draws the same texts, so bounds are averaged too."""
    first, *others = figures
    if not others:
        return first
    bounds = ("mean", "low", "high")
    means = {name: np.mean([getattr(each, name) for each in figures]) for name in bounds}
    return replace(first, **{name: float(mean) for name, mean in means.items()})
