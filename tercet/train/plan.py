"""What a run is made of: recipe, data of each stage, and what says that it is the same run."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tercet.data.batches.collate import PromptOf
from tercet.data.batches.mixture import by_language, shares_of
from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.files.atomic import replacing_file
from tercet.kinds import Kind
from tercet.models.settings import FILE
from tercet.train import checkpoint
from tercet.train.recipe import Model, Recipe, Stage
from tercet.train.run import Run

log = logging.getLogger("tercet")

CHECKPOINT: Final = "checkpoint.pt"
MADE_WITH: Final = "made_with"  # of a stage, in the manifest of a model

Data = Sequence[Source] | Mapping[str, Sequence[Source]]
"""What a run reads: sources of examples, or for each ``Stage.data`` those that it asks for."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the stages of a run share."""

    recipe: Recipe
    sources: Sequence[Sequence[Source]]  # of each stage
    run: Run
    say: Callable[[str], None]
    prompt_of: PromptOf = lambda role, task: ""  # of a row that brings none


def by_stage(recipe: Recipe, data: Data) -> list[Sequence[Source]]:
    """The sources of each stage.

    Raises:
        RecipeError: when a stage has none, or when some are read by no stage.
    """
    given = data if isinstance(data, Mapping) else {"pairs": data}
    asked = {stage.data for stage in recipe.stages}
    for stage in recipe.stages:
        if not given.get(stage.data):
            raise RecipeError(
                f"the stage {stage.name} reads {stage.data}, and none are given; give some, or "
                "leave this stage out"
            )
    for name in given:
        if given[name] and name not in asked:
            stages = ", ".join(stage.name for stage in recipe.stages)
            raise RecipeError(
                f"{name} are given, but no stage reads them (stages: {stages}); leave them out, or "
                "add the stage that does"
            )
    return [given[stage.data] for stage in recipe.stages]


def require_negatives(recipe: Recipe, sources: Sequence[Sequence[Source]]) -> None:
    """Where others' documents are no negatives, an example that brings none teaches nothing.

    Looked at before the first stage is trained.

    Raises:
        RecipeError: when no example of a source brings one.
    """
    for stage, of_stage in zip(recipe.stages, sources, strict=True):
        alone = stage.in_batch == "none" and not is_refreshed(stage, of_stage, at_start=True)
        for source in of_stage if alone else ():
            bare, every = source.without_negatives, len(source)
            if bare == every:
                raise RecipeError(
                    f"{source.path}: no example has negatives, and the stage {stage.name} takes "
                    "none from other examples, so nothing would be learned from it; mine some "
                    "(tercet mine), or let others' documents be negatives"
                )
            if bare:
                log.warning(
                    "%s: %d of %d examples have no negatives and teach nothing in the stage %s, "
                    "which takes none from other examples",
                    source.path,
                    bare,
                    every,
                    stage.name,
                )


def is_refreshed(stage: Stage, sources: Sequence[Source], *, at_start: bool = False) -> bool:
    """Whether the negatives of these sources are mined in the stage, or even before it."""
    refresh = stage.refresh
    if refresh is None or (at_start and not refresh.at_start):
        return False
    bare = any(source.without_negatives == len(source) for source in sources)
    return bare or not refresh.missing


def require_widths(recipe: Recipe, dim: int) -> None:
    """Look at the shorter widths of all stages before the first is trained.

    Raises:
        RecipeError: when one of them is longer than the model's vectors.
    """
    for stage in recipe.stages:
        dims = stage.objective.traits.dims
        if max(dims, default=0) > dim:
            raise RecipeError(
                f"dims are {list(dims)}, but the model's vectors have {dim} coordinates; give "
                f"lengths up to that (stage {stage.name})"
            )


def warn_of_idle_heads(stage: Stage, model: Model, made: Sequence[Kind]) -> None:
    """Say which heads stay as they are while the network below them is trained."""
    trained = stage.objective.traits.kinds
    idle = [kind for kind in made if kind != "dense" and kind not in trained]
    if idle and not model.freeze_backbone:
        log.warning(
            "the stage %s trains the network and not its layers for %s vectors, which will fit it "
            "less; measure them again, or train them too",
            stage.name,
            " and ".join(idle),
        )


def refuse_other_stages(out: Path, folders: Sequence[Path]) -> None:
    """A run of other stages would lose its final model to this one.

    Raises:
        RecipeError: when ``out`` holds a checkpoint that is not of one of these folders.
    """
    found = [path.parent for path in (*out.glob(CHECKPOINT), *out.glob(f"[0-9]*-*/{CHECKPOINT}"))]
    others = sorted(set(found) - set(folders))
    if others:
        names = ", ".join("one stage" if path == out else path.name for path in others)
        raise RecipeError(
            f"{out} holds a run of other stages ({names}); give another --out, or delete "
            "that folder"
        )


def identity(
    recipe: Recipe,
    stage: Stage,
    sources: Sequence[Source],
    run: Run,
    *,
    begins_with: Mapping[str, str],
) -> dict[str, Any]:
    """What has to be the same for a run to go on: plain values, compared key by key.

    ``begins_with`` are fingerprints of whatever else is read: the base, the stage before, files.
    """
    flat = dict(_leaves("model", asdict(recipe.model))) | dict(_leaves("", asdict(stage)))
    flat |= {f"data {source.name}": source.fingerprint for source in sources}
    return {**flat, **begins_with, "seed": recipe.seed, "precision": run.precision}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The parts of nested settings one by one, so that a message names what differs."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, part)
    else:
        yield name, repr(value)


def refuse_other_model(folder: Path, what: Mapping[str, Any]) -> None:
    """The model of a stage is kept beside its checkpoint, and may outlive it.

    Raises:
        RecipeError: when ``folder`` holds one that was made with other settings, data or weights.
    """
    if not folder.exists():
        return
    try:
        saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
        was = saved["about"]["stages"][-1][MADE_WITH]
        changes = checkpoint.changed(was, what)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        changes = "it does not say with which"
    if changes:
        raise RecipeError(
            f"{folder} was made with other settings ({changes}); give the settings it was made "
            f"with, another --out, or delete {folder.parent} and those of the stages after it"
        )


def is_saved(folder: Path, stages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a folder holds the model that these stages made.

    It may have been changed since, such as by ``tercet tune-weights``, and is not to be replaced.
    """
    try:
        saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return saved["about"]["stages"] == list(stages)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def describe(job: Job, out: Path) -> None:
    """Write ``recipe.json`` and ``mixture.json`` for people and diffs; nothing reads them back."""
    sources = {source.name: source for given in job.sources for source in given}
    record = {
        "recipe": asdict(job.recipe),
        "run": asdict(job.run),
        "data": {
            name: {"examples": len(source), "fingerprint": source.fingerprint}
            for name, source in sources.items()
        },
    }
    mixture = {
        stage.name: _mixture(stage, of_stage)
        for stage, of_stage in zip(job.recipe.stages, job.sources, strict=True)
    }
    for name, told in (("recipe.json", record), ("mixture.json", mixture)):
        with replacing_file(out / name) as fresh:
            fresh.write_text(json.dumps(told, indent=2, default=str) + "\n", encoding="utf-8")


def _mixture(stage: Stage, sources: Sequence[Source]) -> dict[str, Any]:
    """What an epoch of a stage takes of each source and language."""
    shares = shares_of(sources, stage.batch_size, single=stage.mixing == "single")
    return {
        "batch_size": stage.batch_size,
        "mixing": stage.mixing,
        "sources": [asdict(each) for each in shares],
        "languages": by_language(shares),
    }
