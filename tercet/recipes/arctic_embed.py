"""Arctic-Embed 2.0: much data of good quality first, hard negatives after, small vectors in both.

In contrastive pretraining every other document of a large batch is a negative, and a batch has one
language of one source. Fine-tuning then compares a query with its own mined negatives only. Both
train the first coordinates of a vector to work without the others (arXiv 2412.04506, sec. 3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

from tercet.curate.mining.rules import MiningRule
from tercet.models.choices import PoolingName
from tercet.recipes import flags
from tercet.recipes.flags import lora_of, prompts_by_role
from tercet.types import ScheduleName

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe, Refresh

ArcticPreset: TypeAlias = Literal["small", "arctic-m", "arctic-l"]

DECAY: Final = 6_000 / 9_342  # share of the fine-tuning, in the paper


@dataclass(frozen=True, slots=True)
class PresetNumbers:
    """A preset's values for flags that are not given."""

    batch_size: int  # pairs
    learning_rate: float
    epochs: float
    finetuning_batch_size: int  # queries
    finetuning_learning_rate: float
    finetuning_steps: int | None  # None: one pass
    pooling: PoolingName | None = None  # None: the model's own
    query_prompt: str | None = None
    document_prompt: str | None = None


PRESETS: Final[Mapping[ArcticPreset, PresetNumbers]] = {
    "small": PresetNumbers(1_024, 5e-5, 1.0, 64, 2e-5, None),
    "arctic-m": PresetNumbers(32_768, 1e-4, 3.0, 256, 1e-5, 9_342, "first", "query: ", ""),
    "arctic-l": PresetNumbers(32_768, 3e-5, 3.0, 256, 5e-6, 9_342, "first", "query: ", ""),
}


def arctic_embed(
    base: flags.Base = "me5-small",
    preset: Annotated[
        ArcticPreset,
        "Numbers for what no flag says: for one machine, or the paper's for its sizes M and L.",
    ] = "small",
    stages: Annotated[str, "Of pretraining and finetuning, in order, with commas."] = (
        "pretraining,finetuning"
    ),
    epochs: Annotated[float | None, "Of the pretraining; None: the preset's."] = None,
    steps: Annotated[int | None, "Of the pretraining; overrides epochs."] = None,
    finetuning_steps: Annotated[int | None, "None: the preset's, or one pass."] = None,
    batch_size: Annotated[
        int | None, "Pairs a step of pretraining, over all processes; None: the preset's."
    ] = None,
    finetuning_batch_size: Annotated[int | None, "Queries a step; None: the preset's."] = None,
    learning_rate: Annotated[float | None, "Of the pretraining; None: the preset's."] = None,
    finetuning_learning_rate: Annotated[float | None, "None: the preset's."] = None,
    warmup: Annotated[float, "Share of the pretraining; the paper names none."] = 0.01,
    decay: Annotated[float, "Share of the pretraining; the paper names none."] = 0.1,
    finetuning_schedule: Annotated[
        ScheduleName, "wsd: constant, then a decay; early: the decay first."
    ] = "wsd",
    finetuning_decay: Annotated[float, "Share of the fine-tuning, in the paper 6,000 of 9,342."] = (
        DECAY
    ),
    temperature: flags.Temperature = 0.02,
    dims: Annotated[
        list[int] | None, "Shorter widths to train too; may be repeated. None: 256."
    ] = None,
    matryoshka: Annotated[
        Literal["both", "finetuning", "none"], "Stages that train shorter widths."
    ] = "both",
    query_tokens: Annotated[int, "Of the pretraining; longer ones are cut."] = 32,
    document_tokens: Annotated[int, "Of the pretraining; longer ones are cut."] = 256,
    finetuning_tokens: Annotated[int, "Of both, in the fine-tuning."] = 512,
    negatives: Annotated[int, "Mined ones of a query, in the fine-tuning."] = 10,
    threshold: Annotated[
        float, "A negative scores below this share of the positive, where the model mines."
    ] = 0.98,
    pooling: Annotated[PoolingName | None, "None: the preset's, or the model's own."] = None,
    attention: flags.TurnDecoder = None,
    query_prompt: Annotated[str | None, "None: the preset's, or the model's own."] = None,
    document_prompt: Annotated[str | None, "None: the preset's, or the model's own."] = None,
    lora_rank: flags.LoraRank = None,
    freeze_embeddings: flags.FreezeEmbeddings = False,
    patience: flags.Patience = None,
    seed: Annotated[int, "Of batches, dropout and LoRA."] = 0,
) -> "Recipe":
    """Pretrain on pairs of many sources, fine-tune on mined negatives, with short vectors in both.

    Without --mined, the pretrained model mines the negatives of the pairs itself before the
    fine-tuning begins. A stronger teacher makes better ones: tercet mine --teacher.
    """
    from tercet.objectives.contrastive import Contrastive
    from tercet.training.recipe import Model, Recipe, Stage, chosen

    usual = PRESETS[preset]
    shorter = (256,) if dims is None else tuple(dims)
    built = {
        "pretraining": Stage(
            name="pretraining",
            objective=Contrastive(
                temperature=temperature, dims=shorter if matryoshka == "both" else ()
            ),
            data="pairs",
            keep="last",
            epochs=usual.epochs if epochs is None else epochs,
            steps=steps,
            batch_size=batch_size or usual.batch_size,
            negatives=0,
            query_tokens=query_tokens,
            document_tokens=document_tokens,
            learning_rate=learning_rate or usual.learning_rate,
            schedule="wsd",
            warmup=warmup,
            decay=decay,
        ),
        "finetuning": Stage(
            name="finetuning",
            objective=Contrastive(
                temperature=temperature, dims=() if matryoshka == "none" else shorter
            ),
            data="mined",
            steps=finetuning_steps or usual.finetuning_steps,
            batch_size=finetuning_batch_size or usual.finetuning_batch_size,
            negatives=negatives,
            in_batch="none",
            query_tokens=finetuning_tokens,
            document_tokens=finetuning_tokens,
            refresh=_mined_at_start(negatives, threshold),
            learning_rate=finetuning_learning_rate or usual.finetuning_learning_rate,
            schedule=finetuning_schedule,
            warmup=0.0,
            decay=finetuning_decay,
            patience=patience,
        ),
    }
    return Recipe(
        name="arctic-embed",
        model=Model(
            base=base,
            pooling=pooling or usual.pooling,
            attention=attention,
            lora=lora_of(lora_rank),
            freeze_embeddings=freeze_embeddings,
            prompts=prompts_by_role(
                usual.query_prompt if query_prompt is None else query_prompt,
                usual.document_prompt if document_prompt is None else document_prompt,
            ),
        ),
        stages=chosen(built, stages),
        seed=seed,
        paper="arXiv 2412.04506",
        notes={
            "schedule": "lengths of warmup and decay in pretraining are not given; 1 % and 10 %",
            "finetuning_decay": "read as constant for 3,342 steps, then 6,000 of decay",
            "matryoshka": "no weight is given; both widths count alike, as in the public code",
            "threshold": "swept from 0.95 to 0.99 in the paper, the higher the better; none named",
            "clip": "1.0, not the 10.0 of the public example",
        },
    )


def _mined_at_start(negatives: int, threshold: float) -> "Refresh":
    """Mine for rows with too few negatives, if there is a source without any."""
    from tercet.curate.mining.miner import Mining
    from tercet.training.recipe import Refresh

    rule = MiningRule(kind="percent", value=threshold)
    depth = max(100, 2 * negatives)
    return Refresh(
        every=None,
        at_start=True,
        missing=True,
        mining=Mining(rule=rule, negatives=negatives, depth=depth, keep=True),
    )
