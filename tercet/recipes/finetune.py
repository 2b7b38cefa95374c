"""Fine-tune any model on pairs of a query and the documents that answer it.

The plain recipe that most people need first: InfoNCE with in-batch and mined negatives
(arXiv 1807.03748; arXiv 2004.04906 for retrieval). Its numbers are those that the field uses for
small models; each is a flag.
"""

from typing import Annotated, Literal

from tercet.data.batches.collate import Policy
from tercet.models.choices import Attention, PoolingName
from tercet.objectives.contrastive import Contrastive
from tercet.train.recipe import Lora, Model, Recipe, Stage


def finetune(
    base: Annotated[str, "Zoo name, local folder or hub id."] = "minilm",
    epochs: Annotated[float, "Passes over the data."] = 1.0,
    steps: Annotated[int | None, "Optimizer steps; overrides epochs."] = None,
    batch_size: Annotated[int, "Examples a step, over all processes."] = 64,
    learning_rate: Annotated[float, "At its peak."] = 5e-5,
    schedule: Annotated[
        Literal["constant", "linear", "wsd"],
        "Of the learning rate; wsd: warmup-stable-decay.",
    ] = "linear",
    temperature: Annotated[float, "Of the softmax over documents."] = 0.05,
    dims: Annotated[list[int] | None, "A shorter width to train as well; may be repeated."] = None,
    negatives: Annotated[int, "Mined negatives of a query, at most."] = 8,
    in_batch: Annotated[
        Policy, "Others' documents that are negatives; per_row: all, but what a row's task forbids."
    ] = "per_row",
    mixing: Annotated[
        Literal["single", "blended"], "One source a batch, or all in each."
    ] = "single",
    length_edges: Annotated[
        list[int] | None, "Border between length groups, in tokens; may be repeated."
    ] = None,
    token_budget: Annotated[
        int | None, "Examples times tokens of the longest text of their group, at most."
    ] = None,
    query_tokens: Annotated[int | None, "Longer queries are cut."] = None,
    document_tokens: Annotated[int | None, "Longer documents are cut."] = None,
    query_prompt: Annotated[str | None, "Put before every query."] = None,
    document_prompt: Annotated[str | None, "Put before every document."] = None,
    pooling: Annotated[PoolingName | None, "None: the model's own."] = None,
    attention: Annotated[Attention | None, "Turn a decoder both ways; None: as it is."] = None,
    lora_rank: Annotated[int | None, "Train low-rank updates of this rank instead of all."] = None,
    freeze_embeddings: Annotated[bool, "Leave the token table as it is."] = False,
    patience: Annotated[int | None, "Stop after so many evaluations without a better one."] = None,
    seed: Annotated[int, "Of batches, dropout and LoRA."] = 0,
) -> Recipe:
    """Fine-tune on files of queries, positives and, where there are any, mined negatives."""
    prompts = {"query": query_prompt, "document": document_prompt}
    given = {role: prompt for role, prompt in prompts.items() if prompt is not None}
    return Recipe(
        name="finetune",
        model=Model(
            base=base,
            pooling=pooling,
            attention=attention,
            lora=None if lora_rank is None else Lora(rank=lora_rank, alpha=2 * lora_rank),
            freeze_embeddings=freeze_embeddings,
            prompts=given or None,
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
