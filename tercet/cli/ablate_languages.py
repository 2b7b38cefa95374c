"""The verbs ``ablate english-gap`` and ``ablate arctic-embed``: what is measured by language."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tercet.cli.ablate import How, ablations, show, sources_of, trained
from tercet.errors import RecipeError
from tercet.files.console import say


def english_gap(
    english: Annotated[Path, typer.Option(help="Pairs in English.")],
    other: Annotated[
        list[Path], typer.Option(help="Pairs in another language, such as de.jsonl; an arm each.")
    ],
    data: Annotated[
        list[Path],
        typer.Option(help="Examples with negatives, to fine-tune every arm on; may be repeated."),
    ],
    test: Annotated[
        list[Path],
        typer.Option("--eval", help="Folder of LANG.jsonl, or such a file; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for cells, tables and figures.")],
    base: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "me5-small",
    rows: Annotated[
        int | None, typer.Option(help="Pairs of each corpus, at most; None: the smallest's.")
    ] = None,
    queries: Annotated[
        int | None, typer.Option(help="The first so many of each language; None: all.")
    ] = None,
    documents: Annotated[
        int | None,
        typer.Option(help="So many of each language, those that answer first; None: all."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the pretraining; of `en` half.")] = 1_000,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 1_024,
    learning_rate: Annotated[float, typer.Option(help="Of the pretraining.")] = 5e-5,
    finetuning_steps: Annotated[int, typer.Option(help="The same in each arm.")] = 100,
    finetuning_batch_size: Annotated[int, typer.Option(help="Queries a step.")] = 64,
    finetuning_learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 2e-5,
    negatives: Annotated[int, typer.Option(help="Of a query, at most.")] = 10,
    dims: Annotated[
        list[int] | None, typer.Option(help="Shorter widths to train too; None: 256.")
    ] = None,
    query_tokens: Annotated[int, typer.Option(help="In the pretraining.")] = 32,
    document_tokens: Annotated[int, typer.Option(help="In the pretraining.")] = 256,
    finetuning_tokens: Annotated[int, typer.Option(help="In the fine-tuning.")] = 512,
    freeze_embeddings: Annotated[
        bool, typer.Option(help="Leave the token table as it is.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Runs of each arm, from seed 0 on.")] = 1,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of matrix products.")
    ] = "float32",
    keep_models: Annotated[bool, typer.Option(help="Do not delete models once measured.")] = False,
) -> None:
    """Whether another language in the pretraining hurts English, at equally many pairs.

    Arms: en (English, half of the steps), en+en (English alone) and en+X for each other language.
    Corpora are cut to equal length. Each is compared with en+en on the same queries, raw and after
    the same fine-tuning. A killed run goes on when the same command is given again. Writes
    table.md, results.json and gap.png.

    Example: tercet ablate english-gap --english en.jsonl --other de.jsonl --other zh.jsonl
    --data mined.jsonl --eval test/ --out runs/gap --steps 200 --batch-size 128
    """
    from tercet.studies.gap import (
        equal_corpora,
        gap_cells,
        gap_tables,
        mixtures_of,
        require_english,
        write_gap,
    )
    from tercet.studies.languages import Budget, open_languages

    languages = open_languages(test, [], Budget(queries, documents))
    require_english(languages)
    corpora = equal_corpora(english, other, out / "data", batch_size=batch_size, rows=rows)
    others = list(corpora)[1:]
    numbers = {
        "base": base,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "finetuning_steps": finetuning_steps,
        "finetuning_batch_size": finetuning_batch_size,
        "finetuning_learning_rate": finetuning_learning_rate,
        "negatives": negatives,
        "dims": dims,
        "query_tokens": query_tokens,
        "document_tokens": document_tokens,
        "finetuning_tokens": finetuning_tokens,
        "freeze_embeddings": freeze_embeddings,
    }
    pairs = len(corpora["en"])
    say(f"{len(corpora)} corpora of {pairs:,} pairs; each arm reads {steps * batch_size:,} pairs")
    facts = {"ablation": "english-gap", "numbers": {**numbers, "pairs": pairs}, "seeds": seeds}
    mixtures = {**mixtures_of(corpora), "mined": sources_of(data)}
    how = How(out, seeds, precision, keep_models)
    sets = [language.examined for language in languages]
    found = trained(lambda seed: gap_cells(others, seed, **numbers), mixtures, sets, how)
    write_gap(out, found, languages, {**facts, "run": how.run})
    show(gap_tables(found, languages), out)


def arctic_embed(
    data: Annotated[
        list[Path],
        typer.Option(help="Pairs of the pretraining, a file a language; may be repeated."),
    ],
    mined: Annotated[
        list[Path],
        typer.Option(help="Examples with negatives, a file a language; may be repeated."),
    ],
    test: Annotated[
        list[Path],
        typer.Option("--eval", help="Folder of LANG.jsonl, or such a file; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for cells, tables and figures.")],
    part: Annotated[
        Literal["all", "data", "matryoshka", "thresholds", "filters"],
        typer.Option(help="What is changed; all: whatever the flags give something for."),
    ] = "all",
    threshold: Annotated[
        list[float] | None,
        typer.Option(help="Mine the pairs with it for a fine-tuning; may be repeated."),
    ] = None,
    filtered: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER or file: pairs that a filter kept; may be repeated."),
    ] = None,
    base: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "me5-small",
    queries: Annotated[
        int | None, typer.Option(help="The first so many of each language; None: all.")
    ] = None,
    documents: Annotated[
        int | None,
        typer.Option(help="So many of each language, those that answer first; None: all."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the pretraining.")] = 1_000,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 1_024,
    learning_rate: Annotated[float, typer.Option(help="Of the pretraining.")] = 5e-5,
    finetuning_steps: Annotated[int, typer.Option(help="Of the fine-tuning.")] = 100,
    finetuning_batch_size: Annotated[int, typer.Option(help="Queries a step.")] = 64,
    finetuning_learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 2e-5,
    negatives: Annotated[int, typer.Option(help="Of a query, at most.")] = 10,
    short: Annotated[int, typer.Option(help="Coordinates of a short vector.")] = 256,
    query_tokens: Annotated[int, typer.Option(help="In the pretraining.")] = 32,
    document_tokens: Annotated[int, typer.Option(help="In the pretraining.")] = 256,
    finetuning_tokens: Annotated[int, typer.Option(help="In the fine-tuning.")] = 512,
    freeze_embeddings: Annotated[
        bool, typer.Option(help="Leave the token table as it is.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Runs of each cell, from seed 0 on.")] = 1,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of matrix products.")
    ] = "float32",
    keep_models: Annotated[bool, typer.Option(help="Do not delete models once measured.")] = False,
) -> None:
    """Data of both stages, short vectors, thresholds of mining and filters, one at a time.

    Each cell is compared with the full one: all data in both stages, short vectors trained in both.
    A pretraining that several cells begin with is trained once. Figures are of whole vectors and of
    short ones. A killed ablation goes on when the same command is given again. Writes table.md,
    results.json and figures.

    Example: tercet ablate arctic-embed --data en.jsonl --data de.jsonl --mined mined-en.jsonl
    --mined mined-de.jsonl --eval test/ --out runs/ablation --steps 200 --batch-size 128
    """
    from tercet.studies.arctic import (
        Asked,
        arctic_cells,
        arctic_tables,
        at_widths,
        mixtures_of,
        require_bare,
        write_arctic,
    )
    from tercet.studies.languages import Budget, open_languages
    from tercet.studies.run import run_shared

    languages = open_languages(test, [], Budget(queries, documents))
    levels = dict(_level(each) for each in filtered or [])
    pairs = sources_of(data)
    if threshold:
        require_bare(pairs)
    kept = {name: sources_of([path]) for name, path in levels.items()}
    mixtures = mixtures_of(pairs, sources_of(mined), kept)
    numbers = {
        "base": base,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "finetuning_steps": finetuning_steps,
        "finetuning_batch_size": finetuning_batch_size,
        "finetuning_learning_rate": finetuning_learning_rate,
        "negatives": negatives,
        "dims": [short],
        "query_tokens": query_tokens,
        "document_tokens": document_tokens,
        "finetuning_tokens": finetuning_tokens,
        "freeze_embeddings": freeze_embeddings,
    }
    has_english = {"pairs-en", "mined-en"} <= mixtures.keys()
    asked = Asked(part, has_english, tuple(threshold or ()), tuple(levels), numbers)
    facts = {"ablation": "arctic-embed", "numbers": numbers, "seeds": seeds, "short": short}
    sets = [at_widths(language, short) for language in languages]
    how = How(out, seeds, precision, keep_models)
    found = trained(lambda s: arctic_cells(asked, s), mixtures, sets, how, ran=run_shared)
    write_arctic(out, found, languages, asked, {**facts, "run": how.run})
    show(arctic_tables(found, languages, asked, short), out)


def _level(named: str) -> tuple[str, Path]:
    """The name of a filter's level, and the file or folder that it kept."""
    name, equals, where = named.partition("=")
    if not (equals and name and where) or "/" in name:
        raise RecipeError(f"--filtered {named}: give NAME=FOLDER, such as 10=runs/filtered-10")
    return name, Path(where)


ablations.command("arctic-embed")(arctic_embed)
ablations.command("english-gap")(english_gap)
