"""The embedder that a training begins with."""

from collections.abc import Sequence
from dataclasses import replace

from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.kinds import KINDS, Kind
from tercet.models.embedder import Embedder, Settings
from tercet.models.formats.tercet_folder import known_kinds
from tercet.models.network.fingerprints import fingerprint_of
from tercet.models.network.positions import extend_positions
from tercet.train.recipe import Model


def build(model: Model) -> Embedder:
    """The embedder that a recipe starts from."""
    extended = model.positions is not None  # only then is there room for as many tokens
    wanted = {
        "pooling": model.pooling,
        "prompts": model.prompts,
        "pool_prompt": model.pool_prompt,
        "append_end": model.append_end,
        "layer": model.layer,
        "query_tokens": None if extended else model.query_tokens,
        "document_tokens": None if extended else model.document_tokens,
        "kinds": model.kinds and _with_known(model.kinds, known_kinds(model.base)),
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
        keep_layers=model.keep_layers,
        **changes,
    )
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


def fingerprint_of_base(embedder: Embedder) -> str:
    """Changes when one number of the weights that a training begins with does.

    Heads that were drawn anew are left out: the recipe's seed draws the same ones again.
    """
    drawn = tuple(f"heads.{kind}." for kind in embedder.heads.drawn)
    weights = embedder.state_dict()
    return fingerprint_of({name: weights[name] for name in weights if not name.startswith(drawn)})


def _with_known(wanted: Sequence[Kind], known: Sequence[Kind]) -> tuple[Kind, ...]:
    """The kinds to make: a head that the base has is kept, trained or not."""
    return tuple(kind for kind in KINDS if kind in {*wanted, *known})


def with_prompts_of(sources: Sequence[Sequence[Source]], settings: Settings) -> Settings:
    """The settings with the prompts that the examples of all stages bring, by task.

    Where the model has no prompt of its own, those of the very first source become its usual ones,
    if that brings any: a model is used with the prompts that it was trained with, unless somebody
    says otherwise. The first prompt of a task and role counts, and any before an empty one.
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
