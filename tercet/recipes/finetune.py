"""Fine-tune any model on pairs of a query and the documents that answer it.

The plain recipe that most people need first: InfoNCE with in-batch and mined negatives
(arXiv 1807.03748, eq. 4; arXiv 2004.04906, sec. 3.2 for retrieval). Its numbers are usual for
small models; each is a flag.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from tercet.recipes import flags
from tercet.recipes.flags import lora_of, prompts_by_role
from tercet.types import Policy

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe


def finetune(
    base: flags.Base = "minilm",
    epochs: Annotated[float, "Passes over the data."] = 1.0,
    steps: Annotated[int | None, "Optimizer steps; overrides epochs."] = None,
    batch_size: Annotated[int, "Examples a step, over all processes."] = 64,
    learning_rate: Annotated[float, "At its peak."] = 5e-5,
    schedule: Annotated[
        Literal["constant", "linear", "wsd"],
        "Of the learning rate; wsd: warmup-stable-decay.",
    ] = "linear",
    temperature: flags.Temperature = 0.05,
    dims: Annotated[list[int] | None, "A shorter width to train as well; may be repeated."] = None,
    negatives: flags.Negatives = 8,
    in_batch: Annotated[
        Policy, "Others' documents that are negatives; per_row: all, but what a row's task forbids."
    ] = "per_row",
    mixing: Annotated[
        Literal["single", "blended"], "One source a batch, or all in each."
    ] = "single",
    length_edges: flags.LengthEdges = None,
    token_budget: Annotated[
        int | None, "Examples times tokens of the longest text of their group, at most."
    ] = None,
    query_tokens: flags.QueryTokens = None,
    document_tokens: flags.DocumentTokens = None,
    query_prompt: Annotated[str | None, "Put before every query."] = None,
    document_prompt: Annotated[str | None, "Put before every document."] = None,
    pooling: flags.ModelsPooling = None,
    attention: flags.TurnDecoder = None,
    lora_rank: flags.LoraRank = None,
    freeze_embeddings: flags.FreezeEmbeddings = False,
    patience: flags.Patience = None,
    seed: Annotated[int, "Of batches, dropout and LoRA."] = 0,
) -> "Recipe":
    """Fine-tune on files of queries, positives and, where there are any, mined negatives."""
    from tercet.objectives.contrastive import Contrastive
    from tercet.training.recipe import Model, Recipe, Stage

    return Recipe(
        name="finetune",
        model=Model(
            base=base,
            pooling=pooling,
            attention=attention,
            lora=lora_of(lora_rank),
            freeze_embeddings=freeze_embeddings,
            prompts=prompts_by_role(query_prompt, document_prompt),
            query_tokens=query_tokens,
            document_tokens=document_tokens,
        ),
        stages=(
            Stage(
                name="contrastive",
                objective=Contrastive(temperature=temperature, dims=tuple(dims or ())),
                epochs=epochs,
                steps=steps,
                batch_size=batch_size,
                negatives=negatives,
                in_batch=in_batch,
                mixing=mixing,
                length_edges=tuple(length_edges or ()),
                token_budget=token_budget,
                learning_rate=learning_rate,
                schedule=schedule,
                patience=patience,
            ),
        ),
        seed=seed,
        paper="arXiv 1807.03748",
    )
