"""Data files record by record: lines of JSON, rows of parquet, or why one cannot be read."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from tercet.errors import DataError
from tercet.files.artifacts import parse_json
from tercet.files.console import shortened
from tercet.files.limits import (
    ARRAY_ERRORS,
    MAX_EXPANSION,
    MAX_RECORD_BYTES,
    MAX_UNPACKED,
    MAX_VALUES,
    unreadable,
)

BOM: Final = b"\xef\xbb\xbf"
ROWS_AT_ONCE: Final = 1024  # rows of parquet that are Python objects at the same time, at most
BYTES_AT_ONCE: Final = 1 << 26  # 64 MiB of their texts, or one row

# What readers of a damaged file raise. UnicodeDecodeError and ArrowInvalid are ValueErrors.
DAMAGED: Final = (
    *(pa.ArrowException, KeyError),
    *ARRAY_ERRORS,
    NotImplementedError,  # zipfile raises it for a compression that it does not support
)

_TEXTS: Final = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
)
_MOST_UNKNOWN: Final = 100  # fields of a file, that are remembered
_SHOWN_UNKNOWN: Final = 5
_MOST_REPORTED: Final = 1_000  # lines that are not repeated
_LONGEST_NAME: Final = 60  # characters that are compared
_NEAR: Final = 0.7  # likeness of two names, of which one may be the other misspelt
_reported: Final[set[str]] = set()

functions: Any = pyarrow.compute  # made when pyarrow is imported, so that no checker knows them

log = logging.getLogger("tercet")

_LISTS: Final = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)

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


def iter_records(
    path: Path, fields: Sequence[str], *, needs: Needs, known: Sequence[str] = ()
) -> Iterator[FileRecord]:
    """Yield the records of a .jsonl or .parquet file, without blank lines.

    Of parquet, only the columns in ``fields`` are read, and one column of each group in ``needs``
    is required. A line that is not JSON is a record with a problem, so that a caller who
    collects problems can continue. With ``known``, fields of other names are reported at the end.

    Raises:
        DataError: if the file cannot be read at all, or holds no record.
    """
    empty, known_fields, others = True, frozenset((*fields, *known)), dict[str, None]()
    is_parquet = known_suffix(path) == ".parquet"
    if known and is_parquet:
        with readable(path):
            others = dict.fromkeys(pq.read_schema(path).names)
    for record in _parquet_records(path, fields, needs) if is_parquet else _jsonl_records(path):
        empty = False
        yield record
        if known and isinstance(record.value, dict) and not known_fields.issuperset(record.value):
            if len(others) < _MOST_UNKNOWN:
                others |= dict.fromkeys(record.value)
    if empty:
        raise DataError(path, None, "holds no records; write one JSON object per line")
    if unknown := [name for name in others if name not in known_fields]:
        _report_unknown(path, unknown, known)


def _report_unknown(path: Path, unknown: Sequence[str], known: Sequence[str]) -> None:
    """Log the fields of a file that nothing reads, once for each file."""
    named = [f'"{shortened(name, 40)}"{meant(name, known)}' for name in unknown[:_SHOWN_UNKNOWN]]
    more = f" and {len(unknown) - len(named)} more" if len(unknown) > len(named) else ""
    line = f"{path}: fields that are not read: {', '.join(named)}{more}"
    if line not in _reported:
        if len(_reported) >= _MOST_REPORTED:
            _reported.clear()
        _reported.add(line)
        log.warning("%s", line)


def meant(name: str, known: Iterable[str]) -> str:
    """Return a question after the known name nearest to one, or an empty string."""
    near = get_close_matches(name.lower()[:_LONGEST_NAME], list(known), n=1, cutoff=_NEAR)
    return f' (did you mean "{near[0]}"?)' if near else ""


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
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) > MAX_RECORD_BYTES:
                problem = f"is longer than {MAX_RECORD_BYTES:,} bytes; end the line of each record"
                raise DataError(path, number, f"{problem}, or split the text")
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
            value = None if problem else parse_json(str(record.value))
        except json.JSONDecodeError as error:
            problem = (
                f"not JSON: {error.msg}, at character {error.colno}; write one object per line"
            )
        except ValueError as error:  # nested too deeply, or an integer of thousands of digits
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
        for part in parquet_parts(path, file, columns):
            for value in part.to_pylist():
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


def parquet_parts(
    path: Path, file: pq.ParquetFile, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file in order, in batches whose texts fit into memory.

    A file of some kB can hold a text of many MB, or hold one text once and refer to it from every
    row. So a row group is measured before it is written out.

    Raises:
        DataError: if a row, or what a row group unpacks to, is too large.
    """
    row = 0
    for number in range(file.metadata.num_row_groups):
        group = _RowGroup(path, file.metadata.row_group(number), number, columns, row)
        row += file.metadata.row_group(number).num_rows
        at_once = group.rows_at_once()
        for batch in file.iter_batches(
            at_once, row_groups=[number], columns=list(columns), use_threads=False
        ):
            if not group.measured:
                group.measure(batch)
            yield batch


class _RowGroup:
    """The sizes of a row group: packed, unpacked, and of texts that are written out."""

    def __init__(
        self, path: Path, group: Any, number: int, columns: Sequence[str], first: int
    ) -> None:
        self._path, self._number, self._names, self._row = path, number, columns, first
        parts = [group.column(at) for at in range(group.num_columns)]
        self._columns = [it for it in parts if it.path_in_schema.partition(".")[0] in columns]
        self._packed = sum(column.total_compressed_size for column in self._columns)
        self._written, self._fits = 0, ROWS_AT_ONCE
        self.measured = False
        self._check(sum(column.total_uncompressed_size for column in self._columns))
        if any(column.num_values > MAX_VALUES for column in self._columns):
            problem = f"a row group holds more than {MAX_VALUES:,} values of a column"
            raise DataError(path, None, f"{problem}; write it again with smaller row groups")

    def rows_at_once(self) -> int:
        """Return how many rows can be in memory together; measure them, unless that is later."""
        texts = [it for it in self._columns if it.physical_type == "BYTE_ARRAY"]
        if all(it.num_values * it.total_uncompressed_size <= MAX_RECORD_BYTES for it in texts):
            self.measured = True  # whatever is in it
            return ROWS_AT_ONCE
        names = [it.path_in_schema for it in texts]
        fits = ROWS_AT_ONCE
        try:
            # Read like this, a text that occurs many times is kept once.
            with pq.ParquetFile(self._path, pre_buffer=False, read_dictionary=names) as file:
                for batch in file.iter_batches(
                    ROWS_AT_ONCE,
                    row_groups=[self._number],
                    columns=list(self._names),
                    use_threads=False,
                ):
                    fits = min(fits, self.measure(batch))
        except pa.ArrowNotImplementedError:  # pyarrow cannot read lists as dictionaries in part
            entry = max(_dictionary_bytes(self._path, it) for it in texts)
            return min(max(BYTES_AT_ONCE // max(entry, 1), 1), ROWS_AT_ONCE)
        self.measured = True
        return fits

    def measure(self, batch: pa.RecordBatch) -> int:
        """Check the next rows, and return how many of them can be in memory together."""
        sizes = sum(map(_bytes_by_row, batch.columns), np.zeros(len(batch), np.int64))
        if (sizes > MAX_RECORD_BYTES).any():
            row = self._row + int((sizes > MAX_RECORD_BYTES).argmax()) + 1
            problem = f"is longer than {MAX_RECORD_BYTES:,} bytes; split its text"
            raise DataError(self._path, row, problem)
        self._row += len(batch)
        self._written += int(sizes.sum())
        self._check(self._written)
        return max(BYTES_AT_ONCE // max(int(sizes.max(initial=0)), 1), 1)

    def _check(self, size: int) -> None:
        if size > max(MAX_UNPACKED, MAX_EXPANSION * self._packed):
            raise DataError(
                self._path,
                None,
                f"a row group of {self._packed:,} bytes unpacks to {size:,} bytes and more, over "
                f"{MAX_EXPANSION} times as many; write it again without repeated texts, or in "
                "smaller row groups",
            )


def _dictionary_bytes(path: Path, column: Any) -> int:
    """Return the size of the texts that a column refers to, at most."""
    whole = column.total_uncompressed_size
    if not column.has_dictionary_page or column.dictionary_page_offset is None:
        return 0
    with path.open("rb") as file:
        file.seek(column.dictionary_page_offset)
        header = file.read(16)  # Thrift: 0x15 type 0x15 size, both numbers of 7 bits a byte
    at, number = 1, 0
    while at < len(header) and header[at] & 0x80:
        at += 1
    for shift, byte in enumerate(header[at + 2 :]):
        number |= (byte & 0x7F) << 7 * shift
        if not byte & 0x80:
            return min(number >> 1, whole)
    return whole


def _bytes_by_row(values: Any) -> np.ndarray:
    """Return how many bytes the texts of each row have once they are written out."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        of_entries = np.append(_bytes_by_row(values.dictionary), 0)  # -1, for null, finds the 0
        return of_entries[values.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    if pa.types.is_map(kind):
        values = pa.ListArray.from_arrays(
            values.offsets, pa.StructArray.from_arrays([values.keys, values.items], ["k", "v"])
        )
        kind = values.type
    if any(is_list(kind) for is_list in _LISTS):
        ends = np.append(0, np.cumsum(_bytes_by_row(values.flatten())))
        counts = functions.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
        bounds = np.append(0, np.cumsum(counts))
        return np.diff(ends[bounds])
    if pa.types.is_struct(kind):
        nothing = np.zeros(len(values), np.int64)
        return sum((_bytes_by_row(each) for each in values.flatten()), nothing)
    if any(is_text(kind) for is_text in _TEXTS):
        lengths = functions.binary_length(values).fill_null(0).to_numpy(zero_copy_only=False)
        return lengths.astype(np.int64)
    return np.zeros(len(values), np.int64)


def columns_of(file: pq.ParquetFile, fields: Sequence[str]) -> list[str]:
    """Return those fields that the file has."""
    names = file.schema_arrow.names
    return [field for field in fields if field in names]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors of a missing, forbidden, endless or damaged file into a DataError."""
    if problem := unreadable(path):
        raise DataError(path, None, problem)
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(path, None, "no such file") from error
    except DAMAGED as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problem = " ".join(problem.split()) or type(error).__name__
        raise DataError(path, None, f"cannot be read: {problem}") from error
