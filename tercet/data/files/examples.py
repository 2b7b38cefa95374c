"""The fields of a line of training data, and how they are checked."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, get_args

from tercet.files.records import FieldNames, Names
from tercet.types import Example, InBatch

# The first name of each field is the one that is written; the others are read as well. The short
# ones are those of FlagEmbedding's files, and the usual ones those of other data sets.
_POSITIVES: Final = ("positives", "positive", "pos")
_NEGATIVES: Final = ("negatives", "negative", "neg")
QUERY: Final = FieldNames(
    ("query",), ("anchor", "question", "sentence1", "text1"), flag="--query-field"
)
POSITIVES: Final = FieldNames(
    _POSITIVES,
    ("passage", "answer", "context", "document", "text", "sentence2", "text2"),
    numbered=_POSITIVES,
    flag="--positive-field",
)
NEGATIVES: Final = FieldNames(_NEGATIVES, numbered=_NEGATIVES, flag="--negative-field")
TEXT: Final = FieldNames(("text",), ("content", "body", "passage", "document"), flag="--text-field")
TITLE: Final = FieldNames(("title",), flag="--title-field")
ID: Final = FieldNames(("id",), ("_id",), flag="--id-field")
# Of a pair with a similarity score.
TEXT1: Final = ("text1", "sentence1")
TEXT2: Final = ("text2", "sentence2")
SCORE: Final = ("score", "similarity", "label")
POSITIVE_SCORES: Final = ("positive_scores", "pos_scores")
NEGATIVE_SCORES: Final = ("negative_scores", "neg_scores")
QUERY_PROMPT: Final = ("query_prompt", "prompt")
DOCUMENT_PROMPT: Final = ("document_prompt",)
TASK: Final = ("task",)
IN_BATCH: Final = ("in_batch",)
LANG: Final = ("lang", "language")
_OTHERS: Final = (
    *(POSITIVE_SCORES, NEGATIVE_SCORES, QUERY_PROMPT, DOCUMENT_PROMPT),
    *(TASK, IN_BATCH, LANG, SCORE),
)
EXAMPLE_FIELDS: Final[tuple[Names, ...]] = (QUERY, POSITIVES, NEGATIVES, *_OTHERS)

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


@dataclass(frozen=True, slots=True)
class ExampleFields:
    """The names that query, positives and negatives have in the records of a file.

    The default ones stand for all names that are recognised; another one for itself alone, and for
    its numbered columns (``NAME_1``, ``NAME_2``).
    """

    query: str = "query"
    positives: str = "positives"
    negatives: str = "negatives"

    @property
    def names(self) -> tuple[FieldNames, FieldNames, FieldNames]:
        """The names of query, positives and negatives."""
        return _names_of(self)

    @property
    def columns(self) -> tuple[Names, ...]:
        """All fields of an example."""
        return (*self.names, *_OTHERS)


USUAL_FIELDS: Final = ExampleFields()
_FIRST_TEXTS: Final = frozenset(TEXT1)
_EITHER_TEXT: Final = frozenset((*TEXT1, *TEXT2))


@lru_cache(maxsize=64)
def _names_of(fields: ExampleFields) -> tuple[FieldNames, FieldNames, FieldNames]:
    return (
        named_field(fields.query, QUERY),
        named_field(fields.positives, POSITIVES),
        named_field(fields.negatives, NEGATIVES),
    )


def named_field(name: str, field: FieldNames) -> FieldNames:
    """Return the names of a field that the user calls ``name``; its first name means all."""
    if name in field.names[:1]:
        return field
    return FieldNames((name,), numbered=(name,) if field.numbered else (), flag=field.flag)


def parse_example(record: object, task: str, names: ExampleFields = USUAL_FIELDS) -> Example:
    """Return the training example that a decoded JSON object or a parquet row holds.

    Unknown fields are ignored, and a field that is null counts as absent. ``task`` is the name
    for a record that gives none. A negative that equals a positive is kept: the relation matrix
    ignores equal texts, and ``check`` counts them. Two texts with a score are a pair, see
    :class:`tercet.types.Example`.

    Raises:
        ValueError: naming the field; the caller adds file and line.
    """
    fields = as_object(record)
    query_names, positive_names, negative_names = (
        (QUERY, POSITIVES, NEGATIVES) if names is USUAL_FIELDS else names.names
    )
    name, query = given(fields, query_names)
    if name in _FIRST_TEXTS and _is_scored(fields, name, names):
        _refuse_documents(fields, positive_names, negative_names)
        return _pair(fields, task)
    if query is None:
        _refuse_labelled(fields)
        raise ValueError(
            f'"{name}" is missing; an example needs a "query" and its "positives"; if another '
            f"field holds the query, name it with {query_names.flag}"
        )
    positive_name, value = given(fields, positive_names)
    positives = _texts(value, positive_name)
    if not positives:
        raise ValueError(
            f'"{positive_names.names[0]}" is missing or empty; a query needs at least one document '
            f"that it matches; if another field holds it, name it with {positive_names.flag}"
        )
    if positive_name in _EITHER_TEXT:
        _refuse_score(fields, name, positive_name)
    for text in positives:
        nonblank(text, positive_names.names[0])
    negative_name, value = given(fields, negative_names)
    negatives = _texts(value, negative_name)
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


def _is_scored(fields: Mapping[str, Any], first: str, names: ExampleFields) -> bool:
    """Whether a record, whose query is read from the field ``first``, is a pair with a score."""
    if first == TEXT1[0] and names.query != first:  # under this name a pair has a score
        return True
    has_score = any(name in fields for name in SCORE)
    return has_score and any(fields.get(name) is not None for name in TEXT2)


def _refuse_documents(fields: Mapping[str, Any], *documents: FieldNames) -> None:
    """Raise for what a pair with a score has no use for: other documents, and how these count."""
    of_examples = (POSITIVE_SCORES, NEGATIVE_SCORES, DOCUMENT_PROMPT, IN_BATCH)
    for names in (*documents, *of_examples):
        name, value = given(fields, names)
        if value and name not in TEXT2:
            raise ValueError(
                f'"{name}" is not read beside two texts with a similarity score; remove it, or the '
                "score if the second text answers the first"
            )


def _refuse_score(fields: Mapping[str, Any], query: str, positive: str) -> None:
    """Raise for a similarity score of texts of which one would be read as a positive."""
    score = next((name for name in SCORE if fields.get(name) is not None), None)
    if score is not None:
        raise ValueError(
            f'"{positive}" with a "{score}" is a text of a pair with a similarity score, and would '
            f'be read as a positive of "{query}"; remove "{query}" if "{TEXT1[0]}" and '
            f'"{TEXT2[0]}" are the pair, or "{score}" if every "{positive}" answers its query'
        )


def scored_texts(fields: Mapping[str, Any]) -> tuple[str, str, float]:
    """Return the two texts of a record, and how similar they are.

    Raises:
        ValueError: naming the field that is missing or no such value.
    """
    texts = []
    for names in (TEXT1, TEXT2):
        name, value = given(fields, names)
        if value is None:
            raise ValueError(
                f'"{name}" is missing; a pair needs "{TEXT1[0]}", "{TEXT2[0]}" and "{SCORE[0]}"'
            )
        texts.append(nonblank(text_of(value, name), name))
    name, value = given(fields, SCORE)
    if value is None:
        raise ValueError(f'"{name}" is missing; give the similarity of the two texts as a number')
    return texts[0], texts[1], finite(_number(value), name)


def _pair(fields: Mapping[str, Any], task: str) -> Example:
    """Return the pair of texts with a score that a record holds.

    Raises:
        ValueError: if the score is a label, which may be a class: those of inference (NLI) rise
            from entailment to contradiction.
    """
    first, second, score = scored_texts(fields)
    if (name := given(fields, SCORE)[0]) == "label":
        raise ValueError(
            f'"{name}" may be a class; rename it to "{SCORE[0]}" if a higher one means that the '
            "texts are more alike, or make examples with: tercet convert scores"
        )
    return Example(
        query=first,
        positives=(second,),
        query_prompt=optional_text(fields, QUERY_PROMPT),
        task=optional_text(fields, TASK) or task,
        lang=optional_text(fields, LANG) or "",
        score=score,
    )


def _number(value: object) -> object:
    """Return the number that a text holds, as the cell of a table does; else the value."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _refuse_labelled(fields: Mapping[str, Any]) -> None:
    """Raise for a text with a label."""
    if "text" in fields and ("label" in fields or "labels" in fields):
        raise ValueError(
            '"text" and "label" are a labelled text and not an example; make examples of them '
            "with: tercet convert labels"
        )


def example_record(example: Example) -> dict[str, Any]:
    """Return the record of an example, as ``parse_example`` reads it, without absent fields."""
    record: dict[str, Any] = {}
    for field in dataclasses.fields(example):
        value = getattr(example, field.name)
        if value != field.default:
            record[field.name] = list(value) if isinstance(value, tuple) else value
    if example.score is not None:
        first, (second,) = record.pop("query"), record.pop("positives")
        return {TEXT1[0]: first, TEXT2[0]: second, **record}
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


def given(fields: Mapping[str, Any], names: Sequence[str] | FieldNames) -> tuple[str, Any]:
    """Return the name of a field in this record, and its value; None if it is absent.

    Numbered columns are one list.

    Raises:
        ValueError: if two names may hold the field.
    """
    if isinstance(names, FieldNames):
        return _given_under(fields, names)
    if len(names) == 1:
        return names[0], fields.get(names[0])
    used = [name for name in names if fields.get(name) is not None]
    if len(used) > 1:
        raise _two_names(used)
    return (used[0], fields[used[0]]) if used else (names[0], None)


def _given_under(fields: Mapping[str, Any], names: FieldNames) -> tuple[str, Any]:
    ours = names.names
    used = [name for name in ours if fields.get(name) is not None]
    if names.numbered:
        for key in fields:
            if key[-1:].isdecimal():
                used = names.among({name for name, it in fields.items() if it is not None})
                if used and used[0] not in ours and used[0] not in names.usual:
                    return used[0], [fields[name] for name in used]
                break
    if not used:
        used = [name for name in names.usual if fields.get(name) is not None]
        if len(used) > 1:
            raise ValueError(
                f'"{used[0]}" and "{used[1]}" may both be the {ours[0]}; name the one that is '
                f"with {names.flag}"
            )
    elif len(used) > 1:
        raise _two_names(used)
    return (used[0], fields[used[0]]) if used else (ours[0], None)


def _two_names(used: Sequence[str]) -> ValueError:
    return ValueError(f'"{used[0]}" and "{used[1]}" are two names of one field; keep one of them')


def optional_text(fields: Mapping[str, Any], names: Sequence[str] | FieldNames) -> str | None:
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


def _texts(value: object, name: str) -> tuple[str, ...]:
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
