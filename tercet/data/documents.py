"""Texts to search in or to encode: one document a record, or one a line of plain text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tercet.data.examples import as_object, nonblank, shown, text_of
from tercet.data.records import Record, decoded, iter_lines, iter_records, parsed
from tercet.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """A text that can be found, and what to call it."""

    id: str
    text: str
    title: str = ""


def read_documents(
    path: Path | str,
    *,
    text_field: str = "text",
    title_field: str = "title",
    id_field: str = "id",
) -> Iterator[Document]:
    """The documents of a .jsonl, .parquet or .txt file (one text a line, blank lines are none).

    The title may be absent. An absent id becomes the number of the line, or of the parquet row.

    Raises:
        DataError: at the first record that is no document or has the id of an earlier one,
            naming the line.
    """
    path = Path(path)

    def document_of(record: Record) -> Document:
        fields = as_object(record.value)
        return Document(
            id=_id_of(fields.get(id_field), id_field, record.line),
            text=nonblank(_text(fields.get(text_field), text_field), text_field),
            title=_title(fields.get(title_field), title_field),
        )

    # Ids are kept as 8-byte hashes. Where two are equal, the file is read again up to here, which
    # finds the first line, and tells two ids of one hash apart.
    seen: set[int] = set()
    for record in _records(path, (text_field, title_field, id_field)):
        document = parsed(path, record, document_of)
        if hash(document.id) in seen:
            for earlier in _records(path, (text_field, title_field, id_field)):
                if earlier.line == record.line:
                    break
                if document_of(earlier).id == document.id:
                    raise DataError(
                        path,
                        record.line,
                        f'"{id_field}" {shown(document.id)} is that of line {earlier.line} '
                        "already; give each document an id of its own",
                    )
        seen.add(hash(document.id))
        yield document


def read_texts(path: Path | str, field: str = "text") -> Iterator[str]:
    """The texts of a .jsonl, .parquet or .txt file, in order and blank ones included.

    A text stands for a row of the vectors made of it, so a blank line of a .txt file is a text.

    Raises:
        DataError: at the first record without such a text, naming the line.
    """
    path = Path(path)
    for record in _records(path, (field,), blank_lines=True):
        yield parsed(path, record, lambda it: _text(as_object(it.value).get(field), field))


def _text(value: object, field: str) -> str:
    if value is None:
        raise ValueError(f'"{field}" is missing; it holds the text of the document')
    return text_of(value, field)


def _title(value: object, field: str) -> str:
    return "" if value is None else text_of(value, field)


def _id_of(value: object, field: str, line: int) -> str:
    if value is None:
        return str(line)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f'"{field}" must be a text or a whole number, got {shown(value)}')
    return nonblank(text_of(value, field), field)


def _records(path: Path, fields: tuple[str, ...], *, blank_lines: bool = False) -> Iterator[Record]:
    """The records of a file; a line of plain text is a record with the first field only."""
    if path.suffix in (".jsonl", ".parquet"):
        yield from iter_records(path, fields, needs=(fields[:1],))
        return
    if path.suffix != ".txt":
        kinds = "use .jsonl, .parquet or .txt"
        raise DataError(path, None, f'unknown kind of file "{path.suffix}"; {kinds}')
    empty = True
    for number, offset, line in iter_lines(path):
        try:
            text, problem = decoded(line, offset), None
        except ValueError as error:
            text, problem = "?", str(error)
        if blank_lines or (text and not text.isspace()):
            empty = False
            yield Record(number, offset, 0.0, line, {fields[0]: text}, problem)
    if empty:
        raise DataError(path, None, "holds no texts; write one text a line")
