"""Everything that a run needs to go on after a kill as if nothing had happened.

Random numbers are not saved: every draw (batches, documents, dropout) comes from a seed that
depends only on the run's seed and the step.
"""

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from tercet.errors import RecipeError
from tercet.files.atomic import replacing_file
from tercet.files.checksums import is_whole_archive, seal_archive
from tercet.files.limits import unreadable
from tercet.losses.unified import Mixture
from tercet.objectives.contrastive import Contrastive
from tercet.sharding import kept_by_main, part_of

VERSION: Final = 1
_UNREADABLE: Final = (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError)
# Names of settings in runs of earlier versions, and in this one.
_RENAMED: Final = (
    ("objective.in_lesson", "objective.mixture.in_distilled"),
    ("objective.lesson", "objective.mixture.distil"),
    ("objective.", "objective.mixture."),
)
# Settings that runs of earlier versions do not name; their defaults change nothing.
_NEW: Final = ("similarity_temperature", "distil", "distil_weight", "teacher_temperature")
_DEFAULTS: Final = {"model.which_layers": repr("first")} | {
    f"{prefix}{name}": repr(value)
    for prefix, objective in (("objective.", Contrastive()), ("objective.mixture.", Mixture()))
    for name, value in asdict(objective).items()
    if name in _NEW
}


@dataclass(slots=True, kw_only=True)
class StageProgress:
    """How far a stage is."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # read by the model
    seconds: float = 0.0  # spent training, over all restarts
    truncated: int = 0  # texts that were cut
    best_score: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    finished: bool = False
    scores: list[tuple[int, float]] = field(default_factory=list)  # (step, score on the dev set)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that training changes, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained weights; whole in the first process, but all have to call this.

    Sharded ones come one by one onto the CPU.
    """
    return {name: kept_by_main(p) for name, p in trainable(module).items()}


def save(path: Path, what: dict[str, Any], progress: StageProgress, **states: Any) -> None:
    """Write a checkpoint that appears whole or not at all; ``what`` identifies the run.

    Raises:
        StorageError: if the disk refuses; the checkpoint before it is still there.
    """
    record = {"version": VERSION, "what": what, "progress": asdict(progress), **states}
    with replacing_file(path) as fresh:
        torch.save(record, fresh)
        seal_archive(fresh)


def load(
    path: Path, what: dict[str, Any], *, mapped: bool = False
) -> tuple[StageProgress, dict[str, Any]] | None:
    """Return the progress and states of the checkpoint at ``path``; None if there is none.

    ``mapped`` leaves tensors in the file until they are copied: processes of a machine share it.

    Raises:
        RecipeError: if it belongs to another run: another recipe, other data, other precision.
    """
    if not path.exists():
        return None
    record = read(path, mapped=mapped)
    try:
        version, found = record["version"], StageProgress(**record["progress"])
        changes = changed(record["what"], what)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path) from error
    if version != VERSION or changes:
        raise RecipeError(
            f"{path.parent} holds a run with other settings ({changes or 'another version'}); "
            "give the settings it was started with, another --out, or delete that folder"
        )
    return found, record


def changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the differences between two runs, for people; empty if they are the same run."""
    was = _with_new_names(was, now)
    keys = [key for key in dict.fromkeys((*now, *was)) if was.get(key) != now.get(key)]
    return "; ".join(f"{key} was {was.get(key)!r}, now {now.get(key)!r}" for key in keys)


def _with_new_names(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in was.items():
        old, new = next((pair for pair in _RENAMED if key.startswith(pair[0])), ("", ""))
        renamed = new + key.removeprefix(old)
        found[renamed if key not in now and renamed in now else key] = value
    # A setting that an earlier version did not have was off, or had its default.
    off = {key: value for key, value in now.items() if value in ("None", "False")}
    return off | {key: value for key, value in _DEFAULTS.items() if key in now} | found


def read(path: Path, *, mapped: bool = False) -> Any:
    """Return what a file of weights or of a checkpoint holds; see :func:`load` for ``mapped``.

    Raises:
        RecipeError: if it is missing or damaged.
    """
    if not is_whole_archive(path):  # torch would not notice another byte in a weight
        raise _damaged(path)
    try:
        if problem := unreadable(path):
            raise ValueError(problem)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (*_UNREADABLE, pickle.UnpicklingError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> RecipeError:
    return RecipeError(
        f"{path}: this file of an earlier run is gone or damaged; delete {path.parent} to "
        "start again, or give another --out"
    )


def read_weights(path: Path, module: nn.Module, *, mapped: bool = False) -> dict[str, Tensor]:
    """Return the trainable weights of the module that a file holds.

    Raises:
        RecipeError: if it is missing, damaged, or holds other things.
    """
    found = read(path, mapped=mapped)
    if not isinstance(found, dict) or found.keys() != trainable(module).keys():
        raise _damaged(path)
    return found


def restore(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put saved trainable weights back into the module they came from."""
    own = trainable(module)
    assert own.keys() == weights.keys(), "a checkpoint of the same run has the same weights"
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(part_of(weights[name], weight))
