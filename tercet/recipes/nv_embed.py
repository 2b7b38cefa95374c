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
from tercet.recipes.flags import divided, lora_of, recorded
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
SHARES: Final[Mapping[str, int]] = {"retrieval": 1, "blended": 1}  # of a run's steps
WARMUP: Final = 500  # steps, in the paper; a tenth of a shorter stage


@recorded
def nv_embed(
    model: flags.ModelName = "smollm2",
    stages: flags.Stages = "retrieval,blended",
    steps: flags.Steps = None,
    retrieval_steps: flags.StageSteps = None,
    blended_steps: flags.StageSteps = None,
    batch_size: Annotated[int, "Queries in a step, over all processes.", "queries"] = 128,
    retrieval_learning_rate: Annotated[float, "Learning rate at its peak."] = 2e-5,
    blended_learning_rate: Annotated[float, "Learning rate at its peak."] = 1.5e-5,
    warmup_steps: Annotated[
        int | None,
        "Steps in which the learning rate of a stage rises. Default: 500, or a tenth of a shorter "
        "stage.",
        "steps",
    ] = None,
    temperature: Annotated[
        float, "Temperature of the softmax over documents; the paper names none."
    ] = 0.02,
    similarity_temperature: flags.SimilarityTemperature = 0.05,
    distil: flags.Distil = "none",
    distil_weight: flags.DistilWeight = 1.0,
    teacher_temperature: flags.TeacherTemperature = 1.0,
    negatives: flags.Negatives = 7,
    retrieval_in_batch: Annotated[
        Policy, "Which documents of other examples are negatives."
    ] = "all",
    blended_in_batch: Annotated[
        Policy,
        "Which documents of other examples are negatives; per_row: all, unless the task of a row "
        "forbids it.",
    ] = "none",
    blended_mixing: Annotated[
        Mixing, "A batch has examples of all sources, or of one."
    ] = "blended",
    mask_duplicates: Annotated[
        bool, "Never take a document that equals a positive as a negative."
    ] = True,
    pooling: Annotated[
        Pooler, "How token states become a vector; eos: the state of the end-of-text token."
    ] = "latent",
    latents: Annotated[int, "Rows of the dictionary of latent attention.", "latents"] = 512,
    heads: Annotated[int, "Attention heads of the layer before pooling.", "heads"] = 8,
    head_size: Annotated[
        int | None, "Width of a head. Default: the model's width divided by heads.", "coordinates"
    ] = None,
    init: Annotated[
        Literal["normal", "identity"],
        "First weights of that layer; identity starts as plain mean pooling, for small data.",
    ] = "identity",
    preset: Annotated[
        NVEmbedPreset,
        "Values of that layer; nv-embed: as published (512 latents, 8 heads as wide as the model, "
        "normal).",
    ] = "default",
    attention: Annotated[
        Attention, "Direction of attention; causal is the paper's ablation."
    ] = "bidirectional",
    instruction: Annotated[
        str | None,
        "Instruction of the finished model for queries. Default: that of the first task of the "
        "data.",
    ] = None,
    pool_prompt: flags.PoolPrompt = False,
    append_end: Annotated[bool, "End every text with the end-of-text token."] = True,
    max_tokens: flags.MaxTokens = 512,
    lora_rank: flags.LoraRankOrAll = 16,
    lora_dropout: Annotated[float, "Dropout of the low-rank updates.", "share"] = 0.1,
    keep_layers: Annotated[
        int | None,
        "Use the first layers of the model only, for experiments. Default: all layers.",
        "layers",
    ] = None,
    seed: flags.Seed = 0,
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
    own = {"retrieval": retrieval_steps, "blended": blended_steps}
    steps_of = divided(steps, stages, SHARES, own)
    retrieval = Stage(
        name="retrieval",
        objective=Contrastive(
            temperature=temperature,
            similarity_temperature=similarity_temperature,
            distil=distil,
            distil_weight=distil_weight,
            teacher_temperature=teacher_temperature,
        ),
        data="retrieval",
        steps=steps_of["retrieval"],
        batch_size=batch_size,
        negatives=negatives,
        in_batch=retrieval_in_batch,
        mask_duplicates=mask_duplicates,
        learning_rate=retrieval_learning_rate,
        warmup_steps=_warmup(warmup_steps, steps_of["retrieval"]),
        weight_decay=0.0,
    )
    blended = replace(
        retrieval,
        name="blended",
        data="blended",
        steps=steps_of["blended"],
        in_batch=blended_in_batch,
        mixing=blended_mixing,
        learning_rate=blended_learning_rate,
        warmup_steps=_warmup(warmup_steps, steps_of["blended"]),
    )
    return Recipe(
        name="nv-embed",
        model=Model(
            base=model,
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


def _warmup(given: int | None, steps: int | None) -> int:
    return min(WARMUP, (steps or 0) // 10) if given is None else given
