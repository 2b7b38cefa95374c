"""The one training loop. Recipes differ in numbers and parts, not in loops."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tercet import distributed
from tercet.files.atomic import LOCK, sole_writer
from tercet.files.outputs import mark
from tercet.kinds import Kind
from tercet.models.embedder import Embedder
from tercet.models.zoo import zoo
from tercet.objectives.contrastive import require_dims
from tercet.training.forecast import StageForecast, lines_of
from tercet.training.forecast import forecast as forecast_stages
from tercet.training.log import kept_messages
from tercet.training.plan import (
    CHECKPOINT,
    RUN,
    Data,
    TrainingPlan,
    build,
    by_stage,
    check_run_place,
    describe,
    fingerprint_of_base,
    is_saved,
    prompts_of,
    refuse_other_model,
    refuse_other_stages,
    require_negatives,
    require_ranking,
    require_scores,
    stage_folders,
    warn_of_idle_heads,
    with_prompts_of,
    without_tuning,
)
from tercet.training.recipe import Recipe, Run, Stage
from tercet.training.run_report import try_to_report
from tercet.training.snapshots import STEPS, Snapshots
from tercet.training.trainer import Score, Trainer


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

    Of several stages, each one's model is kept too, in its folder in ``out``. At the end,
    ``out/report.html`` shows curves, data, settings and warnings. The same call after a
    kill goes on from the last checkpoint, and on a CPU ends with the same bits as a run that was
    never stopped. With ``Run.shard_weights`` each of several processes holds a part of the
    network's weights while it trains; the embedder that is returned is whole, and on the CPU.

    Args:
        recipe: what to train; see ``tercet.recipes``.
        data: sources of examples, or a mapping from the name in ``Stage.data`` to sources.
        out: the run folder, which one run writes at a time.
        score: measures the model before the first step and along the way; the best weights stay.
        run: device, precision, memory, and how often to save and measure.
        say: receives lines for people.

    Raises:
        RecipeError: if recipe, data and an earlier run in ``out`` do not fit together, or ``out``
            holds something else.
        TrainingError: if a loss or gradient is NaN or infinite; it names the examples.
        StorageError: if the disk refuses a checkpoint; the one before it is kept.

    Examples:
        ``train(finetune(steps=100), [open_source("pairs.jsonl")], Path("runs/mine"))``
    """
    run, out = (run or Run()).resolved(), Path(out)
    begun = (out / LOCK).exists()  # by a run that was killed, or ended
    plan = TrainingPlan(recipe, by_stage(recipe, data), run, say)
    if not distributed.is_main():
        return _train(plan, out, score, begun=begun)
    check_run_place(plan, out)
    with sole_writer(out), kept_messages(out, say) as keep_and_say:
        mark(out, RUN)
        embedder = _train(replace(plan, say=keep_and_say), out, score, begun=begun)
        try_to_report(out, say)
    return embedder


def forecast(recipe: Recipe, data: Data, *, run: Run | None = None) -> list[StageForecast]:
    """Estimate what a training takes, without training or writing anything.

    Args:
        recipe: what would be trained.
        data: as for :func:`train`.
        run: device, memory and dtype.

    Returns:
        For each stage its steps, batches, documents that a query is compared with, tokens of a
        step, seconds and GB.

    Raises:
        RecipeError: if recipe and data do not fit together.
    """
    run = (run or Run()).resolved()
    plan, embedder = _begin(TrainingPlan(recipe, by_stage(recipe, data), run, lambda line: None))
    return forecast_stages(plan, embedder)


def _begin(plan: TrainingPlan) -> tuple[TrainingPlan, Embedder]:
    """Return the embedder that the first stage begins with, after checks of all stages."""
    recipe = plan.recipe
    require_negatives(recipe, plan.sources)
    require_ranking(recipe, plan.sources)
    require_scores(recipe, plan.sources)
    for stage in recipe.stages:
        if stage.guide is not None:  # a slip is found before the stages that come first
            zoo.resolve(stage.guide)
    device = plan.run.home
    torch.manual_seed(recipe.seed)  # for the weights of a new layer
    embedder = build(recipe.model).to(device)
    embedder.backbone.require_float("it cannot be trained")
    for stage in recipe.stages:  # all of them, before the first is trained
        require_dims(stage.objective.traits.dims, embedder, stage.name)
    plan = replace(plan, prompt_of=prompts_of(embedder.settings))  # before those of the data
    embedder.settings = with_prompts_of(plan.sources, embedder.settings)
    return plan, embedder


def _train(plan: TrainingPlan, out: Path, score: Score | None, *, begun: bool) -> Embedder:
    recipe, run = plan.recipe, plan.run
    several, folders = len(recipe.stages) > 1, stage_folders(recipe, out)
    refuse_other_stages(out, folders)
    device = run.home
    plan, embedder = _begin(plan)
    _announce(plan, embedder, folders)
    begins_with = {"base": fingerprint_of_base(embedder)}
    done: list[dict[str, Any]] = list(embedder.about.get("stages", []))
    kinds, untrained = embedder.kinds, {*embedder.heads.drawn}
    for number, (stage, folder) in enumerate(zip(recipe.stages, folders, strict=True), start=1):
        embedder.settings = without_tuning(embedder.settings, plan.say)
        if recipe.model.lora is not None and not embedder.backbone.has_lora:
            lora = recipe.model.lora
            torch.manual_seed(recipe.seed + number)
            embedder.backbone.add_lora(lora.rank, lora.alpha, lora.dropout)
            embedder.to(device)
        untrained -= {*stage.objective.traits.kinds}
        made: tuple[Kind, ...] = tuple(kind for kind in kinds if kind not in untrained)
        embedder.settings = replace(embedder.settings, kinds=made)
        warn_of_idle_heads(stage, recipe.model, made)
        snapshots = None
        if number == 1 and run.models_at:
            complete = partial(_describe_model, plan, stage, tuple(done))
            snapshots = Snapshots(folder / STEPS, run.models_at, complete)
        trainer = Trainer(embedder, stage, folder, plan, begins_with, snapshots)
        if several:
            refuse_other_model(folder / "model", trainer.what)
        trainer.resume(begun=begun and number == 1)
        if number == 1 and distributed.is_main():
            describe(plan, out)
        trainer.run(score)
        done.append(trainer.record())
        begins_with = {**begins_with, "stage before": done[-1]["weights"]}
        embedder.backbone.merge_lora()
        _describe_model(plan, stage, done[:-1], embedder, done[-1])
        if distributed.is_main():
            if several and not is_saved(folder / "model", done):
                embedder.save(folder / "model")
            if number == len(recipe.stages) and not is_saved(out / "model", done):
                embedder.save(out / "model")
        distributed.barrier()
    return embedder.eval()


def _announce(plan: TrainingPlan, embedder: Embedder, folders: Sequence[Path]) -> None:
    """Print what all stages will do, unless the run goes on from a checkpoint."""
    if any((folder / CHECKPOINT).exists() for folder in folders):
        return
    for line in lines_of(forecast_stages(plan, embedder)):
        plan.say(line)


def _describe_model(
    plan: TrainingPlan,
    stage: Stage,
    before: Sequence[Mapping[str, Any]],
    embedder: Embedder,
    record: Mapping[str, Any],
) -> None:
    """Add to an embedder the widths that a stage trains, and the record of how it was made.

    A distilled one gets its own fingerprints too, by which a later change is noticed.
    """
    if short := {dim for dim in stage.objective.traits.dims if dim < embedder.dim}:
        known = {*embedder.settings.dims, *short}
        embedder.settings = replace(embedder.settings, dims=tuple(sorted(known)))
    if embedder.settings.shares_space_with:
        embedder.settings = replace(embedder.settings, distilled_as=embedder.fingerprints())
    recipe = plan.recipe
    about = {"recipe": recipe.name, "base": recipe.model.base, "seed": recipe.seed}
    embedder.about = {**about, "stages": [*before, record], "run": asdict(plan.run)}
