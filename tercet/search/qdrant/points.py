"""Records as points of both Qdrant engines.

A point has up to three named vectors, ``dense``, ``sparse`` and ``multi``; empty ones are left out.
Its payload holds ``id``, ``title``, ``text``, ``fields``, and ``facts``: each field with a value as
one word, so that a single keyword index serves all filters. Its id is the UUID5 of the record's.
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
Facts: TypeAlias = tuple[tuple[str, ...], ...]  # a record needs one of each group


@dataclass(frozen=True, slots=True)
class Point:
    """A record in the form that Qdrant stores."""

    id: UUID
    parts: PointVectors
    payload: dict[str, Any]

    @property
    def numbers(self) -> int:
        """The number of numbers in its vectors."""
        return sum(
            2 * len(part.ids) if isinstance(part, TermRow) else part.size
            for part in self.parts.values()
        )


def check_stored(stored: Stored | None) -> None:
    """Raise RecipeError for bits with finer codes, which Qdrant lacks."""
    if stored == "binary+int8":
        raise RecipeError(
            "Qdrant scores what bits find by the vectors themselves, which it keeps: take binary "
            "in place of binary+int8, or the exact engine"
        )


def uuid_of(name: str) -> UUID:
    """Return the id of a record's point: its UUID5 in the URL namespace."""
    named = NAMESPACE_URL.bytes + name.encode("utf-8", "surrogatepass")  # for any string
    return UUID(bytes=sha1(named).digest()[:16], version=5)


def points_of(records: Sequence[Record], vectors: Vectors, widths: Widths) -> list[Point]:
    """Check records and their vectors, and return them as points.

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
    """Return the vectors of each text by kind, without empty ones."""
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
    return [slice(low, high) for low, high in pairwise(offsets.tolist())]


def payload_of(record: Record, number: int | None = None) -> dict[str, Any]:
    """Return the payload of a record.

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
    """Return the record of a payload.

    Raises:
        KeyError, TypeError: when another program wrote it.
    """
    record = Record(payload["id"], payload["text"], payload["title"], payload["fields"])
    texts = (record.id, record.text, record.title)
    if not all(isinstance(text, str) for text in texts) or not isinstance(record.fields, dict):
        raise TypeError("parts of other types")
    return record


def facts_of(where: Where | None) -> Facts:
    """Return a group of facts for each field of a filter; a record needs one of each group."""
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
    """Return a field and its value as one word; 1 equals 1.0, but not true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = json.dumps([name, value])
    return word if len(word) <= _SHORT else str(uuid_of(word))
