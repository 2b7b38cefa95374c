"""Documents to search in: one a record, or one a line of plain text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tercet.data.files.examples import as_object, nonblank, shown, text_of
from tercet.data.files.texts import text_records, text_under
from tercet.errors import DataError
from tercet.files.records import Record, open_parquet, parsed, readable

_PLAIN: Final = (str, bool, int, float)


@dataclass(frozen=True, slots=True)
class Document:
    """A text that can be found, and what to call it."""

    id: str
    text: str
    title: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)  # what else is known of it


def read_documents(
    path: Path | str,
    *,
    text_field: str = "text",
    title_field: str = "title",
    id_field: str = "id",
    split: str | None = None,
    keep_fields: bool = False,
) -> Iterator[Document]:
    """The documents of a .jsonl, .parquet or .txt file (one text a line, blank lines are none).

    The title may be absent. An absent id becomes the number of the line, or of the parquet row.
    With a ``split``, only records whose field of that name says so are documents.
    With ``keep_fields`` a document has the record's other fields that hold a text, a number, a
    truth value, or a list of these.

    Raises:
        DataError: at the first record that is no document or has the id of an earlier one,
            naming the line.
    """
    path = Path(path)
    names = (text_field, title_field, id_field, "split")
    if keep_fields and path.suffix == ".parquet":
        with readable(path), open_parquet(path) as file:
            names = (*names, *(set(file.schema_arrow.names) - set(names)))

    def document_of(record: Record) -> Document:
        fields = as_object(record.value)
        return Document(
            id=_id_of(fields.get(id_field), id_field, record.line),
            text=nonblank(text_under(fields, text_field), text_field),
            title=_title(fields.get(title_field), title_field),
            fields=_others(fields, {text_field, title_field, id_field}) if keep_fields else {},
        )

    # Ids are kept as 8-byte hashes. Where two are equal, the file is read again up to here, which
    # finds the first line, and tells two ids of one hash apart.
    seen: set[int] = set()
    for record in text_records(path, names):
        if split is not None and parsed(path, record, _split_of) != split:
            continue
        document = parsed(path, record, document_of)
        if hash(document.id) in seen:
            for earlier in text_records(path, names):
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
    if not seen:
        raise DataError(path, None, f'has no record whose "split" is {shown(split)}')


def _split_of(record: Record) -> object:
    return as_object(record.value).get("split")


def _others(fields: Mapping[str, Any], named: set[str]) -> dict[str, Any]:
    """The fields that a filter can ask for."""
    return {
        name: value
        for name, value in fields.items()
        if name not in named and (isinstance(value, _PLAIN) or _is_list_of_plain(value))
    }


def _is_list_of_plain(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(member, _PLAIN) for member in value)


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
