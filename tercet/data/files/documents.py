"""Documents to search in: one per record, or one per line of plain text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tercet.data.files.examples import (
    ID,
    TEXT,
    TITLE,
    as_object,
    given,
    named_field,
    nonblank,
    optional_text,
    shown,
    text_of,
)
from tercet.data.files.inputs import local_path
from tercet.data.files.texts import text_records, text_under
from tercet.errors import DataError
from tercet.files.arrays import KeySet
from tercet.files.forms import known_form
from tercet.files.parquet import open_parquet
from tercet.files.records import FieldNames, FileRecord, Names, parsed, readable

_SCALARS: Final = (str, bool, int, float)
_SPLIT: Final = "split"


@dataclass(frozen=True, slots=True)
class Document:
    """A text that can be found, with its id and title."""

    id: str
    text: str
    title: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)  # other fields of its record


@dataclass(frozen=True, slots=True)
class Fields:
    """The names that text, title and id have in the records of a file.

    The default ones stand for all names that are recognised (``content``, ``body``, ``_id``).
    """

    text: str = "text"
    title: str = "title"
    id: str = "id"

    @property
    def names(self) -> tuple[FieldNames, FieldNames, FieldNames]:
        """The names of text, title and id."""
        return (
            named_field(self.text, TEXT),
            named_field(self.title, TITLE),
            named_field(self.id, ID),
        )

    def document(self, record: FileRecord, *, keep_others: bool = False) -> Document:
        """Return the document that a record holds, or raise a ValueError that names the field."""
        values = as_object(record.value)
        text, title, id_ = self.names
        named = {name for group in self.names for name in group.among(values)}
        name, value = given(values, id_)
        return Document(
            id=_id_of(value, name, record.line),
            text=nonblank(text_under(values, text), self.text),
            title=optional_text(values, title) or "",
            fields={n: v for n, v in values.items() if n not in named and _can_be_filtered(v)}
            if keep_others
            else {},
        )


def read_documents(
    path: Path | str,
    fields: Fields = Fields(),
    *,
    split: str | None = None,
    keep_others: bool = False,
) -> Iterator[Document]:
    """Yield the documents of a file (.txt has one per line), or of a folder of BEIR.

    Blank lines are skipped. The title may be absent. An absent id becomes the number of the line,
    or of the parquet row.

    Args:
        path: the file.
        fields: names of the fields for text, title and id.
        split: read only records with this value in their field "split".
        keep_others: keep the record's other fields that hold a text, a number, a truth value, or a
            list of these.

    Raises:
        DataError: at the first record that is not a document or repeats an id, naming the line.

    Examples:
        >>> next(read_documents("docs.jsonl")).text
        'nginx serves files'
    """
    path = local_path(path)
    columns: tuple[Names, ...] = (*fields.names, _SPLIT)
    form = known_form(path)
    if keep_others and form is not None and form.kind == "parquet" and path.is_file():
        with readable(path), open_parquet(path) as file:
            columns = (*columns, *file.schema_arrow.names)
    seen = KeySet()  # of hashes of ids
    for record in text_records(path, columns):
        if (
            split is not None
            and parsed(path, record, lambda it: as_object(it.value)).get(_SPLIT) != split
        ):
            continue
        document = parsed(path, record, lambda it: fields.document(it, keep_others=keep_others))
        if not seen.add(hash(document.id)):
            _refuse_repeated_id(path, columns, fields, document.id, record.line)
        yield document
    if not len(seen):
        raise DataError(path, None, f'has no record whose "split" is {shown(split)}')


def _refuse_repeated_id(
    path: Path, columns: tuple[Names, ...], fields: Fields, repeated: str, line: int
) -> None:
    """Read the file again to find the first line with this id; two ids may share a hash."""
    for earlier in text_records(path, columns):
        if earlier.line == line:
            return
        if fields.document(earlier).id == repeated:
            raise DataError(
                path,
                line,
                f'"{fields.id}" {shown(repeated)} is already on line {earlier.line}; '
                "give each document a unique id",
            )


def _can_be_filtered(value: object) -> bool:
    return all(
        isinstance(each, _SCALARS) for each in (value if isinstance(value, list) else [value])
    )


def _id_of(value: object, field: str, line: int) -> str:
    if value is None:
        return str(line)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f'"{field}" must be a text or a whole number, got {shown(value)}')
    return nonblank(text_of(value, field), field)
