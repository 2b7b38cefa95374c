"""Data files: records one by one, examples by their row, and files written whole or not at all.

A file is never held in memory. Opening it as a ``Source`` checks every record once and keeps
eight bytes for where a record begins and four for its size.
"""

import hashlib
import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any, Final, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.data.examples import (
    EXAMPLE_FIELDS,
    POSITIVES,
    QUERY,
    example_record,
    parse_example,
)
from tercet.errors import DataError
from tercet.types import Example

BOM: Final = b"\xef\xbb\xbf"
MAX_LINE_BYTES: Final = 1 << 26  # 64 MiB: more is not a line but a file without line ends
ROWS_AT_ONCE: Final = 1024  # rows of parquet that are Python objects at the same time
ROWS_PER_GROUP: Final = 4096  # of a parquet file we write
CACHED_BYTES: Final = 1 << 28  # 256 MiB of row groups in memory; at least two groups
WINDOW_BLOCKS: Final = 8  # so many are shuffled together, if two such windows fit in the cache
ROWS_PER_REPORT: Final = 1000  # how often progress is told

# What pyarrow raises on a damaged file. UnicodeDecodeError and ArrowInvalid are ValueErrors.
DAMAGED: Final = (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError)

Needs: TypeAlias = Sequence[Sequence[str]]
Stamp: TypeAlias = tuple[int, int]
Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it stands in a file, or the reason why it cannot be told."""

    line: int  # of the file, from 1; of parquet, the row
    offset: int  # the byte where the line begins; 0 for parquet
    done: float  # the part of the file that lies before the record
    content: bytes  # what a fingerprint is taken of
    value: object = None
    problem: str | None = None


@runtime_checkable
class Reader(Protocol):
    """Gives the records of some rows, in the order asked for."""

    def read(self, rows: Sequence[int]) -> list[object]:
        """The records of these rows."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The examples of one file, checked, and readable in any order.

    It can be pickled, and read from several threads: a reader holds no open file.
    """

    path: Path
    name: str  # the task of examples that name none
    weight: float | int  # how often each example is used an epoch
    sizes: np.ndarray  # [rows] int32, UTF-8 bytes of the longest text; stands for its tokens
    blocks: np.ndarray  # [blocks] int64, the first row of each block that is cheap to read whole
    window: int  # blocks that are cheap to read in turns
    fingerprint: str  # of what the records say
    reader: Reader

    def __len__(self) -> int:
        return len(self.sizes)

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """The examples of these rows, in this order.

        Raises:
            DataError: if the file is no longer the one that was opened.
        """
        try:
            return [parse_example(record, self.name) for record in self.reader.read(indices)]
        except ValueError as error:
            raise _changed(self.path) from error


def open_source(
    path: Path | str,
    *,
    name: str | None = None,
    weight: float | int = 1.0,
    progress: Callable[[float], None] | None = None,
) -> Source:
    """Check every example of a .jsonl or .parquet file, and make them readable by row.

    Reads the file once from end to end. ``progress`` is told the part that is done, up to 1.

    Raises:
        DataError: at the first record that is not an example, naming the line.
    """
    path = Path(path)
    name = path.stem if name is None else name
    with _readable(path):
        stamp = _stamp(path)
    offsets, sizes = array("q"), array("i")
    digest = hashlib.blake2b(digest_size=16)
    for record in example_records(path):
        example = parsed(path, record, lambda it: parse_example(it.value, name))
        offsets.append(record.offset)
        sizes.append(longest_text_bytes(example))
        digest.update(record.content)
        if progress is not None and len(sizes) % ROWS_PER_REPORT == 0:
            progress(record.done)
    if progress is not None:
        progress(1.0)
    _check_stamp(path, stamp)
    if path.suffix == ".parquet":
        blocks, window = _row_groups(path)
        reader: Reader = ParquetReader(path, stamp, blocks)
    else:
        blocks, window = np.zeros(1, np.int64), 1
        reader = JsonlReader(path, stamp, np.frombuffer(offsets, np.int64))
    return Source(
        path=path,
        name=name,
        weight=weight,
        sizes=np.frombuffer(sizes, np.int32),
        blocks=blocks,
        window=window,
        fingerprint=digest.hexdigest(),
        reader=reader,
    )


def iter_examples(path: Path | str, task: str | None = None) -> Iterator[Example]:
    """The examples of a file from first to last; ``task`` names those that name none.

    Raises:
        DataError: at the first record that is not an example, naming the line.
    """
    path = Path(path)
    name = path.stem if task is None else task
    for record in example_records(path):
        yield parsed(path, record, lambda it: parse_example(it.value, name))


def example_records(path: Path) -> Iterator[Record]:
    """The records of a file that should hold examples."""
    return iter_records(path, EXAMPLE_FIELDS, needs=(QUERY, POSITIVES))


def longest_text_bytes(example: Example) -> int:
    """UTF-8 bytes of the longest text of an example, prompts not counted."""
    texts = (example.query, *example.positives, *example.negatives)
    return max(len(text.encode()) for text in texts)


def parsed(path: Path, record: Record, parse: Callable[[Record], Parsed]) -> Parsed:
    """What ``parse`` makes of a record; its ValueError becomes a DataError with file and line."""
    if record.problem is not None:
        raise DataError(path, record.line, record.problem)
    try:
        return parse(record)
    except ValueError as error:
        raise DataError(path, record.line, str(error)) from error


def iter_records(path: Path, fields: Sequence[str], *, needs: Needs) -> Iterator[Record]:
    """The records of a .jsonl or .parquet file; blank lines are none.

    Of parquet, only the columns in ``fields`` are read, and of each group in ``needs`` one column
    must be there. A line that is no JSON is a record with a problem, so that a caller who
    collects problems can go on to the next.

    Raises:
        DataError: if the file cannot be read at all, or holds no record.
    """
    empty = True
    for record in _records_of_suffix(path, fields, needs):
        empty = False
        yield record
    if empty:
        raise DataError(path, None, "holds no records; write one JSON object a line")


def iter_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """The number, the first byte and the content of each line, line end and BOM taken off."""
    with _readable(path), path.open("rb") as file:
        offset = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(offset)
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise DataError(
                    path, number, f"is longer than {MAX_LINE_BYTES} bytes; end each record's line"
                )
            yield number, offset, line.removesuffix(b"\n").removesuffix(b"\r")
            offset += len(line)


def decoded(line: bytes, offset: int) -> str:
    """The text of a line that begins at this byte of its file.

    Raises:
        ValueError: if it is not UTF-8, naming the byte.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"invalid UTF-8 at byte {offset + error.start} of the file "
            f"(0x{line[error.start]:02x}); save the file as UTF-8"
        ) from None


def write_examples(path: Path | str, examples: Iterable[Example]) -> None:
    """Write a .jsonl or .parquet file that reads back as these examples.

    The file appears under its name when it is complete, and not before.

    Raises:
        DataError: if an example could not be read back, or the disk is full.
    """
    path = Path(path)
    write = _write_parquet if _known_suffix(path) == ".parquet" else _write_jsonl
    with whole_file(path) as unfinished:
        write(unfinished, _checked_records(path, examples))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it takes the place of ``path`` if the body succeeds."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise DataError(path, None, f"cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, eq=False)
class JsonlReader:
    """Reads lines by seeking to where they begin."""

    path: Path
    stamp: Stamp
    offsets: np.ndarray  # [rows] int64

    def read(self, rows: Sequence[int]) -> list[object]:
        """The records of these lines; read in the order of the file."""
        _check_stamp(self.path, self.stamp)
        wanted = np.asarray(rows, np.int64)
        lines = [b""] * len(wanted)
        with _readable(self.path), self.path.open("rb") as file:
            for place in np.argsort(wanted, kind="stable").tolist():
                file.seek(int(self.offsets[wanted[place]]))
                lines[place] = file.readline()
        return [json.loads(line.decode("utf-8")) for line in lines]


class ParquetReader:
    """Reads row groups, and keeps the ones used last: up to 256 MiB, and at least two."""

    def __init__(self, path: Path, stamp: Stamp, blocks: np.ndarray) -> None:
        self.path, self.stamp, self.blocks = path, stamp, blocks
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> tuple[Path, Stamp, np.ndarray]:
        return self.path, self.stamp, self.blocks

    def __setstate__(self, state: tuple[Path, Stamp, np.ndarray]) -> None:
        self.__init__(*state)

    def read(self, rows: Sequence[int]) -> list[object]:
        """The records of these rows; each row group is touched once."""
        _check_stamp(self.path, self.stamp)
        wanted = np.asarray(rows, np.int64)
        groups = np.searchsorted(self.blocks, wanted, side="right") - 1
        records: list[object] = [None] * len(wanted)
        with self._lock, _readable(self.path):
            for group in np.unique(groups).tolist():
                places = np.flatnonzero(groups == group)
                table = self._group(group)
                found = table.take(pa.array(wanted[places] - self.blocks[group])).to_pylist()
                for place, record in zip(places.tolist(), found, strict=True):
                    records[place] = record
        return records

    def _group(self, group: int) -> pa.Table:
        if group not in self._kept:
            with _parquet_file(self.path) as file:
                columns = _columns_of(file, EXAMPLE_FIELDS)
                self._kept[group] = file.read_row_group(group, columns=columns, use_threads=False)
        self._kept.move_to_end(group)
        while len(self._kept) > 2 and sum(t.nbytes for t in self._kept.values()) > CACHED_BYTES:
            self._kept.popitem(last=False)
        return self._kept[group]


def _records_of_suffix(path: Path, fields: Sequence[str], needs: Needs) -> Iterator[Record]:
    if _known_suffix(path) == ".parquet":
        return _parquet_records(path, fields, needs)
    return _jsonl_records(path)


def _known_suffix(path: Path) -> str:
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(path, None, f'unknown kind of file "{path.suffix}"; use .jsonl or .parquet')
    return path.suffix


def _jsonl_records(path: Path) -> Iterator[Record]:
    with _readable(path):
        total = max(path.stat().st_size, 1)
    for number, offset, line in iter_lines(path):
        if line.isspace() or not line:
            continue
        value, problem = None, None
        try:
            value = json.loads(decoded(line, offset))
        except json.JSONDecodeError as error:
            problem = f"not JSON: {error.msg}, at character {error.colno}; one object a line"
        except RecursionError:
            problem = "not JSON that can be read: nested too deeply"
        except ValueError as error:
            problem = str(error)
        yield Record(number, offset, offset / total, line, value, problem)


def _parquet_records(path: Path, fields: Sequence[str], needs: Needs) -> Iterator[Record]:
    with _readable(path), _parquet_file(path) as file:
        columns = _columns_of(file, fields)
        for group in needs:
            if not set(group) & set(columns):
                raise DataError(
                    path,
                    None,
                    f'has no column "{group[0]}"; rename one of its columns to it: '
                    + ", ".join(f'"{name}"' for name in file.schema_arrow.names),
                )
        total = max(file.metadata.num_rows, 1)
        row = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
            for value in batch.to_pylist():
                row += 1
                yield Record(row, 0, (row - 1) / total, repr(value).encode(), value)
        if row != file.metadata.num_rows:
            promised = file.metadata.num_rows
            raise DataError(path, None, f"holds {row} rows, not the {promised} that it promises")


def _parquet_file(path: Path) -> pq.ParquetFile:
    # By default pyarrow fetches all row groups ahead: the whole file would be in memory.
    return pq.ParquetFile(path, pre_buffer=False)


def _columns_of(file: pq.ParquetFile, fields: Sequence[str]) -> list[str]:
    names = file.schema_arrow.names
    return [field for field in fields if field in names]


def _row_groups(path: Path) -> tuple[np.ndarray, int]:
    """The first row of each row group, and how many groups a window of the shuffle spans."""
    with _readable(path):
        metadata = pq.read_metadata(path)
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    first_rows = np.concatenate(([0], np.cumsum([group.num_rows for group in groups[:-1]])))
    largest = max(group.total_byte_size for group in groups)
    window = min(max(CACHED_BYTES // 2 // max(largest, 1), 1), WINDOW_BLOCKS)
    return first_rows.astype(np.int64), window


def _checked_records(path: Path, examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
    for row, example in enumerate(examples, start=1):
        record = example_record(example)
        try:
            parse_example(record, example.task)
        except ValueError as error:
            raise DataError(path, row, f"cannot be written: {error}") from error
        yield record


def _write_jsonl(path: Path, records: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, records: Iterator[dict[str, Any]]) -> None:
    text, number = pa.string(), pa.float64()
    schema = pa.schema(
        {
            "query": text,
            "positives": pa.list_(text),
            "negatives": pa.list_(text),
            "positive_scores": pa.list_(number),
            "negative_scores": pa.list_(number),
            "query_prompt": text,
            "document_prompt": text,
            "task": text,
        }
    )
    with pq.ParquetWriter(path, schema) as writer:
        for first in records:
            group = list(chain([first], islice(records, ROWS_PER_GROUP - 1)))
            writer.write_table(pa.Table.from_pylist(group, schema))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what a missing, forbidden or damaged file raises into a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(path, None, "no such file") from error
    except DAMAGED as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(path, None, f"cannot be read: {told}") from error


def _stamp(path: Path) -> Stamp:
    """What tells that a file was written to, without reading it: its size and its time."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _check_stamp(path: Path, stamp: Stamp) -> None:
    with _readable(path):
        now = _stamp(path)
    if now != stamp:
        raise _changed(path)


def _changed(path: Path) -> DataError:
    return DataError(path, None, "has changed since it was opened; start the command again")
