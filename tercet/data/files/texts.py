"""Files of plain texts: .txt with one text per line, or records with a text field."""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from tercet.data.files.beir import is_judged_folder, judged_documents
from tercet.data.files.examples import TEXT, as_object, given, named_field, nonblank, text_of
from tercet.data.files.inputs import local_path
from tercet.data.files.scan import RecordFormat
from tercet.data.files.sources import Source, open_source
from tercet.errors import DataError
from tercet.files.artifacts import fingerprint_number
from tercet.files.forms import TEXTS, form_of
from tercet.files.records import FieldNames, FileRecord, Names, iter_records, line_records, parsed
from tercet.types import Example

Value = TypeVar("Value")


def read_texts(path: Path | str, field: str = "text") -> Iterator[str]:
    """Yield the texts of a file in order, with blank ones.

    Each text becomes a row of an array of vectors, so a blank line of a .txt file is a text.

    Raises:
        DataError: at the first record without such a text, naming the line.
    """
    path, names = local_path(path), named_field(field, TEXT)
    for record in text_records(path, (names,), blank_lines=True):
        yield parsed(path, record, lambda it: text_under(it.value, names))


def open_texts(
    path: Path | str,
    *,
    field: str = "text",
    name: str | None = None,
    weight: float | int = 1.0,
    blank_lines: bool = False,
) -> Source:
    """Check a file of texts, and make them readable by row, for stages that read texts.

    Each text is an example: its query and its one positive.

    Args:
        path: a file of texts, one a line (.txt), or of records (.jsonl, .csv, .tsv, .parquet).
        field: the column with the text.
        name: the source's name; None takes the file's.
        weight: how often an epoch uses each text.
        blank_lines: take blank lines of a .txt file as texts.

    Raises:
        DataError: at the first record without a text, naming the line.

    Examples:
        >>> len(open_texts("texts.txt"))
        3
    """
    return open_source(
        path, name=name, weight=weight, record_format=text_format(field, blank=blank_lines)
    )


def text_format(field: str = "text", *, blank: bool = False) -> RecordFormat:
    """Return the format of files of texts."""
    names = named_field(field, TEXT)
    return RecordFormat(
        about=f"texts {field!r} {blank}",
        records=partial(text_records, fields=(names,), blank_lines=blank),
        parse=partial(_as_example, field=names, blank=blank),
        fields=(names,),
        plain=partial(_line_as_record, field=field),
        named="" if names == TEXT else f"texts {field!r}",
    )


def text_records(
    path: Path, fields: tuple[Names, ...], *, blank_lines: bool = False
) -> Iterator[FileRecord]:
    """Yield the records of a file; a line of plain text is a record with only the first field.

    Of a folder of BEIR these are its documents.
    """
    if is_judged_folder(path):
        yield from judged_documents(path)
        return
    if form_of(path, TEXTS).kind != "txt":
        yield from iter_records(path, fields, needs=fields[:1])
        return
    empty, name = True, FieldNames.of(fields[0]).names[0]
    for record in line_records(path):
        text = str(record.value or "")
        if blank_lines or record.problem or (text and not text.isspace()):
            empty = False
            yield replace(record, value={name: text})
    if empty:
        raise DataError(path, None, "holds no texts; write one text per line")


def _as_example(record: object, task: str, *, field: FieldNames, blank: bool) -> Example:
    text = text_under(record, field)
    return Example(text if blank else nonblank(text, field.names[0]), (text,), task=task)


def _line_as_record(line: str, *, field: str) -> dict[str, str]:
    return {field: line.removesuffix("\n").removesuffix("\r")}


def text_under(record: object, field: FieldNames) -> str:
    """Return the text of a record, or raise a ValueError that names the field."""
    name, value = given(as_object(record), field)
    if value is None:
        raise ValueError(
            f'"{name}" is missing; it holds the text; if another field does, name it with '
            f"{TEXT.flag}"
        )
    return text_of(value, name)


def normal_form(text: str) -> str:
    """Return a text in NFKC and lower case, with single spaces, to recognise duplicates."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)  # ASCII is NFKC
    return " ".join(plain.lower().split())


class EvenSample(Generic[Value]):
    """Values at equal distances in a stream of unknown length: at most ``limit`` of them."""

    def __init__(self, limit: int) -> None:
        self.kept: list[Value] = []
        self._limit, self._step, self._seen = limit, 1, 0

    def add(self, value: Value) -> None:
        """Keep the value if its turn has come; when there are too many, drop every other one."""
        if self._seen % self._step == 0:
            self.kept.append(value)
        if len(self.kept) > self._limit:
            self.kept, self._step = self.kept[::2], self._step * 2
        self._seen += 1


def evenly_spaced(texts: Iterable[str], limit: int) -> list[str]:
    """Return at most ``limit`` texts at equal distances; twice as many are held in memory."""
    sample = EvenSample[str](2 * limit)
    for text in texts:
        sample.add(text)
    return sample.kept[:: -(-len(sample.kept) // limit) or 1]


def text_key(text: str) -> int:
    """Return a 64-bit hash that ignores case, spaces and Unicode form."""
    return fingerprint_number(normal_form(text))
