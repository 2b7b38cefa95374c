"""Run the cells of an ablation one after the other, and keep what each one answers.

A cell that is done is not run again: its answers lie in its folder. A killed cell goes on where it
was. Models are deleted once they are measured, unless they are asked for.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tercet.ablation.cells import Cell
from tercet.data.sources import Source
from tercet.errors import RecipeError
from tercet.evaluate.suite import EvaluationSet
from tercet.files import replacing_file
from tercet.nn.embedder import Embedder
from tercet.train.loop import train
from tercet.train.run import Run

ANSWERS: Final = "answers.npz"
FACTS: Final = "cell.json"

Answers = Mapping[str, np.ndarray]
"""Of each evaluation set, by its name."""


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What all cells of an ablation share."""

    data: Mapping[str, Sequence[Source]]  # by ``Stage.data``
    sets: Sequence[EvaluationSet]
    out: Path
    run: Run
    keep_models: bool = False


def run_cells(
    cells: Sequence[Cell], bench: Bench, say: Callable[[str], None]
) -> dict[str, list[Answers]]:
    """The answers of each cell, after each of its stages in order.

    Raises:
        RecipeError: when the folder holds cells of another ablation.
    """
    found: dict[str, list[Answers]] = {}
    for number, cell in enumerate(cells, start=1):
        folder = bench.out / "cells" / cell.name
        facts = _facts(cell, bench)
        done = _done(folder, facts)
        if done is None:
            say(f"cell {number} of {len(cells)}: {cell.name}")
            done = _run(cell, folder, facts, bench, say)
        else:
            say(f"cell {number} of {len(cells)}: {cell.name} is done already")
        found[cell.name] = done
    return found


def baselines(sets: Sequence[EvaluationSet]) -> Answers:
    """What words alone answer."""
    return {examined.name: examined.words() for examined in sets}


def _run(
    cell: Cell, folder: Path, facts: dict[str, Any], bench: Bench, say: Callable[[str], None]
) -> list[Answers]:
    stages = cell.recipe.stages
    data = {stage.data: bench.data[stage.data] for stage in stages}
    train(cell.recipe, data, folder, run=bench.run, say=say)
    folders = [folder / f"{number}-{stage.name}" for number, stage in enumerate(stages, start=1)]
    answers: list[Answers] = []
    seconds = 0.0
    for each in folders if len(stages) > 1 else [folder]:
        model = Embedder.load(each / "model", dtype=getattr(torch, bench.run.precision))
        model.to(bench.run.find_device())
        answers.append({examined.name: examined.measure(model) for examined in bench.sets})
        seconds = sum(stage["seconds"] for stage in model.about["stages"])
    arrays: dict[str, Any] = {
        f"{number}/{name}": array
        for number, of_stage in enumerate(answers)
        for name, array in of_stage.items()
    }
    with replacing_file(folder / ANSWERS) as fresh, fresh.open("wb") as file:
        np.savez_compressed(file, **arrays)
    with replacing_file(folder / FACTS) as fresh:
        text = json.dumps({**facts, "seconds": round(seconds)}, indent=2)
        fresh.write_text(text + "\n", encoding="utf-8")
    if not bench.keep_models:
        for path in folder.iterdir():
            if path.name not in (ANSWERS, FACTS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return answers


def _facts(cell: Cell, bench: Bench) -> dict[str, Any]:
    """What has to be the same for a cell's answers to be used again."""
    recipe = json.loads(json.dumps(asdict(cell.recipe), default=repr))
    read = sorted({stage.data for stage in cell.recipe.stages})
    return {
        "cell": cell.name,
        "recipe": recipe,
        "data": {
            name: [[source.name, source.fingerprint, source.weight] for source in bench.data[name]]
            for name in read
        },
        "sets": {examined.name: examined.fingerprint for examined in bench.sets},
        "precision": bench.run.precision,
    }


def _done(folder: Path, facts: dict[str, Any]) -> list[Answers] | None:
    if not (folder / FACTS).exists():
        return None
    known = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    other = [name for name, value in facts.items() if known.get(name) != value]
    if other:
        raise RecipeError(
            f"{folder}: was run with another {', '.join(other)}; give another --out, or delete "
            "that folder"
        )
    with np.load(folder / ANSWERS) as arrays:
        stages = len(facts["recipe"]["stages"])
        return [
            {name: arrays[f"{number}/{name}"] for name in facts["sets"]} for number in range(stages)
        ]
