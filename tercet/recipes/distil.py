"""Distil a teacher's vectors into a small student, from plain texts (arXiv 2509.12539).

No labels and no negatives: each text's vector is pulled to the one that the teacher gives it, and
so are the similarities between the texts of a batch (arXiv 2101.04731). The student takes over the
teacher's space, with its shorter widths and ranges of codes, so that it can search the teacher's
index.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from tercet.errors import RecipeError
from tercet.models.choices import WhichLayers
from tercet.recipes import flags
from tercet.recipes.flags import lora_of, prompts_by_role, recorded
from tercet.types import ReadAs

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe


@recorded
def distil(
    model: Annotated[
        str, "Student to start from: a zoo name, a local folder or a hub id."
    ] = "me5-small",
    teacher: Annotated[
        str, "Model whose vectors are learned: a zoo name, a local folder or a hub id."
    ] = "me5-small",
    keep_layers: Annotated[
        int | None,
        "Start with this many of the student's layers. Default: 3 if student and teacher are the "
        "same model, otherwise all.",
        "layers",
    ] = None,
    which_layers: Annotated[
        WhichLayers,
        "Which layers these are; even: at equal distances, the first and the last among them.",
    ] = "even",
    read_as: Annotated[
        ReadAs,
        "How texts are read, by teacher and student, each with its prompts; both: every second one "
        "as a query.",
    ] = "both",
    epochs: Annotated[float, "Passes over the texts.", "epochs"] = 1.0,
    steps: Annotated[
        int | None, "Budget of the whole run. Default: as many as epochs need.", "steps"
    ] = None,
    batch_size: Annotated[int, "Texts in a step, over all processes.", "texts"] = 64,
    learning_rate: Annotated[float, "Learning rate at its peak."] = 1e-3,
    schedule: Annotated[
        Literal["constant", "linear", "wsd"],
        "Course of the learning rate; wsd: warmup, stable, decay.",
    ] = "linear",
    relational: Annotated[
        float,
        "Weight of the loss of similarities between texts, times the temperature; 0: each text "
        "alone.",
    ] = 1.0,
    temperature: Annotated[
        float, "Temperature of the softmax over the other texts of a batch."
    ] = 0.02,
    dims: Annotated[
        list[int] | None,
        "Shorter vector widths to train as well, besides those of the teacher (Matryoshka).",
        "coordinates",
    ] = None,
    max_tokens: Annotated[
        int | None,
        "Longer texts are cut, for the teacher too. Default: the models' limit.",
        "tokens",
    ] = None,
    query_prompt: flags.QueryPrompt = None,
    document_prompt: flags.DocumentPrompt = None,
    pooling: flags.ModelsPooling = None,
    attention: flags.TurnDecoder = None,
    lora_rank: flags.LoraRank = None,
    freeze_embeddings: flags.FreezeEmbeddings = False,
    patience: flags.Patience = None,
    seed: flags.Seed = 0,
) -> "Recipe":
    """Teach a small student the vectors that a teacher gives plain texts."""
    from tercet.objectives.distil import Distil
    from tercet.training.recipe import Model, Recipe, Stage

    if keep_layers is None and model == teacher:
        keep_layers = 3
    if keep_layers is None and which_layers != "even":
        raise RecipeError(
            f"which_layers is {which_layers}, and all layers are kept; set keep_layers, or leave "
            "which_layers out"
        )
    return Recipe(
        name="distil",
        model=Model(
            base=model,
            pooling=pooling,
            attention=attention,
            keep_layers=keep_layers,
            which_layers=which_layers,
            as_wide_as=teacher,
            lora=lora_of(lora_rank),
            freeze_embeddings=freeze_embeddings,
            prompts=prompts_by_role(query_prompt, document_prompt),
            query_tokens=max_tokens,
            document_tokens=max_tokens,
        ),
        stages=(
            Stage(
                name="distillation",
                objective=Distil(
                    teacher=teacher,
                    dims=tuple(dims or ()),
                    relational=relational,
                    temperature=temperature,
                    read_as=read_as,
                ),
                data="texts",
                epochs=epochs,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                schedule=schedule,
                patience=patience,
            ),
        ),
        seed=seed,
        paper="arXiv 2509.12539",
        notes={
            "relational": "the paper has the distance of vectors alone; 0 is the paper's",
        },
    )
