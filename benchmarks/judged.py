"""Measures what training brings, on sets that people judged.

    python -m benchmarks.judged --sets FOLDER --out runs/judged
    python -m benchmarks.judged --sets FOLDER --out runs/judged --only 'scifact/minilm*' --list

FOLDER has the sets, which are not part of the repository (``docs/evidence.md`` names them). Each
cell trains and measures one model in a process with one thread; what it answers to each query is
kept in ``OUT/cells``, so that it is not run again, and a killed training goes on. All that has been
measured becomes ``benchmarks/results/judged.json``, and with ``--page`` the last section of a page.
Rows of this file that were not measured now stay, each with the commit that measured it.

- An interval is the middle 95 % of a paired bootstrap over the queries, pairs or sentences of the
  set. Of several seeds, the scores of a query are averaged first (of similarity, the intervals
  are). The spread is the standard deviation over seeds.
- ``better`` and ``worse`` are differences whose interval is on one side of zero.
- Nothing is chosen by a test split. Learning rates and the weights of sums are chosen by 100
  training claims of SciFact, which no model is trained on, and by the dev split of STS-B.
- Every model is measured in bfloat16, with queries of at most 64 and documents of at most 256
  tokens (decoders 128). Minutes are CPU minutes of a cell: training, and measuring on all of its
  sets.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, commit, write_results
from benchmarks.judged_cells import PARTS, all_cells
from benchmarks.judged_rows import DENSE, INT8_TABLE, KEPT_TABLE, Row, tables
from benchmarks.judged_sets import SCIFACT, SCIFACT_DEV, Answers, Cell, Job, Place, opened
from tercet.evaluate.report.intervals import Interval
from tercet.evaluate.suites.suite import FIGURES
from tercet.files.artifacts import read_json, write_json
from tercet.studies.tables import Column, Results

HEADING = "## Tables"
TEACHER_AND_STUDENT = ("scifact/me5-small", "scifact/student")
NO_DIFFERENCE = "no difference shown"


def main(words: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, then write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", type=Path, required=True, help="the folder of the sets")
    parser.add_argument("--out", type=Path, default=Path("runs/judged"), help="what is kept")
    parser.add_argument("--only", nargs="+", metavar="PART/CELL", help="patterns; default: all")
    parser.add_argument("--list", action="store_true", help="say what would be run, and end")
    parser.add_argument("--again", action="store_true", help="also cells that have been run")
    parser.add_argument("--peer", default=sys.executable, help="Python of sentence-transformers")
    parser.add_argument("--results", type=Path, default=RESULTS / "judged.json")
    parser.add_argument("--page", type=Path, help="a page whose tables are replaced")
    parser.add_argument("--run-cell", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    place, cells = Place(given.sets, given.out, given.peer), all_cells()
    if given.run_cell:
        name, seed = given.run_cell
        run_here(place, cells[name], int(seed))
        return
    jobs = jobs_of(cells, given.only or ["*"])
    missing = [job for job in jobs if given.again or not place.result(job[0].name, job[1]).exists()]
    if given.list:
        show(place, jobs, missing)
        return
    failed: list[str] = []
    for number, (cell, seed) in enumerate(missing, start=1):
        print(f"cell {number} of {len(missing)}: {cell.name}, seed {seed}", flush=True)
        if without := [need for need in cell.needs if place.kept(need) is None]:
            failed.append(f"{cell.name}, seed {seed}: {', '.join(without)} is missing")
        else:
            if given.again:  # or the finished model would be measured
                shutil.rmtree(place.model(cell.name, seed), ignore_errors=True)
            if not run_in_process(given, cell, seed):
                failed.append(f"{cell.name}, seed {seed}")
    rows = with_kept(measured_rows(place, cells), given.results)
    write_results("judged", rows, "bm25s", "scikit-learn", out=given.results)
    if given.page:
        write_page(given.page, markdown(rows))
    if failed:
        raise SystemExit("\n".join(["these cells failed:", *failed]))


# ---- running cells -------------------------------------------------------------------------------


def jobs_of(cells: dict[str, Cell], patterns: Iterable[str]) -> list[tuple[Cell, int]]:
    """Cells that match, with their seeds, each after those that it needs."""
    chosen: dict[tuple[str, int], None] = {}

    def add(name: str, seeds: int) -> None:
        for need in cells[name].needs:
            add(need, 1)
        chosen.update(dict.fromkeys((name, seed) for seed in range(seeds)))

    for pattern in patterns:
        names = [name for name in cells if fnmatchcase(name, pattern)]
        if not names:
            raise SystemExit(f"no cell is named {pattern}; --list shows all")
        for name in names:
            add(name, cells[name].seeds)
    return [(cells[name], seed) for name, seed in chosen]


def show(
    place: Place, jobs: Sequence[tuple[Cell, int]], missing: Sequence[tuple[Cell, int]]
) -> None:
    """Print the cells, and the minutes that are left."""
    for cell, seed in jobs:
        kept = place.kept(cell.name, seed)
        if (cell, seed) in missing or kept is None:
            state = f"about {cell.estimate(seed):g} min"
        else:
            minutes = "" if kept["minutes"] is None else f" in {kept['minutes']:g} min"
            state = f"done{minutes}, commit {kept['commit']}"
        print(f"{cell.name}, seed {seed}: {state}")
    left = sum(cell.estimate(seed) for cell, seed in missing)
    print(f"{len(missing)} of {len(jobs)} are left: about {left / 60:.1f} hours of one core")


def run_in_process(given: argparse.Namespace, cell: Cell, seed: int) -> bool:
    """Run a cell in a process with one thread, and return whether it succeeded."""
    command = [sys.executable, "-m", "benchmarks.judged", "--run-cell", cell.name, str(seed)]
    command += ["--sets", str(given.sets), "--out", str(given.out), "--peer", given.peer]
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return not subprocess.run(command, check=False, env={**os.environ, **threads}).returncode


def run_here(place: Place, cell: Cell, seed: int) -> None:
    """Run a cell and keep what it answers."""
    torch.set_num_threads(1)
    job, begin = Job(place, cell.name, seed), time.time()
    was_begun = job.was_begun  # then the minutes of this process are not all of them
    found = cell.run(job)
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    record = {
        "cell": cell.name,
        "seed": seed,
        "commit": commit(),
        "minutes": None
        if was_begun
        else round(sum(each.ru_utime + each.ru_stime for each in spent) / 60, 2),
        "clock_minutes": None if was_begun else round((time.time() - begin) / 60, 2),
        "facts": found.facts,
        "answers": {name: np.round(each, 6).tolist() for name, each in found.answers.items()},
    }
    if found.same_as:
        record = {**(place.kept(found.same_as) or {}), "cell": cell.name, "same_as": found.same_as}
    path = place.result(cell.name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record, indent=None)
    job.clean(keep_model=cell.keeps_model)


# ---- results -------------------------------------------------------------------------------------


Runs = dict[int, dict[str, Any]]  # what a cell answered, by seed


def measured_rows(place: Place, cells: dict[str, Cell]) -> list[dict[str, Any]]:
    """A row for each comparison whose cells have been run."""
    kept: dict[str, Runs] = {
        name: {n: each for n in range(cell.seeds) if (each := place.kept(name, n)) is not None}
        for name, cell in cells.items()
    }
    measured: list[dict[str, Any]] = []
    for title, rows in tables().items():
        for row in rows:
            runs = {name: kept[name] for name in (row.cell, row.against) if name}
            runs = of_common_seeds(runs, cells)
            if all(runs.values()):
                answers = {name: [[answers_of(each)] for each in runs[name]] for name in runs}
                results = Results({row.of: opened(place, row.of)}, answers)
                measured.append(compared(results, title, row, runs[row.cell]))
    return measured


def of_common_seeds(
    runs: dict[str, Runs], cells: dict[str, Cell]
) -> dict[str, list[dict[str, Any]]]:
    """Leave out seeds that not all cells have, if all of them were to be run with several."""
    several = [found for name, found in runs.items() if cells[name].seeds > 1]
    if len(several) < len(runs):
        return {name: list(found.values()) for name, found in runs.items()}
    common = sorted(set[int].intersection(*map(set, several)))
    return {name: [found[seed] for seed in common] for name, found in runs.items()}


def answers_of(kept: dict[str, Any]) -> Answers:
    """The answers of a cell, by the name of the set."""
    return {of: np.array(found) for of, found in kept["answers"].items()}


def compared(results: Results, table: str, row: Row, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """A cell's figure, its difference to another one's on the same queries, and the verdict."""
    column = column_of(row.of, row.part)
    lead = None
    if row.against:
        lead = results.lead(row.cell, row.against, column, column_of(row.of, row.against_part))
    spread = results.spread(row.cell, column)
    steps = {each["facts"].get("steps") for each in kept} - {None}
    return {
        "table": table,
        "name": row.title,
        "cell": row.cell,
        "set": row.of,
        "part": row.part or None,
        "metric": FIGURES[results.sets[row.of].category],
        "figure": numbers(results.figure(row.cell, column)),
        "against": " ".join(filter(None, (row.against, row.against_part))) or None,
        "difference": None if lead is None else numbers(lead),
        "verdict": None if lead is None else verdict(lead),
        "seeds": len(kept),
        "spread": None if spread is None else round(spread, 4),
        "steps": max(steps, default=None),
        "rate": kept[0]["facts"].get("rate"),
        "minutes": sum_of([each["minutes"] for each in kept]),
        "training_minutes": mean_of(each["facts"].get("training_minutes") for each in kept),
        "measuring_minutes": mean_of(
            each["facts"].get("measuring_minutes", {}).get(row.of) for each in kept
        ),
        "commit": ", ".join(sorted({each["commit"] for each in kept})),
    }


def column_of(of: str, part: str) -> Column:
    """The column of a set and, for a model with three kinds, of one of them."""
    return Column(of, ((of,),), part=PARTS.index(part) if part else None)


def verdict(lead: Interval) -> str:
    """What the interval of a difference says."""
    if not lead.excludes_zero():
        return NO_DIFFERENCE
    return "better" if lead.low > 0 else "worse"


def mean_of(minutes: Iterable[float | None]) -> float | None:
    """The mean over seeds; None where nothing was spent on it."""
    spent = [each for each in minutes if each is not None]
    return round(float(np.mean(spent)), 2) if spent else None


def sum_of(minutes: Sequence[float | None]) -> float | None:
    """The sum over seeds; None if those of one are not known."""
    spent = [each for each in minutes if each is not None]
    return round(sum(spent), 1) if len(spent) == len(minutes) else None


def numbers(figure: Interval) -> list[float]:
    """A mean and the bounds of its interval."""
    return [round(each, 4) for each in (figure.mean, figure.low, figure.high)]


Rows = list[dict[str, Any]]
Said = tuple[str, bool] | None  # what rows show, and whether it is enough; None: too few of them


@dataclass(frozen=True)
class Aim:
    """What was to be reached, and how rows of the tables show it."""

    what: str
    chosen: Callable[[dict[str, Any]], bool]  # the rows that show it, also of :func:`expected`
    found: Callable[[Rows], Said]


def reaches(least: float) -> Callable[[Rows], Said]:
    """The figure of the first row has to be at least this."""

    def found(rows: Rows) -> Said:
        first = rows[0]
        return f"{first['name']}: {first['figure'][0]:.3f}", first["figure"][0] >= least

    return found


def best_reaches(least: float) -> Callable[[Rows], Said]:
    """Of some cells, that with the best dev figure has to reach this on the test."""

    def found(rows: Rows) -> Said:
        dev = [row for row in rows if row["set"] == SCIFACT_DEV]
        best = max(dev, key=lambda row: row["figure"][0])["cell"]
        return reaches(least)([row for row in rows if (row["set"], row["cell"]) == (SCIFACT, best)])

    return found


def loses_at_most(most: float) -> Callable[[Rows], Said]:
    """No row may lose more than this."""

    def found(rows: Rows) -> Said:
        worst = min(rows, key=lambda row: row["difference"][0])
        loss = worst["difference"][0]
        return f"{worst['name']} on {worst['set']}: {loss:+.3f}", loss >= -most

    return found


def keeps_share(least: float, faster: float) -> Callable[[Rows], Said]:
    """The student has to keep this share of the teacher's figure, at this multiple of its speed."""

    def found(rows: Rows) -> Said:
        by_cell = {row["cell"]: row for row in rows}
        teacher, student = (by_cell[name] for name in TEACHER_AND_STUDENT)
        share = student["figure"][0] / teacher["figure"][0]
        if not (teacher["measuring_minutes"] and student["measuring_minutes"]):
            return None
        times = teacher["measuring_minutes"] / student["measuring_minutes"]
        return f"{share:.1%}, {times:.1f} times", share >= least and times >= faster

    return found


def all_better(rows: Rows) -> Said:
    """Every row has to be better than its baseline."""
    text = ", ".join(f"{row['set']}: {row['verdict']}" for row in rows)
    return text, all(row["verdict"] == "better" for row in rows)


AIMS = (
    Aim(
        "The way of training minilm's dense vectors that is the best on the dev set reaches an "
        "nDCG@10 of at least 0.71 on SciFact.",
        lambda row: row["cell"] in DENSE and row["set"] in (SCIFACT, SCIFACT_DEV),
        best_reaches(0.71),
    ),
    Aim(
        "The tuned sum of three kinds of vectors reaches at least 0.74 on SciFact.",
        lambda row: (row["cell"], row["set"], row["part"]) == ("scifact/m3", SCIFACT, "tuned sum"),
        reaches(0.74),
    ),
    Aim(
        "Training on SciFact loses at most 0.01 on each set that it is not about.",
        lambda row: row["table"] == KEPT_TABLE and row["cell"] != TEACHER_AND_STUDENT[1],
        loses_at_most(0.01),
    ),
    Aim(
        "A student of 3 layers keeps 95 % of its teacher's figure on SciFact at 3 times its speed.",
        lambda row: row["cell"] in TEACHER_AND_STUDENT and row["set"] == SCIFACT,
        keeps_share(0.95, 3.0),
    ),
    Aim(
        "Weights in 8 bits lose at most 0.005 on SciFact and on descriptions of packages.",
        lambda row: row["table"] == INT8_TABLE and row["set"].startswith((SCIFACT, "debian/")),
        loses_at_most(0.005),
    ),
    Aim(
        "CoSENT is better than pairs as positives on all three similarity sets.",
        lambda row: "/cosent-" in row["cell"] and "/positives-" in (row["against"] or ""),
        all_better,
    ),
)


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was found of each aim, and whether it is met: None until all cells and seeds are run."""
    seeds = {identity(row): row["seeds"] for row in rows}
    found: list[dict[str, Any]] = []
    for aim in AIMS:
        needed = [row for row in expected() if aim.chosen(row)]
        done = [seeds.get(identity(row), 0) >= row["seeds"] for row in needed]
        if not done:  # tables without it
            continue
        said = aim.found([row for row in rows if aim.chosen(row)]) if all(done) else None
        text, met = said or (f"{sum(done)} of {len(done)} rows have all of their seeds", None)
        found.append({"aim": aim.what, "found": text, "met": met})
    return found


def expected() -> Rows:
    """What is known of each row before any cell has been run."""
    cells = all_cells()
    return [
        {
            "table": title,
            "cell": row.cell,
            "set": row.of,
            "part": row.part or None,
            "against": " ".join(filter(None, (row.against, row.against_part))) or None,
            "seeds": cells[row.cell].seeds,
        }
        for title, rows in tables().items()
        for row in rows
        if row.cell in cells
    ]


def with_kept(rows: Rows, file: Path) -> Rows:
    """The rows and, of the file, those that were not measured now, in the order of the tables."""
    old = read_json(file)["rows"] if file.exists() else []
    known = {identity(row): row for row in [*old, *rows]}
    return [known[each] for each in map(identity, expected()) if each in known]


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a row this one."""
    return tuple(row[name] for name in ("table", "cell", "set", "part", "against"))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables of a page."""
    text = f"{HEADING}\n"
    if listed := aims(rows):
        text += "\n### Targets set beforehand\n\n| target | found | met |\n| --- | --- | --- |\n"
    for each in listed:
        met = {None: "not decided", True: "yes", False: "no"}[each["met"]]
        text += f"| {each['aim']} | {each['found']} | {met} |\n"
    for table in dict.fromkeys(row["table"] for row in rows):
        some = [row for row in rows if row["table"] == table]
        sets, metrics = ({row[name] for row in some} for name in ("set", "metric"))
        metric = some[0]["metric"] if len(metrics) == 1 else "figure"
        columns = ["", *(["set"] if len(sets) > 1 else []), metric, "against"]
        columns += ["difference", "verdict", "seeds", "steps", "training", "minutes", "commit"]
        lines = [columns, ["---"] * len(columns)]
        for row in some:
            spread = "" if row["spread"] is None else f", spread {row['spread']:.3f}"
            of = row["set"] if len(metrics) == 1 else f"{row['set']}, {row['metric']}"
            cells = [row["name"], *([of] if len(sets) > 1 else [])]
            cells += [interval_text(row["figure"]), row["against"] or ""]
            cells += [interval_text(row["difference"], sign="+"), row["verdict"] or ""]
            training = "" if row["training_minutes"] is None else f"{row['training_minutes']:g}"
            cells += [f"{row['seeds']}{spread}", str(row["steps"] or ""), training]
            minutes = "" if row["minutes"] is None else f"{row['minutes']:g}"
            lines.append([*cells, minutes, row["commit"]])
        text += f"\n### {table}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text


def interval_text(found: list[float] | None, sign: str = "") -> str:
    """A figure and its interval for people."""
    if found is None:
        return ""
    mean, low, high = (f"{each:{sign}.3f}" for each in found)
    return f"{mean} [{low}, {high}]"


def write_page(page: Path, text: str) -> None:
    """Replace the last section of a page."""
    before, found, _ = page.read_text(encoding="utf-8").partition(f"{HEADING}\n")
    if not found:
        raise SystemExit(f"{page} has no line {HEADING!r}, below which the tables would stand")
    page.write_text(before + text, encoding="utf-8")


if __name__ == "__main__":
    main()
