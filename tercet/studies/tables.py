"""What an ablation found, in the layout of the paper's tables, with intervals and differences."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tercet.evaluate.report.figures import bars, drawing, write_png
from tercet.evaluate.report.intervals import Interval
from tercet.evaluate.suites.suite import FIGURES, EvaluationSet, average
from tercet.files.atomic import replacing_file
from tercet.studies.cells import ATTENTIONS, POOLINGS, SCHEDULES, cell_name, schedule_cell
from tercet.studies.kept import Answers

AVERAGE: Final = "Average"
NAMES: Final = {"eos": "EOS", "mean": "mean", "latent": "latent", "self_attention": "self-att."}

Table = list[list[str]]
"""Rows of cells; the first one is the header."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The answers of all cells, and what they are worth.

    Of several seeds, figures are those of the mean over seeds.
    """

    sets: Sequence[EvaluationSet]
    cells: Sequence[Mapping[str, Sequence[Answers]]]  # of each seed
    words: Answers
    seed: int = 0  # of the bootstrap

    def figures(self, cell: str, stage: int = -1) -> dict[str, Interval]:
        """Of each category, and their average: a category is the mean of its sets."""
        return self._by_category(
            lambda each: [
                each.figure(found[cell][stage][each.name], self.seed) for found in self.cells
            ]
        )

    def differences(self, one: str, other: str, stages: tuple[int, int]) -> dict[str, Interval]:
        """How much better ``one`` is than ``other``, each after its stage, on the same texts."""
        first, second = stages
        return self._by_category(
            lambda each: [
                each.minus(found[one][first][each.name], found[other][second][each.name], self.seed)
                for found in self.cells
            ]
        )

    def of_words(self) -> dict[str, Interval]:
        """What the baselines without a model get."""
        return self._by_category(lambda each: [each.figure(self.words[each.name], self.seed)])

    def spread(self, cell: str, stage: int = -1) -> float | None:
        """The standard deviation of a cell's average over seeds; None of a single one."""
        if len(self.cells) < 2:
            return None
        means = [
            Found(self.sets, [found], self.words, self.seed).figures(cell, stage)[AVERAGE].mean
            for found in self.cells
        ]
        centre = sum(means) / len(means)
        return (sum((mean - centre) ** 2 for mean in means) / (len(means) - 1)) ** 0.5

    def has(self, *cells: str) -> bool:
        """Whether all of these cells were run."""
        return all(cell in found for cell in cells for found in self.cells)

    def _by_category(self, of: Any) -> dict[str, Interval]:
        found: dict[str, list[Interval]] = {}
        for each in self.sets:
            found.setdefault(each.category, []).append(_same_texts(of(each)))
        ordered = {name: average(found[name]) for name in FIGURES if name in found}
        return {**ordered, AVERAGE: average(list(ordered.values()))}


def grid_table(found: Found, stage: int) -> Table:
    """Tables 2 and 3 of the paper: categories by pooling, ``both ways / causal``."""
    columns = {
        pooling: [found.figures(cell_name(a, pooling), stage) for a in ATTENTIONS]
        for pooling in POOLINGS
    }
    rows = [["both ways / causal", *(NAMES[pooling] for pooling in POOLINGS), "words"]]
    words = found.of_words()
    for category in words:
        cells = [
            " / ".join(f"{figures[category].mean:.3f}" for figures in both)
            for both in columns.values()
        ]
        rows.append([_titled(category), *cells, f"{words[category].mean:.3f}"])
    half = [
        " / ".join(f"±{(f[AVERAGE].high - f[AVERAGE].low) / 2:.3f}" for f in both)
        for both in columns.values()
    ]
    rows.append(["95 % of the average", *half, ""])
    if len(found.cells) > 1:
        spread = [
            " / ".join(f"{found.spread(cell_name(a, pooling), stage):.3f}" for a in ATTENTIONS)
            for pooling in POOLINGS
        ]
        rows.append(["spread over seeds", *spread, ""])
    return rows


def differences_table(found: Found, stage: int) -> Table:
    """Which of the paper's claims about attention and pooling the averages bear out."""
    rows = [[f"after stage {stage + 1}", "Average", *(c for c in found.of_words() if c != AVERAGE)]]
    for name, one, other in _claims():
        if found.has(one, other):
            rows.append([name, *_signed(found.differences(one, other, (stage, stage)))])
    for pooling in POOLINGS if stage else ():
        cell = cell_name("bidirectional", pooling)
        if found.has(cell):
            stages = found.differences(cell, cell, (1, 0))
            rows.append([f"stage 2 - stage 1, {NAMES[pooling]}", *_signed(stages)])
    return rows


def schedules_table(found: Found) -> Table:
    """The first rows of the paper's table 4, all with the latent layer and both ways."""
    names = list(found.of_words())
    rows = [["schedule", *map(_titled, names)]]
    for schedule in SCHEDULES:
        figures = found.figures(schedule_cell(schedule))
        rows.append([schedule, *(str(figures[name]) for name in names)])
    two = schedule_cell("two stages")
    for schedule in SCHEDULES:
        if schedule != "two stages":
            leads = found.differences(two, schedule_cell(schedule), (-1, -1))
            cells = [leads[name] for name in names]
            rows.append([f"two stages - {schedule}", *(signed(lead) for lead in cells)])
    return rows


def tables(found: Found) -> Iterator[tuple[str, Table]]:
    """All tables that the cells fill, with their titles."""
    if found.has(*(cell_name(a, p) for a in ATTENTIONS for p in POOLINGS)):
        yield "Attention and pooling, after stage 1 (retrieval)", grid_table(found, 0)
        yield "Attention and pooling, after stage 2 (blended)", grid_table(found, 1)
        for stage in (0, 1):
            title = f"Differences on the same texts after stage {stage + 1}, with 95 % intervals"
            yield title, differences_table(found, stage)
    if found.has(*map(schedule_cell, SCHEDULES)):
        yield "Schedules", schedules_table(found)


def write_findings(out: Path, found: Found, facts: Mapping[str, Any]) -> None:
    """Write ``table.md``, ``results.json`` and figures into the folder."""
    write_tables(out, found, facts, dict(tables(found)), _rows(found))
    poolings = {
        NAMES[p]: found.figures(cell_name("bidirectional", p))
        for p in POOLINGS
        if found.has(cell_name("bidirectional", p))
    }
    schedules = {
        s: found.figures(schedule_cell(s)) for s in SCHEDULES if found.has(schedule_cell(s))
    }
    with drawing():
        for name, rows in (("poolings", poolings), ("schedules", schedules)):
            if len(rows) > 1:
                write_png(out / f"{name}.png", bars(rows))


def write_tables(
    out: Path,
    found: Found,
    facts: Mapping[str, Any],
    titled: Mapping[str, Table],
    rows: Iterable[Mapping[str, Any]],
) -> None:
    """Write ``table.md``, and all figures with the facts of the run into ``results.json``."""
    text = f"{_told(facts)}\n\n"
    text += "".join(f"## {title}\n\n{as_markdown(table)}\n" for title, table in titled.items())
    with replacing_file(out / "table.md") as fresh:
        fresh.write_text(text, encoding="utf-8")
    record = {
        **facts,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "sets": {
            each.name: {
                "category": each.category,
                "size": each.size,
                "data": each.fingerprint,
            }
            for each in found.sets
        },
        "rows": list(rows),
        "tables": dict(titled),
    }
    with replacing_file(out / "results.json") as fresh:
        fresh.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def as_markdown(table: Table) -> str:
    """The table as text that renders as one."""
    lines = ["| " + " | ".join(row) + " |\n" for row in table]
    return "".join([lines[0], "|---" * len(table[0]) + "|\n", *lines[1:]])


def _told(facts: Mapping[str, Any]) -> str:
    """What was run, in a line: sizes, steps, rates, and how much of the base was kept."""
    numbers = facts.get("numbers", {})
    told = [f"{name} {value}" for name, value in numbers.items() if value is not None]
    return ", ".join([*told, f"seeds {facts.get('seeds', 1)}"])


def _rows(found: Found) -> Iterator[dict[str, Any]]:
    for cell in found.cells[0]:
        for stage in range(len(found.cells[0][cell])):
            for category, figure in found.figures(cell, stage).items():
                yield {
                    "cell": cell,
                    "stage": stage + 1,
                    "category": category,
                    "figure": FIGURES.get(category, "mean of the categories"),  # pyright: ignore
                    "mean": round(figure.mean, 4),
                    "low": round(figure.low, 4),
                    "high": round(figure.high, 4),
                    "spread_over_seeds": found.spread(cell, stage) if category == AVERAGE else None,
                }
    for category, figure in found.of_words().items():
        yield {"cell": "words", "category": category, "mean": round(figure.mean, 4)}


def _claims() -> Iterator[tuple[str, str, str]]:
    for pooling in POOLINGS:
        both, causal = (cell_name(attention, pooling) for attention in ATTENTIONS)
        yield f"both ways - causal, {NAMES[pooling]}", both, causal
    latent = cell_name("bidirectional", "latent")
    for pooling in POOLINGS:
        if pooling != "latent":
            yield f"latent - {NAMES[pooling]}", latent, cell_name("bidirectional", pooling)


def _signed(figures: Mapping[str, Interval]) -> list[str]:
    first = figures[AVERAGE]
    return [signed(first), *(signed(f) for name, f in figures.items() if name != AVERAGE)]


def signed(figure: Interval) -> str:
    """A difference with its interval, for people."""
    return f"{figure.mean:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"


def _titled(category: str) -> str:
    figure = FIGURES.get(category)  # pyright: ignore
    return f"{category}, {figure}" if figure else category


def _same_texts(seeds: Sequence[Interval]) -> Interval:
    """The mean over runs with other seeds; the same texts are drawn in each, so bounds too."""
    count = len(seeds)
    return Interval(
        sum(each.mean for each in seeds) / count,
        sum(each.low for each in seeds) / count,
        sum(each.high for each in seeds) / count,
        seeds[0].queries,
        seed=seeds[0].seed,
    )
