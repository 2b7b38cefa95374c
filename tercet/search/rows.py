"""Documents and their vectors as rows that search engines take in: JSON, one object a line.

- *elasticsearch*: the bulk API's two lines a document, an action and the document (8 and 9).
  ``dense`` is for a ``dense_vector`` field, ``sparse`` for ``rank_features`` (texts as names,
  weights above 0) and ``multi`` for ``rank_vectors`` (from 8.18 on).
- *opensearch*: the same bulk lines (2 and 3). ``dense`` is for ``knn_vector``, ``sparse`` for
  ``rank_features``; ``multi`` is not written.
- *milvus*: rows of an insert by its REST API v2 (2.4 and later). ``dense`` is
  for FLOAT_VECTOR, ``sparse`` for SPARSE_FLOAT_VECTOR; pymilvus wants its names as numbers.
- *qdrant*: points of ``PUT /collections/NAME/points`` (from 1.10 on), with named vectors, of which
  ``multi`` is for a multivector compared by ``max_sim``. A point's id is the UUID5 of the
  document's in the namespace of URLs, as in our own indexes; the id stands in its payload.
- *vespa*: its document JSON format (8), one put a line. ``dense`` is for ``tensor<float>(x[N])``,
  ``sparse`` for ``tensor<float>(token{})``. ``multi`` is for ``tensor<int8>(token{}, x[N/8])``:
  a bit a number, 1 where that is above 0, eight to a byte with the first one highest, in hex.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal, TypeAlias
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

from tercet.kinds import KINDS, Kind
from tercet.models.formats.bge_m3_files import lexical_weights
from tercet.vectors import Terms, Vectors

FormatName: TypeAlias = Literal["elasticsearch", "milvus", "opensearch", "qdrant", "vespa"]

HELD: Final[Mapping[FormatName, tuple[Kind, ...]]] = {
    "elasticsearch": KINDS,
    "milvus": ("dense", "sparse"),
    "opensearch": ("dense", "sparse"),
    "qdrant": KINDS,
    "vespa": KINDS,
}
TAKEN: Final = ("id", "title", "text", *KINDS)  # names that a document's own fields cannot have
_DECIMALS: Final = 7  # a float32 of a unit vector has no more that matter


@dataclass(frozen=True, slots=True)
class EngineRow:
    """A document's part of a row, beside its vectors."""

    id: str
    text: str
    title: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)  # none of the names that are TAKEN

    def about(self) -> dict[str, Any]:
        """Return all but the id; without a title if it is empty."""
        title = {"title": self.title} if self.title else {}
        return {**self.fields, **title, "text": self.text}


def parts_of(form: FormatName, vectors: Vectors) -> list[dict[Kind, Any]]:
    """Return the vectors of each text by kind, as in the engine's JSON.

    A kind that a text has nothing of is left out; Milvus gets an empty mapping, since its fields
    of vectors may not be absent.
    """
    found: list[dict[Kind, Any]] = [{} for _ in range(len(vectors))]
    if vectors.dense is not None:
        for parts, row in zip(found, _rounded(vectors.dense).tolist(), strict=True):
            parts["dense"] = row
    if vectors.sparse is not None:
        for parts, terms in zip(found, _terms(form, vectors.sparse), strict=True):
            if terms or form == "milvus":
                parts["sparse"] = terms
    if vectors.multi is not None:
        of_all = vectors.multi.vectors.cpu().numpy()
        for parts, (low, high) in zip(found, pairwise(vectors.multi.offsets.tolist()), strict=True):
            if high > low:
                rows = of_all[low:high]
                parts["multi"] = _hex_rows(rows) if form == "vespa" else _rounded(rows).tolist()
    return found


def lines_of(form: FormatName, row: EngineRow, parts: Mapping[Kind, Any]) -> list[str]:
    """Return the lines of one document.

    Raises:
        ValueError: for a field that JSON cannot hold.
    """
    if form in ("elasticsearch", "opensearch"):
        objects: list[Any] = [{"index": {"_id": row.id}}, {**row.about(), **parts}]
    elif form == "milvus":
        objects = [{"id": row.id, "title": "", **row.about(), **parts}]
    elif form == "qdrant":
        payload = {"id": row.id, **row.about()}
        point = str(uuid5(NAMESPACE_URL, row.id))
        objects = [{"id": point, "vector": dict(parts), "payload": payload}]
    else:
        objects = [{"put": f"id:tercet:document::{row.id}", "fields": {**row.about(), **parts}}]
    return [json_line(each) for each in objects]


def json_line(value: object) -> str:
    """Return a value as JSON without white space or escaped letters.

    Raises:
        ValueError: where it holds NaN or infinity, which JSON cannot say.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def binarised(
    vectors: Float[np.ndarray, "rows width"],
) -> Shaped[np.ndarray, "rows bytes"]:
    """Return one bit a number, 1 above 0, in bytes (int8); the last byte is filled with zeros.

    1,024 numbers take 128 bytes.
    """
    return np.packbits(vectors > 0, axis=1).view(np.int8)


def _hex_rows(rows: Float[np.ndarray, "rows width"]) -> dict[str, str]:
    """Return Vespa's short form of a tensor with a mapped dimension, with cells in hex."""
    return {str(number): row.tobytes().hex() for number, row in enumerate(binarised(rows))}


def _terms(form: FormatName, terms: Terms) -> list[dict[str, Any]]:
    """Return weights by token, without those that round to zero: rank features are above 0."""
    weights = [
        {token: rounded for token, weight in each.items() if (rounded := round(weight, _DECIMALS))}
        for each in lexical_weights(terms)
    ]
    if form != "qdrant":
        return list(weights)
    return [
        {"indices": [int(token) for token in each], "values": list(each.values())} if each else {}
        for each in weights
    ]


def _rounded(values: Tensor | np.ndarray) -> np.ndarray:
    found = values.cpu().numpy() if isinstance(values, Tensor) else values
    return found.astype(np.float64).round(_DECIMALS)
