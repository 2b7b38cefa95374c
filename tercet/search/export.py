"""Write vectors of texts to files, batch by batch: arrays in a folder, or rows for an engine."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from tercet.data.files.documents import Document
from tercet.data.files.examples import shown
from tercet.errors import DataError
from tercet.files.arrays import NAMES, GrowingArray, VectorWriter, holds_only_vectors
from tercet.files.atomic import clear_about, replacing_file, replacing_folder
from tercet.files.outputs import FolderKind, check_output, mark
from tercet.files.progress import Bars, bar
from tercet.kinds import KINDS, Kind
from tercet.models.embedder import Embedder
from tercet.search.indexing import bytes_of, document_batches
from tercet.search.rows import TAKEN, EngineRow, FormatName, json_line, lines_of, parts_of
from tercet.types import Role
from tercet.vectors import Vectors

VECTORS: Final = FolderKind("a folder of vectors", own=tuple(NAMES), is_older=holds_only_vectors)
WINDOW_OF_TEXTS: Final = 50_000  # of dense vectors alone: those that encode sorts by length


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """Which vectors to write, and how texts are encoded."""

    kinds: tuple[Kind, ...]
    role: Role = "document"
    task: str | None = None
    dims: int | None = None  # leading coordinates of dense vectors


@dataclass(slots=True)
class WrittenVectors:
    """Numbers of texts that were written, and of bytes of their vectors."""

    texts: int = 0
    bytes: Counter[Kind] = field(default_factory=Counter)

    def of_a_text(self) -> dict[Kind, float]:
        """Return the mean number of bytes of a text by kind."""
        return {kind: self.bytes[kind] / max(self.texts, 1) for kind in KINDS if kind in self.bytes}


def write_vectors(
    embedder: Embedder,
    texts: Iterable[str],
    out: Path,
    wanted: EncodeOptions,
    total: int | None = None,
    *,
    bars: Bars = bar,
) -> WrittenVectors:
    """Write a folder of arrays (``tercet.files.arrays``), which appears whole or not at all.

    Raises:
        ModelError: when a vector is not finite.
        RecipeError: when ``out`` is a folder with other files in it, or for a kind of vectors that
            the model does not make.
        StorageError: when the disk refuses.
    """
    check_output(out, kind=VECTORS)
    written = WrittenVectors()
    with replacing_folder(out) as fresh, bars("encode", total) as advance:
        mark(fresh, VECTORS)
        with VectorWriter.open(fresh) as writer:
            for batch in document_batches(texts, len):
                vectors = _encoded(embedder, batch, wanted)
                writer.add(vectors)
                written.texts += len(batch)
                written.bytes.update(bytes_of(vectors))
                advance(len(batch))
    return written


def write_dense(
    embedder: Embedder,
    texts: Iterable[str],
    out: Path,
    wanted: EncodeOptions,
    *,
    progress: bool = True,
) -> WrittenVectors:
    """Write the dense vectors as one .npy file of float32 rows, which appears whole or not at all.

    Raises:
        ModelError: when a vector is not finite.
        RecipeError: for an unknown task, or ``dims`` out of range.
        StorageError: when the disk refuses.
    """
    written, rest = WrittenVectors(), iter(texts)
    with replacing_file(out) as fresh, ExitStack() as opened:  # a closed place shows early
        file = None
        while window := list(islice(rest, WINDOW_OF_TEXTS)):
            vectors = embedder.encode(
                window, wanted.role, task=wanted.task, dims=wanted.dims, progress=progress
            )
            if file is None:
                array = GrowingArray.open(fresh, vectors.dtype, vectors.shape[1:])
                file = opened.enter_context(array)
            file.add(vectors)
            written.texts += len(window)
            written.bytes["dense"] += vectors.nbytes
        assert file is not None, "a file of texts holds some"
    return written


def write_rows(
    embedder: Embedder,
    documents: Iterable[Document],
    out: Path,
    form: FormatName,
    *,
    wanted: EncodeOptions,
    total: int | None = None,
) -> WrittenVectors:
    """Write a file of rows for an engine (``tercet.search.rows``), whole or not at all.

    Raises:
        DataError: for a document with a field that has the name of another part of its row, or
            holds what JSON cannot say.
        ModelError: when a vector is not finite.
        StorageError: when the disk refuses.
    """
    written = WrittenVectors()
    with replacing_file(out) as fresh, bar("encode", total) as advance:
        with clear_about(out), fresh.open("wb") as opened:
            for batch in document_batches(documents, lambda document: len(document.text)):
                rows = [_row_of(document) for document in batch]
                vectors = _encoded(embedder, [row.text for row in rows], wanted)
                for row, parts in zip(rows, parts_of(form, vectors), strict=True):
                    opened.write(_as_bytes(form, row, parts))
                    written.bytes.update({k: len(json_line(part)) for k, part in parts.items()})
                written.texts += len(batch)
                advance(len(batch))
    return written


def _encoded(embedder: Embedder, texts: Sequence[str], wanted: EncodeOptions) -> Vectors:
    return embedder.encode_vectors(
        texts, wanted.role, kinds=wanted.kinds, task=wanted.task, dims=wanted.dims
    )


def _row_of(document: Document) -> EngineRow:
    if clash := set(document.fields) & set(TAKEN):
        raise DataError(
            "documents",
            None,
            f'the document {shown(document.id)} has a field "{min(clash)}", as its row has; '
            "give the field another name",
        )
    return EngineRow(document.id, document.text, document.title, document.fields)


def _as_bytes(form: FormatName, row: EngineRow, parts: Mapping[Kind, Any]) -> bytes:
    try:
        return b"".join(f"{line}\n".encode() for line in lines_of(form, row, parts))
    except ValueError as error:  # NaN, or half of a character
        raise DataError(
            "documents",
            None,
            f"a field of the document {shown(row.id)} cannot be written: {error}; "
            "correct or remove it",
        ) from error
