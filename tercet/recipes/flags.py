"""Parameters that several recipes share, and how a budget of steps is divided.

Each parameter of a recipe is annotated with its meaning and, where it has one, its unit; the
command line shows both (``tercet train RECIPE --explain``).
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Final, ParamSpec, TypeAlias

from tercet.errors import RecipeError
from tercet.models.choices import Attention, PoolingName
from tercet.types import Distillation

if TYPE_CHECKING:
    from tercet.training.recipe import Lora, Recipe

Given = ParamSpec("Given")

STEPS: Final = 1_000  # of a stage, where a recipe is given no budget

ModelName: TypeAlias = Annotated[
    str, "Model to start from: a zoo name, a local folder or a hub id."
]
Steps: TypeAlias = Annotated[
    int | None,
    "Budget of the whole run, divided among its stages. Default: 1,000 for each stage.",
    "steps",
]
StageSteps: TypeAlias = Annotated[
    int | None, "Optimizer steps of this stage. Default: its share of steps.", "steps"
]
Stages: TypeAlias = Annotated[str, "Stages to run, in this order, with commas between."]
Temperature: TypeAlias = Annotated[float, "Temperature of the softmax over documents."]
SimilarityTemperature: TypeAlias = Annotated[
    float, "Temperature of the loss of pairs with a similarity score (CoSENT)."
]
Distil: TypeAlias = Annotated[
    Distillation,
    "Learn the scores in the examples, if they come from a reranker (not the cosines of mining): "
    "their softmax (kl), their order (listwise) or their margins (margin-mse).",
]
DistilWeight: TypeAlias = Annotated[
    float, "Weight of the loss by a reranker's scores, beside the other one."
]
TeacherTemperature: TypeAlias = Annotated[
    float,
    "The reranker's scores are divided by it, and then compared with cosines divided by the "
    "temperature.",
]
Negatives: TypeAlias = Annotated[int, "Maximum number of mined negatives of a query.", "documents"]
LengthEdges: TypeAlias = Annotated[
    list[int] | None, "Borders between length groups; a batch has texts of one group.", "tokens"
]
QueryTokens: TypeAlias = Annotated[
    int | None, "Longer queries are cut. Default: the model's limit.", "tokens"
]
DocumentTokens: TypeAlias = Annotated[
    int | None, "Longer documents are cut. Default: the model's limit.", "tokens"
]
MaxTokens: TypeAlias = Annotated[int, "Longer texts are cut.", "tokens"]
QueryPrompt: TypeAlias = Annotated[
    str | None, "Text put before every query. Default: the model's prompt."
]
DocumentPrompt: TypeAlias = Annotated[
    str | None, "Text put before every document. Default: the model's prompt."
]
PoolPrompt: TypeAlias = Annotated[bool, "Let the tokens of prompts count in pooling."]
TurnDecoder: TypeAlias = Annotated[
    Attention | None, "Direction of a decoder's attention. Default: the model's."
]
ModelsPooling: TypeAlias = Annotated[
    PoolingName | None, "How token states become a vector. Default: the model's pooling."
]
DenseDim: TypeAlias = Annotated[
    int | None,
    "Width of the vectors; another one than the model's adds a linear layer after the pooling. "
    "Default: the model's width.",
    "coordinates",
]
LoraRank: TypeAlias = Annotated[
    int | None, "Rank of low-rank updates (LoRA). Default: every weight is trained."
]
LoraRankOrAll: TypeAlias = Annotated[
    int, "Rank of low-rank updates (LoRA); 0 trains every weight instead."
]
FreezeEmbeddings: TypeAlias = Annotated[bool, "Do not train the table of token embeddings."]
Patience: TypeAlias = Annotated[
    int | None, "Stop after this many evaluations without a better dev score.", "evaluations"
]
Seed: TypeAlias = Annotated[int, "Seed of batches, masks, dropout and new weights."]
ShorterDims: TypeAlias = Annotated[
    list[int] | None, "Shorter vector widths to train as well (Matryoshka).", "coordinates"
]


def recorded(function: "Callable[Given, Recipe]") -> "Callable[Given, Recipe]":
    """Return a recipe function whose recipes keep the parameters that they were built with."""
    signature = inspect.signature(function)

    @wraps(function)
    def build(*args: Given.args, **changes: Given.kwargs) -> "Recipe":
        given = signature.bind(*args, **changes)
        given.apply_defaults()
        return replace(function(*args, **changes), settings=dict(given.arguments))

    return build


def lora_of(rank: int | None, dropout: float | None = None) -> "Lora | None":
    """Return low-rank updates with an alpha of twice the rank; None: every weight is trained."""
    from tercet.training.recipe import Lora

    if rank is None:
        return None
    return Lora(rank=rank, alpha=2 * rank, dropout=Lora.dropout if dropout is None else dropout)


def prompts_by_role(query: str | None, document: str | None) -> dict[str, str] | None:
    """Return the prompts that are given; None: the model's own."""
    prompts = {"query": query, "document": document}
    return {role: prompt for role, prompt in prompts.items() if prompt is not None} or None


def divided(
    steps: int | None,
    stages: str,
    shares: Mapping[str, int],
    own: Mapping[str, int | None],
    default: int | None = STEPS,
) -> dict[str, int | None]:
    """Divide a budget of steps among the stages that run, by their shares.

    Args:
        steps: optimizer steps of the whole run; None gives each stage ``default``.
        stages: names of the stages that run, with commas between.
        shares: for each stage, its part of the budget in relation to the others.
        own: steps that were given for single stages; they replace the stage's part.
        default: steps of a stage without a budget; None where a stage counts epochs.

    Returns:
        The steps of every stage in ``shares``. Parts are rounded so that their sum is the budget,
        and no part is 0.

    Raises:
        RecipeError: if the budget has fewer steps than there are stages.
    """
    names = [name for name in map(str.strip, stages.split(",")) if name in shares]
    parts: dict[str, int | None] = dict.fromkeys(shares, default)
    if steps is not None and names:
        if steps < len(names):
            raise RecipeError(
                f"steps must be at least {len(names)}, one for each stage ({', '.join(names)}); "
                f"got {steps}"
            )
        parts |= _rounded(steps, {name: shares[name] for name in names})
    return parts | {name: number for name, number in own.items() if number is not None}


def _rounded(steps: int, shares: Mapping[str, int]) -> dict[str, int]:
    """Return whole parts of at least 1 in these shares, whose sum is ``steps``."""
    total = sum(shares.values())
    parts = {name: max(1, steps * share // total) for name, share in shares.items()}
    while (rest := steps - sum(parts.values())) != 0:
        missing = {name: steps * shares[name] / total - parts[name] for name in shares}
        if rest > 0:
            parts[max(missing, key=missing.__getitem__)] += 1
        else:
            parts[max(parts, key=lambda name: (parts[name], -missing[name]))] -= 1
    return parts
