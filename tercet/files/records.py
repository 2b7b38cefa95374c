"""Data files record by record: lines of JSON, rows of parquet, or why one cannot be read."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tercet.errors import DataError

BOM: Final = b"\xef\xbb\xbf"
MAX_LINE_BYTES: Final = 1 << 26  # 64 MiB: anything longer is a file without line ends
ROWS_AT_ONCE: Final = 1024  # rows of parquet that are Python objects at the same time

# What pyarrow raises on a damaged file. UnicodeDecodeError and ArrowInvalid are ValueErrors.
DAMAGED: Final = (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError)

Needs: TypeAlias = Sequence[Sequence[str]]
Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One record of a file, or the reason why it cannot be read."""

    line: int  # of the file, from 1; of parquet, the row
    offset: int  # the byte where the line begins; 0 for parquet
    done: float  # the part of the file before the record
    content: bytes  # for fingerprints
    value: object = None
    problem: str | None = None


def parsed(path: Path, record: FileRecord, parse: Callable[[FileRecord], Parsed]) -> Parsed:
    """Return ``parse(record)``; its ValueError becomes a DataError with file and line."""
    if record.problem is not None:
        raise DataError(path, record.line, record.problem)
    try:
        return parse(record)
    except ValueError as error:
        raise DataError(path, record.line, str(error)) from error


def iter_records(path: Path, fields: Sequence[str], *, needs: Needs) -> Iterator[FileRecord]:
    """Yield the records of a .jsonl or .parquet file, without blank lines.

    Of parquet, only the columns in ``fields`` are read, and one column of each group in ``needs``
    is required. A line that is not JSON is a record with a problem, so that a caller who
    collects problems can continue.

    Raises:
        DataError: if the file cannot be read at all, or holds no record.
    """
    empty = True
    is_parquet = known_suffix(path) == ".parquet"
    for record in _parquet_records(path, fields, needs) if is_parquet else _jsonl_records(path):
        empty = False
        yield record
    if empty:
        raise DataError(path, None, "holds no records; write one JSON object per line")


def begins_with(path: Path | str, *fields: Sequence[str]) -> bool:
    """Whether the first record of a file has a field of each group, to recognise its type.

    False for folders, and for a file whose first line is damaged: its reader reports that.
    """
    path = Path(path)
    if path.is_dir():
        return False
    names = [name for group in fields for name in group]
    first = next(iter_records(path, names, needs=())).value
    return isinstance(first, dict) and all(any(n in first for n in group) for group in fields)


def iter_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number, the first byte and the content of each line, line end and BOM taken off."""
    with readable(path), path.open("rb") as file:
        offset = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(offset)
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise DataError(
                    path,
                    number,
                    f"is longer than {MAX_LINE_BYTES} bytes; end the line of each record",
                )
            yield number, offset, line.removesuffix(b"\n").removesuffix(b"\r")
            offset += len(line)


def decoded(line: bytes, offset: int) -> str:
    """Return the text of a line that begins at this byte of its file, or raise a ValueError."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"invalid UTF-8 at byte {offset + error.start} of the file "
            f"(0x{line[error.start]:02x}); save the file as UTF-8"
        ) from None


def known_suffix(path: Path) -> str:
    """Return the ending of a file that can be read, with its dot."""
    if path.is_dir() and not path.suffix:
        raise DataError(path, None, "is a folder; give one of its files")
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(path, None, f'unknown kind of file "{path.suffix}"; use .jsonl or .parquet')
    return path.suffix


def line_records(path: Path) -> Iterator[FileRecord]:
    """Yield the lines of a text file as records whose value is the text of the line."""
    with readable(path):
        total = max(path.stat().st_size, 1)
    for number, offset, line in iter_lines(path):
        try:
            text, problem = decoded(line, offset), None
        except ValueError as error:
            text, problem = None, str(error)
        yield FileRecord(number, offset, offset / total, line, text, problem)


def _jsonl_records(path: Path) -> Iterator[FileRecord]:
    for record in line_records(path):
        if record.content.isspace() or not record.content:
            continue
        value, problem = None, record.problem
        try:
            value = None if problem else json.loads(str(record.value))
        except json.JSONDecodeError as error:
            problem = (
                f"not JSON: {error.msg}, at character {error.colno}; write one object per line"
            )
        except RecursionError:
            problem = "JSON is nested too deeply"
        except ValueError as error:  # an integer of thousands of digits
            problem = str(error)
        yield replace(record, value=value, problem=problem)


def _parquet_records(path: Path, fields: Sequence[str], needs: Needs) -> Iterator[FileRecord]:
    with readable(path), open_parquet(path) as file:
        columns = columns_of(file, fields)
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
                yield FileRecord(row, 0, (row - 1) / total, repr(value).encode(), value)
        if row != file.metadata.num_rows:
            problem = f"holds {row} rows, but its header states {file.metadata.num_rows}"
            raise DataError(path, None, problem)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Return the file, to be read one row group at a time.

    By default pyarrow prefetches all row groups: the whole file would be in memory.
    """
    return pq.ParquetFile(path, pre_buffer=False)


def columns_of(file: pq.ParquetFile, fields: Sequence[str]) -> list[str]:
    """Return those fields that the file has."""
    names = file.schema_arrow.names
    return [field for field in fields if field in names]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors of a missing, forbidden or damaged file into a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(path, None, "no such file") from error
    except DAMAGED as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(path, None, f"cannot be read: {problem}") from error
