"""Segments made of records or merged from others, in memory or in a folder.

A folder holds ``records.parquet`` and one ``.npy`` file per array. Merging drops deleted rows and
keeps the order of the others.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64, Shaped

from tercet.errors import ModelError
from tercet.files.arrays import GrowingArray, release
from tercet.files.artifacts import write_npy_header
from tercet.files.atomic import replacing_folder
from tercet.files.limits import ARRAY_ERRORS
from tercet.kinds import Kind
from tercet.rank.scoring import Postings
from tercet.search.engine.engine import Record
from tercet.search.exact.segment import (
    ROWS_PER_GROUP,
    SCHEMA,
    Coding,
    DenseVectors,
    RecordTable,
    Segment,
    SegmentTokens,
    arrays_of,
    coding_of,
    damaged,
    dense_of,
)
from tercet.segments import row_of, runs_within
from tercet.vectors import Terms, TokenRows, Vectors

_RECORDS: Final = "records.parquet"
_BLOCK: Final = 2_048  # rows of vectors that are copied at a time
_TEXTS: Final = 512  # whose token vectors are
_POSTINGS: Final = 1 << 19  # terms of documents that are merged at a time
_ARRAYS: Final[dict[Kind, tuple[str, ...]]] = {
    "dense": ("dense",),  # unless they are in codes
    "sparse": ("tokens", "token_offsets", "token_rows", "token_weights"),
    "multi": ("multi", "multi_offsets"),
}
_CODES: Final = ("codes", "finer")
_TYPES: Final = {
    "dense": ("float32",),
    "codes": ("uint8",),
    "finer": ("uint8",),
    "tokens": ("int64",),
    "token_offsets": ("int64",),
    "token_rows": ("int32",),
    "token_weights": ("float32",),
    "multi": ("float16", "float32"),
    "multi_offsets": ("int64",),
}
_FILES: Final = {name: f"{name}.npy" for name in _TYPES}
_TABLES: Final = ("dense", *_CODES, "multi")  # of two dimensions


@dataclass(frozen=True, slots=True, eq=False)
class LivePart:
    """A segment, and which of its rows have not been deleted; the mask is changed in place."""

    segment: Segment
    alive: Bool[np.ndarray, "docs"]
    folder: Path | None = None  # None: in memory

    def __len__(self) -> int:
        """The records that are alive."""
        return int(self.alive.sum())


def part_of(segment: Segment, folder: Path | None = None) -> LivePart:
    """Return the segment with all of its rows alive."""
    return LivePart(segment, np.ones(len(segment), dtype=np.bool_), folder)


def segment_of(
    records: Sequence[Record], vectors: Vectors, precision: str, coding: Coding | None = None
) -> Segment:
    """Return these records in memory; ``precision`` is that of the token vectors.

    Raises:
        ModelError: when a value is too large for the precision.
    """
    dense, sparse, multi = vectors.dense, vectors.sparse, vectors.multi
    coded = None if dense is None else dense.detach().float().numpy()
    if coded is not None and coding is not None:
        coded = coding.coded(coded)
    return Segment(
        RecordTable.of(records),
        coded,
        None if sparse is None else _postings(sparse.merged()),
        None if multi is None else _rows(multi, precision),
    )


def _rows(multi: TokenRows, precision: str) -> SegmentTokens:
    with np.errstate(over="ignore"):
        vectors = multi.vectors.detach().float().numpy().astype(precision)
    if not np.isfinite(vectors).all():
        raise ModelError(
            f"token vectors hold values too large for {precision}; make them of unit length, "
            "or make the index in float32"
        )
    return SegmentTokens(vectors, multi.offsets.long().numpy())


def _postings(terms: Terms) -> Postings:
    rows = row_of(terms.offsets).numpy().astype(np.int32)
    return _sorted(terms.ids.long().numpy(), rows, terms.weights.detach().float().numpy())


def _sorted(tokens: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> Postings:
    """Return inverted lists of (token, row, weight) whose rows ascend for each token."""
    order = np.argsort(tokens, kind="stable")
    words, counts = np.unique(tokens, return_counts=True)
    return Postings(words.astype(np.int64), _bounds(counts), rows[order], weights[order])


def merged_in_memory(parts: Sequence[LivePart]) -> Segment:
    """Return one segment of the rows that are alive in these."""
    tables = list(_tables(parts))
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    first = parts[0].segment
    return Segment(
        RecordTable(table.combine_chunks()),
        None if first.dense is None else _merged_dense(first.dense, parts),
        None if first.sparse is None else _merged_postings(parts),
        None
        if first.multi is None
        else SegmentTokens(np.concatenate(list(_multi(parts))), _multi_offsets(parts)),
    )


def write_merged(folder: Path, parts: Sequence[LivePart]) -> Segment:
    """Write one segment of the rows that are alive in these, and open it.

    Everything is copied block by block and need not fit in memory.

    Raises:
        StorageError: when the disk refuses; the folder is not there then.
    """
    first = parts[0].segment
    with replacing_folder(folder) as fresh:
        with pq.ParquetWriter(
            fresh / _RECORDS,
            SCHEMA,
            compression="zstd",
            write_page_checksum=True,
            write_statistics=False,  # of texts, which would stay in memory
        ) as writer:
            for table in _regrouped(_tables(parts)):
                writer.write_table(table)
        if first.dense is not None:
            names = _names("dense", coding_of(first.dense))
            for place, (name, array) in enumerate(zip(names, arrays_of(first.dense), strict=True)):
                shape = (sum(map(len, parts)), array.shape[1])
                _write(fresh, name, _dense(parts, place), shape, array.dtype)
        if first.sparse is not None:
            _write_postings(fresh, parts)
        if first.multi is not None:
            offsets = _multi_offsets(parts)
            shape = (int(offsets[-1]), first.multi.vectors.shape[1])
            _write(fresh, "multi", _multi(parts), shape, first.multi.vectors.dtype)
            _write(fresh, "multi_offsets", [offsets], offsets.shape, offsets.dtype)
    kinds: tuple[Kind, ...] = tuple(kind for kind in _ARRAYS if kind in first.widths)
    return open_segment(folder, kinds, coding_of(first.dense))


def open_segment(folder: Path, kinds: Sequence[Kind], coding: Coding | None = None) -> Segment:
    """Open the segment of a folder, with its vectors mapped into memory.

    Offsets are checked, since a wrong one would be a wrong answer or a crash; vectors are not read.

    Raises:
        IndexFolderError: when a file is missing, damaged, or disagrees with another.
    """
    documents = RecordTable(_records_file(folder), folder)
    names = [name for kind in kinds for name in _names(kind, coding)]
    arrays = {name: mapped(folder / _FILES[name]) for name in names}
    for name, array in arrays.items():
        if array.ndim != (2 if name in _TABLES else 1) or array.dtype.name not in _TYPES[name]:
            raise damaged(folder, f"{_FILES[name]} holds other things")
    count = len(documents)
    dense = [arrays[name] for name in _names("dense", coding)] if "dense" in kinds else []
    for array in dense:
        if len(array) != count:
            raise damaged(folder, f"{len(array)} dense vectors of {count} records")
    if dense and coding and tuple(array.shape[1] for array in dense) != coding.bytes:
        raise damaged(folder, "the codes of its dense vectors are of another length")
    if "multi" in kinds:
        bounds = arrays["multi_offsets"]
        if len(bounds) != count + 1 or not _are_bounds(bounds, len(arrays["multi"])):
            raise damaged(folder, f"the token vectors are not those of {count} records")
    lists = Postings(*(arrays[name] for name in _ARRAYS["sparse"])) if "sparse" in kinds else None
    if lists is not None and not _are_lists(lists, count):
        raise damaged(folder, f"the terms are not those of {count} records")
    multi = SegmentTokens(arrays["multi"], arrays["multi_offsets"]) if "multi" in kinds else None
    return Segment(documents, dense_of(dense, coding) if dense else None, lists, multi)


def _records_file(folder: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(folder / _RECORDS, page_checksum_verification=True)
        same = file.schema_arrow.equals(SCHEMA)
        about = file.metadata
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(folder, str(error)) from error
    if not same or min(sizes, default=1) < 1 or sum(sizes) != about.num_rows:
        raise damaged(folder, f"{_RECORDS} has other columns or rows")
    return file


def mapped(path: Path) -> np.ndarray:
    """Return the array of a file, mapped into memory.

    Raises:
        IndexFolderError: when it cannot be read.
    """
    try:
        with warnings.catch_warnings():  # numpy would guess at a header that is not quite right
            warnings.simplefilter("error")
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except (*ARRAY_ERRORS, Warning) as error:
        raise damaged(path.parent, f"{path.name} cannot be read: {error}") from error


def _are_bounds(bounds: np.ndarray, end: int) -> bool:
    """Return whether these are bounds of runs that cover ``end`` rows in order."""
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != end:
        return False
    return bool((bounds[1:] >= bounds[:-1]).all())


def _are_lists(lists: Postings, count: int) -> bool:
    rows, tokens = lists.rows, lists.tokens
    return (
        len(lists.weights) == len(rows)
        and len(lists.offsets) == len(tokens) + 1
        and _are_bounds(lists.offsets, len(rows))
        and bool((tokens[1:] > tokens[:-1]).all())
        and (not len(rows) or bool(0 <= rows.min() and rows.max() < count))
    )


def _write(folder: Path, name: str, blocks: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    with (folder / _FILES[name]).open("wb") as file:
        write_npy_header(file, shape, dtype.newbyteorder("<"))
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype.newbyteorder("<")).data)


def _names(kind: Kind, coding: Coding | None) -> tuple[str, ...]:
    """Return the names of a kind's arrays."""
    if kind == "dense" and coding is not None:
        return _CODES[: len(coding.quantizers)]
    return _ARRAYS[kind]


def _merged_dense(first: DenseVectors, parts: Sequence[LivePart]) -> DenseVectors:
    places = range(len(arrays_of(first)))
    merged = [np.concatenate(list(_dense(parts, place))) for place in places]
    return dense_of(merged, coding_of(first))


def _dense(parts: Sequence[LivePart], place: int) -> Iterator[Shaped[np.ndarray, "docs width"]]:
    """Yield the alive rows of the vectors or codes with number ``place``."""
    for part in parts:
        assert part.segment.dense is not None
        vectors = arrays_of(part.segment.dense)[place]
        for start in range(0, len(vectors), _BLOCK):
            block = slice(start, start + _BLOCK)
            yield vectors[block][part.alive[block]]
            release(vectors)


def _multi(parts: Sequence[LivePart]) -> Iterator[Shaped[np.ndarray, "rows width"]]:
    for part in parts:
        rows = part.segment.multi
        assert rows is not None
        yield rows.vectors[:0]  # a block even of a segment without tokens
        for start in range(0, len(part.alive), _TEXTS):
            bounds = rows.offsets[start : start + _TEXTS + 1]
            alive = np.repeat(part.alive[start : start + _TEXTS], np.diff(bounds))
            yield rows.vectors[bounds[0] : bounds[-1]][alive]
            release(rows.vectors)


def _multi_offsets(parts: Sequence[LivePart]) -> Int64[np.ndarray, "bounds"]:
    lengths = [
        np.diff(part.segment.multi.offsets)[part.alive]
        for part in parts
        if part.segment.multi is not None
    ]
    return _bounds(np.concatenate(lengths))


def _merged_postings(parts: Sequence[LivePart]) -> Postings:
    blocks = list(_postings_blocks(parts))
    arrays = ([getattr(each, name) for each in blocks] for name in ("tokens", "rows", "weights"))
    sizes = [np.diff(each.offsets) for each in blocks]
    tokens, rows, weights = map(np.concatenate, arrays)
    return Postings(tokens, _bounds(np.concatenate(sizes)), rows, weights)


def _write_postings(folder: Path, parts: Sequence[LivePart]) -> None:
    tokens, sizes = [], []
    with ExitStack() as stack:
        rows, weights = (
            stack.enter_context(GrowingArray.open(folder / _FILES[name], np.dtype(kind), ()))
            for name, kind in (("token_rows", "<i4"), ("token_weights", "<f4"))
        )
        for block in _postings_blocks(parts):
            tokens.append(block.tokens)
            sizes.append(np.diff(block.offsets))
            rows.add(block.rows)
            weights.add(block.weights)
    bounds = _bounds(np.concatenate(sizes))
    for name, array in (("tokens", np.concatenate(tokens)), ("token_offsets", bounds)):
        _write(folder, name, [array], array.shape, array.dtype)


def _postings_blocks(parts: Sequence[LivePart]) -> Iterator[Postings]:
    """Yield the merged lists of some tokens at a time, by ascending token."""
    every: list[Postings] = [p.segment.sparse for p in parts if p.segment.sparse is not None]
    tokens = np.unique(np.concatenate([lists.tokens for lists in every]))
    sizes = np.zeros(len(tokens), np.int64)
    for lists in every:
        sizes[np.searchsorted(tokens, lists.tokens)] += np.diff(lists.offsets)
    counts = np.array([len(part) for part in parts])
    starts = np.cumsum(counts) - counts
    new_rows = [
        np.cumsum(part.alive, dtype=np.int32) + np.int32(start - 1)
        for part, start in zip(parts, starts.tolist(), strict=True)
    ]
    if not len(tokens):
        yield _sorted(
            tokens, *(np.zeros(0, _TYPES[f"token_{name}"][0]) for name in ("rows", "weights"))
        )
    for low, high in runs_within(_bounds(sizes).tolist(), _POSTINGS):
        some: list[tuple[np.ndarray, ...]] = []
        for part, lists, rows in zip(parts, every, new_rows, strict=True):
            first = np.searchsorted(lists.tokens, tokens[low])
            last = np.searchsorted(lists.tokens, tokens[high - 1], side="right")
            bounds = lists.offsets[first : last + 1]
            here = slice(bounds[0], bounds[-1])
            kept = part.alive[lists.rows[here]]
            words = np.repeat(lists.tokens[first:last], np.diff(bounds))
            some.append((words[kept], rows[lists.rows[here][kept]], lists.weights[here][kept]))
            release(lists.rows)
            release(lists.weights)
        yield _sorted(*map(np.concatenate, zip(*some, strict=True)))


def _bounds(sizes: Int64[np.ndarray, "lists"]) -> Int64[np.ndarray, "bounds"]:
    return np.concatenate([[0], sizes.cumsum()]).astype(np.int64)


def _tables(parts: Sequence[LivePart]) -> Iterator[pa.Table]:
    """Yield the records that are alive."""
    for part in parts:
        start = 0
        for table in part.segment.documents.blocks():
            yield table.filter(pa.array(part.alive[start : start + len(table)]))
            start += len(table)


def _regrouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of one size, so that merges do not make hits slower to read."""
    rest = SCHEMA.empty_table()
    for table in tables:
        rest = pa.concat_tables([rest, table])
        full = len(rest) - len(rest) % ROWS_PER_GROUP
        for start in range(0, full, ROWS_PER_GROUP):
            yield rest.slice(start, ROWS_PER_GROUP)
        rest = rest.slice(full).combine_chunks()
    if len(rest):
        yield rest
