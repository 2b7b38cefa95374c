"""LLM2Vec: any decoder-only language model becomes a text encoder (arXiv 2404.05961).

Attention becomes bidirectional. Three stages follow, each with new low-rank updates that are merged
before the next: masked next-token prediction, SimCSE, and on request contrastive training on pairs
with instructions.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Final, Literal

from tercet.data.batches.masking import Masking, MaskToken
from tercet.models.choices import Attention, PoolingName, Window
from tercet.recipes import flags
from tercet.recipes.flags import divided, lora_of, prompts_by_role, recorded

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe

LLM2VecPreset = Literal["default", "llama", "mistral", "mistral-words"]

PRESETS: Final[Mapping[LLM2VecPreset, Masking]] = {  # paper, appendix D.1
    "default": Masking(probability=0.2, kind="default"),
    "llama": Masking(probability=0.2, kind="default"),  # Sheared-LLaMA, Llama 2, 3 and 3.1
    "mistral": Masking(probability=0.8, kind="all"),  # Mistral 7B, for vectors of sentences
    "mistral-words": Masking(probability=0.2, kind="default"),  # the same, for vectors of words
}

SHARES: Final[Mapping[str, int]] = {"mntp": 1, "simcse": 1, "supervised": 1}  # of a run's steps


@recorded
def llm2vec(
    model: Annotated[
        str, "Decoder to start from: a zoo name, a local folder or a hub id."
    ] = "smollm2",
    stages: flags.Stages = "mntp,simcse",
    steps: flags.Steps = None,
    mntp_steps: flags.StageSteps = None,
    simcse_steps: flags.StageSteps = None,
    supervised_steps: flags.StageSteps = None,
    mntp_preset: Annotated[
        LLM2VecPreset, "Masking that the paper chose for a family of models."
    ] = "default",
    mntp_mask_probability: Annotated[
        float | None, "Share of the tokens that are masked. Default: the preset's.", "share"
    ] = None,
    mntp_masking: Annotated[
        Literal["default", "all"] | None,
        "What replaces a masked token; default: 80 % the mask token, 10 % a random one, 10 % "
        "unchanged; all: always the mask token. Default: the preset's.",
    ] = None,
    mntp_mask_token: Annotated[
        MaskToken, 'Token that masks where the model has no mask token; blank: "_".'
    ] = "blank",
    mntp_block_tokens: Annotated[int, "Length of a block of texts.", "tokens"] = 512,
    mntp_batch_size: Annotated[int, "Blocks in a step, over all processes.", "blocks"] = 32,
    mntp_learning_rate: Annotated[float, "Learning rate of the stage, constant."] = 5e-5,
    mntp_concatenated: Annotated[
        bool, "Let the texts of a block attend to each other, as in the paper."
    ] = False,
    mntp_train_head: Annotated[bool, "Train the language-model head too, as in the paper."] = False,
    simcse_batch_size: Annotated[int, "Texts in a step, over all processes.", "texts"] = 128,
    simcse_learning_rate: Annotated[float, "Learning rate at its peak."] = 3e-5,
    simcse_attention_dropout: Annotated[
        float, "Dropout of attention, which makes the two views of a text differ.", "share"
    ] = 0.3,
    simcse_max_tokens: flags.MaxTokens = 128,
    supervised_batch_size: Annotated[int, "Pairs in a step, over all processes.", "pairs"] = 512,
    supervised_learning_rate: Annotated[float, "Learning rate at its peak."] = 2e-4,
    supervised_temperature: flags.Temperature = 0.02,
    supervised_negatives: flags.Negatives = 1,
    max_tokens: flags.MaxTokens = 512,
    query_prompt: Annotated[
        str | None, "Instruction before every query; best ended by a line break."
    ] = None,
    document_prompt: Annotated[str | None, "Instruction before every document."] = None,
    pool_prompt: flags.PoolPrompt = False,
    pooling: Annotated[PoolingName, "How token states become a vector."] = "mean",
    attention: Annotated[
        Attention, "Direction of attention; causal trains the ablation that the paper calls Uni."
    ] = "bidirectional",
    window: Annotated[
        Window | None,
        "Sliding windows of attention. Default: full attention where every layer has a window "
        "(Mistral), otherwise the model's.",
    ] = None,
    lora_rank: flags.LoraRankOrAll = 16,
    seed: flags.Seed = 0,
) -> "Recipe":
    """Turn a decoder into a text encoder: MNTP and SimCSE on texts, then pairs on request."""
    from tercet.objectives.contrastive import Contrastive
    from tercet.objectives.mntp import MNTP
    from tercet.objectives.simcse import SimCSE
    from tercet.training.recipe import Model, Recipe, Stage, chosen

    own = {"mntp": mntp_steps, "simcse": simcse_steps, "supervised": supervised_steps}
    steps_of = divided(steps, stages, SHARES, own)
    usual = PRESETS[mntp_preset]
    mntp = MNTP(
        head=model,
        masking=Masking(
            probability=usual.probability
            if mntp_mask_probability is None
            else mntp_mask_probability,
            kind=mntp_masking or usual.kind,
        ),
        mask_token=mntp_mask_token,
        block_tokens=mntp_block_tokens,
        concatenated=mntp_concatenated,
        train_head=mntp_train_head,
    )
    simcse = SimCSE(attention_dropout=simcse_attention_dropout, max_tokens=simcse_max_tokens)
    built = {
        "mntp": Stage(
            name="mntp",
            objective=mntp,
            data="texts",
            keep="last",
            steps=steps_of["mntp"],
            batch_size=mntp_batch_size,
            learning_rate=mntp_learning_rate,
            schedule="constant",
            warmup=0.0,
            weight_decay=0.0,
        ),
        "simcse": Stage(
            name="simcse",
            objective=simcse,
            data="sentences",
            keep="last",
            steps=steps_of["simcse"],
            batch_size=simcse_batch_size,
            learning_rate=simcse_learning_rate,
            warmup=0.0,
            weight_decay=0.0,
        ),
        "supervised": Stage(
            name="supervised",
            objective=Contrastive(temperature=supervised_temperature),
            steps=steps_of["supervised"],
            batch_size=supervised_batch_size,
            negatives=supervised_negatives,
            learning_rate=supervised_learning_rate,
            warmup=0.3,
            weight_decay=0.0,
        ),
    }
    return Recipe(
        name="llm2vec",
        model=Model(
            base=model,
            attention=attention,
            window=window,
            pooling=pooling,
            lora=lora_of(lora_rank or None),
            prompts=prompts_by_role(query_prompt, document_prompt),
            pool_prompt=pool_prompt,
            query_tokens=max_tokens,
            document_tokens=max_tokens,
        ),
        stages=chosen(built, stages),
        seed=seed,
        paper="arXiv 2404.05961",
        notes={
            "optimizer": "the paper's scripts set none: AdamW without decay, as their trainer does",
            "schedule": "mntp: linear over three epochs and stopped at 1,000 steps, so nearly "
            "constant; here constant",
            "head": "frozen: the paper's scripts train it and then throw it away",
            "borders": "texts of a block do not see each other; concatenated=True is the paper's",
        },
    )
