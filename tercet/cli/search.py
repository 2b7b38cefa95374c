"""The commands index, search and serve."""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tercet.cli.options import (
    MACHINE,
    OUTPUT,
    BatchTokensOption,
    DeviceOption,
    DimsOption,
    FastDtypeOption,
    Figures,
    IdFieldOption,
    JsonOption,
    KindOption,
    KindWeightOption,
    MaybeModelOption,
    StoreAsOption,
    TaskOption,
    TextFieldOption,
    TitleFieldOption,
    changed_weights,
    chosen_dtype,
    in_order,
    load,
    local_inputs,
    model_names,
    model_option,
    out_option,
    require_package,
    where,
)
from tercet.errors import IndexFolderError, RecipeError
from tercet.files.console import columns, one_line, results, say, shortened
from tercet.files.outputs import check_files
from tercet.kinds import Kind

if TYPE_CHECKING:
    from tercet.search.engine.conditions import Condition
    from tercet.search.engine.engine import Engine

_ENGINE, _HITS, _OFFER, _LIMITS = "Engine", "Hits", "What is offered", "Limits"  # panels


def index(
    file: Annotated[
        Path | None,
        typer.Argument(help="File of documents (.txt has one a line).", callback=local_inputs),
    ] = None,
    *,
    model: MaybeModelOption = None,
    out: Annotated[Path, out_option("Index folder.")],
    text_field: TextFieldOption = "text",
    title_field: TitleFieldOption = "title",
    id_field: IdFieldOption = "id",
    task: TaskOption = None,
    kind: KindOption = None,
    dims: DimsOption = None,
    store_as: StoreAsOption = "float32",
    keep_missing: Annotated[
        bool,
        typer.Option(
            "--keep-missing",
            help="Keep documents of the index that are not in the file.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Start over if there is an index in --out already.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Write nothing; check all of the index in --out.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    engine: Annotated[
        Literal["exact", "qdrant"],
        typer.Option(
            help="exact compares a query with every document; qdrant searches a graph.",
            rich_help_panel=_ENGINE,
        ),
    ] = "exact",
    url: Annotated[
        str | None,
        typer.Option(
            help="Address of a Qdrant server that keeps the index. Default: in --out.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    collection: Annotated[
        str,
        typer.Option(help="Name of the collection on the server.", rich_help_panel=_ENGINE),
    ] = "tercet",
    device: DeviceOption = None,
    dtype: FastDtypeOption = None,
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Encode documents and write an index folder to search in.

    The other fields of a document are kept, and a search can ask for their values. The same command
    again encodes what is new or has changed, removes what is no longer in the file, and continues
    a run that was killed.

    With --store-as int8, int4, binary or binary+int8, dense vectors are stored in 8, 4 or 1 bits a
    coordinate. The ranges of these codes are those saved with the model (tercet tune codes), or
    learned from some of the documents, and are kept with the index. Qdrant makes its own codes and
    keeps the vectors too.

    With --verify all files of an index are compared with their checksums, and every record is read.

    Examples:
        tercet index docs.jsonl --model runs/mine/model --out runs/mine/index
        tercet index docs.jsonl --model minilm --store-as int8 --out runs/small-index
    """
    if verify:
        _verify(out, given=model is not None or file is not None)
        return
    if model is None or file is None:
        raise RecipeError(
            f"tercet index needs {'a FILE of documents' if file is None else '--model'}; or "
            "--verify, which checks the index in --out"
        )
    if dtype == "bfloat16" and store_as != "float32":
        raise RecipeError(
            f"--store-as {store_as} needs weights in float32; leave out --dtype {dtype}"
        )
    if engine == "qdrant":
        require_package("qdrant_edge" if url is None else "qdrant_client", "Qdrant", "qdrant")
    from tercet.data.files.documents import Fields, read_documents
    from tercet.search.opening import check_index_place, weights_of_index
    from tercet.search.text_index import IndexOptions
    from tercet.search.text_index import index as make_index

    fields = Fields(text=text_field, title=title_field, id=id_field)
    check_index_place(out, [file, model], fresh=fresh)
    kept = None if fresh else weights_of_index(out)  # an index goes on in its own type
    precision = store_as
    if store_as == "float32":
        precision = dtype or kept or chosen_dtype(None, device, where(model))
    options = IndexOptions(
        kinds=in_order(kind),
        task=task,
        dims=dims,
        precision=precision,
        engine=engine,
        url=url,
        collection=collection,
        keep=keep_missing,
        fresh=fresh,
    )
    read = partial(read_documents, file, fields, keep_others=True)
    loaded = partial(load, device=device, batch_tokens=batch_tokens)
    made = make_index(read, where(model), out, options, load=loaded, say=say)
    held, done = made.documents, made.done
    results().print(f"{out}: {held:,} documents", soft_wrap=True)
    if "dense" in made.kinds:
        say(_dense_size(precision, made.dim, held, engine))
    if done.unchanged or done.removed:
        say(
            f"{done.encoded:,} encoded, {done.unchanged:,} unchanged, {done.removed:,} removed "
            f"because {file} lacks them"
        )
    if others := held - done.encoded - done.unchanged:
        say(
            f"{others:,} documents that {file} lacks were kept; to remove them, omit --keep-missing"
        )
    say(f'search it: tercet search {out} "your question"')


def _verify(folder: Path, *, given: bool) -> None:
    """Check an index and print what was found in order."""
    from tercet.search.opening import verify_index

    if given:
        raise RecipeError("--verify checks the index in --out; leave out FILE and --model")
    found = verify_index(folder)
    how = "as they were written" if found.checked else "readable; there are no checksums of them"
    results().print(f"{folder}: {found.records:,} documents, {how}", soft_wrap=True)
    if not found.complete:
        say("it is not complete: tercet index was stopped; run the same command again")


def _dense_size(precision: str, width: int, held: int, engine: str) -> str:
    """Describe the size of the dense vectors that are kept."""
    from tercet.rank.quantized import bytes_of
    from tercet.search.opening import stored_as
    from tercet.search.text_index import readable_size

    stored = stored_as(precision)
    size = bytes_of(stored, width)
    line = (
        f"dense vectors: {width} coordinates in {stored}, {size:,} bytes each, "
        f"{readable_size(size * held)} in all"
    )
    if engine == "exact" or stored == "float32":
        return line
    whole = bytes_of("float32", width)
    return f"{line}; Qdrant keeps the vectors themselves too, of {whole:,} bytes, on its disk"


def search(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="Index folder.")],
    queries: Annotated[
        list[str], typer.Argument(metavar="QUESTION", help="One or more questions.")
    ],
    model: Annotated[
        str | None,
        model_option(
            "Model that reads the questions, distilled from the index's. Default: the index's."
        ),
    ] = None,
    k: Annotated[
        int,
        typer.Option("--k", "-k", min=1, help="Hits for each question.", rich_help_panel=_HITS),
    ] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="FIELD=VALUE",
            help="Only documents with this value. Repeat for more.",
            rich_help_panel=_HITS,
        ),
    ] = None,
    fusion: Annotated[
        Literal["weighted", "rrf", "rerank"],
        typer.Option(
            help="How kinds are combined: weighted (sum of scores), rrf (reciprocal rank fusion), "
            "rerank (score the dense candidates again).",
            rich_help_panel=_HITS,
        ),
    ] = "weighted",
    kind_weight: KindWeightOption = None,
    candidates: Annotated[
        int,
        typer.Option(
            min=0,
            help="Candidates of each kind that are scored; 0: all documents.",
            rich_help_panel=_HITS,
        ),
    ] = 100,
    json: JsonOption = None,
    device: DeviceOption = None,
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Answer questions from an index.

    Conditions of --where on different fields must all hold; several values for one field are
    alternatives. With --model a small model reads the questions, if it was distilled from the model
    that read the documents (tercet train distil).

    Examples:
        tercet search runs/mine/index "a small web server"
        tercet search runs/mine/index "a small web server" --where section=web --kind-weight multi=0
    """
    from tercet.search.engine.fusion import fusion_of
    from tercet.search.text_index import check_texts, open_index

    _refuse_swapped(folder, queries)
    check_texts(queries)
    shown = Figures(json)
    check_files([folder], json=shown.file)
    conditions, given = _conditions(only or []), changed_weights(kind_weight)
    wanted: dict[str, list[Any]] = {}
    for name, _, values in conditions:
        wanted.setdefault(name, []).extend(values)
    loaded = partial(load, device=device, batch_tokens=batch_tokens)
    with open_index(folder, model=model, load=loaded) as opened:
        complete, kinds = opened.about.complete, opened.kinds
        if not complete:
            say(f"tercet: note: {folder}: some documents are missing; call tercet index again")
        if others := [kind for kind in given or () if kind not in kinds]:
            raise RecipeError(
                f"--kind-weight {others[0]}: {folder} has no {others[0]} vectors; leave it out"
            )
        how = fusion_of(fusion, given, opened.weights, candidates)
        found = opened.search(queries, k, fusion=how, where=wanted)
        if not any(found) or len(conditions) > len(wanted):  # one of several values may be wrong
            _explain(folder, opened.engine, conditions, complete=complete)
    several: Sequence[Kind] = kinds if len(kinds) > 1 else ()
    for query, hits in zip(queries, found, strict=True):
        shown.print(one_line(query), style="bold")
        table = columns("score", *several, "id", "title")
        for hit in hits:
            parts = (f"{hit.scores[kind]:.3f}" if kind in hit.scores else "-" for kind in several)
            title = shortened(hit.record.title or hit.record.text)
            table.add_row(f"{hit.score:.3f}", *parts, one_line(hit.record.id), title)
        shown.print(table)
    shown.write(
        [
            {"query": query, "hits": list(map(_hit_record, hits))}
            for query, hits in zip(queries, found, strict=True)
        ]
    )


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL",
            help="One or more models: name, folder, hub id or GGUF file.",
            autocompletion=model_names,
        ),
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(
            "--index",
            metavar="[NAME=]FOLDER",
            help="Index to search in; its model is offered too. Repeat for more.",
            rich_help_panel=_OFFER,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: all.", rich_help_panel=_OFFER)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65_535, help="Port; 0 takes a free one.", rich_help_panel=_OFFER),
    ] = 8080,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE",
            help="Environment variable with the key that requests must carry. Default: no key.",
            rich_help_panel=_OFFER,
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Allow pages of this origin to send requests. Repeat for more. Default: none.",
            rich_help_panel=_OFFER,
        ),
    ] = None,
    queue_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens that may wait for a model; more requests get status 429.",
            rich_help_panel=_LIMITS,
        ),
    ] = 1_000_000,
    max_texts: Annotated[
        int, typer.Option(min=1, help="Texts of a request.", rich_help_panel=_LIMITS)
    ] = 2_048,
    max_body: Annotated[
        float, typer.Option(min=0.001, help="Megabytes of a request.", rich_help_panel=_LIMITS)
    ] = 32,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for an answer.", rich_help_panel=_LIMITS)
    ] = 300,
    no_access_log: Annotated[
        bool,
        typer.Option(
            "--no-access-log", help="Print no line about each request.", rich_help_panel=OUTPUT
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Threads of a CPU that compute. Default: all.", rich_help_panel=MACHINE
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: FastDtypeOption = None,
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Serve vectors of models, and search in indexes, over HTTP.

    It speaks the protocols of OpenAI (/v1/embeddings), Cohere (/v2/embed) and Hugging Face's TEI
    (/embed, /rerank and more), and has endpoints for all kinds of vectors at once (/v1/vectors) and
    for indexes (/v1/search, /v1/documents). The page at / searches; /openapi.json describes all.

    A model is offered under its name, or the name of its folder; NAME= sets another. Requests that
    name none get the first. Ctrl-C or SIGTERM ends the server when what has begun is answered.

    Examples:
        tercet serve minilm
        tercet serve runs/mine/model --index docs=runs/mine/index --port 9000
    """
    for package in ("starlette", "uvicorn", "orjson", "prometheus_client"):
        require_package(package, "tercet serve", "serve")
    from tercet.serve.access_log import access_log
    from tercet.serve.names import named_indexes, named_models
    from tercet.serve.server import Limits, ServeOptions
    from tercet.serve.server import serve as run_server

    key = None
    if api_key_env is not None and not (key := os.environ.get(api_key_env)):
        raise RecipeError(
            f"--api-key-env {api_key_env}: this environment variable must hold a key; it is not "
            "set or empty"
        )
    if not models and not index:
        raise RecipeError("tercet serve needs a model or an --index: tercet serve minilm")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    limits = Limits(
        body_bytes=int(max_body * 1_000_000),
        texts=max_texts,
        queue_tokens=queue_tokens,
        seconds=timeout,
    )
    options = ServeOptions(
        models=named_models(models or ()),
        indexes=named_indexes(index or ()),
        host=host,
        port=port,
        key=key,
        origins=cors or (),
        limits=limits,
        precision=lambda source, of_index: dtype or of_index or chosen_dtype(None, device, source),
        load=partial(load, device=device, batch_tokens=batch_tokens),
    )
    if not options.is_local and key is None:
        say(f"tercet: note: {host} may be open to others; --api-key-env asks requests for a key")
    with nullcontext() if no_access_log else access_log(sys.stderr) as note:
        run_server(replace(options, access_log=note), say)


def _hit_record(hit: Any) -> dict[str, Any]:
    return {"score": hit.score, "scores": dict(hit.scores), **asdict(hit.record)}


def _refuse_swapped(folder: Path, queries: Sequence[str]) -> None:
    """Refuse a question where the index should be, if the index stands among the questions."""
    if folder.exists():
        return
    for each in queries:
        if Path(each).is_dir():
            others = [str(folder), *(query for query in queries if query != each)]
            raise RecipeError(
                f"{folder}: is not an index, and {each} is a folder; the index comes first: "
                f"tercet search {shlex.join([each, *others])}"
            )


def _explain(
    folder: Path, engine: "Engine", conditions: Sequence["Condition"], *, complete: bool
) -> None:
    """Say which conditions no document fulfils, and which fields and values there are.

    Raises:
        IndexFolderError: when the index is said to be complete, and nothing is in it.
    """
    from tercet.search.engine.conditions import unfulfilled

    if engine.stats().records:
        for problem in unfulfilled(engine, conditions):
            say(f"tercet: note: --where {problem}")
    elif complete:
        raise IndexFolderError(
            f"{folder}: its documents are gone; build it again with: tercet index --fresh"
        )


def _conditions(given: Sequence[str]) -> list["Condition"]:
    """Return fields, what they should be, and the values that this may stand for."""
    found: list[Condition] = []
    for condition in given:
        name, equals, text = condition.partition("=")
        if not name or not equals:
            raise RecipeError(f"--where {condition}: write a field and its value, as section=web")
        values: list[Any] = [text]
        if text in ("true", "false"):
            values.append(text == "true")
        for number in (int, float):
            with suppress(ValueError):
                values.append(number(text))
        found.append((name, text, values))
    return found
