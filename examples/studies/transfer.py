"""What a series of checkpoints is worth in each language, raw and after the same fine-tuning.

Transfer is quality in one language that comes from training on others. Raw figures mislead: long
pretraining harms what a short fine-tuning brings back (arXiv 2412.04506, section 5).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

from tercet.data.files.languages import family_of
from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.evaluate.report.figures import CurvePoint, panels
from tercet.evaluate.report.intervals import Interval
from tercet.evaluate.suites.suite import EvaluationSet
from tercet.models.zoo.zoo import resolve
from tercet.recipes.arctic_embed import arctic_embed
from tercet.studies.cells import Cell, Study, with_numbers_of
from tercet.studies.language_sets import open_languages
from tercet.studies.tables import Column, Picture, Results, Table
from tercet.training.snapshots import models_in

EARLY = 0.06  # share of the steps: 8K of 130K in the paper
JUDGED = ("raw", "fine-tuned")
OF_PRETRAINING = (
    "preset",
    *(name for name in signature(arctic_embed).parameters if name.startswith("pretraining_")),
)


@with_numbers_of(arctic_embed, "model", "stages", "steps", *OF_PRETRAINING)
def study(
    checkpoints: Annotated[
        list[str],
        "A run folder with models of several steps (run.models_at), or several models in order.",
    ],
    data: Annotated[list[Source], "Examples with negatives to fine-tune on; may be repeated."],
    test: Annotated[list[Path], "Folder of LANG.jsonl, or such a file; may be repeated."],
    seen: Annotated[list[str], "Language of the pretraining; may be repeated."],
    reference: Annotated[
        int | None, "Step that the last is compared with; None: the first at 6 % or later."
    ] = None,
    queries: Annotated[int | None, "The first ones of each language; None: all."] = None,
    documents: Annotated[int | None, "Of each language, relevant ones first; None: all."] = None,
    finetuning_steps: Annotated[int, "The same of each checkpoint."] = 100,
    **numbers: Any,
) -> Study:
    """What each language gains or loses along a training, raw and after the same fine-tuning.

    Each checkpoint is measured as it is, and after one short fine-tuning with each of three seeds.

    Example: tercet study examples/studies/transfer.py --checkpoints runs/pretrained --data
    mined.jsonl --test test/ --seen en --seen de --out runs/transfer --queries 300
    """
    models = models_of(checkpoints)
    compared = (reference_of(list(models), reference), max(models))
    sets = open_languages(test, queries=queries, documents=documents)
    if any(source.without_negatives == len(source) for source in data):
        logging.getLogger("tercet").warning(
            "some examples bring no negatives: each checkpoint mines its own for them, so data "
            "differ between checkpoints; mine once (tercet mine) to have them equal"
        )
    cells = [Cell(f"{step}-raw", folder) for step, folder in models.items()]
    for step, folder in models.items():
        recipe = arctic_embed(
            model=str(folder), stages="finetuning", finetuning_steps=finetuning_steps, **numbers
        )
        cells.append(Cell(f"{step}-fine-tuned", recipe))
    titled = groups_of(sets, seen)
    report_of = partial(report, list(models), compared, titled)
    return Study(cells=cells, data={"mined": data}, sets=sets, report=report_of, seeds=3)


def models_of(named: Sequence[str]) -> dict[int, Path]:
    """Return the models of a run's series by step, or the models named.

    Models in folders that are named by numbers have these for steps; else they are counted from 1.
    """
    found = models_in(Path(named[0])) if len(named) == 1 else {}
    if not found:
        folders = [Path(resolve(name)) for name in named]
        by_name = all(folder.name.isdigit() for folder in folders)
        steps = [int(f.name) if by_name else n for n, f in enumerate(folders, start=1)]
        found = dict(sorted(zip(steps, folders, strict=True)))
    if len(found) < max(2, len(named)):
        raise RecipeError(
            f"{', '.join(named)}: a series of two checkpoints or more is needed, each once; train "
            "with --set run.models_at=0,100,400,1000 and give the run folder, or give several "
            "models"
        )
    return found


def reference_of(steps: Sequence[int], wanted: int | None) -> int:
    """Return the step wanted, or the first at 6 % of the steps or later, before the last."""
    before = steps[:-1]
    if wanted is not None:
        if wanted not in before:
            raise RecipeError(
                f"the reference must be a checkpoint before the last; got {wanted}; give one of "
                f"{', '.join(map(str, before))}"
            )
        return wanted
    late = [step for step in before if step >= EARLY * steps[-1]]
    return late[0] if late else before[-1]


def groups_of(sets: Sequence[EvaluationSet], seen: Sequence[str]) -> dict[str, list[Column]]:
    """Return columns of languages and families, by title; seen and unseen ones stay apart."""
    names = {each.name: {spelled(each.name), spelled(each.name).partition("_")[0]} for each in sets}
    for lang in seen:
        if not any(spelled(lang) in spellings for spellings in names.values()):
            raise RecipeError(
                f"--seen has {lang!r}, but no evaluation set is in this language (there are "
                f"{', '.join(names)}); add one, or leave it out of --seen"
            )
    wanted = set(map(spelled, seen))
    languages: dict[str, list[Column]] = {}
    families: dict[tuple[str, str], list[str]] = {}
    for which in ("seen", "unseen"):
        for name, spellings in names.items():
            if bool(spellings & wanted) == (which == "seen"):
                column = Column(f"{name} ({which})", ((name,),))
                languages.setdefault(f"Languages, {which} in pretraining", []).append(column)
                families.setdefault((family_of(name), which), []).append(name)
    return languages | {
        "Families": [
            Column(f"{family} ({which})", (tuple(langs),))
            for (family, which), langs in families.items()
        ]
    }


def spelled(lang: str) -> str:
    """Return a language in one spelling: ``pt_br`` of ``pt-BR``."""
    return lang.replace("-", "_").lower()


def report(
    steps: Sequence[int],
    compared: tuple[int, int],
    titled: Mapping[str, list[Column]],
    results: Results,
) -> Iterator[Table | Picture]:
    """Yield a table for each group of languages, and curves over steps."""
    if not results.has(*(f"{step}-{judged}" for step in steps for judged in JUDGED)):
        return
    drawn = {}
    for title, columns in titled.items():
        yield table(title, steps, compared, columns, results)
        drawn[title] = {column.title: curves(steps, column, results) for column in columns}
    marked = float(compared[0])
    yield Picture("transfer", lambda: panels(drawn, x="step", y="nDCG@10", marked=marked))


def table(
    title: str,
    steps: Sequence[int],
    compared: tuple[int, int],
    columns: list[Column],
    results: Results,
) -> Table:
    """Return a row for each language or family: two checkpoints, the change, and the best step."""
    header = [name for j in JUDGED for name in (*(f"{j} {step}" for step in compared), "change")]
    rows = [["nDCG@10", *header, "best step"]]
    for column in columns:
        row = [column.title]
        for judged in JUDGED:
            first, last = (f"{step}-{judged}" for step in compared)
            row += [f"{results.figure(cell, column).mean:.3f}" for cell in (first, last)]
            row.append(in_percent(results.change(last, first, column)))
        means = {step: results.figure(f"{step}-fine-tuned", column).mean for step in steps}
        rows.append([*row, str(max(means, key=lambda step: means[step]))])
    return Table(title, rows)


def in_percent(change: Interval) -> str:
    """Return a relative change with its interval as text."""
    mean, low, high = (100 * value for value in (change.mean, change.low, change.high))
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"


def curves(steps: Sequence[int], column: Column, results: Results) -> dict[str, list[CurvePoint]]:
    """Return the figures over steps, raw and fine-tuned."""
    return {
        judged: [
            CurvePoint(float(step), results.figure(f"{step}-{judged}", column)) for step in steps
        ]
        for judged in JUDGED
    }
