"""The verb that turns texts into vectors: arrays, or rows for a search engine."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from tercet.cli.options import (
    AddressOption,
    Echo,
    ModelName,
    PoolingOption,
    Precision,
    ReadingOption,
    RunnerOption,
    WorkersOption,
    kinds_of,
    load,
)
from tercet.errors import RecipeError
from tercet.files.console import results, say
from tercet.files.outputs import check_output
from tercet.kinds import Kind

if TYPE_CHECKING:
    from tercet.curate.jobs.encode_job import EncodeJob
    from tercet.data.files.sources import Source
    from tercet.search.export import EncodeOptions, WrittenVectors
    from tercet.search.rows import FormatName

_ARRAYS: Final = (".npy", ".npz")


def encode(
    model: ModelName,
    files: Annotated[
        list[Path],
        typer.Argument(help="Texts: .txt (one a line), .jsonl or .parquet; or folders of them."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="A .npy file; a folder with --kinds or for several files; .jsonl with --format."
        ),
    ],
    role: Annotated[Literal["query", "document"], typer.Option(help="Decides the prompt.")] = (
        "document"
    ),
    text_field: Annotated[str, typer.Option(help="Where the text is in a record.")] = "text",
    task: Annotated[str | None, typer.Option(help="Take this task's prompts.")] = None,
    dims: Annotated[int | None, typer.Option(help="Keep so many coordinates.")] = None,
    kinds: Annotated[
        str | None, typer.Option(help="Such as dense,sparse,multi: a folder of arrays.")
    ] = None,
    form: Annotated[
        Literal["elasticsearch", "milvus", "opensearch", "qdrant", "vespa"] | None,
        typer.Option("--format", help="Rows that this engine takes in, as lines of JSON."),
    ] = None,
    id_field: Annotated[str, typer.Option(help="Where the id is, for --format.")] = "id",
    title_field: Annotated[str, typer.Option(help="Where the title is, for --format.")] = "title",
    output: Annotated[
        Literal["texts", "tokens", "words"], typer.Option(help="What gets a vector.")
    ] = "texts",
    attention: ReadingOption = None,
    pooling: PoolingOption = None,
    echo: Echo = False,
    precision: Precision = "float32",
    part: Annotated[
        int | None,
        typer.Option(help="Texts that are written together into the folder; None: 100,000."),
    ] = None,
    runner: RunnerOption = "auto",
    workers: WorkersOption = 1,
    address: AddressOption = None,
) -> None:
    """Turn texts into vectors: a row of the output for each, or for each token or word.

    With tokens or words the output is an .npz file: vectors of all texts, and in offsets where
    each text begins. With --kinds it is a folder of arrays for each kind, with --format a file of
    rows for a search engine, with all kinds that the model makes and the engine takes.

    Several files or a folder, or one file with --part, become a folder with vectors for each file,
    or each part of a large one. There a killed run goes on when the same command is given again,
    and --workers or --runner ray share the work.

    Example: tercet encode minilm texts.txt --out vectors.npy
    """
    from tercet.data.files.documents import Fields, read_documents
    from tercet.data.files.texts import read_texts
    from tercet.search.export import (
        VECTORS,
        EncodeOptions,
        write_dense,
        write_rows,
        write_vectors,
    )
    from tercet.search.rows import HELD

    chosen = kinds_of(kinds)
    wanted = {"role": role, "task": task, "dims": dims}
    reading = {"attention": attention, "pooling": pooling, "echo": echo}
    shared = runner != "auto" or workers > 1 or address is not None
    if len(files) > 1 or files[0].is_dir() or part is not None or shared:
        from tercet.curate.jobs.encode_job import ENCODED, PART, encode_files, open_files
        from tercet.curate.jobs.runners import Runner

        _check_folder(out, output, form)
        check_output(out, [*files, model], ENCODED)
        where = Runner(engine=runner, workers=workers, address=address)
        sources = open_files(files, text_field)
        how = EncodeOptions(kinds=chosen or ("dense",), **wanted)
        opened = partial(load, model, precision, **reading)
        job = _job(opened, precision, sources, out, wanted=how, arrays=chosen is not None)
        _tell(out, encode_files(job, part=PART if part is None else part, runner=where))
        return
    (file,) = files
    as_folder = chosen is not None and (chosen != ("dense",) or out.suffix not in _ARRAYS)
    if form is not None:
        _check_rows(out, output, form, chosen)
    else:
        _check_arrays(out, output, as_folder=as_folder)
    check_output(out, [file, model], VECTORS if as_folder and form is None else None)
    fields = Fields(text=text_field, title=title_field, id=id_field)
    # The whole file is read once before the model is: a line that is wrong shows early.
    texts = read_texts(file, text_field) if form is None else read_documents(file, fields)
    total = sum(1 for _ in texts)
    embedder = load(model, precision, **reading)
    if form is not None:
        held: tuple[Kind, ...] = tuple(kind for kind in HELD[form] if kind in embedder.kinds)
        documents = read_documents(file, fields, keep_others=True)
        how = EncodeOptions(kinds=chosen or held, **wanted)
        _tell(out, write_rows(embedder, documents, out, form, wanted=how, total=total))
    elif output != "texts":
        _write_parts(embedder, list(read_texts(file, text_field)), out, output=output, **wanted)
    elif as_folder:
        how = EncodeOptions(kinds=chosen or (), **wanted)
        _tell(out, write_vectors(embedder, read_texts(file, text_field), out, how, total))
    else:
        how = EncodeOptions(kinds=("dense",), **wanted)
        written = write_dense(embedder, read_texts(file, text_field), out, how)
        width = dims or embedder.dim
        results().print(f"{out}: {written.texts:,} vectors of {width} dimensions", soft_wrap=True)


def _job(
    opened: Callable[[], Any],
    precision: str,
    sources: Mapping[str, "Source"],
    out: Path,
    *,
    wanted: "EncodeOptions",
    arrays: bool,
) -> "EncodeJob":
    """What each process does; the model is loaded here to know it, and let go."""
    from tercet.curate.jobs.encode_job import EncodeJob

    embedder = opened()
    about = {
        "model": embedder.fingerprint(),
        "attention": embedder.backbone.attention,
        "window": embedder.backbone.window,
        "precision": precision,
    }
    return EncodeJob(
        load=opened, about=about, sources=sources, out=out, wanted=wanted, arrays=arrays
    )


def _check_folder(out: Path, output: str, form: str | None) -> None:
    """Refuse what several files, parts and workers are not for."""
    flag = f"--format {form}" if form else f"--output {output}"
    if form or output != "texts":
        raise RecipeError(f"{flag}: is of one file, in one process; give one, without --part")
    if out.suffix in (*_ARRAYS, ".jsonl") or out.is_file():
        raise RecipeError(
            f"{out}: several files or parts become a folder of vectors; name one"
            + (f" without {out.suffix}" if out.suffix else "")
        )


def _check_rows(out: Path, output: str, form: "FormatName", kinds: Sequence[Kind] | None) -> None:
    from tercet.search.rows import HELD

    if output != "texts":
        raise RecipeError(f"--output {output}: rows for {form} are of whole texts; leave it out")
    if out.suffix in _ARRAYS:
        raise RecipeError(f"{out}: rows for {form} are lines of JSON; name it .jsonl")
    if refused := [kind for kind in kinds or () if kind not in HELD[form]]:
        raise RecipeError(
            f"--kinds: rows for {form} hold {' and '.join(HELD[form])} vectors, and no "
            f"{' or '.join(refused)} ones; leave that out"
        )


def _check_arrays(out: Path, output: str, *, as_folder: bool) -> None:
    if as_folder and output != "texts":
        raise RecipeError(f"--output {output} is of dense vectors alone; leave --kinds out")
    if as_folder and out.suffix in (*_ARRAYS, ".jsonl"):
        raise RecipeError(
            f"{out}: vectors of some kinds are a folder of arrays; name it without {out.suffix}"
        )
    kind = ".npy" if output == "texts" else ".npz"
    if not as_folder and out.suffix in _ARRAYS and out.suffix != kind:
        raise RecipeError(f"{out}: vectors of {output} are a {kind} file; name it so")


def _write_parts(
    embedder: Any, texts: Sequence[str], out: Path, *, output: str, **wanted: Any
) -> None:
    """Write the vectors of all tokens or words, and where each text begins."""
    import numpy as np

    from tercet.files.atomic import replacing_file

    with replacing_file(out) as fresh:
        parts = embedder.encode(texts, **wanted, progress=True, output=output)
        offsets = np.cumsum([0, *map(len, parts)])
        with fresh.open("wb") as opened:
            np.savez(opened, vectors=np.concatenate(parts), offsets=offsets)
    count = f"{offsets[-1]:,} {output} of {len(texts):,} texts"
    results().print(f"{out}: vectors of {count}", soft_wrap=True)


def _tell(out: Path, written: "WrittenVectors") -> None:
    sizes = ", ".join(f"{kind} {size:,.0f}" for kind, size in written.of_a_text().items())
    results().print(f"{out}: {written.texts:,} texts", soft_wrap=True)
    say(f"bytes a text in there: {sizes}")
