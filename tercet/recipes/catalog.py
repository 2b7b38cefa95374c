"""All recipes by name, with the data that each of their stages reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from tercet.errors import RecipeError
from tercet.files.records import meant
from tercet.recipes.arctic_embed import arctic_embed
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.distil import distil
from tercet.recipes.finetune import finetune
from tercet.recipes.llm2vec import llm2vec
from tercet.recipes.nv_embed import nv_embed

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe

DataFormat: TypeAlias = Literal["examples", "texts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageData:
    """What a stage reads: files that are named for it, or those that every stage reads."""

    mixture: str  # its name in ``Stage.data``
    format: DataFormat = "examples"  # of files that are named for this stage
    shares: Literal["instead", "beside", "never"] = "instead"
    """How the files of all stages count: if no others are named, always, or never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeEntry:
    """A recipe, and the data that its stages read."""

    function: "Callable[..., Recipe]"
    stages: Mapping[str, StageData]
    summary: str
    format: DataFormat = "examples"  # of files that are named for no stage
    example: str = ""  # what follows "tercet train "


RECIPES: Final[Mapping[str, RecipeEntry]] = {
    "finetune": RecipeEntry(
        function=finetune,
        stages={"contrastive": StageData(mixture="pairs")},
        summary="fine-tune any model on pairs of a query and a document",
        example="finetune --data pairs.jsonl --dev dev.jsonl --out runs/mine",
    ),
    "llm2vec": RecipeEntry(
        function=llm2vec,
        stages={
            "mntp": StageData(mixture="texts", format="texts"),
            "simcse": StageData(mixture="sentences", format="texts"),
            "supervised": StageData(mixture="pairs", shares="never"),
        },
        format="texts",
        summary="turn a decoder into an encoder, with plain texts",
        example="llm2vec --model smollm2 --data texts.txt --out runs/mine",
    ),
    "nv-embed": RecipeEntry(
        function=nv_embed,
        stages={
            "retrieval": StageData(mixture="retrieval"),
            "blended": StageData(mixture="blended", shares="beside"),
        },
        summary="instruction tuning on many tasks, with latent attention",
        example="nv-embed --model smollm2 --data pairs.jsonl --data blended=labels.jsonl "
        "--out runs/mine",
    ),
    "bge-m3": RecipeEntry(
        function=bge_m3,
        stages={
            "retromae": StageData(mixture="texts", format="texts"),
            "contrastive": StageData(mixture="pairs"),
            "unified": StageData(mixture="examples"),
        },
        summary="dense, sparse and multi-vector retrieval from one model",
        example="bge-m3 --model me5-small --data mined.jsonl --out runs/mine",
    ),
    "arctic-embed": RecipeEntry(
        function=arctic_embed,
        stages={
            "pretraining": StageData(mixture="pairs"),
            "finetuning": StageData(mixture="mined"),
        },
        summary="pretraining on many sources and languages, then mined negatives",
        example="arctic-embed --model me5-small --data sources/ --data finetuning=mined.jsonl "
        "--out runs/mine",
    ),
    "distil": RecipeEntry(
        function=distil,
        stages={"distillation": StageData(mixture="texts", format="texts")},
        format="texts",
        summary="a small student learns a teacher's vectors, from plain texts",
        example="distil --teacher me5-small --model me5-small --keep-layers 3 --data texts.txt "
        "--out runs/mine",
    ),
}


def recipe_named(name: str) -> RecipeEntry:
    """Return a recipe.

    Raises:
        RecipeError: if there is none of this name; it names the nearest one.
    """
    if name not in RECIPES:
        raise RecipeError(
            f"there is no recipe {name!r}{meant(name, RECIPES)}; the recipes are "
            f"{', '.join(RECIPES)}"
        )
    return RECIPES[name]
