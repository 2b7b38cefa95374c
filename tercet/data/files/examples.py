"""The fields of a line of training data, and how they are checked."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, get_args

from tercet.types import Example, InBatch

# The first name of each field is the one that is written; the others are read as well. The short
# ones are those of FlagEmbedding's files.
QUERY: Final = ("query",)
POSITIVES: Final = ("positives", "positive", "pos")
NEGATIVES: Final = ("negatives", "negative", "neg")
POSITIVE_SCORES: Final = ("positive_scores", "pos_scores")
NEGATIVE_SCORES: Final = ("negative_scores", "neg_scores")
QUERY_PROMPT: Final = ("query_prompt", "prompt")
DOCUMENT_PROMPT: Final = ("document_prompt",)
TASK: Final = ("task",)
IN_BATCH: Final = ("in_batch",)
LANG: Final = ("lang", "language")
EXAMPLE_FIELDS: Final = (
    *QUERY,
    *POSITIVES,
    *NEGATIVES,
    *POSITIVE_SCORES,
    *NEGATIVE_SCORES,
    *QUERY_PROMPT,
    *DOCUMENT_PROMPT,
    *TASK,
    *IN_BATCH,
    *LANG,
)

OUR_FIELDS: Final = (
    "rank",
    "score",
    "document_id",
    "passage_start",
    "passage_end",
    "passage_position",
    "generator",
    "prompt_digest",
    "seed",
)
"""What ``tercet filter`` and ``tercet synthesize`` write beside an example; nothing reads it."""

SHOWN_CHARACTERS: Final = 60  # of a wrong value, in a message


def parse_example(record: object, task: str) -> Example:
    """Return the training example that a decoded JSON object or a parquet row holds.

    Unknown fields are ignored, and a field that is null counts as absent. ``task`` is the name
    for a record that gives none. A negative that equals a positive is kept: the relation matrix
    ignores equal texts, and ``check`` counts them.

    Raises:
        ValueError: naming the field; the caller adds file and line.
    """
    fields = as_object(record)
    name, query = given(fields, QUERY)
    if query is None:
        raise ValueError('"query" is missing; an example needs a "query" and its "positives"')
    positives = _texts(fields, POSITIVES)
    if not positives:
        raise ValueError(
            '"positives" is missing or empty; a query needs at least one document that it matches'
        )
    for text in positives:
        nonblank(text, POSITIVES[0])
    negatives = _texts(fields, NEGATIVES)
    return Example(
        query=nonblank(text_of(query, name), name),
        positives=positives,
        negatives=negatives,
        positive_scores=_scores(fields, POSITIVE_SCORES, len(positives)),
        negative_scores=_scores(fields, NEGATIVE_SCORES, len(negatives)),
        query_prompt=optional_text(fields, QUERY_PROMPT),
        document_prompt=optional_text(fields, DOCUMENT_PROMPT),
        task=optional_text(fields, TASK) or task,
        in_batch=_policy(fields),
        lang=optional_text(fields, LANG) or "",
    )


def example_record(example: Example) -> dict[str, Any]:
    """Return the record of an example, as ``parse_example`` reads it, without absent fields."""
    record: dict[str, Any] = {}
    for field in dataclasses.fields(example):
        value = getattr(example, field.name)
        if value != field.default:
            record[field.name] = list(value) if isinstance(value, tuple) else value
    return record


def as_object(record: object) -> Mapping[str, Any]:
    """Return the record if it is an object with fields."""
    if not isinstance(record, dict):
        raise ValueError(
            f"expected an object with named fields, {{...}}, got {type(record).__name__}"
        )
    return record


def text_of(value: object, field: str) -> str:
    """Return the value if it is a text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise ValueError(f'"{field}" must be a text, got {shown(value)}')
    # JSON can contain half of a character that needs two escapes ("\ud83d" without its second
    # half). Python accepts it in a string, but tokenizers do not.
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'"{field}" holds half a character at position {error.start}, '
            f"{value[error.start]!r}; remove it"
        ) from None
    return value


def nonblank(text: str, field: str) -> str:
    """Return the text if it is not blank."""
    if not text or text.isspace():
        raise ValueError(f'"{field}" holds a blank text; write the text or remove the record')
    return text


def shown(value: object) -> str:
    """Return a value for a message, at most one line long."""
    whole = repr(value)
    return whole if len(whole) <= SHOWN_CHARACTERS else whole[:SHOWN_CHARACTERS] + "..."


def given(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """Return the name of a field in this record, and its value; None if it is absent."""
    if len(names) == 1:
        return names[0], fields.get(names[0])
    used = [name for name in names if fields.get(name) is not None]
    if len(used) > 1:
        raise ValueError(
            f'"{used[0]}" and "{used[1]}" are two names of one field; keep one of them'
        )
    return (used[0], fields[used[0]]) if used else (names[0], None)


def optional_text(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the text in a field of this record; None if it is absent."""
    name, value = given(fields, names)
    return None if value is None else text_of(value, name)


def finite(value: object, field: str) -> float:
    """Return the value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'"{field}" must hold numbers, got {shown(value)}')
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f'"{field}" must hold finite numbers, got {shown(number)}')
    return number


def _policy(fields: Mapping[str, Any]) -> InBatch | None:
    name, value = given(fields, IN_BATCH)
    if value is not None and value not in get_args(InBatch):
        raise ValueError(
            f'"{name}" must be one of {", ".join(get_args(InBatch))}, got {shown(value)}'
        )
    return value


def _texts(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    name, value = given(fields, names)
    if value is None:
        return ()
    if isinstance(value, str):
        return (text_of(value, name),)
    if not isinstance(value, list):
        raise ValueError(f'"{name}" must be a list of texts, got {shown(value)}')
    return tuple(text_of(text, name) for text in value)


def _scores(
    fields: Mapping[str, Any], names: Sequence[str], texts: int
) -> tuple[float, ...] | None:
    name, value = given(fields, names)
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f'"{name}" must be a list of numbers, got {shown(value)}')
    if len(value) != texts:
        raise ValueError(
            f'"{name}" has {len(value)} numbers for {texts} texts; give one number for each text'
        )
    return tuple(finite(score, name) for score in value)
