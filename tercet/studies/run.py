"""Run the cells of an ablation one after the other, and keep what each one answers.

A cell that is done is not run again: its answers lie in its folder. A killed cell goes on where it
was. Models are deleted once they are measured, unless they are asked for.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tercet.data.files.sources import Source
from tercet.evaluate.suites.suite import EvaluationSet
from tercet.files.progress import bar
from tercet.models.embedder import Embedder
from tercet.studies.cells import Cell
from tercet.studies.kept import (
    ANSWERS,
    FACTS,
    Answers,
    fingerprint_of_model,
    keep_answers,
    kept_answers,
)
from tercet.train.loop import train
from tercet.train.recipe import Run


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
        done = kept_answers(folder, facts)
        if done is None:
            say(f"cell {number} of {len(cells)}: {cell.name}")
            done = _run(cell, folder, facts, bench, say)
        else:
            say(f"cell {number} of {len(cells)}: {cell.name} is done already")
        found[cell.name] = done
    return found


@dataclass(frozen=True, slots=True)
class Shared:
    """A training that several others begin with: their recipes get its model as their base."""

    first: Cell
    then: Sequence[Cell]


def run_shared(
    groups: Sequence[Shared], bench: Bench, say: Callable[[str], None]
) -> dict[str, list[Answers]]:
    """The answers of all cells; what several begin with is trained once, and kept until they end.

    Raises:
        RecipeError: when the folder holds cells of another ablation.
    """
    found: dict[str, list[Answers]] = {}
    for group in groups:
        folder = bench.out / "cells" / group.first.name
        facts = _facts(group.first, bench)
        begins_with = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        then = [_on_top_of(folder / "model", cell, begins_with) for cell in group.then]
        todo = [
            cell.name
            for cell in then
            if kept_answers(bench.out / "cells" / cell.name, _facts(cell, bench)) is None
        ]
        if todo and kept_answers(folder, facts) and not (folder / "model").is_dir():
            say(f"{group.first.name} is trained again: its model is gone, and {todo[0]} needs it")
            (folder / FACTS).unlink()
        found |= run_cells([group.first], replace(bench, keep_models=True), say)
        found |= run_cells(then, bench, say)
        if not bench.keep_models:
            _clear(folder)
    return found


def _on_top_of(model: Path, cell: Cell, begins_with: str) -> Cell:
    recipe = replace(cell.recipe, model=replace(cell.recipe.model, base=str(model)))
    return replace(cell, recipe=recipe, begins_with=begins_with)


def baselines(sets: Sequence[EvaluationSet]) -> Answers:
    """What words alone answer."""
    return {examined.name: examined.words() for examined in sets}


def measure_models(
    models: Mapping[str, Path], bench: Bench, say: Callable[[str], None]
) -> dict[str, Answers]:
    """What models answer as they are, without any training.

    Raises:
        RecipeError: when the folder holds the answers of others.
    """
    found: dict[str, Answers] = {}
    for number, (name, path) in enumerate(models.items(), start=1):
        folder = bench.out / "cells" / name
        facts = {"cell": name, "model": fingerprint_of_model(path), **_asked(bench)}
        done = kept_answers(folder, facts)
        if done is None:
            say(f"model {number} of {len(models)}: {name}")
            done = [_measured(path, bench)[1]]
            keep_answers(folder, facts, done)
        else:
            say(f"model {number} of {len(models)}: {name} is done already")
        found[name] = done[-1]
    return found


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
        about, found = _measured(each / "model", bench)
        answers.append(found)
        seconds = sum(stage["seconds"] for stage in about["stages"])
    keep_answers(folder, facts, answers, seconds=seconds)
    if not bench.keep_models:
        _clear(folder)
    return answers


def _clear(folder: Path) -> None:
    """Delete all but the answers."""
    for path in folder.iterdir():
        if path.name not in (ANSWERS, FACTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _measured(path: Path, bench: Bench) -> tuple[Mapping[str, Any], Answers]:
    """How a saved model was made, and what it answers."""
    model = Embedder.load(path, dtype=getattr(torch, bench.run.precision))
    model.to(bench.run.find_device())
    found: dict[str, np.ndarray] = {}
    with bar("measuring", len(bench.sets), shown=bench.run.show_progress) as advance:
        for examined in bench.sets:
            found[examined.name] = examined.measure(model)
            advance(1, examined.name)
    return model.about, found


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
        **({} if cell.begins_with is None else {"begins_with": cell.begins_with}),
        **_asked(bench),
    }


def _asked(bench: Bench) -> dict[str, Any]:
    """What is asked of every model, and how it reads it."""
    return {
        "sets": {examined.name: examined.fingerprint for examined in bench.sets},
        "precision": bench.run.precision,
    }
