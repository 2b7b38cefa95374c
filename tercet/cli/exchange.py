"""Verbs that read and write what Arctic-Embed's training code does."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tercet.errors import RecipeError
from tercet.files.console import columns, results, say

Rows = Annotated[list[Path], typer.Argument(help="Rows: .jsonl or .parquet files.")]
Root = Annotated[Path, typer.Argument(help="A folder with data/batch_... and metadata.json.")]
Model = Annotated[str, typer.Option(help="Whose tokenizer: zoo name, folder or hub id.")]
OutFile = Annotated[Path, typer.Option("--out", help="The rows: a .jsonl or .parquet file.")]
OutFolder = Annotated[Path, typer.Option("--out", help="A folder.")]


def from_arctic(
    folder: Annotated[
        Path, typer.Argument(help="With queries.parquet, documents.parquet and labels.parquet.")
    ],
    out: OutFile,
    mined: Annotated[
        Path | None, typer.Option(help="A table with RELEVANCE; below 0 are negatives.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where texts wait on the disk meanwhile.")] = Path(
        "runs/convert"
    ),
) -> None:
    """Make rows of Arctic-Embed's tables of queries, documents and labels.

    Example: tercet convert arctic tables/ --mined tables/mined.parquet --out rows.parquet
    """
    from tercet.curate.convert.arctic import TablesReport, examples_of_tables
    from tercet.data.files.sources import write_examples

    report = TablesReport()
    write_examples(out, examples_of_tables(folder, report, work=work, mined=mined))
    _show(report)


def to_arctic(files: Rows, out: OutFolder) -> None:
    """Write rows as Arctic-Embed's tables of queries, documents, labels and mined documents.

    Example: tercet convert to-arctic rows.parquet --out tables/
    """
    from tercet.curate.convert.arctic import write_tables

    _check_folder(out, files)
    _show(write_tables(out, _examples(files)))


def from_arctic_batches(root: Root, model: Model, out: OutFile) -> None:
    """Make rows of Arctic-Embed's batches of tokens; their texts are what the tokens stand for.

    Example: tercet convert arctic-batches batches/ --model me5-small --out rows.parquet
    """
    from tercet.curate.convert.arctic import examples_of_batch
    from tercet.curate.convert.arctic_batches import batch_folders, read_batch, read_metadata
    from tercet.data.files.sources import write_examples

    metadata, folders = read_metadata(root), batch_folders(root)
    if metadata.tokenizer_huggingface_id != model:
        say(f"tercet: note: made with the tokenizer of {metadata.tokenizer_huggingface_id}")
    stock = _embedder(model).tokenizer.stock
    before = {"query": metadata.query_prefix, "document": metadata.document_prefix}

    def decode(ids: Sequence[int], role: Any) -> str:
        text = stock.decode(ids, skip_special_tokens=True)
        return text.removeprefix(before[role]).removeprefix(before[role].rstrip()).strip()

    def rows() -> Iterator[Any]:
        for folder in folders:
            yield from examples_of_batch(read_batch(folder), decode)

    write_examples(out, rows())
    say(f"rows of {len(folders):,} batches are in {out}")


def to_arctic_batches(
    files: Rows,
    model: Model,
    out: OutFolder,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a text; the rest is cut.")] = 512,
) -> None:
    """Write rows as Arctic-Embed's batches of tokens, with a model's prompts in them.

    Example: tercet convert to-arctic-batches rows.parquet --model me5-small --out batches/
    """
    from tercet.curate.convert.arctic import token_batches
    from tercet.curate.convert.arctic_batches import BatchMetadata, write_batches

    _check_folder(out, files)
    embedder = _embedder(model)

    def tokenize(texts: Sequence[str], role: Any) -> list[np.ndarray]:
        return embedder.tokenize(texts, role, max_tokens=max_tokens).ids

    metadata = BatchMetadata(
        tokenizer_huggingface_id=model,
        batch_size=batch_size,
        max_seq_length=max_tokens,
        query_prefix=embedder.settings.prompt("query"),
        document_prefix=embedder.settings.prompt("document"),
    )
    count = write_batches(out, token_batches(_examples(files), tokenize, batch_size), metadata)
    say(f"{count:,} batches are in {out}")


def split_arctic_batches(
    root: Root,
    out: OutFolder,
    parts: Annotated[int, typer.Option(min=2, help="Of each batch.")] = 2,
) -> None:
    """Cut Arctic-Embed's batches into smaller ones by their queries; no positive is lost.

    Example: tercet convert arctic-split batches/ --parts 4 --out smaller/
    """
    from dataclasses import replace

    from tercet.curate.convert.arctic_batches import (
        batch_folders,
        read_batch,
        read_metadata,
        write_batches,
    )

    _check_folder(out, [root])
    metadata = read_metadata(root)
    smaller = replace(metadata, batch_size=-(-metadata.batch_size // parts))
    batches = (part for folder in batch_folders(root) for part in read_batch(folder).split(parts))
    say(f"{write_batches(out, batches, smaller):,} batches are in {out}")


def _examples(files: Sequence[Path]) -> Iterator[Any]:
    from tercet.data.files.sources import iter_examples

    for file in files:
        yield from iter_examples(file)


def _embedder(model: str) -> Any:
    from tercet.cli.options import load

    return load(model, "float32")


def _check_folder(out: Path, inputs: Sequence[Path]) -> None:
    """Stop before anything is read where the result would take the place of an input."""
    if out.is_file() or any(each.resolve().is_relative_to(out.resolve()) for each in inputs):
        raise RecipeError(f"{out}: is read, or a file; give another folder with --out")


def _show(report: Any) -> None:
    table = columns("queries", "rows", "without a label", "negatives")
    counts = (report.queries, report.rows, report.unanswered, report.negatives)
    table.add_row(*(f"{count:,}" for count in counts))
    results().print(table)
