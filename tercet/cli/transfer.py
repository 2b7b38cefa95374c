"""The verb ``transfer``: what a series of checkpoints is worth in each language."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tercet.cli.ablate import sources_of
from tercet.cli.options import whole_numbers
from tercet.files.console import columns, results, say


def transfer(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="A run folder with --models-at, or several models in order."),
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Examples with negatives to fine-tune on; may be repeated. FILE:2 weighs."
        ),
    ],
    test: Annotated[
        list[Path],
        typer.Option("--eval", help="Folder of LANG.jsonl, or such a file; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for cells, figures and report.html.")],
    seen: Annotated[
        str, typer.Option(help="Languages of the pretraining, with commas, such as en,de.")
    ],
    reference: Annotated[
        int | None,
        typer.Option(help="Step that the last is compared with; None: the first at 6 % or later."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of the fine-tunings, with commas.")] = "0,1,2",
    queries: Annotated[
        int | None, typer.Option(help="The first so many of each language; None: all.")
    ] = None,
    documents: Annotated[
        int | None,
        typer.Option(help="So many of each language, those that answer first; None: all."),
    ] = None,
    finetuning_steps: Annotated[int, typer.Option(help="The same of each checkpoint.")] = 100,
    finetuning_batch_size: Annotated[int, typer.Option(help="Queries a step.")] = 64,
    finetuning_learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 2e-5,
    negatives: Annotated[int, typer.Option(help="Of a query, at most.")] = 10,
    finetuning_tokens: Annotated[int, typer.Option(help="Longer texts are cut.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of the softmax over documents.")] = 0.02,
    dims: Annotated[
        list[int] | None, typer.Option(help="Shorter widths to train; None: 256.")
    ] = None,
    matryoshka: Annotated[bool, typer.Option(help="Train shorter widths too.")] = True,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train low-rank updates of this rank instead of all.")
    ] = None,
    freeze_embeddings: Annotated[
        bool, typer.Option(help="Leave the token table as it is.")
    ] = False,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of matrix products.")
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="None: a GPU if there is one.")] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="For activations; None: half of what is free.")
    ] = None,
    keep_models: Annotated[bool, typer.Option(help="Do not delete models once measured.")] = False,
) -> None:
    """Show what each language gains or loses along a training, raw and after the same fine-tuning.

    Each checkpoint is measured as it is, and after one short fine-tuning with each seed. A killed
    diagnosis goes on when the same command is given again. Writes transfer.json, transfer.png and
    report.html; the score of each query stays in cells/*/answers.npz.

    Example: tercet transfer runs/pretrained --data mined.jsonl --eval test/ --seen en,de,fr
    --out runs/transfer --finetuning-steps 100 --queries 300
    """
    from tercet.files.atomic import sole_writer
    from tercet.studies.languages import Budget, open_languages
    from tercet.studies.run import Bench
    from tercet.studies.transfer import Transfer, checkpoints_of, reference_of, run_transfer
    from tercet.studies.transfer_tables import NOTE, by_heading, transfer_table, write_transfer
    from tercet.train.recipe import Run

    drawn = whole_numbers("seeds", seeds)
    series = checkpoints_of(checkpoints)
    steps = [each.step for each in series]
    place = reference_of(steps, reference)
    named = [lang.strip() for lang in seen.split(",") if lang.strip()]
    languages = open_languages(test, named, Budget(queries, documents))
    sources = sources_of(data)
    numbers = {
        "finetuning_steps": finetuning_steps,
        "finetuning_batch_size": finetuning_batch_size,
        "finetuning_learning_rate": finetuning_learning_rate,
        "negatives": negatives,
        "finetuning_tokens": finetuning_tokens,
        "temperature": temperature,
        "dims": dims,
        "matryoshka": "finetuning" if matryoshka else "none",
        "lora_rank": lora_rank,
        "freeze_embeddings": freeze_embeddings,
    }
    for language in languages:
        known = "seen" if language.seen else "not seen"
        say(f"{language.name}: {language.family}, {known}, {language.examined.size}")
    run = Run(precision=precision, device=device, memory_gb=memory_gb)
    sets = [language.examined for language in languages]
    bench = Bench({"mined": sources}, sets, out, run, keep_models)
    with sole_writer(out):
        raw, tuned = run_transfer(series, bench, numbers, drawn, say)
        found = Transfer(languages, steps, raw, tuned, place)
        facts = {"finetuning": numbers, "seeds": list(drawn), "precision": precision}
        facts |= {"checkpoints": [str(each.folder) for each in series]}
        write_transfer(out, found, facts)
    for heading, groups in by_heading(found).items():
        header, *rows = transfer_table(found, groups)
        results().print(f"\n{heading}")
        table = columns(*header)
        for row in rows:
            table.add_row(*row)
        results().print(table)
    results().print(f"\n{NOTE}\n{out / 'transfer.png'}", soft_wrap=True)
