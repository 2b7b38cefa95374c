"""Verbs that make an index of documents, and search in it."""

from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import typer

from tercet.cli.options import (
    KindsOption,
    WeightsOption,
    kinds_of,
    load,
    weights_of,
    where,
)
from tercet.errors import IndexFolderError, RecipeError
from tercet.files.console import columns, one_line, results, say, shortened
from tercet.kinds import KINDS, Kind, Weights

if TYPE_CHECKING:
    from tercet.search.engine.engine import Engine, Fusion

_FIELDS_NAMED: Final = 10  # in a message
_VALUES_REMEMBERED: Final = 1_000  # of each field, to name those that are like a wrong one
_Condition: TypeAlias = tuple[str, str, list[Any]]  # a field, what it should be, possible values

Precision = Annotated[
    Literal["float32", "bfloat16", "int8", "int4", "binary", "binary+int8"],
    typer.Option(
        help="float32 or bfloat16: of the model's weights. The others: of the dense vectors that "
        "are kept, with weights in float32; binary+int8 is searched by bits and scored by int8."
    ),
]


def index(
    out: Annotated[Path, typer.Option(help="Index folder.")],
    model: Annotated[
        str | None, typer.Argument(help="Zoo name, folder or hub id (see: tercet models).")
    ] = None,
    file: Annotated[
        Path | None, typer.Argument(help="Documents: .jsonl, .parquet or .txt.")
    ] = None,
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
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check all of the index in --out; takes no MODEL or FILE."),
    ] = False,
) -> None:
    """Encode documents and write an index folder to search in.

    The other fields of a document are kept, and a search can ask for their values. Called again,
    it encodes what is new or has changed, and removes what the file lacks; so a call that was
    killed goes on where it was.

    With --precision int8, int4, binary or binary+int8 dense vectors take so many bits a coordinate.
    What these stand for is kept with the index: the ranges that the model keeps (tercet calibrate),
    or what some of these documents teach. Qdrant has codes of its own, beside the vectors.

    With --verify nothing is written: all files of an existing index are compared with their
    checksums, and every record is read.

    Example: tercet index runs/mine/model docs.jsonl --out runs/mine/index --precision int8
    """
    if verify:
        _verify(out, given=model is not None)
        return
    if model is None or file is None:
        raise RecipeError(
            f"tercet index needs a {'MODEL and a FILE' if model is None else 'FILE'} of documents; "
            "or --verify, which checks the index in --out"
        )
    from tercet.data.files.documents import Fields, read_documents
    from tercet.search.opening import check_index_place
    from tercet.search.text_index import IndexOptions
    from tercet.search.text_index import index as make_index

    fields = Fields(text=text_field, title=title_field, id=id_field)
    options = IndexOptions(
        kinds=kinds_of(kinds),
        task=task,
        dims=dims,
        precision=precision,
        engine=engine,
        url=url,
        collection=collection,
        keep=keep,
        fresh=fresh,
    )
    check_index_place(out, [file, model], fresh=fresh)
    read = partial(read_documents, file, fields, keep_others=True)
    made = make_index(read, where(model), out, options, load=load, say=say)
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
        say(f"{others:,} documents that {file} lacks were kept; to remove them, omit --keep")
    say(f'search it: tercet search {out} "your question"')


def _verify(folder: Path, *, given: bool) -> None:
    """Check an index and print what was found in order."""
    from tercet.search.opening import verify_index

    if given:
        raise RecipeError("--verify checks the index in --out; leave out MODEL and FILE")
    found = verify_index(folder)
    how = "as they were written" if found.checked else "readable; there are no checksums of them"
    results().print(f"{folder}: {found.records:,} documents, {how}", soft_wrap=True)


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
    folder: Annotated[Path, typer.Argument(help="Index folder.")],
    queries: Annotated[list[str], typer.Argument(help="One or more questions.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Hits of each.")] = 5,
    weights: WeightsOption = None,
    fusion: Annotated[
        Literal["weighted", "rrf", "rerank"],
        typer.Option(help="Weighted sum, reciprocal rank fusion, or re-scored dense candidates."),
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
    from tercet.search.text_index import check_texts, open_index

    check_texts(queries)
    conditions, given = _conditions(only or []), weights_of(weights)
    wanted: dict[str, list[Any]] = {}
    for name, _, values in conditions:
        wanted.setdefault(name, []).extend(values)
    with open_index(folder, load=load) as opened:
        complete, kinds = opened.about.complete, opened.kinds
        if not complete:
            say(f"tercet: note: {folder}: some documents are missing; call tercet index again")
        how = _fusion(fusion, given, opened.weights, candidates)
        found = opened.search(queries, k, fusion=how, where=wanted)
        if not any(found) or len(conditions) > len(wanted):  # one of several values may be wrong
            _explain(folder, opened.engine, conditions, complete=complete)
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


def _explain(
    folder: Path, engine: "Engine", conditions: Sequence[_Condition], *, complete: bool
) -> None:
    """Say which conditions no document fulfils, and which fields and values there are.

    Raises:
        IndexFolderError: when the index is said to be complete, and nothing is in it.
    """
    waiting, known = list(conditions), dict[str, set[str]]()
    if not engine.stats().records:
        if complete:
            raise IndexFolderError(
                f"{folder}: its documents are gone; build it again with: tercet index --fresh"
            )
        return
    for record in engine.scan() if waiting else ():
        for name, value in record.fields.items():
            values = value if isinstance(value, list | tuple) else [value]
            waiting = [c for c in waiting if c[0] != name or not _any_equal(values, c[2])]
            seen = known.setdefault(name, set())
            if len(seen) < _VALUES_REMEMBERED:
                seen |= {str(each) for each in values}
        if not waiting:
            return
    for name, text, _ in waiting:
        values = known.get(name)
        if values is None:
            what, lacks = one_line(name), "this field"
            there = one_line(", ".join(islice(sorted(known), _FIELDS_NAMED))) or "none"
        else:
            what, lacks = one_line(f"{name}={text}"), "this value"
            near = get_close_matches(text, values, _FIELDS_NAMED, cutoff=0.5) or sorted(values)
            there = one_line(", ".join(shortened(each, 40) for each in near[:_FIELDS_NAMED]))
        what = what.encode("utf-8", "backslashreplace").decode()  # of bytes that are no Unicode
        say(f"tercet: note: --where {what}: no document has {lacks}; there are: {there}")


def _any_equal(values: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether two lists share a value; true is not 1."""
    return any(
        a == b and isinstance(a, bool) == isinstance(b, bool) for a in values for b in wanted
    )


def _fusion(name: str, given: Weights | None, usual: Weights, candidates: int) -> "Fusion":
    """Return the fusion of a name; by ranks, kinds with a weight count, or all."""
    from tercet.search.engine.engine import ReciprocalRank, Rerank, Weighted

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


def _conditions(given: Sequence[str]) -> list[_Condition]:
    """Return fields, what they should be, and the values that this may stand for."""
    found: list[_Condition] = []
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
