"""Labelled texts: one text per record, and its classes or topics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tercet.data.files.examples import (
    TEXT,
    as_object,
    given,
    named_field,
    nonblank,
    optional_text,
    shown,
    text_of,
)
from tercet.data.files.inputs import local_path
from tercet.data.files.texts import text_under
from tercet.errors import DataError
from tercet.files.artifacts import parse_json
from tercet.files.limits import read_text
from tercet.files.records import FieldNames, begins_with, iter_records, parsed, readable

LABELS: Final = FieldNames(("label", "labels"), flag="--label-field")  # one, or a list of them
SPLIT: Final = "split"


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and its labels: one class, several topics, or none."""

    text: str
    labels: tuple[str, ...]  # distinct
    split: str | None = None


def read_labelled_texts(
    path: Path | str,
    *,
    text_field: str | Sequence[str] = TEXT.names[0],
    label_field: str = LABELS.names[0],
    label_prefix: str = "",
) -> Iterator[LabelledText]:
    """Yield the labelled texts of a file, in order.

    Several text fields, such as title and abstract, are joined by spaces; all but the first may
    be absent. A label is a text or a whole number, or a list of them; the field ``labels`` is read
    as well as ``label``. With ``label_prefix`` only labels with that prefix count; it is removed.

    Raises:
        DataError: at the first record that is not a labelled text, naming file and line.
    """
    path = local_path(path)
    first, *others = (text_field,) if isinstance(text_field, str) else text_field
    texts, labels = named_field(first, TEXT), named_field(label_field, LABELS)
    for record in iter_records(
        path, (texts, *others, labels, SPLIT), needs=(texts, labels), known=()
    ):
        yield parsed(
            path, record, lambda it: _labelled(it.value, texts, others, labels, label_prefix)
        )


def read_label_texts(path: Path | str) -> dict[str, str]:
    """Read the names of labels from a file with a JSON object: ``{"0": "sadness", "1": "joy"}``.

    Raises:
        DataError: if the file holds anything else.
    """
    path = Path(path)
    with readable(path):
        content = read_text(path)
    try:
        words = as_object(parse_json(content))
        return {label: nonblank(text_of(text, label), label) for label, text in words.items()}
    except ValueError as error:
        raise DataError(
            path, None, f"must be one object of labels and their names, {{...}}: {error}"
        ) from error


def is_labelled_file(path: Path | str) -> bool:
    """Whether the first record of a file has a text and a label."""
    return begins_with(path, TEXT, LABELS)


def _labelled(
    record: object,
    text_names: FieldNames,
    others: Sequence[str],
    label_names: FieldNames,
    prefix: str,
) -> LabelledText:
    fields = as_object(record)
    parts = [text_under(fields, text_names), *(optional_text(fields, (name,)) for name in others)]
    text = " ".join(part for part in parts if part and not part.isspace())
    return LabelledText(
        text=nonblank(text, text_names.names[0]),
        labels=_labels(*given(fields, label_names), prefix),
        split=optional_text(fields, (SPLIT,)),
    )


def _labels(name: str, value: object, prefix: str) -> tuple[str, ...]:
    if value is None:
        raise ValueError(
            f'"{name}" is missing; it holds the label, or a list of labels; '
            f"if another field does, name it with {LABELS.flag}"
        )
    labels = [_label(each, name) for each in (value if isinstance(value, list) else [value])]
    kept = [label.removeprefix(prefix) for label in labels if label.startswith(prefix)]
    return tuple(dict.fromkeys(kept))


def _label(value: object, name: str) -> str:
    if isinstance(value, int):  # the number of a class; true and false as in JSON
        return str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str):
        raise ValueError(
            f'"{name}" must hold a text or a whole number, or a list of them, got {shown(value)}'
        )
    return nonblank(text_of(value, name), name)
