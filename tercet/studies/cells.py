"""Cells of an ablation: a name, the recipe that makes it, and after which stages it is measured."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from tercet.objectives.unified import Unified
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.nv_embed import Pooler, nv_embed
from tercet.train.recipe import Recipe

Part: TypeAlias = Literal["all", "grid", "schedules"]

ATTENTIONS: Final = ("bidirectional", "causal")
POOLINGS: Final[tuple[Pooler, ...]] = ("eos", "mean", "latent", "self_attention")
SCHEDULES: Final = ("one stage, in-batch", "one stage, own", "two stages", "reversed")

M3Part: TypeAlias = Literal["all", "distillation", "stages", "kinds", "teacher"]

FULL: Final = "full"  # all kinds, self-distillation, the stage unified alone
M3_CELLS: Final[dict[M3Part, tuple[str, ...]]] = {
    "distillation": ("no-distillation",),
    "stages": ("retromae-unified", "retromae-contrastive-unified"),
    "kinds": ("dense", "dense-sparse", "dense-multi"),
    "teacher": ("teacher-0.5", "teacher-2"),
}
"""What is compared with the full cell, by part."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid."""

    name: str  # also that of its folder
    recipe: Recipe
    begins_with: str | None = None  # the fingerprint of a base that was itself made by a run


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


def bge_m3_cells(part: M3Part, seed: int, **numbers: Any) -> Iterator[Cell]:
    """The runs of an ablation of BGE-M3, the full one first; each differs from it in one thing.

    Self-distillation and stages are those of tables 14 and 15 of the final text of
    arXiv 2402.03216. Kinds: fewer of them trained together. Teacher: how much self-distillation
    weighs beside the other losses, which is 1 in the full cell and 0 in ``no-distillation``.
    """
    fixed = {"seed": seed, **numbers}
    yield Cell(FULL, bge_m3(stages="unified", **fixed))
    for name in (n for each, names in M3_CELLS.items() if part in ("all", each) for n in names):
        if name in M3_CELLS["stages"]:
            yield Cell(name, bge_m3(stages=name.replace("-", ","), **fixed))
        elif name in M3_CELLS["kinds"]:
            yield Cell(name, bge_m3(stages="unified", kinds=name.replace("-", ","), **fixed))
        else:
            taught = name in M3_CELLS["teacher"]
            weight = float(name.removeprefix("teacher-")) if taught else 0.0
            yield Cell(name, _taught(bge_m3(stages="unified", **fixed), weight))


def _taught(recipe: Recipe, weight: float) -> Recipe:
    """The same, with another weight of self-distillation."""
    (stage,) = recipe.stages
    assert isinstance(stage.objective, Unified)
    mixture = replace(stage.objective.mixture, distilled=weight)
    objective = replace(stage.objective, mixture=mixture)
    return replace(recipe, stages=(replace(stage, objective=objective),))
