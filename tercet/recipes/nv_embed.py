"""NV-Embed: a decoder read both ways, latent attention, two stages of instruction tuning.

The first stage trains on retrieval, where the others' documents are good negatives. The second
blends retrieval with classification, clustering and similarity in every batch, each query against
its own negatives only: labels repeat in a batch, so that another row's answer is often right as
well (arXiv 2405.17428, sec. 3.2).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

from tercet.models.choices import Attention, LayerSettings, PoolingName
from tercet.recipes import flags
from tercet.recipes.flags import lora_of
from tercet.types import Mixing, Policy

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe

Pooler: TypeAlias = Literal["latent", "self_attention", "mean", "eos"]
NVEmbedPreset: TypeAlias = Literal["default", "nv-embed"]

POOLERS: Final[Mapping[Pooler, PoolingName]] = {
    "latent": "mean",
    "self_attention": "mean",
    "mean": "mean",
    "eos": "last",
}
WARMUP: Final = 500  # steps, in the paper; a tenth of a shorter stage


def nv_embed(
    base: flags.Base = "smollm2",
    stages: Annotated[str, "Of retrieval and blended, in order, with commas."] = (
        "retrieval,blended"
    ),
    steps: Annotated[int, "Of the stage retrieval."] = 1_000,
    blended_steps: Annotated[int, "Of the stage blended."] = 1_000,
    batch_size: Annotated[int, "Queries a step, over all processes."] = 128,
    learning_rate: Annotated[float, "Of the stage retrieval, at its peak."] = 2e-5,
    blended_learning_rate: Annotated[float, "Of the stage blended, at its peak."] = 1.5e-5,
    warmup_steps: Annotated[
        int | None, "Of each stage; None: 500, or a tenth of a shorter stage."
    ] = None,
    temperature: Annotated[float, "Of the softmax over documents; the paper names none."] = 0.02,
    negatives: flags.Negatives = 7,
    in_batch: Annotated[
        Policy, "Others' documents that are negatives in the stage retrieval."
    ] = "all",
    blended_in_batch: Annotated[
        Policy, "The same in the stage blended; per_row: what a row's task allows."
    ] = "none",
    mixing: Annotated[
        Mixing, "Of the stage blended: all sources in each batch, or one a batch."
    ] = "blended",
    mask_duplicates: Annotated[bool, "Ignore documents equal to a positive."] = True,
    pooling: Annotated[Pooler, "From states to a vector; eos: that of the end-of-text token."] = (
        "latent"
    ),
    latents: Annotated[int, "Of latent attention."] = 512,
    heads: Annotated[int, "Of the layer before pooling."] = 8,
    head_size: Annotated[int | None, "Of each head; None: the model's width over heads."] = None,
    init: Annotated[
        Literal["normal", "identity"], "identity starts as plain mean pooling, for small data."
    ] = "identity",
    preset: Annotated[
        NVEmbedPreset,
        "nv-embed: the published layer (512 latents, 8 heads as wide as the model, normal).",
    ] = "default",
    attention: Annotated[Attention, "causal is the paper's ablation."] = "bidirectional",
    instruction: Annotated[
        str | None, "What the model does by default; None: the first task's of the data."
    ] = None,
    pool_prompt: flags.PoolPrompt = False,
    append_end: Annotated[bool, "End every text with the end-of-text token."] = True,
    max_tokens: flags.MaxTokens = 512,
    lora_rank: flags.LoraRankOrAll = 16,
    lora_dropout: Annotated[float, "Of the low-rank updates."] = 0.1,
    keep_layers: Annotated[
        int | None, "Keep the first layers of the base only, for experiments; None: all."
    ] = None,
    seed: Annotated[int, "Of batches, dropout and new weights."] = 0,
) -> "Recipe":
    """Train on retrieval, then on all tasks with instructions, with latent attention pooling."""
    from tercet.models.settings import as_prompt
    from tercet.objectives.contrastive import Contrastive
    from tercet.training.recipe import Model, Recipe, Stage, chosen

    layer: LayerSettings | Literal["none"] = "none"
    if pooling in ("latent", "self_attention"):
        published = preset == "nv-embed"
        layer = LayerSettings(
            kind=pooling,
            latents=512 if published else latents,
            heads=8 if published else heads,
            head_size="hidden" if published else head_size,
            init="normal" if published else init,
        )
    retrieval = Stage(
        name="retrieval",
        objective=Contrastive(temperature=temperature),
        data="retrieval",
        steps=steps,
        batch_size=batch_size,
        negatives=negatives,
        in_batch=in_batch,
        mask_duplicates=mask_duplicates,
        learning_rate=learning_rate,
        warmup_steps=_warmup(warmup_steps, steps),
        weight_decay=0.0,
    )
    blended = replace(
        retrieval,
        name="blended",
        data="blended",
        steps=blended_steps,
        in_batch=blended_in_batch,
        mixing=mixing,
        learning_rate=blended_learning_rate,
        warmup_steps=_warmup(warmup_steps, blended_steps),
    )
    return Recipe(
        name="nv-embed",
        model=Model(
            base=base,
            attention=attention,
            pooling=POOLERS[pooling],
            layer=layer,
            keep_layers=keep_layers,
            lora=lora_of(lora_rank or None, lora_dropout),
            prompts={"query": as_prompt(instruction)} if instruction else None,
            pool_prompt=pool_prompt,
            append_end=append_end,
            query_tokens=max_tokens,
            document_tokens=max_tokens,
        ),
        stages=chosen({"retrieval": retrieval, "blended": blended}, stages),
        seed=seed,
        paper="arXiv 2405.17428",
        notes={
            "temperature": "named in no text of the paper; 0.02 as in LLM2Vec",
            "init": "identity by default: few steps do not train a layer from noise",
            "head_size": "the model's width over heads; published: as wide as the model, each",
            "optimizer": "Adam: AdamW without decay",
        },
    )


def _warmup(given: int | None, steps: int) -> int:
    return min(WARMUP, steps // 10) if given is None else given
