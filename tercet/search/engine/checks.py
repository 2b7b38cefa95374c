"""Checks of records and queries: kinds, widths, finite values and unique ids."""

from collections.abc import Mapping, Sequence

from jaxtyping import Bool
from torch import Tensor

from tercet.errors import BROKEN_MODEL, DataError, ModelError, RecipeError
from tercet.kinds import Kind
from tercet.search.engine.engine import Record
from tercet.segments import row_of
from tercet.vectors import Vectors

Widths = Mapping[Kind, int]  # of each kind of vectors; 0 for terms, which have none


def require_same(place: object, kind: Kind, there: str, wanted: str | None) -> None:
    """Check that vectors are stored in the wanted precision; None accepts any.

    Raises:
        RecipeError: naming both.
    """
    if wanted not in (None, there):
        what = {"multi": "token"}.get(kind, kind)
        raise RecipeError(
            f"{place}: holds {what} vectors in {there}, not {wanted}; choose another place for "
            "these, or do not set the precision"
        )


def widths_of(vectors: Vectors) -> dict[Kind, int]:
    """Return the kinds of vectors with their widths; 0 for terms."""
    found: dict[Kind, int] = {}
    if vectors.dense is not None:
        found["dense"] = vectors.dense.shape[1]
    if vectors.sparse is not None:
        found["sparse"] = 0
    if vectors.multi is not None:
        found["multi"] = vectors.multi.vectors.shape[1]
    return found


def check_records(records: Sequence[Record], vectors: Vectors, widths: Widths) -> None:
    """Check that an engine of these kinds and widths can hold the records; empty accepts any.

    Raises:
        DataError: when counts differ, two records share an id, or a text cannot be written.
        ModelError: when the vectors have other kinds or widths, or hold NaN or infinity.
    """
    if len(records) != len(vectors):
        raise DataError("records", None, f"{len(records)} records but {len(vectors)} vectors")
    seen: set[str] = set()
    for number, record in enumerate(records, start=1):
        if record.id in seen:
            raise DataError("records", number, f"id {record.id!r} occurs twice; give each its own")
        seen.add(record.id)
        try:
            f"{record.id}{record.title}{record.text}".encode()
        except UnicodeEncodeError as error:
            problem = f"the texts of {record.id!r} are not valid Unicode: {error.reason}"
            raise DataError("records", number, problem) from error
    found = widths_of(vectors)
    if widths and set(found) != set(widths):
        raise ModelError(
            f"the engine holds vectors of {', '.join(widths)}, and these are of "
            f"{', '.join(found)}; encode all records with the same model and kinds"
        )
    _check_widths(found, widths, "these records")
    broken = _unusable(vectors)
    if broken.any():
        record = records[int(broken.int().argmax())]
        raise ModelError(
            f"the vectors of {record.id!r} hold NaN, infinity or a negative weight; {BROKEN_MODEL}"
        )


def check_queries(queries: Vectors, widths: Widths) -> None:
    """Check that an engine of these widths can compare the queries.

    Raises:
        ModelError: when a width differs, or a value is NaN or infinite.
    """
    _check_widths(widths_of(queries), widths, "the queries")
    broken = _unusable(queries)
    if broken.any():
        raise ModelError(
            f"the vectors of query {int(broken.int().argmax())} hold NaN, infinity or a negative "
            f"weight; {BROKEN_MODEL}"
        )


def _unusable(vectors: Vectors) -> Bool[Tensor, "texts"]:
    """Return which texts have a value that is not finite, or a negative weight."""
    bad = vectors.not_finite()
    if vectors.sparse is not None:
        bad[row_of(vectors.sparse.offsets)[vectors.sparse.weights < 0]] = True
    return bad


def _check_widths(found: Widths, widths: Widths, what: str) -> None:
    for kind, width in found.items():
        if kind in widths and widths[kind] != width:
            raise ModelError(
                f"the {kind} vectors of {what} have {width} dimensions, and those in the engine "
                f"{widths[kind]}; encode both with the same model and the same number of dimensions"
            )
