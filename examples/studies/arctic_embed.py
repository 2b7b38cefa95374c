"""Arctic-Embed 2.0 (arXiv 2412.04506): data, short vectors, thresholds of mining, filters.

Fine-tunings that begin alike share one pretraining.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tercet.data.files.folders import open_sources
from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.recipes.arctic_embed import arctic_embed
from tercet.studies.cells import Cell, Study, with_numbers_of
from tercet.studies.language_sets import english_and_others, language_of, open_languages
from tercet.studies.tables import Column, Picture, Results, Table, leads_over

FULL = "full"  # all data in both stages, short vectors in both, negatives as they were mined
TITLES = {
    "data": "Data of pretraining and fine-tuning, English or all",
    "matryoshka": "Short vectors in both stages, in fine-tuning, in none",
    "thresholds": "Threshold of mining, by the pretrained model",
    "filters": "Level of the filter before pretraining",
}


@with_numbers_of(
    arctic_embed,
    "stages",
    "steps",
    "pretraining_epochs",
    "dims",
    "matryoshka",
    "finetuning_threshold",
)
def study(
    data: Annotated[list[Source], "Pairs of the pretraining, a file a language; may be repeated."],
    mined: Annotated[list[Source], "Examples with negatives, a file a language; may be repeated."],
    test: Annotated[list[Path], "Folder of LANG.jsonl, or such a file; may be repeated."],
    thresholds: Annotated[
        list[float] | None, "Mine the pairs with it for a fine-tuning; may be repeated."
    ] = None,
    filtered: Annotated[
        list[str] | None, "NAME=FOLDER or file: pairs that a filter kept; may be repeated."
    ] = None,
    short: Annotated[int, "Coordinates of a short vector."] = 256,
    queries: Annotated[int | None, "The first ones of each language; None: all."] = None,
    documents: Annotated[int | None, "Of each language, relevant ones first; None: all."] = None,
    pretraining_steps: Annotated[int, "Steps of the pretraining."] = 1_000,
    finetuning_steps: Annotated[int, "Steps of the fine-tuning."] = 100,
    **numbers: Any,
) -> Study:
    """Data of both stages, short vectors, thresholds of mining and filters, one at a time.

    Each cell is compared with the full one: all data in both stages, short vectors trained in both.
    A pretraining that several cells begin with is trained once. Figures are of whole vectors and of
    short ones. For some parts, name cells: --only full --only 'matryoshka-*'.

    Example: tercet study examples/studies/arctic_embed.py --data en.jsonl --data de.jsonl
    --mined mined-en.jsonl --mined mined-de.jsonl --test test/ --out runs/parts
    --pretraining-steps 200
    """
    read: dict[str, Sequence[Source]] = {"pairs": data, "mined": mined, **english_of(data, mined)}
    read |= {f"pairs-{name}": open_sources(path) for name, path in map(level, filtered or ())}
    if thresholds:
        require_bare(data)
    sets = open_languages(test, queries=queries, documents=documents, short=short)
    steps = {"pretraining_steps": pretraining_steps, "finetuning_steps": finetuning_steps}
    sizes = {"dims": [short], **steps, **numbers}
    return Study(
        cells=list(cells(read, thresholds or [], sizes)),
        data=read,
        sets=sets,
        report=partial(report, english_and_others(sets), short),
    )


def cells(
    read: Mapping[str, Sequence[Source]], thresholds: Sequence[float], sizes: Mapping[str, Any]
) -> Iterator[Cell]:
    """Yield each pretraining, and after it the fine-tunings that begin with it."""

    def cell(name: str, data: str, after: str | None = None, **changes: Any) -> Cell:
        stage = "pretraining" if after is None else "finetuning"
        recipe = arctic_embed(stages=stage, **{**sizes, **changes})
        return Cell(name, replace(recipe, stages=(replace(recipe.stages[0], data=data),)), after)

    yield cell("pretraining", "pairs")
    yield cell(FULL, "mined", "pretraining")
    if "pairs-en" in read:
        yield cell("all-en", "mined-en", "pretraining")
    for value in thresholds:
        yield cell(f"threshold-{value:g}", "pairs", "pretraining", finetuning_threshold=value)
    if "pairs-en" in read:
        yield cell("pretraining-en", "pairs-en")
        yield cell("en-all", "mined", "pretraining-en")
        yield cell("en-en", "mined-en", "pretraining-en")
    yield cell("pretraining-full-width", "pairs", matryoshka="finetuning")
    for which in ("finetuning", "none"):
        yield cell(f"matryoshka-{which}", "mined", "pretraining-full-width", matryoshka=which)
    for mixture in read:
        name = mixture.removeprefix("pairs-")
        if name not in ("pairs", "mined", "mined-en", "en"):
            yield cell(f"pretraining-filter-{name}", mixture)
            yield cell(f"filter-{name}", "mined", f"pretraining-filter-{name}")


def english_of(data: Sequence[Source], mined: Sequence[Source]) -> dict[str, Sequence[Source]]:
    """Return the English sources of both, unless one of them has nothing else, or none."""
    found = {}
    for name, sources in (("pairs", data), ("mined", mined)):
        found[f"{name}-en"] = [source for source in sources if language_of(source) == "en"]
        if len(found[f"{name}-en"]) in (0, len(sources)):
            return {}
    return found


def level(named: str) -> tuple[str, Path]:
    """Return the name of a filter's level, and the file or folder that it kept."""
    name, _, path = named.partition("=")
    if not (name and path) or "/" in name or name == "en":
        raise RecipeError(f"--filtered {named}: give NAME=FOLDER, such as 10=runs/filtered-10")
    return name, Path(path)


def require_bare(pairs: Sequence[Source]) -> None:
    """Refuse pairs with negatives: the model would not mine any, with whatever threshold."""
    for source in pairs:
        if source.without_negatives < len(source):
            raise RecipeError(
                f"{source.path}: its examples bring negatives, so that no threshold of mining "
                "would matter; give pairs without, or leave out --thresholds"
            )


def report(
    parts: Mapping[str, tuple[str, ...]], short: int, results: Results
) -> Iterator[Table | Picture]:
    """Yield a table and a picture for each part, against the full cell."""
    columns = [
        Column(f"{name}, {('whole', f'at {short}')[width]}", (sets,), part=width)
        for name, sets in parts.items()
        for width in (0, 1)
    ]
    run = [name for name in results.answers if not name.startswith("pretraining")]
    cells_of = {
        "data": [name for name in ("en-en", "en-all", "all-en") if name in run],
        "matryoshka": [name for name in run if name.startswith("matryoshka-")],
        "thresholds": [name for name in run if name.startswith("threshold-")],
        "filters": [name for name in run if name.startswith("filter-")],
    }
    for part, names in cells_of.items():
        if names and results.has(FULL):
            cells = {name: name for name in (FULL, *names)}
            yield results.table(TITLES[part], cells, columns, leads_over(FULL, names))
            yield results.bars(part, cells, columns)
