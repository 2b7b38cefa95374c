"""What parts of Arctic-Embed 2.0 are worth: data, short vectors, thresholds of mining, filters.

Cells that differ in their fine-tuning alone begin with one pretraining, which is trained once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.evaluate.measures.retention import retention
from tercet.evaluate.report.figures import bars, drawing, write_png
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.suite import EvaluationSet
from tercet.models.embedder import Embedder
from tercet.recipes.arctic_embed import arctic_embed
from tercet.studies.cells import Cell
from tercet.studies.languages import Language, language_of
from tercet.studies.parts import ENGLISH, OTHERS, ByPart, Column, parts_of
from tercet.studies.run import Shared
from tercet.studies.tables import Found, Table, write_tables
from tercet.train.recipe import Recipe

ArcticPart: TypeAlias = Literal["all", "data", "matryoshka", "thresholds", "filters"]

FULL: Final = "full"  # all data in both stages, short vectors in both, negatives as they were mined
TITLES: Final[Mapping[str, str]] = {
    "data": "Data of pretraining and fine-tuning, English or all",
    "matryoshka": "Short vectors in both stages, in fine-tuning, in none",
    "thresholds": "Threshold of mining, by the pretrained model",
    "filters": "Level of the filter before pretraining",
}
_MAIN: Final = "ndcg@10"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is varied. Mixtures are ``Stage.data`` of the bench."""

    part: ArcticPart = "all"
    english: bool = True  # whether there are mixtures of English alone: pairs-en and mined-en
    thresholds: tuple[float, ...] = ()
    filters: tuple[str, ...] = ()  # each with a mixture pairs-NAME
    numbers: Mapping[str, Any] = field(default_factory=dict)  # of the recipe, in all cells


def cells_by_part(asked: Asked) -> dict[str, tuple[str, ...]]:
    """The cells that are compared with the full one, by part; parts without any are left out."""
    found = {
        "data": ("en-en", "en-all", "all-en") if asked.english else (),
        "matryoshka": ("matryoshka-finetuning", "matryoshka-none"),
        "thresholds": tuple(f"threshold-{value:g}" for value in asked.thresholds),
        "filters": tuple(f"filter-{name}" for name in asked.filters),
    }
    wanted = {part: names for part, names in found.items() if asked.part in ("all", part) and names}
    if not wanted:
        raise RecipeError(
            f"there is nothing to vary in the part {asked.part!r}; the data need English and other "
            "languages, thresholds --threshold, and filters --filtered"
        )
    return wanted


def arctic_cells(asked: Asked, seed: int) -> list[Shared]:
    """Each pretraining with the fine-tunings that begin with it; the full cell is among them."""
    wanted = {name for names in cells_by_part(asked).values() for name in names}
    build = partial(_recipe, asked.numbers, seed)
    first = build("pretraining", "pairs")
    groups = {
        "pretraining": (
            first,
            {
                FULL: build("finetuning", "mined"),
                "all-en": build("finetuning", "mined-en"),
                **{
                    f"threshold-{value:g}": build("finetuning", "pairs", threshold=value)
                    for value in asked.thresholds
                },
            },
        ),
        "pretraining-en": (
            build("pretraining", "pairs-en"),
            {"en-all": build("finetuning", "mined"), "en-en": build("finetuning", "mined-en")},
        ),
        "pretraining-full-width": (
            build("pretraining", "pairs", matryoshka="finetuning"),
            {
                "matryoshka-finetuning": build("finetuning", "mined", matryoshka="finetuning"),
                "matryoshka-none": build("finetuning", "mined", matryoshka="none"),
            },
        ),
        **{
            f"pretraining-filter-{name}": (
                build("pretraining", f"pairs-{name}"),
                {f"filter-{name}": build("finetuning", "mined")},
            )
            for name in asked.filters
        },
    }
    found = []
    for name, (pretraining, then) in groups.items():
        cells = [Cell(cell, recipe) for cell, recipe in then.items() if cell in {*wanted, FULL}]
        if cells:
            found.append(Shared(Cell(name, pretraining), cells))
    return found


def at_widths(language: Language, short: int) -> EvaluationSet:
    """Its set; answers have a column for whole vectors and one for their first coordinates."""
    return replace(
        language.examined,
        answers=partial(_at_widths, language.data, short),
        fingerprint=f"{language.examined.fingerprint} and at {short}",
    )


def mixtures_of(
    pairs: Sequence[Source], mined: Sequence[Source], filtered: Mapping[str, Sequence[Source]]
) -> dict[str, Sequence[Source]]:
    """What the stages of all cells read; no part of English where all is in it, or nothing."""
    found: dict[str, Sequence[Source]] = {"pairs": pairs, "mined": mined}
    for name, sources in tuple(found.items()):
        english = [source for source in sources if language_of(source) == ENGLISH]
        if 0 < len(english) < len(sources):
            found[f"{name}-en"] = english
    return found | {f"pairs-{name}": sources for name, sources in filtered.items()}


def require_bare(pairs: Sequence[Source]) -> None:
    """Look whether the model mines the negatives of all pairs, so that a threshold matters.

    Raises:
        RecipeError: when some bring negatives.
    """
    for source in pairs:
        if source.without_negatives < len(source):
            raise RecipeError(
                f"{source.path}: its examples bring negatives, so that no threshold of mining "
                "would matter; give pairs without, or leave out --threshold"
            )


def arctic_tables(
    found: Found, languages: Sequence[Language], asked: Asked, short: int
) -> Iterator[tuple[str, Table]]:
    """A table a part: each cell in English and elsewhere, whole and short, against the full one."""
    by_part = ByPart(found, parts_of(languages), FULL)
    for part, cells in cells_by_part(asked).items():
        yield TITLES[part], by_part.table([FULL, *cells], _columns(by_part, short))


def write_arctic(
    out: Path, found: Found, languages: Sequence[Language], asked: Asked, facts: Mapping[str, Any]
) -> None:
    """Write ``table.md``, ``results.json`` and a figure of each part into the folder."""
    by_part, short = ByPart(found, parts_of(languages), FULL), facts["short"]
    columns = _columns(by_part, short)
    titled = dict(arctic_tables(found, languages, asked, short))
    parts = cells_by_part(asked)
    each = [_column(name, width, short) for name in by_part.parts for width in (0, 1)]
    write_tables(out, found, facts, titled, by_part.rows(list(found.cells[0]), each))
    with drawing():
        for part, cells in parts.items():
            shown = {
                cell: {c.title: by_part.figure(cell, c) for c in columns} for cell in (FULL, *cells)
            }
            write_png(out / f"{part}.png", bars(shown))


def _recipe(numbers: Mapping[str, Any], seed: int, stage: str, data: str, **changes: Any) -> Recipe:
    recipe = arctic_embed(stages=stage, seed=seed, **{**numbers, **changes})
    return replace(recipe, stages=(replace(recipe.stages[0], data=data),))


def _at_widths(data: RetrievalSet, short: int, embedder: Embedder, task: str | None) -> np.ndarray:
    whole, *cut = retention(
        embedder, data, task=task, dims=[short], stored=["float32"], names=[_MAIN]
    )
    found = cut[-1] if cut else whole
    return np.stack([each.result.scores[_MAIN] for each in (whole, found)], axis=1)


def _columns(by_part: ByPart, short: int) -> list[Column]:
    named = [name for name in (ENGLISH, OTHERS) if name in by_part.parts]
    return [_column(name, width, short) for name in named for width in (0, 1)]


def _column(name: str, width: int, short: int) -> Column:
    return Column(name, width=width, title=f"{name}, at {short}" if width else f"{name}, whole")
