"""Whether another language in the pretraining hurts English (arXiv 2412.04506, section 5).

All arms but ``en`` read equally many pairs, of corpora that are equally long.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from tercet.data.files.sources import Source, iter_examples, open_source, write_examples
from tercet.errors import RecipeError
from tercet.recipes.arctic_embed import arctic_embed
from tercet.studies.cells import Cell, Study, with_numbers_of
from tercet.studies.language_sets import english_and_others, language_of, open_languages
from tercet.studies.tables import Column, Picture, Results, Table, leads_over

HALF = "en"  # English alone, half of the steps
BOTH = "en+en"  # English alone, as many steps as with another language
STAGES = ("raw", "fine-tuned")


@with_numbers_of(arctic_embed, "stages", "steps", "pretraining_epochs")
def study(
    english: Annotated[Path, "Pairs in English."],
    other: Annotated[list[Path], "Pairs in another language, such as de.jsonl; an arm each."],
    data: Annotated[list[Source], "Examples with negatives for the fine-tuning of every arm."],
    test: Annotated[list[Path], "Folder of LANG.jsonl, or such a file; may be repeated."],
    out: Path,
    rows: Annotated[int | None, "Pairs of each corpus, at most; None: the smallest's."] = None,
    queries: Annotated[int | None, "The first ones of each language; None: all."] = None,
    documents: Annotated[int | None, "Of each language, relevant ones first; None: all."] = None,
    pretraining_steps: Annotated[int, "Steps of the pretraining; the arm en takes half."] = 1_000,
    pretraining_batch_size: Annotated[int, "Pairs in a step of the pretraining."] = 1_024,
    finetuning_steps: Annotated[int, "The same in each arm."] = 100,
    **numbers: Any,
) -> Study:
    """Whether another language in the pretraining hurts English, at equally many pairs.

    Arms: en (English, half of the steps), en+en (English alone) and en+X for each other language.
    Corpora are cut to equal length. Each arm is compared with en+en on the same queries, raw and
    after the same fine-tuning.

    Example: tercet study examples/studies/english_gap.py --english en.jsonl --other de.jsonl
    --data mined.jsonl --test test/ --out runs/gap --pretraining-steps 200
    --pretraining-batch-size 128
    """
    steps, batch_size = pretraining_steps, pretraining_batch_size
    if steps < 2 or steps % 2:
        raise RecipeError(
            f"pretraining_steps must be even, since the arm en takes half of them; got {steps}"
        )
    sets = open_languages(test, queries=queries, documents=documents)
    parts = english_and_others(sets)
    corpora = equal_corpora(english, other, out / "data", batch_size=batch_size, rows=rows)
    arms = {HALF: ["en"], BOTH: ["en"]}
    arms |= {f"en+{lang}": ["en", lang] for lang in corpora if lang != "en"}
    sizes = {"pretraining_batch_size": batch_size, "finetuning_steps": finetuning_steps, **numbers}
    cells = []
    for name in arms:
        recipe = arctic_embed(pretraining_steps=steps // 2 if name == HALF else steps, **sizes)
        pretraining, finetuning = recipe.stages
        stages = (replace(pretraining, data=name), finetuning)
        cells.append(Cell(name, replace(recipe, stages=stages)))
    read = {name: [corpora[lang] for lang in langs] for name, langs in arms.items()}
    return Study(
        cells=cells,
        data={**read, "mined": data},
        sets=sets,
        report=partial(report, list(arms), parts),
    )


def equal_corpora(
    english: Path, others: Sequence[Path], folder: Path, *, batch_size: int, rows: int | None
) -> dict[str, Source]:
    """Write the beginnings of the files, equally long and in whole batches, and open them.

    So a pass over each corpus has equally many batches of one size.
    """
    found = {"en": open_source(english)}
    for path in others:
        source = open_source(path)
        lang = language_of(source)
        if not lang or lang in found:
            problem = f"language {lang!r} has a corpus already" if lang else "rows are in several"
            raise RecipeError(f"{path}: its {problem}; give a file of one other language")
        found[lang] = source
    least = min(rows or len(found["en"]), *map(len, found.values()))
    if least < batch_size:
        raise RecipeError(
            f"the smallest corpus has {least} pairs, and a batch {batch_size}; give more pairs, or "
            "a smaller --batch-size"
        )
    count = least // batch_size * batch_size
    for lang, source in found.items():
        path = folder / f"{lang}.jsonl"
        write_examples(path, islice(iter_examples(source.path), count))
        found[lang] = open_source(path)
    return found


def report(
    arms: list[str], parts: Mapping[str, tuple[str, ...]], results: Results
) -> Iterator[Table | Picture]:
    """Yield each arm in English and elsewhere, raw and fine-tuned, and its lead over en+en."""
    cells, leads = {name: name for name in arms}, leads_over(BOTH, arms)
    together = columns(parts)
    title = "English, and the mean of the other languages"
    yield results.table(title, cells, together, leads)
    alone = columns({name: (name,) for name in parts.get("others", ())})
    if alone:
        yield results.table("Each other language", cells, alone, leads)
    yield results.bars("gap", cells, together)


def columns(parts: Mapping[str, tuple[str, ...]]) -> list[Column]:
    """Return a column of each part after each stage."""
    return [
        Column(f"{name}, {stage}", (sets,), number)
        for name, sets in parts.items()
        for number, stage in enumerate(STAGES)
    ]
