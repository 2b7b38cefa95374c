"""Does another language in the pretraining hurt English? Arms that read equally many pairs.

English alone at half time, English alone, and English with one other language; each corpus has
equally many pairs, and all arms get the same fine-tuning (arXiv 2412.04506, section 5).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from tercet.data.files.sources import Source, iter_examples, open_source, write_examples
from tercet.errors import RecipeError
from tercet.evaluate.report.figures import bars, drawing, write_png
from tercet.recipes.arctic_embed import arctic_embed
from tercet.studies.cells import Cell
from tercet.studies.languages import Language, language_of
from tercet.studies.parts import ENGLISH, OTHERS, ByPart, Column, parts_of
from tercet.studies.tables import Found, Table, write_tables

HALF: Final = "en"  # English alone, half of the steps
BOTH: Final = "en+en"  # English alone, as many steps as with another language
STAGES: Final = ("raw", "fine-tuned")


def arms_of(others: Sequence[str]) -> tuple[str, ...]:
    """The arms, by their names; that of all comparisons is the second."""
    return (HALF, BOTH, *(f"{ENGLISH}+{lang}" for lang in others))


def equal_corpora(
    english: Path, others: Sequence[Path], folder: Path, *, batch_size: int, rows: int | None
) -> dict[str, Source]:
    """The beginnings of the files, equally long and in whole batches, by language.

    They are written into the folder. So a pass over each has equally many batches of one size.

    Raises:
        DataError: when a row is no example.
        RecipeError: when a language stands there twice, or a file has less than a batch.
    """
    opened = {ENGLISH: open_source(english)}
    for path in others:
        source = open_source(path)
        lang = language_of(source)
        if not lang or lang in opened:
            told = f"language {lang!r} has a corpus already" if lang else "rows are in several"
            raise RecipeError(f"{path}: its {told}; give a file of one other language")
        opened[lang] = source
    if len(opened) < 2:
        raise RecipeError("there is no other language; give one with --other, such as de.jsonl")
    least = min(len(source) for source in opened.values())
    least = least if rows is None else min(least, rows)
    if least < batch_size:
        raise RecipeError(
            f"the smallest corpus has {least} pairs, and a batch {batch_size}; give more pairs, or "
            "a smaller --batch-size"
        )
    count = least // batch_size * batch_size
    found: dict[str, Source] = {}
    for lang, source in opened.items():
        path = folder / f"{lang}.jsonl"
        write_examples(path, islice(iter_examples(source.path), count))
        found[lang] = open_source(path)
    return found


def mixtures_of(corpora: Mapping[str, Source]) -> dict[str, list[Source]]:
    """What the pretraining of each arm reads, by the arm's name."""
    english = corpora[ENGLISH]
    alone = {HALF: [english], BOTH: [english]}
    pairs = {f"{ENGLISH}+{lang}": [english, corpora[lang]] for lang in corpora if lang != ENGLISH}
    return {**alone, **pairs}


def gap_cells(others: Sequence[str], seed: int, *, steps: int, **numbers: Any) -> Iterator[Cell]:
    """A run of both stages for each arm; they differ in what the pretraining reads.

    Raises:
        RecipeError: when the steps cannot be halved.
    """
    if steps < 2 or steps % 2:
        raise RecipeError(f"steps is {steps}; give an even number: one arm takes half of them")
    for arm in arms_of(others):
        taken = steps // 2 if arm == HALF else steps
        recipe = arctic_embed(steps=taken, seed=seed, **numbers)
        first, second = recipe.stages
        yield Cell(arm, replace(recipe, stages=(replace(first, data=arm), second)))


def gap_tables(found: Found, languages: Sequence[Language]) -> Iterator[tuple[str, Table]]:
    """Each arm in English and elsewhere, raw and fine-tuned, and its lead over English alone."""
    by_part, arms = _by_part(found, languages), list(found.cells[0])
    together = _columns([name for name in (ENGLISH, OTHERS) if name in by_part.parts])
    yield "English, and the mean of the other languages", by_part.table(arms, together)
    alone = _columns([name for name in by_part.parts if name not in (ENGLISH, OTHERS)])
    if alone:
        yield "Each other language", by_part.table(arms, alone)


def write_gap(
    out: Path, found: Found, languages: Sequence[Language], facts: Mapping[str, Any]
) -> None:
    """Write ``table.md``, ``results.json`` and ``gap.png`` into the folder."""
    by_part, arms = _by_part(found, languages), list(found.cells[0])
    rows = by_part.rows(arms, _columns(list(by_part.parts)))
    write_tables(out, found, facts, dict(gap_tables(found, languages)), rows)
    together = _columns([name for name in (ENGLISH, OTHERS) if name in by_part.parts])
    shown = {arm: {c.title: by_part.figure(arm, c) for c in together} for arm in arms}
    with drawing():
        write_png(out / "gap.png", bars(shown))


def require_english(languages: Sequence[Language]) -> None:
    """Look whether English is measured at all.

    Raises:
        RecipeError: when no set is in it.
    """
    if ENGLISH not in parts_of(languages):
        names = ", ".join(each.name for each in languages)
        raise RecipeError(f"no evaluation set is in English (there are {names}); add one")


def pairs_read(folder: Path) -> int:
    """How many pairs a stage has read, by its log."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line).get("examples", 0) for line in lines)


def _by_part(found: Found, languages: Sequence[Language]) -> ByPart:
    return ByPart(found, parts_of(languages), BOTH)


def _columns(named: Sequence[str]) -> list[Column]:
    return [
        Column(name, at, title=f"{name}, {stage}")
        for name in named
        for at, stage in enumerate(STAGES)
    ]
