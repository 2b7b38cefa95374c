"""BGE-M3 (arXiv 2402.03216, tables 14 and 15): self-distillation, stages, kinds of vectors."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tercet.data.files.sources import Source
from tercet.data.files.texts import text_format
from tercet.evaluate.suites.suite import COLUMNS, EvaluationSet, open_kinds_set, open_sets
from tercet.objectives.unified import Unified
from tercet.recipes.bge_m3 import bge_m3
from tercet.studies.cells import Cell, Study, with_numbers_of
from tercet.studies.tables import WORDS, Column, Picture, Results, Table
from tercet.training.recipe import Recipe

FULL = "full"  # all kinds, self-distillation, the stage unified alone
PARTS = {
    "distillation": ("Self-distillation", ("no-distillation",)),
    "stages": ("Stages", ("retromae-unified", "retromae-contrastive-unified")),
    "kinds": ("Kinds trained together", ("dense", "dense-sparse", "dense-multi")),
    "teacher": ("Weight of self-distillation", ("teacher-0.5", "teacher-2")),
}
"""What is compared with the full cell, which differs from it in one thing."""


@with_numbers_of(bge_m3, "stages", "steps", "kinds", "unified_self_distillation")
def study(
    data: Annotated[list[Source], "Examples, of every stage; may be repeated."],
    test: Annotated[
        list[Path],
        "Examples, or a folder in the layout of BEIR or FlagEmbedding; may be repeated.",
    ],
    texts: Annotated[
        list[Source] | None, "Texts for the stage retromae; None: those of --data.", text_format()
    ] = None,
    pairs: Annotated[
        list[Source] | None, "Examples for the stage contrastive; None: those of --data."
    ] = None,
    **numbers: Any,
) -> Study:
    """Self-distillation, stages, kinds and the teacher's weight, by every kind of vectors.

    Nine runs with the same data, seed and number of steps, each compared with the full one: all
    kinds with self-distillation, in the stage unified alone. For one part, name its cells:
    --only full --only no-distillation.

    Example: tercet study examples/studies/bge_m3.py --data mined.jsonl --test test.jsonl
    --out runs/m3 --only full --only 'teacher-*' --steps 200 --batch-size 24
    """
    sets = open_sets(test, open_kinds_set)
    return Study(
        cells=[Cell(FULL, bge_m3(stages="unified", **numbers)), *others(**numbers)],
        data={"examples": data, "pairs": pairs or data, "texts": texts or data},
        sets=sets,
        report=partial(report, sets),
    )


def others(**numbers: Any) -> Iterator[Cell]:
    """Yield the cells beside the full one."""
    for name in PARTS["stages"][1]:
        yield Cell(name, bge_m3(stages=name.replace("-", ","), **numbers))
    for name in PARTS["kinds"][1]:
        yield Cell(name, bge_m3(stages="unified", kinds=name.replace("-", ","), **numbers))
    for name, weight in (("no-distillation", 0.0), ("teacher-0.5", 0.5), ("teacher-2", 2.0)):
        yield Cell(name, taught(bge_m3(stages="unified", **numbers), weight))


def taught(recipe: Recipe, weight: float) -> Recipe:
    """Return the recipe with this weight of self-distillation beside the other losses."""
    (stage,) = recipe.stages
    assert isinstance(stage.objective, Unified)
    mixture = replace(stage.objective.mixture, distilled=weight)
    objective = replace(stage.objective, mixture=mixture)
    return replace(recipe, stages=(replace(stage, objective=objective),))


def report(sets: list[EvaluationSet], results: Results) -> Iterator[Table | Picture]:
    """Yield for each part a table of figures by kind, one of differences, and a picture."""
    every = tuple(examined.name for examined in sets)
    kinds = [Column(kind, (every,), part=number) for number, kind in enumerate(COLUMNS)]
    for part, (title, names) in PARTS.items():
        if not any(results.has(FULL, name) for name in names):
            continue
        cells = {name: name for name in (FULL, *names)}
        yield results.table(title, {**cells, "words (BM25)": WORDS}, kinds)
        leads = {name: (FULL, name) for name in names}
        title = f"{title}: differences on the same queries, with 95 % intervals"
        yield results.table(title, {}, kinds, leads, corner=f"{FULL} minus")
        yield results.bars(part, cells, kinds)
