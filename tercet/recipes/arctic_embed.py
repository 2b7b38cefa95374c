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
from tercet.recipes.flags import divided, lora_of, prompts_by_role, recorded
from tercet.types import ScheduleName

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe, Refresh

ArcticPreset: TypeAlias = Literal["small", "arctic-m", "arctic-l"]

SHARES: Final[Mapping[str, int]] = {"pretraining": 3, "finetuning": 1}  # of the steps, rounded
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


@recorded
def arctic_embed(
    model: flags.ModelName = "me5-small",
    preset: Annotated[
        ArcticPreset,
        "Values of what is not given: for one machine, or the paper's for its sizes M and L.",
    ] = "small",
    stages: flags.Stages = "pretraining,finetuning",
    steps: Annotated[
        int | None,
        "Budget of the whole run, divided among its stages (3 : 1). Default: epochs of the "
        "pretraining, and the preset's steps or one pass of the fine-tuning.",
        "steps",
    ] = None,
    pretraining_epochs: Annotated[
        float | None, "Passes over the data. Default: the preset's.", "epochs"
    ] = None,
    pretraining_steps: Annotated[
        int | None, "Optimizer steps of this stage; overrides epochs.", "steps"
    ] = None,
    finetuning_steps: Annotated[
        int | None, "Optimizer steps of this stage. Default: the preset's, or one pass.", "steps"
    ] = None,
    pretraining_batch_size: Annotated[
        int | None, "Pairs in a step, over all processes. Default: the preset's.", "pairs"
    ] = None,
    finetuning_batch_size: Annotated[
        int | None, "Queries in a step, over all processes. Default: the preset's.", "queries"
    ] = None,
    pretraining_learning_rate: Annotated[
        float | None, "Learning rate at its peak. Default: the preset's."
    ] = None,
    finetuning_learning_rate: Annotated[
        float | None, "Learning rate at its peak. Default: the preset's."
    ] = None,
    pretraining_warmup: Annotated[
        float, "Part of the steps in which the learning rate rises; the paper names none.", "share"
    ] = 0.01,
    pretraining_decay: Annotated[
        float, "Part of the steps in which the learning rate falls; the paper names none.", "share"
    ] = 0.1,
    finetuning_schedule: Annotated[
        ScheduleName,
        "Course of the learning rate; wsd: constant, then a decay; early: the decay first.",
    ] = "wsd",
    finetuning_decay: Annotated[
        float,
        "Part of the steps in which the learning rate falls; 6,000 of 9,342 in the paper.",
        "share",
    ] = DECAY,
    temperature: flags.Temperature = 0.02,
    dims: Annotated[
        list[int] | None, "Shorter vector widths to train as well. Default: 256.", "coordinates"
    ] = None,
    matryoshka: Annotated[
        Literal["both", "finetuning", "none"], "Stages that train shorter widths."
    ] = "both",
    pretraining_query_tokens: Annotated[int, "Longer queries are cut.", "tokens"] = 32,
    pretraining_document_tokens: Annotated[int, "Longer documents are cut.", "tokens"] = 256,
    finetuning_max_tokens: flags.MaxTokens = 512,
    finetuning_negatives: flags.Negatives = 10,
    finetuning_distil: flags.Distil = "none",
    finetuning_distil_weight: flags.DistilWeight = 1.0,
    finetuning_teacher_temperature: flags.TeacherTemperature = 1.0,
    finetuning_threshold: Annotated[
        float,
        "Where the model mines: a negative scores below this share of the positive's score.",
        "share",
    ] = 0.98,
    pooling: Annotated[
        PoolingName | None,
        "How token states become a vector. Default: the preset's, or the model's.",
    ] = None,
    attention: flags.TurnDecoder = None,
    query_prompt: Annotated[
        str | None, "Text put before every query. Default: the preset's, or the model's."
    ] = None,
    document_prompt: Annotated[
        str | None, "Text put before every document. Default: the preset's, or the model's."
    ] = None,
    lora_rank: flags.LoraRank = None,
    freeze_embeddings: flags.FreezeEmbeddings = False,
    finetuning_patience: flags.Patience = None,
    seed: flags.Seed = 0,
) -> "Recipe":
    """Pretrain on pairs of many sources, fine-tune on mined negatives, with short vectors in both.

    Where the fine-tuning has no data with negatives, the pretrained model mines them from the pairs
    before the fine-tuning begins. A stronger model finds better ones (``tercet mine``).
    """
    from tercet.objectives.contrastive import Contrastive
    from tercet.training.recipe import Model, Recipe, Stage, chosen

    usual = PRESETS[preset]
    own = {"pretraining": pretraining_steps, "finetuning": finetuning_steps}
    steps_of = divided(steps, stages, SHARES, own, default=None)
    shorter = (256,) if dims is None else tuple(dims)
    built = {
        "pretraining": Stage(
            name="pretraining",
            objective=Contrastive(
                temperature=temperature, dims=shorter if matryoshka == "both" else ()
            ),
            data="pairs",
            keep="last",
            epochs=usual.epochs if pretraining_epochs is None else pretraining_epochs,
            steps=steps_of["pretraining"],
            batch_size=pretraining_batch_size or usual.batch_size,
            negatives=0,
            query_tokens=pretraining_query_tokens,
            document_tokens=pretraining_document_tokens,
            learning_rate=pretraining_learning_rate or usual.learning_rate,
            schedule="wsd",
            warmup=pretraining_warmup,
            decay=pretraining_decay,
        ),
        "finetuning": Stage(
            name="finetuning",
            objective=Contrastive(
                temperature=temperature,
                dims=() if matryoshka == "none" else shorter,
                distil=finetuning_distil,
                distil_weight=finetuning_distil_weight,
                teacher_temperature=finetuning_teacher_temperature,
            ),
            data="mined",
            steps=steps_of["finetuning"] or usual.finetuning_steps,
            batch_size=finetuning_batch_size or usual.finetuning_batch_size,
            negatives=finetuning_negatives,
            in_batch="none",
            query_tokens=finetuning_max_tokens,
            document_tokens=finetuning_max_tokens,
            # Negatives that are mined here have no scores of a reranker.
            refresh=_mined_at_start(finetuning_negatives, finetuning_threshold)
            if finetuning_distil == "none"
            else None,
            learning_rate=finetuning_learning_rate or usual.finetuning_learning_rate,
            schedule=finetuning_schedule,
            warmup=0.0,
            decay=finetuning_decay,
            patience=finetuning_patience,
        ),
    }
    return Recipe(
        name="arctic-embed",
        model=Model(
            base=model,
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
