"""Verbs that turn texts into vectors, and search among them."""

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from tercet.cli.loading import (
    Echo,
    ModelName,
    PoolingOption,
    Precision,
    ReadingOption,
    load,
    where,
)
from tercet.console import columns, one_line, results, say, shortened
from tercet.data.documents import Document, read_documents
from tercet.data.texts import read_texts
from tercet.errors import IndexFolderError, ModelError, RecipeError
from tercet.files import replacing_file
from tercet.search.engine import Fusion, FusionName, ReciprocalRank, Rerank, Value, Weighted
from tercet.vectors import KINDS, Kind, Vectors, Weights


def encode(
    model: ModelName,
    file: Annotated[Path, typer.Argument(help="Texts: .txt (one a line), .jsonl or .parquet.")],
    out: Annotated[Path, typer.Option(help="A .npy file of float32 vectors; .npz of parts.")],
    role: Annotated[Literal["query", "document"], typer.Option(help="Decides the prompt.")] = (
        "document"
    ),
    text_field: Annotated[str, typer.Option(help="Where the text is in a record.")] = "text",
    task: Annotated[str | None, typer.Option(help="Take this task's prompts.")] = None,
    dims: Annotated[int | None, typer.Option(help="Keep so many coordinates.")] = None,
    output: Annotated[
        Literal["texts", "tokens", "words"], typer.Option(help="What gets a vector.")
    ] = "texts",
    attention: ReadingOption = None,
    pooling: PoolingOption = None,
    echo: Echo = False,
    precision: Precision = "float32",
) -> None:
    """Turn texts into vectors: a row of the output for each, or for each token or word.

    With tokens or words the output is an .npz file: vectors of all texts, and in offsets where
    each text begins.

    Example: tercet encode minilm texts.txt --out vectors.npy
    """
    kind = ".npy" if output == "texts" else ".npz"
    if out.suffix in (".npy", ".npz") and out.suffix != kind:
        raise RecipeError(f"{out}: vectors of {output} are a {kind} file; name it so")
    texts = list(read_texts(file, text_field))
    embedder = load(model, precision, attention=attention, pooling=pooling, echo=echo)
    if output != "texts":
        with replacing_file(out) as fresh:
            parts = embedder.encode(texts, role, task=task, dims=dims, progress=True, output=output)
            offsets = np.cumsum([0, *map(len, parts)])
            with fresh.open("wb") as opened:
                np.savez(opened, vectors=np.concatenate(parts), offsets=offsets)
        count = f"{offsets[-1]:,} {output} of {len(texts):,} texts"
        results().print(f"{out}: vectors of {count}", soft_wrap=True)
        return
    with replacing_file(out) as fresh:  # before the work: a place that is closed to us shows early
        vectors = embedder.encode(texts, role, task=task, dims=dims, progress=True)
        with fresh.open("wb") as opened:
            np.save(opened, vectors)
    results().print(
        f"{out}: {vectors.shape[0]:,} vectors of {vectors.shape[1]} dimensions", soft_wrap=True
    )


def index(
    model: ModelName,
    file: Annotated[Path, typer.Argument(help="Documents: .jsonl, .parquet or .txt.")],
    out: Annotated[Path, typer.Option(help="Index folder.")],
    text_field: Annotated[str, typer.Option(help="Where the text is in a record.")] = "text",
    title_field: Annotated[str, typer.Option(help="Where the title is.")] = "title",
    id_field: Annotated[str, typer.Option(help="Where the id is.")] = "id",
    kinds: Annotated[
        str | None, typer.Option(help="Such as dense,sparse,multi; None: all that the model makes.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Take this task's prompts and weights.")] = None,
    dims: Annotated[int | None, typer.Option(help="Keep so many coordinates.")] = None,
    precision: Precision = "float32",
    engine: Annotated[
        Literal["exact", "qdrant"], typer.Option(help="exact compares with every document.")
    ] = "exact",
    url: Annotated[str | None, typer.Option(help="Of a Qdrant server, to keep it there.")] = None,
    collection: Annotated[str, typer.Option(help="Its name on the server.")] = "tercet",
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="Keep what is in the index and not in the file; always on a server."
        ),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew, where there is an index already.")
    ] = False,
) -> None:
    """Encode documents and write an index folder to search in.

    The other fields of a document are kept, and a search can ask for their values. Called again,
    it encodes what is new or has changed; so a call that was killed goes on where it was.

    Example: tercet index runs/mine/model docs.jsonl --out runs/mine/index
    """
    from tercet.search.indexing import expected_bytes, index_documents, settings_of
    from tercet.search.opening import About, make_engine, write_about

    if url is not None and engine == "exact":
        raise RecipeError("--url is of a Qdrant server; add --engine qdrant")
    embedder = load(model, precision)
    chosen = _kinds(kinds, embedder.kinds)

    def read() -> Iterator[Document]:
        return read_documents(
            file,
            text_field=text_field,
            title_field=title_field,
            id_field=id_field,
            keep_fields=True,
        )

    def encoded(texts: Sequence[str]) -> Vectors:
        return embedder.encode_vectors(texts, "document", kinds=chosen, task=task, dims=dims)

    count, sizes = expected_bytes(read(), encoded)
    parts = ", ".join(f"{kind} {_size(size)}" for kind, size in sizes.items())
    say(f"{count:,} documents; their vectors will take about {_size(sum(sizes.values()))}: {parts}")
    about = About(
        engine=engine if url is None else "cluster",
        url=url,
        collection=None if url is None else collection,
        settings=settings_of(
            embedder,
            model=where(model),
            kinds=chosen,
            task=task,
            dims=dims,
            precision=precision,
        ),
    )
    with closing(make_engine(out, about, fresh=fresh)) as opened:
        done = index_documents(opened, read(), encoded, total=count, keep=keep or url is not None)
        held = opened.stats().records
    write_about(out, about)
    results().print(f"{out}: {held:,} documents", soft_wrap=True)
    if done.unchanged or done.removed:
        say(
            f"{done.encoded:,} encoded, {done.unchanged:,} as they were, {done.removed:,} removed "
            f"because {file} lacks them"
        )
    say(f'search it: tercet search {out} "your question"')


def search(
    folder: Annotated[Path, typer.Argument(help="Index folder.")],
    queries: Annotated[list[str], typer.Argument(help="One or more questions.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Hits of each.")] = 5,
    weights: Annotated[
        str | None,
        typer.Option(help="Of dense, sparse, multi: 1,0.3,1. None: those tuned for the model."),
    ] = None,
    fusion: Annotated[
        FusionName, typer.Option(help="Rank by the sum, by ranks, or the best dense ones anew.")
    ] = "weighted",
    candidates: Annotated[
        int, typer.Option(min=0, help="Of each kind, to be looked at; 0: all documents.")
    ] = 100,
    only: Annotated[
        list[str] | None,
        typer.Option("--where", help="A field and its value: section=web. Repeat for more."),
    ] = None,
) -> None:
    """Answer questions from an index.

    A --where of a field that is named before gives one more value that it may have.

    Example: tercet search runs/mine/index "a small web server" --weights 1,0.3,1
    """
    from tercet.search.opening import about_index, open_engine, require

    if not all(query.strip() for query in queries):
        raise RecipeError("a query is blank; say what to look for")
    about = about_index(folder)
    wanted = _where(only or [])
    given = None if weights is None else _weights(weights)
    names = ("model", "precision", "kinds", "task", "dims")
    model, precision, kinds, task, dims = (about.setting(folder, name) for name in names)
    try:
        embedder = load(model, precision)
    except ModelError as error:
        raise IndexFolderError(f"{folder}: its model cannot be loaded: {error}") from error
    require(folder, about, {"fingerprint": embedder.fingerprint()})
    if not about.complete:
        say(f"tercet: note: {folder}: not all documents are there yet; call tercet index again")
    tuned = embedder.settings.weights
    usual = tuned.get(task or "", tuned.get("", Weights()))
    vectors = embedder.encode_vectors(queries, "query", kinds=kinds, task=task, dims=dims)
    how = _fusion(fusion, given, usual, candidates)
    with closing(open_engine(folder, read_only=True)) as opened:
        found = opened.search(vectors, k, fusion=how, where=wanted)
    out = results()
    shown: Sequence[Kind] = kinds if len(kinds) > 1 else ()
    for query, hits in zip(queries, found, strict=True):
        out.print(one_line(query), style="bold")
        table = columns("score", *shown, "id", "title")
        for hit in hits:
            parts = (f"{hit.scores[kind]:.3f}" if kind in hit.scores else "-" for kind in shown)
            title = shortened(hit.record.title or hit.record.text)
            table.add_row(f"{hit.score:.3f}", *parts, one_line(hit.record.id), title)
        out.print(table)


def _kinds(named: str | None, made: Sequence[Kind]) -> tuple[Kind, ...]:
    """The kinds that are named, in their usual order, or all that the model makes."""
    if named is None:
        return tuple(made)
    words = {word.strip() for word in named.split(",")}
    if not words <= set(made):
        raise RecipeError(
            f"--kinds {named}: the model makes {', '.join(made)} vectors; name some of these"
        )
    return tuple(kind for kind in KINDS if kind in words)


def _size(count: int) -> str:
    """So many bytes, in a unit that leaves few digits."""
    size, units = float(count), ["bytes", "KB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:,.0f} {units[0]}"


def _weights(text: str) -> Weights:
    try:
        dense, sparse, multi = map(float, text.split(","))
    except ValueError:
        dense = sparse = multi = -1.0
    if not all(isfinite(weight) and weight >= 0 for weight in (dense, sparse, multi)):
        raise RecipeError(
            f"--weights {text}: give three numbers that are not negative, of dense, sparse and "
            "multi, such as 1,0.3,1"
        )
    return Weights(dense, sparse, multi)


def _fusion(name: FusionName, given: Weights | None, usual: Weights, candidates: int) -> Fusion:
    """The fusion of this name; of ranks, those kinds count that have a weight, or all."""
    weights = given or usual
    if name == "weighted":
        return Weighted(weights=weights, candidates=candidates or None)
    if candidates == 0:
        raise RecipeError(f"--candidates 0: {name} needs some; only weighted can look at all")
    if name == "rerank":
        return Rerank(weights=weights, candidates=candidates)
    kinds: tuple[Kind, ...] = ReciprocalRank().kinds
    if given is not None:
        kinds = tuple(kind for kind in KINDS if given.of(kind))
    return ReciprocalRank(kinds=kinds, candidates=candidates)


def _where(conditions: Sequence[str]) -> dict[str, list[Value]]:
    """Fields and the values that they may have; what looks like a number may be one."""
    found: dict[str, list[Value]] = {}
    for condition in conditions:
        name, equals, text = condition.partition("=")
        if not name or not equals:
            raise RecipeError(f"--where {condition}: write a field and its value, as section=web")
        values = found.setdefault(name, [])
        values.append(text)
        if text in ("true", "false"):
            values.append(text == "true")
        for number in (int, float):
            with suppress(ValueError):
                values.append(number(text))
    return found
