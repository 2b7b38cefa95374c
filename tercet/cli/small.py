"""Verbs for vectors in few bytes: learn the ranges of their codes, and see what they cost."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
import typer

from tercet.cli.options import ModelName, Precision, load
from tercet.errors import DataError, RecipeError
from tercet.files.atomic import replacing_file
from tercet.files.console import columns, results, say
from tercet.models.zoo import zoo

if TYPE_CHECKING:
    from tercet.evaluate.measures.retention import Retained

_FEW: Final = 100  # texts, below which a range says little of others

DimsOption = Annotated[
    list[int] | None,
    typer.Option("--dims", help="Coordinates to keep; may be repeated. None: those trained for."),
]


def calibrate(
    model: ModelName,
    texts: Annotated[
        Path, typer.Argument(help="Documents such as will be searched (.txt, .jsonl, .parquet).")
    ],
    dims: DimsOption = None,
    save: Annotated[bool, typer.Option("--save", help="Keep them in the model's folder.")] = False,
    most: Annotated[int, typer.Option(min=1, help="Texts that are taken, at equal distances.")] = (
        5_000
    ),
    text_field: Annotated[str, typer.Option(help="Of a .jsonl or .parquet file.")] = "text",
    precision: Precision = "float32",
) -> None:
    """Learn the ranges in which coordinates become codes of 8, 4 and 1 bits.

    For each number of coordinates that is kept: the centre of these texts' vectors, and how far
    codes reach on either side of it, chosen for the smallest error. What is beyond it is cut. The
    error is the usual distance of a vector from what its codes stand for. With --save, eval and
    sizes use them from then on; the model's vectors and sentence-transformers' files stay as they
    are.

    Example: tercet calibrate runs/mine/model documents.jsonl --dims 256 --save
    """
    from tercet.data.files.texts import evenly_spaced, read_texts
    from tercet.models.settings import require_settings, save_ranges
    from tercet.rank.quantized import PRECISIONS, Ranges, bytes_of, truncated

    folder = zoo.resolve(model, say)
    if save:
        require_settings(folder, "ranges of codes")
    taken = evenly_spaced((text for text in read_texts(texts, text_field) if text.strip()), most)
    if not taken:
        raise DataError(texts, None, "holds no text; give some thousands of documents")
    if len(taken) < _FEW:
        say(f"{texts}: {len(taken)} texts are few to learn a range from; give some thousands")
    embedder = load(model, precision)
    widths = _widths(embedder, dims)
    vectors = embedder.encode(taken, "document", progress=True)
    found: dict[int, Ranges] = {}
    table = columns("coordinates", "codes", "range", "beyond it", "error", "bytes")
    for kept in widths:
        some = vectors if kept == embedder.dim else truncated(vectors, kept)
        found[kept] = Ranges.learned(some)
        distances = some - np.array(found[kept].centre, dtype=np.float32)
        for each in map(found[kept].quantizer, PRECISIONS):
            beyond = float((np.abs(distances) > each.limit).mean())
            error = ((each.rounded(distances) - distances) ** 2).sum(axis=1).mean() ** 0.5
            shown = (f"{each.limit:.4f}", f"{beyond:.2%}", f"{error:.4f}")
            table.add_row(str(kept), each.precision, *shown, str(bytes_of(each.precision, kept)))
    results().print(table)
    if save:
        save_ranges(folder, found)
        results().print(f"{folder}: keeps these ranges", soft_wrap=True)
    else:
        say("nothing was saved; give --save to keep them with the model")


def sizes(
    model: ModelName,
    data: Annotated[
        Path,
        typer.Argument(
            help="Examples (.jsonl, .parquet), or a folder in the layout of BEIR or FlagEmbedding."
        ),
    ],
    dims: DimsOption = None,
    split: Annotated[str | None, typer.Option(help="Of a folder; None: its only one.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Use the model's prompts for it; None: what the data is called."),
    ] = None,
    metric: Annotated[str, typer.Option(help="What is compared.")] = "ndcg@10",
    factor: Annotated[
        int, typer.Option(min=1, help="Candidates for each place, which are scored again.")
    ] = 4,
    precision: Precision = "float32",
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    figures: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file too.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this PNG file.")] = None,
) -> None:
    """Show how well documents are found when their vectors are stored in fewer bytes.

    Texts are encoded once. Each number of coordinates is measured in float32 and in codes of 8, 4
    and 1 bits, with the queries as they are. binary+int8 finds candidates by the signs of documents
    and scores these again by int8 codes, which may stay on the disk. The difference to all
    coordinates in float32 has a 95 % interval over the same queries.

    Example: tercet sizes runs/mine/model test.jsonl --dims 256 --plot sizes.png
    """
    from tercet.evaluate.measures.prompts import known_task, task_names
    from tercet.evaluate.measures.retention import retention
    from tercet.evaluate.sets.retrieval_set import RetrievalSet, depth_of

    depth_of(metric)  # refuses an unknown one before the work
    if split is not None and not data.is_dir():
        raise RecipeError(f"{data}: --split is of a folder, and this is none; leave it out")
    is_folder = data.is_dir()
    examined = (
        RetrievalSet.from_folder(data, split) if is_folder else RetrievalSet.from_examples(data)
    )
    embedder = load(model, precision)
    if task is not None:
        embedder.settings.prompt("query", task)  # refuses an unknown one
    found = retention(
        embedder,
        examined,
        task=task or known_task(embedder.settings, task_names(data, examples=not is_folder)),
        dims=_widths(embedder, dims),
        names=(metric,),
        factor=factor,
        progress=True,
    )
    results().print(f"{len(examined.queries):,} queries, {len(examined.documents):,} documents")
    _show(found, metric, seed)
    if learned := dict.fromkeys(str(each.dims) for each in found if each.learned):
        say(
            f"the ranges of codes of {', '.join(learned)} coordinates were learned from the "
            "documents of this set, never from its queries; keep some with the model: "
            "tercet calibrate"
        )
    if figures is not None:
        _write(figures, {"data": str(data), "model": str(model)}, found, metric, seed)
    if plot is not None:
        _draw(plot, found, metric, seed)


def _widths(embedder: Any, dims: Sequence[int] | None) -> list[int]:
    """What was asked for, or all coordinates and the numbers that the model was trained for."""
    wanted = sorted(set(dims or (embedder.dim, *embedder.settings.dims)), reverse=True)
    if wrong := [kept for kept in wanted if not 0 < kept <= embedder.dim]:
        raise RecipeError(
            f"--dims {wrong[0]}: the model's vectors have {embedder.dim} coordinates; choose fewer"
        )
    if dims and (untrained := set(wanted) - {embedder.dim, *embedder.settings.dims}):
        numbers = ", ".join(map(str, sorted(untrained)))
        say(f"the model was not trained to be cut to {numbers} coordinates; that costs more")
    return wanted


def _show(found: "Sequence[Retained]", metric: str, seed: int) -> None:
    full = found[0]
    best = full.result.mean(metric)
    table = columns("coordinates", "stored as", "bytes", metric, "minus the first", "kept")
    for each in found:
        value, loss = each.result.interval(metric, seed), each.minus(full, metric, seed)
        shown = f"{loss.mean:+.3f} [{loss.low:+.3f}, {loss.high:+.3f}]"
        share = f"{value.mean / best:.1%}" if best else ""
        row = (str(each.dims), each.stored, f"{each.bytes:,}", str(value))
        table.add_row(*row, "" if each is full else shown, share)
    results().print(table)


def _write(
    path: Path, about: dict[str, str], found: "Sequence[Retained]", metric: str, seed: int
) -> None:
    rows = [
        {
            "dims": each.dims,
            "stored": each.stored,
            "bytes": each.bytes,
            "limit": each.limit,
            "learned_here": each.learned,
            metric: asdict(each.result.interval(metric, seed)),
            "minus_first": asdict(each.minus(found[0], metric, seed)),
        }
        for each in found
    ]
    with replacing_file(path) as fresh:
        text = json.dumps({**about, "metric": metric, "rows": rows}, indent=2, ensure_ascii=False)
        fresh.write_text(text + "\n", encoding="utf-8")


def _draw(path: Path, found: "Sequence[Retained]", metric: str, seed: int) -> None:
    from tercet.evaluate.report.figures import Point, curves, drawing, write_png

    lines: dict[str, list[Point]] = {}
    for each in found:
        point = Point(float(each.bytes), each.result.interval(metric, seed), str(each.dims))
        lines.setdefault(each.stored, []).append(point)
    with drawing():
        write_png(path, curves(lines, x="bytes a vector", y=metric))
