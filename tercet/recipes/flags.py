"""Flags that several recipes share, and the settings that they stand for."""

from typing import TYPE_CHECKING, Annotated, TypeAlias

from tercet.models.choices import Attention, PoolingName

if TYPE_CHECKING:
    from tercet.training.recipe import Lora

Base: TypeAlias = Annotated[str, "Zoo name, local folder or hub id."]
Temperature: TypeAlias = Annotated[float, "Of the softmax over documents."]
Negatives: TypeAlias = Annotated[int, "Mined negatives of a query, at most."]
LengthEdges: TypeAlias = Annotated[
    list[int] | None, "Border between length groups, in tokens; may be repeated."
]
QueryTokens: TypeAlias = Annotated[int | None, "Longer queries are cut."]
DocumentTokens: TypeAlias = Annotated[int | None, "Longer documents are cut."]
MaxTokens: TypeAlias = Annotated[int, "Longer texts are cut."]
PoolPrompt: TypeAlias = Annotated[bool, "Pool the tokens of instructions too."]
TurnDecoder: TypeAlias = Annotated[Attention | None, "Turn a decoder both ways; None: as it is."]
ModelsPooling: TypeAlias = Annotated[PoolingName | None, "None: the model's own."]
LoraRank: TypeAlias = Annotated[int | None, "Train low-rank updates of this rank instead of all."]
LoraRankOrAll: TypeAlias = Annotated[int, "Of the low-rank updates; 0 trains every weight."]
FreezeEmbeddings: TypeAlias = Annotated[bool, "Leave the token table as it is."]
Patience: TypeAlias = Annotated[int | None, "Stop after so many evaluations without a better one."]


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
