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
from tercet.recipes.flags import lora_of, prompts_by_role

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe

LLM2VecPreset = Literal["default", "llama", "mistral", "mistral-words"]

PRESETS: Final[Mapping[LLM2VecPreset, Masking]] = {  # paper, appendix D.1
    "default": Masking(probability=0.2, kind="default"),
    "llama": Masking(probability=0.2, kind="default"),  # Sheared-LLaMA, Llama 2, 3 and 3.1
    "mistral": Masking(probability=0.8, kind="all"),  # Mistral 7B, for vectors of sentences
    "mistral-words": Masking(probability=0.2, kind="default"),  # the same, for vectors of words
}


def llm2vec(
    base: Annotated[str, "Zoo name, local folder or hub id of a decoder."] = "smollm2",
    stages: Annotated[
        str, "Of mntp, simcse and supervised, in order, with commas."
    ] = "mntp,simcse",
    mntp_steps: Annotated[int, "Of masked next-token prediction."] = 1_000,
    simcse_steps: Annotated[int, "Of SimCSE."] = 1_000,
    supervised_steps: Annotated[int, "Of training on pairs."] = 1_000,
    preset: Annotated[
        LLM2VecPreset, "Masking as the paper chose it for a family of models."
    ] = "default",
    mask_probability: Annotated[float | None, "Share of hidden tokens; None: the preset's."] = None,
    masking: Annotated[
        Literal["default", "all"] | None,
        "default: 80 % masked, 10 % random, 10 % kept; None: the preset's.",
    ] = None,
    mask_token: Annotated[MaskToken, 'blank is "_"; a mask token of the model wins.'] = "blank",
    block_tokens: Annotated[int, "Of one block of texts."] = 512,
    mntp_batch_size: Annotated[int, "Blocks a step."] = 32,
    mntp_learning_rate: Annotated[float, "Of masked next-token prediction."] = 5e-5,
    concatenated: Annotated[bool, "Let texts of a block see each other, as the paper did."] = False,
    train_head: Annotated[bool, "Train the language-model head too, as the paper did."] = False,
    simcse_batch_size: Annotated[int, "Texts a step."] = 128,
    simcse_learning_rate: Annotated[float, "Of SimCSE."] = 3e-5,
    attention_dropout: Annotated[float, "What makes SimCSE's two views differ."] = 0.3,
    simcse_tokens: Annotated[int, "Longer texts are cut in SimCSE."] = 128,
    batch_size: Annotated[int, "Pairs a step."] = 512,
    learning_rate: Annotated[float, "Of training on pairs, at its peak."] = 2e-4,
    temperature: Annotated[float, "Of training on pairs."] = 0.02,
    negatives: flags.Negatives = 1,
    max_tokens: flags.MaxTokens = 512,
    query_prompt: Annotated[
        str | None, "Instruction before queries; best ended by a line break."
    ] = None,
    document_prompt: Annotated[str | None, "Instruction before documents."] = None,
    pool_prompt: flags.PoolPrompt = False,
    pooling: Annotated[PoolingName, "From states to a vector."] = "mean",
    attention: Annotated[
        Attention, "causal trains the ablation that the paper calls Uni."
    ] = "bidirectional",
    window: Annotated[
        Window | None, "Sliding windows; None: full where all layers have one (Mistral), else keep."
    ] = None,
    lora_rank: flags.LoraRankOrAll = 16,
    seed: Annotated[int, "Of batches, masks, dropout and LoRA."] = 0,
) -> "Recipe":
    """Turn a decoder into a text encoder: MNTP and SimCSE on texts, then pairs on request."""
    from tercet.objectives.contrastive import Contrastive
    from tercet.objectives.mntp import MNTP
    from tercet.objectives.simcse import SimCSE
    from tercet.training.recipe import Model, Recipe, Stage, chosen

    usual = PRESETS[preset]
    mntp = MNTP(
        head=base,
        masking=Masking(
            probability=usual.probability if mask_probability is None else mask_probability,
            kind=masking or usual.kind,
        ),
        mask_token=mask_token,
        block_tokens=block_tokens,
        concatenated=concatenated,
        train_head=train_head,
    )
    simcse = SimCSE(attention_dropout=attention_dropout, max_tokens=simcse_tokens)
    built = {
        "mntp": Stage(
            name="mntp",
            objective=mntp,
            data="texts",
            keep="last",
            steps=mntp_steps,
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
            steps=simcse_steps,
            batch_size=simcse_batch_size,
            learning_rate=simcse_learning_rate,
            warmup=0.0,
            weight_decay=0.0,
        ),
        "supervised": Stage(
            name="supervised",
            objective=Contrastive(temperature=temperature),
            steps=supervised_steps,
            batch_size=batch_size,
            negatives=negatives,
            learning_rate=learning_rate,
            warmup=0.3,
            weight_decay=0.0,
        ),
    }
    return Recipe(
        name="llm2vec",
        model=Model(
            base=base,
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
