"""Verbs that turn texts into vectors, and search among them."""

from collections.abc import Iterator
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
from tercet.data.documents import read_documents
from tercet.data.texts import read_texts
from tercet.errors import IndexFolderError, ModelError, RecipeError
from tercet.files import replacing_file


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
    dims: Annotated[int | None, typer.Option(help="Keep so many coordinates.")] = None,
    precision: Precision = "float32",
) -> None:
    """Encode documents and write an index folder to search in.

    Example: tercet index runs/mine/model docs.jsonl --out runs/mine/index
    """
    from tercet.search.exact import ExactIndex

    fields = {"text_field": text_field, "title_field": title_field, "id_field": id_field}
    embedder = load(model, precision)

    def vectors() -> Iterator[np.ndarray]:
        texts: list[str] = []
        for document in read_documents(file, **fields):
            texts.append(document.text)
            if len(texts) == 20_000:
                yield embedder.encode(texts, "document", dims=dims, progress=True)
                texts.clear()
        if texts:
            yield embedder.encode(texts, "document", dims=dims, progress=True)

    built = ExactIndex.build(
        out,
        vectors=vectors(),
        documents=((d.id, d.title, d.text) for d in read_documents(file, **fields)),
        settings={
            "model": where(model),
            "fingerprint": embedder.fingerprint(),
            "dims": dims,
            "precision": precision,
        },
    )
    results().print(f"{out}: {len(built):,} documents", soft_wrap=True)
    say(f'search it: tercet search {out} "your question"')


def search(
    folder: Annotated[Path, typer.Argument(help="Index folder.")],
    queries: Annotated[list[str], typer.Argument(help="One or more questions.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Hits of each.")] = 5,
) -> None:
    """Answer questions from an index.

    Example: tercet search runs/mine/index "a small web server"
    """
    from tercet.search.exact import ExactIndex

    if not all(query.strip() for query in queries):
        raise RecipeError("a query is blank; say what to look for")
    opened = ExactIndex.open(folder)
    try:
        embedder = load(opened.setting("model"), opened.setting("precision"))
    except ModelError as error:
        raise IndexFolderError(f"{folder}: its model cannot be loaded: {error}") from error
    opened.require({"fingerprint": embedder.fingerprint()})
    vectors = embedder.encode(queries, "query", dims=opened.setting("dims"))
    out = results()
    for query, hits in zip(queries, opened.search(vectors, k), strict=True):
        out.print(one_line(query), style="bold")
        table = columns("score", "id", "title")
        for hit in hits:
            table.add_row(f"{hit.score:.3f}", one_line(hit.id), shortened(hit.title or hit.text))
        out.print(table)
