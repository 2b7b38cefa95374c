"""Verbs about data: the demo, and what is in a file."""

from pathlib import Path
from typing import Annotated, Final

import typer

from tercet.data.report import DataReport, Quantiles, check_examples
from tercet.files.console import columns, results, say, shortened

EXAMPLES: Final = Path("examples/data/packages.en.parquet")


def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(help="Debian package descriptions.")] = EXAMPLES,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    seed: Annotated[int, typer.Option(help="Of batches and dropout.")] = 0,
) -> None:
    """Fine-tune a small model on real texts, measure the gain, and search, in minutes.

    Example: tercet demo --out runs/demo
    """
    from tercet.cli.demo import run_demo

    run_demo(out, data, steps=steps, seed=seed, console=results(), say=say)


def check(
    file: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file, or a folder.")],
    batch_size: Annotated[int, typer.Option(help="To count batches an epoch.")] = 256,
    model: Annotated[
        str | None, typer.Option(help="Count the tokens of its tokenizer, on a sample.")
    ] = None,
    query_tokens: Annotated[int | None, typer.Option(help="Where queries will be cut.")] = None,
    document_tokens: Annotated[int | None, typer.Option(help="And documents.")] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Evaluation sets, or a folder of them: count rows that stand there."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the mixture into this PNG.")] = None,
) -> None:
    """Read training data and say what is in it, or what is wrong with it.

    A folder is told source by source and language by language, and so is a file for which one of
    the options is given.

    Example: tercet check sources/ --model me5-small --document-tokens 256 --against test.jsonl
    """
    if file.is_dir() or any((model, query_tokens, document_tokens, against, json, plot)):
        from tercet.cli.survey import Asked, check_sources

        limits = (query_tokens, document_tokens)
        check_sources(file, Asked(batch_size, model, limits, tuple(against or ()), json, plot))
        return
    report = check_examples(file)
    if report.examples:
        _show(report)
    for warning in report.warnings:
        say(f"tercet: note: {warning}")
    for error in report.errors:
        say(f"tercet: {error}")
    if report.errors:
        raise typer.Exit(2)


def _show(report: DataReport) -> None:
    out = results()
    counts = columns("what", "count")
    for name in ("examples", "with_negatives", "distinct_queries", "distinct_documents"):
        counts.add_row(name.replace("_", " "), f"{getattr(report, name):,}")
    counts.add_row("positives per query", f"{report.positives_per_query:.2f}")
    counts.add_row("duplicate pairs", f"{report.duplicate_pairs:,}")
    out.print(counts)
    lengths = columns("words", "least", "25 %", "median", "75 %", "95 %", "most")
    for name, found in (("query", report.query_lengths), ("document", report.document_lengths)):
        lengths.add_row(name, *_shown(found.words))
    out.print(lengths)
    for number, example in enumerate(report.samples, start=1):
        out.print(f"sample {number}", style="bold")
        out.print(f"  query     {shortened(example.query)}")
        out.print(f"  positive  {shortened(example.positives[0])}")
        if example.negatives:
            out.print(f"  negative  {shortened(example.negatives[0])}")


def _shown(numbers: Quantiles) -> list[str]:
    return [f"{number:,.0f}" for number in numbers]
