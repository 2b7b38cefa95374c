"""Data files record by record: lines of JSON, rows of tables, or why one cannot be read."""

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import pyarrow as pa

from tercet.errors import DataError
from tercet.files.artifacts import parse_json
from tercet.files.console import shortened
from tercet.files.forms import (
    Content,
    FileForm,
    form_of,
    known_form,
)
from tercet.files.limits import (
    ARRAY_ERRORS,
    MAX_RECORD_BYTES,
    unreadable,
)
from tercet.files.parquet import open_parquet, parquet_parts

BOM: Final = b"\xef\xbb\xbf"

# What readers of a damaged file raise. UnicodeDecodeError and ArrowInvalid are ValueErrors.
DAMAGED: Final = (
    *(pa.ArrowException, KeyError),
    *ARRAY_ERRORS,
    NotImplementedError,  # zipfile raises it for a compression that it does not support
)

_MOST_UNKNOWN: Final = 100  # fields of a file, that are remembered
_SHOWN_UNKNOWN: Final = 5
_MOST_REPORTED: Final = 1_000  # lines that are not repeated
_LONGEST_NAME: Final = 60  # characters that are compared
_MOST_KEYS: Final = 1_000  # sets of fields of records, whose unknown ones are remembered
_DIGITS: Final = 9  # of the number of a column
_NEAR: Final = 0.7  # likeness of two names, of which one may be the other misspelt
_reported: Final[set[str]] = set()

log = logging.getLogger("tercet")

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The names that a field may have in a file."""

    names: tuple[str, ...]  # two of them in one record are an error
    usual: tuple[str, ...] = ()  # names that others use; read where none of ``names`` is there
    numbered: tuple[str, ...] = ()  # with _1, _2 and so on they hold one text each
    flag: str = ""  # of the command line: it names the field

    @classmethod
    def of(cls, field: "str | Sequence[str] | FieldNames") -> "FieldNames":
        """Return the names of a field that has these names."""
        if isinstance(field, FieldNames):
            return field
        return cls((field,) if isinstance(field, str) else tuple(field))

    def among(self, given: Collection[str]) -> list[str]:
        """Return the names, of those given, that hold this field; several may be ambiguous."""
        found = [name for name in self.names if name in given]
        if self.numbered and (numbers := self._numbered(given)):
            return [*found, *numbers]
        return found or [name for name in self.usual if name in given]

    def _numbered(self, given: Iterable[str]) -> list[str]:
        numbers: dict[str, int] = {}
        for name in given:
            base, _, number = name.rpartition("_")
            if base in self.numbered and number.isascii() and number.isdecimal():
                numbers[name] = int(number[:_DIGITS])
        return sorted(numbers, key=lambda name: (numbers[name], name))


Names: TypeAlias = "str | Sequence[str] | FieldNames"
"""The name of a field, or all names that it may have."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One record of a file, or the reason why it cannot be read."""

    line: int  # of the file, from 1; of parquet, the row
    offset: int  # the byte where the line begins, unpacked; of tables, as lines of JSON; 0: parquet
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
    path: Path,
    fields: Sequence[Names],
    *,
    needs: Sequence[Names],
    known: Sequence[str] | None = None,
    null: Collection[str] = (),
) -> Iterator[FileRecord]:
    """Yield the records of a file of any format, without blank lines.

    The formats are JSON lines, CSV and TSV, each also packed, and parquet. Of parquet, only the
    columns of ``fields`` are read. Of parquet and tables, a column for each of ``needs`` is
    required. A record that cannot be read is one with a problem, so that a caller who collects
    problems can continue. If ``known`` is given, fields that are neither in it nor read are
    reported at the end, with the number of records that have them. An empty cell of a table is an
    absent field; in the columns of ``null`` it is None.

    Raises:
        DataError: if the file cannot be read at all, or holds no record.
    """
    form = form_of(path)
    groups = [FieldNames.of(each) for each in fields]
    unknown = None if known is None else _UnknownFields(groups, known)
    empty = True
    needed = [FieldNames.of(each) for each in needs]
    if form.kind == "parquet":
        records = _parquet_records(path, groups, needed, unknown)
    else:
        is_table = form.kind != "jsonl"
        records = _table_records(path, form, needed, null) if is_table else _jsonl_records(path)
    for record in records:
        empty = False
        if unknown is not None and isinstance(record.value, dict):
            unknown.add(record.value)
        yield record
    if empty:
        raise DataError(path, None, _NO_RECORDS.get(form.kind, "holds no records"))
    if unknown is not None:
        unknown.report(path)


_NO_RECORDS: Final[dict[str, str]] = {
    "jsonl": "holds no records; write one JSON object per line",
    "csv": "holds no records; write the names of the columns, and a row for each record",
    "tsv": "holds no records; write the names of the columns, and a row for each record",
}


class _UnknownFields:
    """Counts of the fields that nothing reads."""

    def __init__(self, fields: Sequence[FieldNames], known: Sequence[str]) -> None:
        self._fields, self._known = fields, frozenset(known)
        self._of_keys: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, names: Collection[str], records: int = 1) -> None:
        """Count the unknown fields of some records that have these fields."""
        keys = tuple(names)
        unknown = self._of_keys.get(keys)
        if unknown is None:
            read = {name for group in self._fields for name in group.among(keys)}
            unknown = tuple(name for name in keys if name not in read | self._known)
            if len(self._of_keys) < _MOST_KEYS:
                self._of_keys[keys] = unknown
        for name in unknown:
            if name in self._counts or len(self._counts) < _MOST_UNKNOWN:
                self._counts[name] += records

    def report(self, path: Path) -> None:
        """Log the fields that nothing reads, once for each file."""
        names = [*self._known, *(name for group in self._fields for name in group.names)]
        others: list[str] = []
        for name, count in self._counts.items():
            if near := nearest(name, names):
                have = "record has" if count == 1 else "records have"
                _log_once(
                    f'{path}: {count:,} {have} a field "{shortened(name, 40)}", which is ignored; '
                    f'did you mean "{near}"?'
                )
            else:
                others.append(f'"{shortened(name, 40)}"')
        more = len(others) - _SHOWN_UNKNOWN
        if others:
            shown = ", ".join(others[:_SHOWN_UNKNOWN])
            rest = f" and {more} more" if more > 0 else ""
            _log_once(f"{path}: fields that are not read: {shown}{rest}")


def _log_once(line: str) -> None:
    if line not in _reported:
        if len(_reported) >= _MOST_REPORTED:
            _reported.clear()
        _reported.add(line)
        log.warning("%s", line)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name nearest to one, or None if none is near."""
    near = get_close_matches(name.lower()[:_LONGEST_NAME], list(known), n=1, cutoff=_NEAR)
    return near[0] if near else None


def meant(name: str, known: Iterable[str]) -> str:
    """Return a question after the known name nearest to one, or an empty string."""
    near = nearest(name, known)
    return "" if near is None else f' (did you mean "{near}"?)'


def begins_with(path: Path | str, *fields: Names) -> bool:
    """Whether the first record of a file has each of these fields, to recognise its type.

    False for folders, and for a file whose first line is damaged: its reader reports that.
    """
    path = Path(path)
    if path.is_dir():
        return False
    groups = [FieldNames.of(each) for each in fields]
    first = next(iter_records(path, groups, needs=())).value
    return isinstance(first, dict) and all(group.among(first) for group in groups)


def iter_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number, the first byte and the content of each line, line end and BOM taken off."""
    for number, offset, _, line in _raw_lines(path):
        yield number, offset, line.removesuffix(b"\n").removesuffix(b"\r")


def _raw_lines(path: Path) -> Iterator[tuple[int, int, float, bytes]]:
    """Yield the number of each line, its first byte, the part of the file before it, and itself."""
    with readable(path), Content(path).buffered() as file:
        content: Any = file.raw
        packed = not (form := known_form(path)) or form.compression is not None
        total = 1 if packed else max(path.stat().st_size, 1)
        offset = number = 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            if number == 0 and line.startswith(BOM):
                offset, line = len(BOM), line[len(BOM) :]
            number += 1
            if len(line) > MAX_RECORD_BYTES:
                problem = f"is longer than {MAX_RECORD_BYTES:,} bytes; end the line of each record"
                raise DataError(path, number, f"{problem}, or split the text")
            if line:
                yield number, offset, content.done if packed else offset / total, line
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
    """Return the ending of a file of examples that is written, with its dot."""
    if path.is_dir() and not path.suffix:
        raise DataError(path, None, "is a folder; give one of its files")
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(path, None, f'unknown kind of file "{path.suffix}"; use .jsonl or .parquet')
    return path.suffix


def line_records(path: Path) -> Iterator[FileRecord]:
    """Yield the lines of a text file as records whose value is the text of the line."""
    for number, offset, done, raw in _raw_lines(path):
        line = raw.removesuffix(b"\n").removesuffix(b"\r")
        try:
            text, problem = decoded(line, offset), None
        except ValueError as error:
            text, problem = None, str(error)
        yield FileRecord(number, offset, done, line, text, problem)


def _jsonl_records(path: Path) -> Iterator[FileRecord]:
    first = True
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
        if first and (problem or isinstance(value, list)):
            other = _of_another_form(path, record.content)
            if other is not None and record.content.strip() != b"{":  # it may be that line alone
                raise DataError(path, record.line, other)
            problem = other or problem
        first = False
        yield replace(record, value=value, problem=problem)


def _of_another_form(path: Path, line: bytes) -> str | None:
    """Return what a file is whose first line is no object, as far as the line shows it."""
    text = line.strip()
    if text in (b"[", b"{") or text.startswith((b"[{", b"[ {")):
        query = "." if text == b"{" else "'.[]'"
        return (
            "is one JSON value and not one object per line; convert it: "
            f"jq -c {query} {path.name} > lines-of-{path.name}"
        )
    named = [kind for kind, mark in (("tsv", b"\t"), ("csv", b",")) if mark in text]
    if named and text[:1] not in b'{["' and text.isascii():
        return (
            f"not JSON; it looks like a table, whose file is named "
            f"{path.name.replace('.jsonl', f'.{named[0]}')}"
        )
    return None


class _TextLines:
    """The decoded lines of a table, for the parser, and how far they were read."""

    def __init__(self, path: Path) -> None:
        self._path, self._lines, self._bytes = path, _raw_lines(path), 0
        self.line, self.done = 0, 0.0
        self.problem: str | None = None

    def __iter__(self) -> "_TextLines":
        return self

    def begin_row(self) -> int:
        """Begin the next row, and return the number of its first line."""
        self._bytes, self.problem = 0, None
        return self.line + 1

    def __next__(self) -> str:
        self.line, offset, self.done, line = next(self._lines)
        self._bytes += len(line)
        if self._bytes > MAX_RECORD_BYTES:
            problem = f"a row is longer than {MAX_RECORD_BYTES:,} bytes; is a quotation mark open?"
            raise DataError(self._path, self.line, problem)
        try:
            return decoded(line, offset)
        except ValueError as error:
            self.problem = self.problem or str(error)
            return line.decode("utf-8", "replace")

    def close(self) -> None:
        self._lines.close()  # pyright: ignore[reportAttributeAccessIssue]


def _table_records(
    path: Path, form: FileForm, needs: Sequence[FieldNames], null: Collection[str]
) -> Iterator[FileRecord]:
    """Yield the rows of a CSV or TSV file as records of texts; see :func:`iter_records`.

    The content of a record is its line of JSON, so it does not depend on how cells are quoted.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    mark = "," if form.kind == "csv" else "\t"
    lines = _TextLines(path)
    rows = csv.reader(lines, delimiter=mark, strict=True)
    header: list[str] | None = None
    offset = 0
    try:
        while True:
            line, done = lines.begin_row(), lines.done
            try:
                cells = next(rows, None)
            except csv.Error as error:
                if header is None:
                    raise DataError(path, line, _table_problem(error, mark)) from error
                yield FileRecord(line, offset, done, b"", None, _table_problem(error, mark))
                return  # where the next row begins is not known
            if cells is None:
                return
            if not cells or (cells == [""] and header is None):
                continue
            if header is None:
                header = _header(path, line, cells, mark, lines.problem)
                _check_columns(path, header, needs)
                continue
            problem = lines.problem
            if problem is None and len(cells) != len(header):
                found = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
                problem = (
                    f"has {found}, but the first line names {len(header)} columns; put quotation "
                    f"marks around a text that holds a {_MARKS[mark]}"
                )
            value = {name: cell for name, cell in zip(header, cells, strict=False) if name and cell}
            content = json.dumps(value, ensure_ascii=False).encode()
            absent = {name: None for name in header if name in null and name not in value}
            full = None if problem else {**value, **absent}
            yield FileRecord(line, offset, done, content, full, problem)
            offset += len(content) + 1
    finally:
        lines.close()


_MARKS: Final = {",": "comma", "\t": "tab", ";": "semicolon"}


def _header(path: Path, line: int, cells: list[str], mark: str, problem: str | None) -> list[str]:
    """Return the names of the columns, of which those without a name are not read."""
    names = [cell.strip() for cell in cells]
    others = [_MARKS[other] for other in _MARKS if other != mark and other in cells[0]]
    if problem is None and cells[0].lstrip().startswith('{"'):
        problem = "its first line is JSON; name a file of JSON lines .jsonl"
    elif problem is None and len(names) == 1 and others:
        problem = (
            f"its first line has a {others[0]} but no {_MARKS[mark]}; a .csv has commas between "
            "its columns, and a .tsv has tabs"
        )
    elif problem is None and not any(names):
        problem = "its first line is blank; it names the columns"
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if problem is None and twice is not None:
        problem = f'its first line names a column "{shortened(twice, 40)}" twice; rename one'
    if problem is not None:
        raise DataError(path, line, problem)
    return names


def _table_problem(error: csv.Error, mark: str) -> str:
    if "unexpected end" in str(error):
        return "a quotation mark that opens in this row is never closed; close it"
    if "new-line character" in str(error):
        return "holds a carriage return that ends no line; save the file with usual line ends"
    return (
        f"cannot be split into columns: {error}; put quotation marks around a text that holds a "
        f"{_MARKS[mark]} or a quotation mark, and double the ones in it"
    )


def _check_columns(path: Path, names: Sequence[str], needs: Sequence[FieldNames]) -> None:
    """Raise a DataError if a field that is needed has no column."""
    for group in needs:
        if not group.among(names):
            flag = f", or name it with {group.flag}" if group.flag else ""
            shown = ", ".join(f'"{shortened(name, 40)}"' for name in names if name)
            raise DataError(
                path,
                None,
                f'has no column "{group.names[0]}"; rename one of its columns to it{flag}: {shown}',
            )


def _parquet_records(
    path: Path,
    fields: Sequence[FieldNames],
    needs: Sequence[FieldNames],
    unknown: _UnknownFields | None,
) -> Iterator[FileRecord]:
    with readable(path), open_parquet(path) as file:
        names = file.schema_arrow.names
        columns = columns_of(names, fields)
        _check_columns(path, names, needs)
        if unknown is not None:
            unknown.add(names, file.metadata.num_rows)
        total = max(file.metadata.num_rows, 1)
        row = 0
        for part in parquet_parts(path, file, columns):
            for value in part.to_pylist():
                row += 1
                yield FileRecord(row, 0, (row - 1) / total, repr(value).encode(), value)
        if row != file.metadata.num_rows:
            problem = f"holds {row} rows, but its header states {file.metadata.num_rows}"
            raise DataError(path, None, problem)


def columns_of(names: Sequence[str], fields: Sequence[Names]) -> list[str]:
    """Return those of these columns that hold the fields."""
    found = (name for each in fields for name in FieldNames.of(each).among(names))
    return list(dict.fromkeys(found))


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
