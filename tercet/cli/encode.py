"""The command encode: texts to vectors, as arrays or as rows for a search engine."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from tercet.cli.options import (
    OUTPUT,
    READING,
    VECTORS,
    AddressChoice,
    AttentionOption,
    BatchTokensOption,
    DeviceOption,
    DimsOption,
    EchoOption,
    FastDtypeOption,
    IdFieldOption,
    KindName,
    ModelOption,
    PoolOption,
    RunnerChoice,
    TaskOption,
    TextFieldOption,
    TitleFieldOption,
    WorkersChoice,
    chosen_dtype,
    in_order,
    kind_option,
    load,
    local_inputs,
    out_option,
    runner_of,
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
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files of texts (.txt has one a line), or folders of them.", callback=local_inputs
        ),
    ],
    model: ModelOption,
    out: Annotated[
        Path,
        out_option(
            "A .npy file; a folder for several kinds or files; a .jsonl file with --format."
        ),
    ],
    text_field: TextFieldOption = "text",
    title_field: TitleFieldOption = "title",
    id_field: IdFieldOption = "id",
    role: Annotated[
        Literal["query", "document"],
        typer.Option(help="Role of the texts; it decides the prompt.", rich_help_panel=READING),
    ] = "document",
    task: TaskOption = None,
    attention: AttentionOption = None,
    pooling: PoolOption = None,
    echo: EchoOption = False,
    kind: Annotated[
        list[KindName] | None,
        kind_option(
            "dense, sparse or multi. Repeat for more. Several, or another than dense, become a "
            "folder of arrays. Default: dense."
        ),
    ] = None,
    dims: DimsOption = None,
    per: Annotated[
        Literal["text", "token", "word"],
        typer.Option(help="What gets a vector.", rich_help_panel=VECTORS),
    ] = "text",
    form: Annotated[
        Literal["elasticsearch", "milvus", "opensearch", "qdrant", "vespa"] | None,
        typer.Option(
            "--format",
            help="Write rows that this engine reads, as lines of JSON.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    part: Annotated[
        int | None,
        typer.Option(
            help="Number of texts in each part of a folder. Default: 100,000.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: FastDtypeOption = None,
    batch_tokens: BatchTokensOption = None,
    runner: RunnerChoice = "auto",
    workers: WorkersChoice = None,
    address: AddressChoice = None,
) -> None:
    """Turn texts into vectors: a row of the output for each text, token or word.

    With --per token or word the output is an .npz file: "vectors" holds those of all texts,
    "offsets" where each text begins. With --kind it is a folder of arrays for each kind. With
    --format it is a file of rows for a search engine, with all kinds that both the model and the
    engine know.

    Several files, a folder, or one file with --part become a folder with vectors for each file, or
    for each part of a large one. There the same command continues a killed run, and --workers or
    --runner ray share the work.

    Examples:
        tercet encode texts.txt --model minilm --out vectors.npy
        tercet encode docs.jsonl --model minilm --format qdrant --out rows.jsonl
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

    chosen, output = in_order(kind), f"{per}s"
    wanted = {"role": role, "task": task, "dims": dims}
    how = {"device": device, "batch_tokens": batch_tokens}
    loaded = partial(load, model, **how, attention=attention, pooling=pooling, echo=echo)
    for flag, name in (("title", title_field), ("id", id_field)):
        if form is None and name != flag:
            raise RecipeError(f"--{flag}-field needs --format, whose rows have it; leave it out")
    shared = runner != "auto" or (workers or 1) > 1 or address is not None
    if len(files) > 1 or files[0].is_dir() or part is not None or shared:
        from tercet.curate.jobs.encode_job import ENCODED, PART, encode_files, open_files

        _check_folder(out, output, form)
        check_output(out, [*files, model], ENCODED)
        where = runner_of(runner, workers, address, device)
        sources = open_files(files, text_field)
        options = EncodeOptions(kinds=chosen or ("dense",), **wanted)
        dtype = chosen_dtype(dtype, device)  # the same on all machines that continue the folder
        loaded = partial(loaded, dtype=dtype)
        job = _job(loaded, dtype, sources, out, wanted=options, arrays=chosen is not None)
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
    as_usual = output == "texts" and not (attention or pooling or echo)
    embedder = loaded(dtype=chosen_dtype(dtype, device, model if as_usual else None))
    if form is not None:
        held: tuple[Kind, ...] = tuple(kind for kind in HELD[form] if kind in embedder.kinds)
        documents = read_documents(file, fields, keep_others=True)
        options = EncodeOptions(kinds=chosen or held, **wanted)
        _tell(out, write_rows(embedder, documents, out, form, wanted=options, total=total))
    elif output != "texts":
        _write_parts(embedder, list(read_texts(file, text_field)), out, output=output, **wanted)
    elif as_folder:
        options = EncodeOptions(kinds=chosen or (), **wanted)
        _tell(out, write_vectors(embedder, read_texts(file, text_field), out, options, total))
    else:
        options = EncodeOptions(kinds=("dense",), **wanted)
        written = write_dense(embedder, read_texts(file, text_field), out, options)
        width = dims or embedder.dim
        results().print(f"{out}: {written.texts:,} vectors of {width} dimensions", soft_wrap=True)


def _job(
    opened: Callable[[], Any],
    dtype: str,
    sources: Mapping[str, "Source"],
    out: Path,
    *,
    wanted: "EncodeOptions",
    arrays: bool,
) -> "EncodeJob":
    """What each process does; the model is loaded here to know it, and let go."""
    from tercet.curate.jobs.encode_job import EncodeJob

    about = {"model": opened().fingerprint(), "precision": dtype}
    return EncodeJob(
        load=opened, about=about, sources=sources, out=out, wanted=wanted, arrays=arrays
    )


def _check_folder(out: Path, output: str, form: str | None) -> None:
    """Refuse what several files, parts and workers are not for."""
    flag = f"--format {form}" if form else f"--per {output[:-1]}"
    if form or output != "texts":
        raise RecipeError(
            f"{flag} takes one file and one process; give one file, without --part and --workers"
        )
    if out.suffix in (*_ARRAYS, ".jsonl") or out.is_file():
        raise RecipeError(
            f"{out}: several files or parts become a folder of vectors; name one"
            + (f" without {out.suffix}" if out.suffix else "")
        )


def _check_rows(out: Path, output: str, form: "FormatName", kinds: Sequence[Kind] | None) -> None:
    from tercet.search.rows import HELD

    if output != "texts":
        raise RecipeError(f"--per {output[:-1]}: rows for {form} are of whole texts; leave it out")
    if out.suffix in _ARRAYS:
        raise RecipeError(f"{out}: rows for {form} are lines of JSON; name it .jsonl")
    if refused := [kind for kind in kinds or () if kind not in HELD[form]]:
        raise RecipeError(
            f"--kind {refused[0]}: rows for {form} hold {' and '.join(HELD[form])} vectors only; "
            "leave it out"
        )


def _check_arrays(out: Path, output: str, *, as_folder: bool) -> None:
    if as_folder and output != "texts":
        raise RecipeError(f"--per {output[:-1]} applies to dense vectors only; leave --kind out")
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
