"""What a run starts from: data of each stage, the embedder, and the identity of the run."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from tercet.data.batches.collate import PromptOf
from tercet.data.batches.mixture import by_language, shares_of
from tercet.data.files.sources import Source, refuse_scored
from tercet.errors import RecipeError
from tercet.evaluate.measures.retrieval import versions
from tercet.files.artifacts import read_json, write_json
from tercet.files.outputs import FolderKind, check_output, json_object
from tercet.kinds import KINDS, Kind
from tercet.models.embedder import Embedder, Settings
from tercet.models.formats.tercet_folder import MODEL, known_kinds, known_width
from tercet.models.network.fingerprints import fingerprint_of
from tercet.models.network.layers import keep_even_layers
from tercet.models.network.positions import extend_positions
from tercet.models.settings import FILE
from tercet.training import checkpoint
from tercet.training.recipe import Model, Recipe, Run, Stage
from tercet.training.snapshots import STEPS
from tercet.types import Role

log = logging.getLogger("tercet")

CHECKPOINT: Final = "checkpoint.pt"
MADE_WITH: Final = "made_with"  # of a stage, in the manifest of a model

Data = Sequence[Source] | Mapping[str, Sequence[Source]]
"""The sources of examples that a run reads, or a mapping from ``Stage.data`` to such."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What the stages of a run share."""

    recipe: Recipe
    sources: Sequence[Sequence[Source]]  # of each stage
    run: Run
    say: Callable[[str], None]
    prompt_of: PromptOf = lambda role, task: ""  # of a row without a prompt


def by_stage(recipe: Recipe, data: Data) -> list[Sequence[Source]]:
    """Return the sources of each stage.

    Raises:
        RecipeError: if a stage has no sources, or if some sources are read by no stage.
    """
    given = data if isinstance(data, Mapping) else {"pairs": data}
    for stage in recipe.stages:
        if not given.get(stage.data):
            raise RecipeError(
                f"the stage {stage.name} reads {stage.data}, and none are given; give some, or "
                "leave this stage out"
            )
    for name in given:
        if given[name] and name not in {stage.data for stage in recipe.stages}:
            stages = ", ".join(stage.name for stage in recipe.stages)
            raise RecipeError(
                f"{name} are given, but no stage reads them (stages: {stages}); leave them out, or "
                "add the stage that does"
            )
    return [given[stage.data] for stage in recipe.stages]


# ---- the embedder ----------------------------------------------------------------------------


def build(model: Model) -> Embedder:
    """Load the embedder that a recipe starts from."""
    extended = model.positions is not None  # only then is there room for as many tokens
    kinds = {*model.kinds, *known_kinds(model.base)} if model.kinds else set[Kind]()
    wanted = {
        "pooling": model.pooling,
        "prompts": model.prompts,
        "pool_prompt": model.pool_prompt,
        "append_end": model.append_end,
        "layer": model.layer,
        "query_tokens": None if extended else model.query_tokens,
        "document_tokens": None if extended else model.document_tokens,
        # A head that the base has is kept, trained or not.
        "kinds": model.kinds and tuple(kind for kind in KINDS if kind in kinds),
        "multi_dim": model.multi_dim,
        "cls_every": model.cls_every,
    }
    changes = {name: value for name, value in wanted.items() if value is not None}
    if model.layer == "none":
        changes["layer"] = None
    embedder = Embedder.load(
        model.base,
        attention=model.attention,
        window=model.window,
        keep_layers=model.keep_layers if model.which_layers == "first" else None,
        **changes,
    )
    if model.which_layers == "even" and model.keep_layers is not None:
        keep_even_layers(embedder.backbone, model.keep_layers)
    if (width := _width_of(model)) not in (None, embedder.dim):
        embedder.add_dense_layer(width)
    if model.positions is not None:
        extend_positions(embedder.backbone, model.positions)
        longest = model.document_tokens or model.positions
        if longest > model.positions:
            raise RecipeError(
                f"document_tokens is {longest}, and positions gives room for {model.positions}; "
                "give at most that"
            )
        queries = model.query_tokens or embedder.settings.query_tokens
        embedder.settings = replace(
            embedder.settings, document_tokens=longest, query_tokens=queries
        )
    if model.freeze_embeddings:
        embedder.backbone.freeze_embeddings()
    if model.freeze_backbone:
        embedder.backbone.requires_grad_(False)
    return embedder


def _width_of(model: Model) -> int | None:
    """Return the width that a recipe asks of a text's vector, if it does."""
    if model.as_wide_as is None:
        return model.dense_dim
    return known_width(model.as_wide_as) or Embedder.load(model.as_wide_as).dim


def fingerprint_of_base(embedder: Embedder) -> str:
    """Return a fingerprint of the weights that training begins with.

    Newly created heads and dense layers are left out: the recipe's seed creates the same again.
    """
    drawn = (
        *(f"heads.{kind}." for kind in embedder.heads.drawn),
        *(f"dense_layers.{place}." for place in embedder.dense_layers.drawn),
    )
    weights = embedder.state_dict()
    return fingerprint_of({name: weights[name] for name in weights if not name.startswith(drawn)})


def prompts_of(settings: Settings) -> PromptOf:
    """Return the prompts of a model, for rows without one; unknown tasks get the usual prompt."""

    def prompt_of(role: Role, task: str) -> str:
        return settings.prompt(role, task if task in settings.task_prompts else None)

    return prompt_of


def with_prompts_of(sources: Sequence[Sequence[Source]], settings: Settings) -> Settings:
    """Return the settings with the prompts of the examples of all stages, by task.

    A model without prompts takes those of the very first source, if any, as its usual ones. The
    first prompt of a task and role counts, and any before an empty one.
    """
    brought: dict[str, dict[str, str]] = {}
    for source in (source for of_stage in sources for source in of_stage):
        for task, prompts in source.prompts.items():
            known = brought.setdefault(task, {})
            known.update({role: text for role, text in prompts.items() if not known.get(role)})
    first = next((source for of_stage in sources for source in of_stage), None)
    usual = settings.prompts
    if first is not None and first.prompts and not any(usual.values()):
        usual = brought[next(iter(first.prompts))]
    return replace(settings, prompts=usual, task_prompts={**settings.task_prompts, **brought})


def without_tuning(settings: Settings, say: Callable[[str], None]) -> Settings:
    """Return the settings without what was tuned for the vectors that a stage begins with."""
    if settings.weights:
        say("training drops the base's tuned weights; find new ones (tercet tune weights)")
    if settings.ranges:
        say("training drops the base's ranges of codes; learn new ones (tercet tune codes)")
    if settings.shares_space_with:
        say("training moves the base's vectors out of the space of its teacher")
    return replace(settings, weights={}, ranges={}, shares_space_with=(), distilled_as=())


# ---- checks before the first stage -----------------------------------------------------------


def require_negatives(recipe: Recipe, sources: Sequence[Sequence[Source]]) -> None:
    """Refuse examples without negatives if a stage takes none from other examples.

    Raises:
        RecipeError: if no example of a source has any.
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


def require_scores(recipe: Recipe, sources: Sequence[Sequence[Source]]) -> None:
    """Refuse examples without a teacher's scores in a stage that learns these.

    Raises:
        RecipeError: if no example of a stage has scores of two documents or more.
    """
    for stage, of_stage in zip(recipe.stages, sources, strict=True):
        if stage.objective.traits.needs_scores and not any(source.taught for source in of_stage):
            rows = [source for source in of_stage if source.scored < len(source)]  # not pairs alone
            paths = " ".join(dict.fromkeys(str(source.path) for source in rows)) or "FILE"
            raise RecipeError(
                f"the stage {stage.name} learns a teacher's scores (distil), and no example has "
                f"scores of two documents; write them: tercet score {paths} --model TEACHER --out "
                "scored-rows.jsonl; or set distil to none"
            )


def require_ranking(recipe: Recipe, sources: Sequence[Sequence[Source]]) -> None:
    """Refuse pairs with a similarity score where a stage does not learn them, or mines negatives.

    Raises:
        DataError: naming the file that holds such pairs.
    """
    for stage, of_stage in zip(recipe.stages, sources, strict=True):
        if not stage.objective.traits.ranks_pairs:
            refuse_scored(of_stage, f"the stage {stage.name}")
        if is_refreshed(stage, of_stage):
            refuse_scored(of_stage, f"the stage {stage.name}, which mines negatives,")


def is_refreshed(stage: Stage, sources: Sequence[Source], *, at_start: bool = False) -> bool:
    """Return whether a stage mines the negatives of these sources; ``at_start``: before step 1."""
    refresh = stage.refresh
    if refresh is None or (at_start and not refresh.at_start):
        return False
    bare = any(source.without_negatives == len(source) for source in sources)
    return bare or not refresh.missing


def warn_of_idle_heads(stage: Stage, model: Model, made: Sequence[Kind]) -> None:
    """Log which heads a stage leaves untrained while it trains the network below them."""
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
    """Refuse a folder with a run of other stages, whose final model would be lost.

    Raises:
        RecipeError: if ``out`` holds a checkpoint outside these folders.
    """
    found = [path.parent for path in (*out.glob(CHECKPOINT), *out.glob(f"[0-9]*-*/{CHECKPOINT}"))]
    others = sorted(set(found) - set(folders))
    if others:
        names = ", ".join("one stage" if path == out else path.name for path in others)
        raise RecipeError(
            f"{out} holds a run of other stages ({names}); give another --out, or delete "
            "that folder"
        )


# ---- which run it is -------------------------------------------------------------------------


def identity(
    recipe: Recipe,
    stage: Stage,
    sources: Sequence[Source],
    run: Run,
    *,
    begins_with: Mapping[str, str],
) -> dict[str, Any]:
    """Return what must be equal for a run to go on: plain values, compared key by key.

    ``begins_with`` are fingerprints of whatever else is read: the base, the stage before, files.
    """
    flat = dict(_leaves("model", asdict(recipe.model))) | dict(_leaves("", asdict(stage)))
    flat |= {f"data {source.name}": source.fingerprint for source in sources}
    return {**flat, **begins_with, "seed": recipe.seed, "precision": run.dtype}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield nested settings one by one, so that a message names what differs."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, part)
    else:
        yield name, repr(value)


def refuse_other_model(folder: Path, what: Mapping[str, Any]) -> None:
    """Refuse a stage's model of another run; it may outlive the checkpoint beside it.

    Raises:
        RecipeError: if ``folder`` holds one that was made with other settings, data or weights.
    """
    if not folder.exists():
        return
    try:
        saved = read_json(folder / FILE)
        changes = checkpoint.changed(saved["about"]["stages"][-1][MADE_WITH], what)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        changes = "it does not say with which"
    if changes:
        raise RecipeError(
            f"{folder} was made with other settings ({changes}); give the settings it was made "
            f"with, another --out, or delete {folder.parent} and those of the stages after it"
        )


def is_saved(folder: Path, stages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a folder holds the model that these stages made.

    It must not be replaced: it may have been changed since, such as by ``tercet tune weights``.
    """
    try:
        saved = read_json(folder / FILE)["about"]["stages"]
        return len(saved) == len(stages) and all(
            was.get("weights") == now.get("weights")
            and not checkpoint.changed(was.get(MADE_WITH, {}), now.get(MADE_WITH, {}))
            for was, now in zip(saved, stages, strict=True)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


RUN: Final = FolderKind(
    "a folder of a run",
    own=(
        "checkpoint.pt",
        "best.pt",
        "log.jsonl",
        "recipe.json",
        "mixture.json",
        "messages.jsonl",
        "report.html",
        "model/*",
        "steps/*",
        "refresh-*/*",
        "tensorboard/*",
        "[0-9]*-*/*",
    ),
    shared=True,
    is_older=lambda folder: "recipe" in json_object(folder / "recipe.json"),
)


def check_run_place(plan: TrainingPlan, out: Path) -> None:
    """Raise, before any work, unless a run and its models may be written.

    Raises:
        RecipeError: if ``out`` holds other things, or an input that would be replaced.
        ModelError: if the place of a model holds something else.
    """
    recipe, sources = plan.recipe, [source for given in plan.sources for source in given]
    corpora = [file for s in recipe.stages if s.refresh is not None for file in s.refresh.corpus]
    read = [recipe.model.base, *corpora, *(source.path for source in sources)]
    check_output(out, read, RUN)
    folders = stage_folders(recipe, out)
    models = [out / "model", *(folder / "model" for folder in folders)]
    for folder in (*models, *(folders[0] / STEPS / str(step) for step in plan.run.models_at)):
        check_output(folder, kind=MODEL)


def stage_folders(recipe: Recipe, out: Path) -> list[Path]:
    """Return the folder of each stage: that of the run if there is only one."""
    several = len(recipe.stages) > 1
    return [out / f"{n}-{s.name}" if several else out for n, s in enumerate(recipe.stages, 1)]


def describe(plan: TrainingPlan, out: Path) -> None:
    """Write ``recipe.json``, which ``tercet train --recipe`` reads, and ``mixture.json``."""
    sources = {source.name: source for given in plan.sources for source in given}
    record = {
        "recipe": asdict(plan.recipe),
        "run": asdict(plan.run),
        "data": {
            name: {"examples": len(source), "fingerprint": source.fingerprint}
            for name, source in sources.items()
        },
        "versions": versions(),
    }
    mixture = {
        stage.name: _mixture(stage, of_stage)
        for stage, of_stage in zip(plan.recipe.stages, plan.sources, strict=True)
    }
    write_json(out / "recipe.json", record, default=str)
    write_json(out / "mixture.json", mixture, default=str)


def _mixture(stage: Stage, sources: Sequence[Source]) -> dict[str, Any]:
    """Return what an epoch of a stage takes from each source and language."""
    shares = shares_of(sources, stage.batch_size, single=stage.mixing == "single")
    return {
        "batch_size": stage.batch_size,
        "mixing": stage.mixing,
        "sources": [asdict(each) for each in shares],
        "languages": by_language(shares),
    }
