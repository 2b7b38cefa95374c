"""Run the cells of a study one after the other, and keep what each of them answers.

A study file is Python with one function, ``study``, which returns a :class:`Study`. Its parameters
are flags of ``tercet study FILE``: ``Annotated[TYPE, "help"]``, where ``list[Source]`` stands for
files of examples. ``docs/extending.md`` shows one, ``examples/studies`` has five.

The answers of a cell are kept with everything that they depend on, so a finished cell is not run
again, and a killed one continues at its last checkpoint. Models are deleted once measured.
"""

import inspect
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch

from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.evaluate.suites.suite import EvaluationSet
from tercet.files.artifacts import (
    KeptResults,
    fingerprint,
    fingerprint_of_file,
    json_text,
    read_json,
)
from tercet.files.atomic import sole_writer
from tercet.files.outputs import FolderKind, check_output, json_object, mark
from tercet.files.progress import bar
from tercet.models.embedder import Embedder
from tercet.models.settings import FILE
from tercet.studies.tables import AnswersBySet, Picture, Results, Table
from tercet.training.loop import train
from tercet.training.recipe import Recipe, Run

_EARLIER: Final = ("cells/*/cell.json", "seed-*/cells/*/cell.json")  # kept other facts
_MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")  # they change its vectors

STUDY: Final = FolderKind(
    "a folder of a study",
    own=("cells/*", "table.md", "results.json", "*.png"),
    shared=True,
    is_older=lambda folder: (
        "tables" in json_object(folder / "results.json")
        or any(folder.glob("cells/*/*.npz"))
        or any(any(folder.glob(pattern)) for pattern in _EARLIER)
    ),
)

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Cell:
    """One model of a study: trained by a recipe with each seed, or the finished one of a folder."""

    name: str  # also of its folder
    model: Recipe | Path
    after: str | None = None  # an earlier cell, whose model replaces the base of the recipe


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """Cells, what they are measured on, and the tables and pictures that compare them."""

    cells: Sequence[Cell]
    sets: Sequence[EvaluationSet]
    report: Callable[[Results], Iterable[Table | Picture]]
    data: Mapping[str, Sequence[Source]] = field(default_factory=dict)  # by ``Stage.data``
    seeds: int = 1  # of each recipe, counted from 0, unless --seeds says otherwise

    def __post_init__(self) -> None:
        earlier: set[str] = set()
        for cell in self.cells:
            if cell.name in earlier:
                raise RecipeError(f"two cells are named {cell.name!r}; names must differ")
            if cell.after is not None and cell.after not in earlier:
                raise RecipeError(
                    f"{cell.name} must stand below {cell.after}, whose model it begins with"
                )
            earlier.add(cell.name)

    def selected(self, only: Sequence[str] = (), without: Sequence[str] = ()) -> list[Cell]:
        """Return the cells that match ``only`` and not ``without``, and those they come after.

        Patterns are names in which ``*`` stands for any letters.

        Raises:
            RecipeError: if a pattern matches no cell, or no cell is left.
        """
        names = [cell.name for cell in self.cells]
        for pattern in (*only, *without):
            if not _matches(names, pattern):
                raise RecipeError(f"no cell is named {pattern}; choose from {', '.join(names)}")
        left = {name for pattern in only or "*" for name in _matches(names, pattern)}
        left -= {name for pattern in without for name in _matches(names, pattern)}
        if not left:
            raise RecipeError("no cell is left to run; give fewer --without")
        for cell in reversed(self.cells):
            if cell.name in left and cell.after is not None:
                left.add(cell.after)
        return [cell for cell in self.cells if cell.name in left]


def with_numbers_of(recipe: Callable[..., Recipe], *fixed: str) -> Callable[[Function], Function]:
    """Let a study's ``**numbers`` be the parameters of a recipe, which become flags of the study.

    Left out are the seed, ``fixed`` ones, which the cells set, and those that the study has itself.
    """

    def add(study: Function) -> Function:
        own = [p for p in _parameters(study) if p.kind is not inspect.Parameter.VAR_KEYWORD]
        skipped = {"seed", *fixed, *(parameter.name for parameter in own)}
        more = [each for each in _parameters(recipe) if each.name not in skipped]
        flags = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *more)]
        study.__signature__ = inspect.Signature(flags)  # pyright: ignore
        return study

    return add


def run_study(  # noqa: PLR0913 (independent choices, each with a default)
    study: Study,
    out: Path,
    run: Run | None = None,
    *,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    keep_models: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Results:
    """Train and measure the cells that are not finished yet, and return the answers of all.

    Raises:
        RecipeError: if the folder holds other cells of the same names.
    """
    earlier = [path for pattern in _EARLIER for path in out.glob(pattern)]
    if earlier:  # of the commands that studies replaced
        raise RecipeError(
            f"{earlier[0].parent}: was written by an earlier version, which kept other facts; give "
            "another --out, or delete that folder"
        )
    read = [source.path for sources in study.data.values() for source in sources]
    models = [cell.model for cell in study.cells if isinstance(cell.model, Path)]
    check_output(out, [*read, *models], STUDY)
    mark(out, STUDY)
    runner = _CellRunner(study, out, (run or Run()).resolved(), keep_models, say)
    cells = study.selected(only, without)
    jobs = [
        (cell, seed)
        for seed in range(study.seeds)
        for cell in cells
        if seed == 0 or isinstance(cell.model, Recipe)
    ]
    last = {cell.after: cell for cell in cells if cell.after is not None}  # to need its model
    answers: dict[str, list[list[AnswersBySet]]] = {}
    with sole_writer(out):
        for number, (cell, seed) in enumerate(jobs, start=1):
            label = f"cell {number} of {len(jobs)}: {cell.name}"
            label += f", seed {seed}" if study.seeds > 1 else ""
            answers.setdefault(cell.name, []).append(runner.answers(cell, seed, label))
            if cell.name not in last:
                runner.delete_model(cell.name, seed)
            if cell.after is not None and last[cell.after] is cell:
                runner.delete_model(cell.after, seed)
    return Results({each.name: each for each in study.sets}, answers)


@dataclass(frozen=True, slots=True, eq=False)
class _CellRunner:
    study: Study
    out: Path
    run: Run
    keep_models: bool
    say: Callable[[str], None]
    fingerprints: dict[Path, str] = field(default_factory=dict)  # of model folders

    def answers(self, cell: Cell, seed: int, label: str) -> list[AnswersBySet]:
        """Return the answers to each set after each stage, kept ones if there are any.

        In their file the array of a set is named ``STAGE/SET``.
        """
        folder = self.out / "cells" / cell.name
        sets = {examined.name: examined.fingerprint for examined in self.study.sets}
        facts = {"cell": cell.name, **self._origin(cell, seed), "sets": sets}
        kept = KeptResults(folder)
        found = kept.find(seed)
        if found is None:
            self.say(label)
            models = [cell.model] if isinstance(cell.model, Path) else self._train(cell, seed)
            arrays = {
                f"{number}/{name}": answers
                for number, model in enumerate(models)
                for name, answers in self._measure(model).items()
            }
            kept.keep(facts, arrays, seed)
        else:
            known, arrays = found
            other = [name for name, value in facts.items() if known.get(name) != value]
            if other:
                raise RecipeError(
                    f"{folder}: was run with another {', '.join(other)}; give another --out, or "
                    "delete that folder"
                )
            self.say(f"{label} is done already")
        stages = 1 + max(int(name.partition("/")[0]) for name in arrays)
        return [{s: arrays[f"{n}/{s}"] for s in sets} for n in range(stages)]

    def delete_model(self, name: str, seed: int) -> None:
        """Delete what the training of a cell has written, unless it is wanted."""
        if not self.keep_models:
            shutil.rmtree(self._folder(name, seed), ignore_errors=True)

    def _folder(self, name: str, seed: int) -> Path:
        return self.out / "cells" / name / f"seed-{seed}"

    def _cell(self, name: str) -> Cell:
        return next(cell for cell in self.study.cells if cell.name == name)

    def _train(self, cell: Cell, seed: int) -> list[Path]:
        """Train by the recipe, and return the model of each stage."""
        assert isinstance(cell.model, Recipe)
        recipe, folder = replace(cell.model, seed=seed), self._folder(cell.name, seed)
        if cell.after is not None:
            base = self._model_of(cell.after, seed, cell.name)
            recipe = replace(recipe, model=replace(recipe.model, base=str(base)))
        data = {stage.data: self.study.data[stage.data] for stage in recipe.stages}
        train(recipe, data, folder, run=self.run, say=self.say)
        if len(recipe.stages) == 1:
            return [folder / "model"]
        return [folder / f"{n}-{stage.name}/model" for n, stage in enumerate(recipe.stages, 1)]

    def _model_of(self, name: str, seed: int, needed_by: str) -> Path:
        """Return the model that a cell comes after; trained again if it was deleted before."""
        cell = self._cell(name)
        if isinstance(cell.model, Path):
            return cell.model
        model = self._folder(name, seed) / "model"
        if not model.is_dir():
            self.say(f"{name} is trained again: its model was deleted, and {needed_by} needs it")
            self._train(cell, seed)
        return model

    def _measure(self, folder: Path) -> AnswersBySet:
        model = Embedder.load(folder, dtype=getattr(torch, self.run.dtype or "float32"))
        model.to(self.run.find_device())
        found: dict[str, np.ndarray] = {}
        with bar("measuring", len(self.study.sets), shown=self.run.show_progress) as advance:
            for examined in self.study.sets:
                found[examined.name] = examined.measure(model)
                advance(1, examined.name)
        return found

    def _origin(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Return, as JSON values, all that the vectors of a cell depend on."""
        if isinstance(cell.model, Path):
            return {"model": self._fingerprint(cell.model), "precision": self.run.dtype}
        recipe = replace(cell.model, seed=seed)
        read = {stage.data: self.study.data[stage.data] for stage in recipe.stages}
        origin = {
            "recipe": json.loads(json.dumps(asdict(recipe), default=repr)),
            "data": {
                name: [[source.name, source.fingerprint, source.weight] for source in sources]
                for name, sources in read.items()
            },
            "precision": self.run.dtype,
        }
        if cell.after is not None:
            before = self._origin(self._cell(cell.after), seed)
            return {**origin, "model before": fingerprint(json_text(before))}
        base = Path(recipe.model.base)
        return {**origin, "base": self._fingerprint(base)} if base.is_dir() else origin

    def _fingerprint(self, folder: Path) -> str:
        if folder not in self.fingerprints:
            self.fingerprints[folder] = fingerprint_of_model(folder)
        return self.fingerprints[folder]


def fingerprint_of_model(folder: Path) -> str:
    """Return what changes with a model's weights, tokenizer or settings, not with its history."""
    parts: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.name == FILE:
            record = read_json(path)
            record.pop("about", None)
            parts.append(json.dumps(record, sort_keys=True))
        elif path.is_file() and path.suffix in _MODEL_FILES:
            parts += [str(path.relative_to(folder)), fingerprint_of_file(path)]
    return fingerprint(*parts)


def _matches(names: Iterable[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())
