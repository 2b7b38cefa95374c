"""Verbs about data: the demo, and what is in a file or a folder."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from tercet.cli.options import shown_progress
from tercet.data.files.texts import text_key
from tercet.data.report import (
    CheckOptions,
    CountTokens,
    DataReport,
    SourceReport,
    TextReport,
    check_data,
)
from tercet.errors import RecipeError
from tercet.files.artifacts import write_json
from tercet.files.console import columns, results, say, shortened
from tercet.types import Role

EXAMPLES: Final = Path("examples/data/packages.en.parquet")
_COUNTS: Final = ("with_negatives", "distinct_queries", "distinct_documents", "duplicate_pairs")


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
    """Read training data and report what is in it, by source and language, and what is wrong.

    Example: tercet check sources/ --model me5-small --document-tokens 256 --against test.jsonl
    """
    if batch_size < 2:
        raise RecipeError(f"--batch-size must be at least 2, got {batch_size}")
    if model is None and (query_tokens or document_tokens):
        raise RecipeError("tokens are counted with a model's tokenizer; name one with --model")
    options = CheckOptions(
        batch_size=batch_size,
        tokens=None if model is None else _token_counter(model),
        query_tokens=query_tokens,
        document_tokens=document_tokens,
        against={name: keys for each in against or () for name, keys in _keys(each).items()},
    )
    with shown_progress(f"read {file.name}") as progress:
        report = check_data([file], options, progress)
    if report.total is not None:
        _show(report, report.total, options)
    for warning in report.warnings:
        say(f"tercet: note: {warning}")
    for error in report.errors:
        say(f"tercet: {error}")
    if json is not None:
        record = asdict(report)
        del record["samples"]
        write_json(json, {"batch_size": batch_size, "model": model, **record})
    if plot is not None and report.sources:
        _draw(plot, report.sources)
    if report.errors:
        raise typer.Exit(2)


def _token_counter(model: str) -> CountTokens:
    """Count tokens together with the prompts that the model puts before a text."""
    from tercet.models.formats.parts import settings_of
    from tercet.models.tokens import Tokenizer, load_tokenizer
    from tercet.models.zoo.zoo import resolve

    place = resolve(model)
    tokenizer, settings = Tokenizer(load_tokenizer(place)), settings_of(model, Path(place))

    def count(texts: Sequence[str], role: Role) -> list[int]:
        return tokenizer(texts, 1_000_000, settings.prompt(role)).lengths

    return count


def _keys(path: Path) -> dict[str, set[int]]:
    """Return the keys of the texts of an evaluation set, or of each set in a folder, by name."""
    from tercet.curate.convert.decontaminate import evaluation_texts

    sets = [path]
    if path.is_dir() and not (path / "corpus.jsonl").is_file():
        sets = sorted(each for each in path.iterdir() if not each.name.startswith("."))
        if not sets:
            raise RecipeError(f"{path}: holds no evaluation set; name a file or a folder of BEIR")
    return {each.name: {text_key(text) for text in evaluation_texts(each)} for each in sets}


def _show(report: DataReport, total: SourceReport, options: CheckOptions) -> None:
    out = results()
    mixture = columns("source", "lang", "rows", "share", "batches", "duplicate pairs")
    for each in (*report.sources, total):
        duplicates = f"{each.duplicate_pairs / each.pairs:.1%}"
        counts = [f"{each.rows:,}", f"{each.share:.1%}", f"{each.batches:,}", duplicates]
        mixture.add_row(each.source, each.lang or "-", *counts)
    out.print(mixture)
    counts = columns("what", "count")
    counts.add_row("examples", f"{total.rows:,}")
    for name in _COUNTS:
        counts.add_row(name.replace("_", " "), f"{getattr(total, name):,}")
    counts.add_row("positives per query", f"{total.positives_per_query:.2f}")
    out.print(counts)
    unit = "words" if options.tokens is None else "tokens"
    lengths = columns(
        "source", "lang", unit, "least", "25 %", "median", "75 %", "95 %", "most", "truncated"
    )
    for each in report.sources:
        for role, texts in (("query", each.queries), ("document", each.documents)):
            lengths.add_row(each.source, each.lang or "-", role, *_shown(texts))
    out.print(lengths)
    if options.against:
        overlap = columns("source", "lang", *options.against)
        for each in report.sources:
            found = [f"{each.overlap.get(name, 0):,}" for name in options.against]
            overlap.add_row(each.source, each.lang or "-", *found)
        out.print("rows with a text of an evaluation set", style="bold")
        out.print(overlap)
    for number, example in enumerate(report.samples, start=1):
        out.print(f"sample {number}", style="bold")
        out.print(f"  query     {shortened(example.query)}")
        out.print(f"  positive  {shortened(example.positives[0])}")
        if example.negatives:
            out.print(f"  negative  {shortened(example.negatives[0])}")


def _shown(texts: TextReport) -> list[str]:
    quantiles = asdict(texts.words if texts.tokens is None else texts.tokens).values()
    truncated = "-" if texts.truncated is None else f"{texts.truncated:.1%}"
    return [*(f"{number:,.0f}" for number in quantiles), truncated]


def _draw(path: Path, reports: Sequence[SourceReport]) -> None:
    from tercet.evaluate.report.figures import drawing, mixture_bars, write_png

    shares: dict[str, dict[str, float]] = {}
    for each in reports:
        shares.setdefault(each.source, {})[each.lang] = each.share
    with drawing():
        write_png(path, mixture_bars(shares))
