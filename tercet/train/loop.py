"""The one training loop. Recipes differ in numbers and parts, not in loops."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tercet import distributed
from tercet.data.batches.collate import PromptOf
from tercet.files.atomic import sole_writer
from tercet.kinds import Kind
from tercet.models.embedder import Embedder, Settings
from tercet.train.building import build, fingerprint_of_base, with_prompts_of
from tercet.train.plan import (
    Data,
    Job,
    by_stage,
    describe,
    is_saved,
    refuse_other_model,
    refuse_other_stages,
    require_negatives,
    require_widths,
    warn_of_idle_heads,
)
from tercet.train.recipe import Recipe, Stage
from tercet.train.run import Run
from tercet.train.snapshots import STEPS, Series
from tercet.train.trainer import Score, Trainer
from tercet.types import Role


def train(
    recipe: Recipe,
    data: Data,
    out: Path,
    *,
    score: Score | None = None,
    run: Run | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Embedder:
    """Run a recipe's stages and save the embedder under ``out/model``.

    Where there are several stages, each one's model is kept too, under its own folder in ``out``.
    The same call after a kill goes on from the last checkpoint, and on a CPU ends with the same
    bits as a run that was never stopped. With ``score`` the model is measured before the first
    step and along the way, and the best weights are the ones that stay. With ``Run.models_at`` the
    first stage's model is saved under ``steps`` in its folder too, as it is after these steps.

    With ``Run.shard_weights`` each of several processes holds a part of the network's weights
    while it trains; the embedder that comes back is whole, and on the CPU.

    Raises:
        RecipeError: when recipe, data and an earlier run in ``out`` do not fit together.
        TrainingError: at a loss or gradient that is not a number, naming the examples.
        StorageError: when the disk refuses a checkpoint; the one before it is kept.
    """
    run, out = run or Run(), Path(out)
    with sole_writer(out) if distributed.is_main() else nullcontext():
        return _train(Job(recipe, by_stage(recipe, data), run, say), out, score)


def _train(job: "Job", out: Path, score: Score | None) -> Embedder:
    recipe = job.recipe
    several = len(recipe.stages) > 1
    folders = [out / f"{n}-{s.name}" if several else out for n, s in enumerate(recipe.stages, 1)]
    refuse_other_stages(out, folders)
    require_negatives(recipe, job.sources)
    device = job.run.home
    torch.manual_seed(recipe.seed)  # of the weights of a new layer
    embedder = build(recipe.model).to(device)
    require_widths(recipe, embedder.dim)
    job = replace(job, prompt_of=prompts_of(embedder.settings))  # before those of the data
    embedder.settings = with_prompts_of(job.sources, embedder.settings)
    embedder.settings = _without_tuning(embedder.settings, job.say)
    begins_with = {"base": fingerprint_of_base(embedder)}
    done: list[dict[str, Any]] = list(embedder.about.get("stages", []))
    kinds, untrained = embedder.kinds, {*embedder.heads.drawn}
    for number, (stage, folder) in enumerate(zip(recipe.stages, folders, strict=True), start=1):
        if recipe.model.lora is not None and not embedder.backbone.has_lora:
            lora = recipe.model.lora
            torch.manual_seed(recipe.seed + number)
            embedder.backbone.add_lora(lora.rank, lora.alpha, lora.dropout)
            embedder.to(device)
        untrained -= {*stage.objective.traits.kinds}
        made: tuple[Kind, ...] = tuple(kind for kind in kinds if kind not in untrained)
        embedder.settings = replace(embedder.settings, kinds=made)
        warn_of_idle_heads(stage, recipe.model, made)
        trainer = Trainer(embedder, stage, folder, job, begins_with)
        if several:
            refuse_other_model(folder / "model", trainer.what)
        if number == 1 and job.run.models_at:
            describe_model = partial(_describe_model, job, stage, tuple(done))
            trainer.series = Series(folder / STEPS, job.run.models_at, describe_model)
        trainer.resume()
        if number == 1 and distributed.is_main():
            describe(job, out)
        trainer.run(score)
        done.append(trainer.record())
        begins_with = {**begins_with, "stage before": done[-1]["weights"]}
        embedder.backbone.merge_lora()
        _describe_model(job, stage, done[:-1], embedder, done[-1])
        if distributed.is_main():
            if several and not is_saved(folder / "model", done):
                embedder.save(folder / "model")
            if number == len(recipe.stages) and not is_saved(out / "model", done):
                embedder.save(out / "model")
        distributed.barrier()
    return embedder.eval()


def _describe_model(
    job: Job,
    stage: Stage,
    before: Sequence[Mapping[str, Any]],
    embedder: Embedder,
    record: Mapping[str, Any],
) -> None:
    """Give an embedder the widths that a stage trains, and say how it was made."""
    dims = stage.objective.traits.dims
    if short := {dim for dim in dims if dim < embedder.dim}:
        known = {*embedder.settings.dims, *short}
        embedder.settings = replace(embedder.settings, dims=tuple(sorted(known)))
    recipe = job.recipe
    about = {"recipe": recipe.name, "base": recipe.model.base, "seed": recipe.seed}
    embedder.about = {**about, "stages": [*before, record], "run": asdict(job.run)}


def _without_tuning(settings: Settings, say: Callable[[str], None]) -> Settings:
    """The settings without what was found for the base's own vectors."""
    if settings.weights:
        say("training drops the base's tuned weights; find new ones (tercet tune-weights)")
    if settings.ranges:
        say("training drops the base's ranges of codes; learn new ones (tercet calibrate)")
    return replace(settings, weights={}, ranges={})


def prompts_of(settings: Settings) -> PromptOf:
    """A model's prompts for rows that bring none; a task that it does not know has the usual."""

    def prompt_of(role: Role, task: str) -> str:
        return settings.prompt(role, task if task in settings.task_prompts else None)

    return prompt_of
