"""Cells of an ablation: a name, the recipe that makes it, and after which stages it is measured."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from tercet.recipes.nv_embed import Pooler, nv_embed
from tercet.train.recipe import Recipe

Part: TypeAlias = Literal["all", "grid", "schedules"]

ATTENTIONS: Final = ("bidirectional", "causal")
POOLINGS: Final[tuple[Pooler, ...]] = ("eos", "mean", "latent", "self_attention")
SCHEDULES: Final = ("one stage, in-batch", "one stage, own", "two stages", "reversed")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid."""

    name: str  # also that of its folder
    recipe: Recipe


def cell_name(attention: str, pooling: str) -> str:
    """The cell of this attention and pooling, after both stages."""
    return f"{attention}-{pooling}"


def schedule_cell(schedule: str) -> str:
    """The cell of this schedule; the one of two stages is that of the grid."""
    if schedule == "two stages":
        return cell_name("bidirectional", "latent")
    return schedule.replace(",", "").replace(" ", "-")


def nv_embed_cells(part: Part, seed: int, **numbers: Any) -> Iterator[Cell]:
    """The runs of NV-Embed's tables 2 to 4 (arXiv 2405.17428): same data, seed and steps in each.

    The grid is attention and pooling, measured after each of two stages. Schedules are those of
    the latent layer: one stage of all data as long as both together, with and without the others'
    documents as negatives, and both stages in reverse.
    """
    steps, blended = numbers.pop("steps"), numbers.pop("blended_steps")
    both = {"steps": steps, "blended_steps": blended, "seed": seed, **numbers}
    if part in ("all", "grid"):
        for attention in ATTENTIONS:
            for pooling in POOLINGS:
                recipe = nv_embed(attention=attention, pooling=pooling, **both)
                yield Cell(cell_name(attention, pooling), recipe)
    if part in ("all", "schedules"):
        if part == "schedules":
            yield Cell(schedule_cell("two stages"), nv_embed(**both))
        alone = {**both, "stages": "blended", "blended_steps": steps + blended}
        yield Cell(schedule_cell("one stage, in-batch"), nv_embed(**alone, blended_in_batch="all"))
        yield Cell(schedule_cell("one stage, own"), nv_embed(**alone))
        yield Cell(schedule_cell("reversed"), nv_embed(**both, stages="blended,retrieval"))
