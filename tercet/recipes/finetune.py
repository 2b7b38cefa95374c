"""Fine-tune any model on pairs of a query and the documents that answer it.

The plain recipe that most people need first: InfoNCE with in-batch and mined negatives
(arXiv 1807.03748, eq. 4; arXiv 2004.04906, sec. 3.2 for retrieval). Its numbers are usual for
small models; each is a flag.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from tercet.recipes import flags
from tercet.recipes.flags import lora_of, prompts_by_role, recorded
from tercet.types import Policy

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe


@recorded
def finetune(
    model: flags.ModelName = "minilm",
    epochs: Annotated[float, "Passes over the data.", "epochs"] = 1.0,
    steps: Annotated[
        int | None, "Budget of the whole run. Default: as many as epochs need.", "steps"
    ] = None,
    batch_size: Annotated[int, "Examples in a step, over all processes.", "examples"] = 64,
    learning_rate: Annotated[float, "Learning rate at its peak."] = 5e-5,
    schedule: Annotated[
        Literal["constant", "linear", "wsd"],
        "Course of the learning rate; wsd: warmup, stable, decay.",
    ] = "linear",
    temperature: flags.Temperature = 0.05,
    similarity_temperature: flags.SimilarityTemperature = 0.05,
    distil: flags.Distil = "none",
    distil_weight: flags.DistilWeight = 1.0,
    teacher_temperature: flags.TeacherTemperature = 1.0,
    dims: flags.ShorterDims = None,
    negatives: flags.Negatives = 8,
    in_batch: Annotated[
        Policy,
        "Which documents of other examples are negatives; per_row: all, unless the task of a row "
        "forbids it.",
    ] = "per_row",
    mixing: Annotated[
        Literal["single", "blended"], "A batch has examples of one source, or of all."
    ] = "single",
    length_edges: flags.LengthEdges = None,
    token_budget: Annotated[
        int | None,
        "Maximum of a batch: its examples times the tokens of the longest text of their length "
        "group.",
        "tokens",
    ] = None,
    query_tokens: flags.QueryTokens = None,
    document_tokens: flags.DocumentTokens = None,
    query_prompt: flags.QueryPrompt = None,
    document_prompt: flags.DocumentPrompt = None,
    pooling: flags.ModelsPooling = None,
    dense_dim: flags.DenseDim = None,
    attention: flags.TurnDecoder = None,
    lora_rank: flags.LoraRank = None,
    freeze_embeddings: flags.FreezeEmbeddings = False,
    patience: flags.Patience = None,
    seed: flags.Seed = 0,
) -> "Recipe":
    """Fine-tune on files of queries, positives and, where there are any, mined negatives."""
    from tercet.objectives.contrastive import Contrastive
    from tercet.training.recipe import Model, Recipe, Stage

    return Recipe(
        name="finetune",
        model=Model(
            base=model,
            pooling=pooling,
            dense_dim=dense_dim,
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
                objective=Contrastive(
                    temperature=temperature,
                    dims=tuple(dims or ()),
                    similarity_temperature=similarity_temperature,
                    distil=distil,
                    distil_weight=distil_weight,
                    teacher_temperature=teacher_temperature,
                ),
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
