"""How both Qdrant engines store a record.

It is a point with up to three named vectors, ``dense``, ``sparse`` and ``multi``; a kind that a
text has nothing of is left out. Its payload holds ``id``, ``title``, ``text``, ``fields``, and
``facts``: every field and value as one word, so that a single keyword index serves all filters,
whatever the values' types. Points are numbered by the UUID5 of the id.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha1
from itertools import pairwise
from typing import Any, Final, TypeAlias
from uuid import NAMESPACE_URL, UUID

import numpy as np
import torch

from tercet.errors import DataError, RecipeError
from tercet.kinds import Kind
from tercet.rank.quantized import Stored
from tercet.search.engine.checks import Widths, check_records
from tercet.search.engine.engine import Record, Value, Where
from tercet.vectors import Vectors

_SHORT: Final = 200  # characters of a fact; a longer one is stored by its digest
_INTEGERS: Final = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class TermRow:
    """The terms of one text."""

    ids: np.ndarray  # [terms], uint32
    weights: np.ndarray  # [terms], float32


PointVector: TypeAlias = np.ndarray | TermRow  # of one text: [dim], terms, or [tokens, width]
PointVectors: TypeAlias = Mapping[Kind, PointVector]
Facts: TypeAlias = tuple[tuple[str, ...], ...]  # of each group a record has one


@dataclass(frozen=True, slots=True)
class Point:
    """A record in the form that Qdrant stores."""

    id: UUID
    parts: PointVectors
    payload: dict[str, Any]

    @property
    def numbers(self) -> int:
        """How many numbers its vectors have."""
        return sum(
            2 * len(part.ids) if isinstance(part, TermRow) else part.size
            for part in self.parts.values()
        )


def check_stored(stored: Stored | None) -> None:
    """Check that Qdrant can store dense vectors so.

    Both have their own codes of 8, 4 and 1 bits beside the vectors, which re-score candidates.

    Raises:
        RecipeError: for bits with finer codes.
    """
    if stored == "binary+int8":
        raise RecipeError(
            "Qdrant scores what bits find by the vectors themselves, which it keeps: take binary "
            "in place of binary+int8, or the exact engine"
        )


def uuid_of(name: str) -> UUID:
    """The number of the point that holds the record of this id: its UUID5 in the URL namespace."""
    named = NAMESPACE_URL.bytes + name.encode("utf-8", "surrogatepass")  # any string may be asked
    return UUID(bytes=sha1(named).digest()[:16], version=5)


def points_of(records: Sequence[Record], vectors: Vectors, widths: Widths) -> list[Point]:
    """The records as they are stored, once they and their vectors are found to be in order.

    Raises:
        ModelError: when the vectors have other kinds or widths than the store, or NaN.
        DataError: when two records share an id, a field has a value that cannot be stored, or
            there are more or fewer vectors than records.
    """
    check_records(records, vectors, widths)
    return [
        Point(uuid_of(record.id), parts, payload_of(record, number))
        for number, (record, parts) in enumerate(
            zip(records, parts_of(vectors), strict=True), start=1
        )
    ]


def parts_of(vectors: Vectors) -> list[dict[Kind, PointVector]]:
    """The vectors text by text, without kinds that a text has nothing of."""
    rows: list[dict[Kind, PointVector]] = [{} for _ in range(len(vectors))]
    if vectors.dense is not None:
        for row, vector in zip(rows, _array(vectors.dense), strict=True):
            row["dense"] = vector
    if vectors.sparse is not None:
        terms = vectors.sparse.merged()
        ids, weights = terms.ids.cpu().numpy().astype(np.uint32), _array(terms.weights)
        for row, part in zip(rows, _slices(terms.offsets), strict=True):
            if part.stop > part.start:
                row["sparse"] = TermRow(ids[part], weights[part])
    if vectors.multi is not None:
        tokens = _array(vectors.multi.vectors)
        for row, part in zip(rows, _slices(vectors.multi.offsets), strict=True):
            if part.stop > part.start:
                row["multi"] = tokens[part]
    return rows


def _array(values: torch.Tensor) -> np.ndarray:
    return values.detach().to("cpu", torch.float32).contiguous().numpy()


def _slices(offsets: torch.Tensor) -> list[slice]:
    bounds = offsets.tolist()
    return [slice(low, high) for low, high in pairwise(bounds)]


def payload_of(record: Record, number: int | None = None) -> dict[str, Any]:
    """What is stored beside the vectors.

    Raises:
        DataError: when a field has a value that Qdrant cannot hold.
    """
    fields = {name: _plain(value) for name, value in record.fields.items()}
    facts: set[str] = set()
    for name, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            if not _storable(name) or not _storable(one):
                raise DataError(
                    "records",
                    number,
                    f"field {name!r} of {record.id!r} is {one!r}; "
                    "give text, a truth value, a finite number or an integer of 64 bits",
                )
            facts.add(_fact(name, one))
    return {
        "id": record.id,
        "title": record.title,
        "text": record.text,
        "fields": fields,
        "facts": sorted(facts),
    }


def record_of(payload: Mapping[str, Any]) -> Record:
    """The record that a payload was made of.

    Raises:
        KeyError, TypeError: when it was made of none.
    """
    record = Record(payload["id"], payload["text"], payload["title"], payload["fields"])
    texts = (record.id, record.text, record.title)
    if not all(isinstance(text, str) for text in texts) or not isinstance(record.fields, dict):
        raise TypeError("parts of other types")
    return record


def facts_of(where: Where | None) -> Facts:
    """What a filter asks for: a group of facts a field, of which a record has one."""
    groups = ((name, _plain(value)) for name, value in (where or {}).items())
    return tuple(
        tuple(_fact(name, one) for one in (value if isinstance(value, list) else [value]))
        for name, value in groups
    )


def _plain(value: Value | Sequence[Value]) -> Value | list[Value]:
    return value if isinstance(value, str | int | float | bool) else list(value)


def _storable(value: object) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)  # half a character
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and value in _INTEGERS


def _fact(name: str, value: Value) -> str:
    """A field and its value as one word; 1 and 1.0 are the same, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = json.dumps([name, value])
    return word if len(word) <= _SHORT else str(uuid_of(word))
