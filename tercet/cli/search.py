"""Verbs that make an index of documents, and search in it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from tercet.cli.options import (
    KindsOption,
    ModelName,
    WeightsOption,
    kinds_of,
    load,
    weights_of,
    where,
)
from tercet.data.files.documents import Document, Fields, read_documents
from tercet.errors import IndexFolderError, ModelError, RecipeError
from tercet.files.console import columns, one_line, results, say, shortened
from tercet.kinds import KINDS, Kind, Weights
from tercet.rank.quantized import Ranges, Stored, bytes_of
from tercet.search.engine.engine import (
    Engine,
    Fusion,
    FusionName,
    ReciprocalRank,
    Rerank,
    Value,
    Weighted,
)
from tercet.vectors import Vectors

_FIELDS_NAMED: Final = 10  # in a message
_FEW: Final = 100  # documents, below which what codes are learned from says little of others

Precision = Annotated[
    Literal["float32", "bfloat16", "int8", "int4", "binary", "binary+int8"],
    typer.Option(
        help="float32 or bfloat16: of the model's weights. The others: of the dense vectors that "
        "are kept, with weights in float32; binary+int8 is searched by bits and scored by int8."
    ),
]


def index(
    model: ModelName,
    file: Annotated[Path, typer.Argument(help="Documents: .jsonl, .parquet or .txt.")],
    out: Annotated[Path, typer.Option(help="Index folder.")],
    text_field: Annotated[str, typer.Option(help="Where the text is in a record.")] = "text",
    title_field: Annotated[str, typer.Option(help="Where the title is.")] = "title",
    id_field: Annotated[str, typer.Option(help="Where the id is.")] = "id",
    kinds: KindsOption = None,
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
        typer.Option("--keep", help="Keep documents of the index that the file lacks."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew, where there is an index already.")
    ] = False,
) -> None:
    """Encode documents and write an index folder to search in.

    The other fields of a document are kept, and a search can ask for their values. Called again,
    it encodes what is new or has changed, and removes what the file lacks; so a call that was
    killed goes on where it was.

    With --precision int8, int4, binary or binary+int8 dense vectors take so many bits a coordinate.
    What these stand for is kept with the index: the ranges that the model keeps (tercet calibrate),
    or what some of these documents teach. Qdrant has codes of its own, beside the vectors.

    Example: tercet index runs/mine/model docs.jsonl --out runs/mine/index --precision int8
    """
    from tercet.search.exact.exact_engine import ExactEngine
    from tercet.search.indexing import (
        expected_bytes,
        index_documents,
        learned_ranges,
        settings_of,
    )
    from tercet.search.opening import About, make_engine, mark_complete, stored_as

    if url is not None and engine == "exact":
        raise RecipeError("--url is of a Qdrant server; add --engine qdrant")
    stored = stored_as(precision)
    embedder = load(model, precision if stored == "float32" else "float32")
    chosen = _chosen(kinds, embedder.kinds, stored)

    def read() -> Iterator[Document]:
        fields = Fields(text=text_field, title=title_field, id=id_field)
        return read_documents(file, fields, keep_others=True)

    def encoded(texts: Sequence[str]) -> Vectors:
        return embedder.encode_vectors(texts, "document", kinds=chosen, task=task, dims=dims)

    count, sizes = expected_bytes(read(), encoded, stored)
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
    width = dims or embedder.dim
    in_codes = stored != "float32" and about.engine == "exact" and count > 0
    learn = partial(learned_ranges, read(), encoded, count)
    ranges = cache(partial(_ranges, model, embedder, width, learn))
    if in_codes and fresh:
        ranges()  # what teaches nothing is refused before anything is replaced
    with closing(make_engine(out, about, fresh=fresh)) as opened:
        if in_codes and isinstance(opened, ExactEngine) and not opened.is_settled:
            opened.settle(ranges())
        done = index_documents(opened, read(), encoded, total=count, keep=keep)
        held = opened.stats().records
    mark_complete(out)
    results().print(f"{out}: {held:,} documents", soft_wrap=True)
    if "dense" in chosen:
        say(_kept(stored, width, held, about.engine))
    if done.unchanged or done.removed:
        say(
            f"{done.encoded:,} encoded, {done.unchanged:,} as they were, {done.removed:,} removed "
            f"because {file} lacks them"
        )
    if others := held - done.encoded - done.unchanged:
        say(
            f"{others:,} others, which {file} lacks, were kept; to remove them, call it without "
            "--keep"
        )
    say(f'search it: tercet search {out} "your question"')


def _chosen(named: str | None, made: Sequence[Kind], stored: Stored) -> tuple[Kind, ...]:
    """The kinds of vectors that are to be kept, of those that the model makes."""
    chosen = kinds_of(named) or tuple(made)
    if not set(chosen) <= set(made):
        kinds = ", ".join(made)
        raise RecipeError(f"--kinds {named}: the model makes {kinds} vectors; name some of these")
    if stored != "float32" and "dense" not in chosen:
        raise RecipeError(
            f"--precision {stored} is of dense vectors, and {', '.join(chosen)} are to be kept; "
            "leave it out"
        )
    return chosen


def _ranges(
    model: str, embedder: Any, width: int, learn: Callable[[], tuple[Ranges, int]]
) -> Ranges:
    """What codes stand for: what the model keeps for so many coordinates, or what is learned."""
    if width in embedder.settings.ranges:
        say(f"codes: by the ranges that the model keeps for {width} coordinates")
        return embedder.settings.ranges[width]
    found, count = learn()
    say(f"codes: learned from {count:,} of these documents, and kept with the index")
    if count < _FEW:
        say(
            f"{count} documents are few to learn codes from that others shall get too; give more, "
            f"or keep ranges with the model: tercet calibrate {model} texts.jsonl --dims {width} "
            "--save"
        )
    return found


def _kept(stored: Stored, width: int, held: int, engine: str) -> str:
    """How large the dense vectors are that are kept."""
    size = bytes_of(stored, width)
    said = (
        f"dense vectors: {width} coordinates in {stored}, {size:,} bytes each, "
        f"{_size(size * held)} in all"
    )
    if engine == "exact" or stored == "float32":
        return said
    whole = bytes_of("float32", width)
    return f"{said}; Qdrant keeps the vectors themselves too, of {whole:,} bytes, on its disk"


def search(
    folder: Annotated[Path, typer.Argument(help="Index folder.")],
    queries: Annotated[list[str], typer.Argument(help="One or more questions.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Hits of each.")] = 5,
    weights: WeightsOption = None,
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
    from tercet.search.opening import about_index, open_engine, require, stored_as

    _check_queries(queries)
    about = about_index(folder)
    wanted = _where(only or [])
    given = weights_of(weights)
    names = ("model", "precision", "kinds", "task", "dims")
    model, precision, kinds, task, dims = (about.setting(folder, name) for name in names)
    weights_in = precision if stored_as(precision) == "float32" else "float32"
    try:
        embedder = load(model, weights_in)
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
        if not any(found):
            _explain(folder, opened, wanted, complete=about.complete)
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


def _check_queries(queries: Sequence[str]) -> None:
    """Refuse what cannot be searched for."""
    for query in queries:
        if not query.strip():
            raise RecipeError("a query is blank; say what to look for")
        try:
            query.encode()
        except UnicodeEncodeError as error:  # bytes that are no UTF-8 arrive as half characters
            raise RecipeError(
                f"the query {query!a} holds what is no character, at position {error.start}; "
                "write it in UTF-8"
            ) from error


def _explain(folder: Path, engine: Engine, asked: Iterable[str], *, complete: bool) -> None:
    """Say why nothing was found, where it is not for lack of likeness.

    Raises:
        IndexFolderError: when the index is said to be complete, and nothing is in it.
    """
    lacking, known = set(asked), set[str]()
    if not engine.stats().records:
        if complete:
            raise IndexFolderError(
                f"{folder}: its documents are gone; build it again with: tercet index --fresh"
            )
        return
    for record in engine.scan() if lacking else ():
        lacking -= record.fields.keys()
        known |= record.fields.keys()
        if not lacking:
            return
    fields = one_line(", ".join(islice(sorted(known), _FIELDS_NAMED))) or "none"
    for name in map(one_line, sorted(lacking)):
        say(f"tercet: note: --where {name}: no document has this field; there are: {fields}")


def _size(count: int) -> str:
    """So many bytes, in a unit that leaves few digits."""
    size, units = float(count), ["bytes", "KB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:,.0f} {units[0]}"


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
