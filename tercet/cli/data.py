"""Verbs about data: the demo, and what is in a file."""

from pathlib import Path
from typing import Annotated, Final

import typer

from tercet.console import columns, results, say, shortened
from tercet.data.check import DataReport, Quantiles, check_examples

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
    from tercet.demo import run_demo

    run_demo(out, data, steps=steps, seed=seed, console=results(), say=say)


def check(file: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file.")]) -> None:
    """Read a file of training data and say what is in it, or what is wrong with it.

    Example: tercet check pairs.jsonl
    """
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
