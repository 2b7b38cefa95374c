"""Nearest neighbours among vectors that are stored in codes of 8, 4 or 1 bits.

The query, rounded to 8 bits (or to signs), is compared with all codes in one exact product of
integers, which ranks as inner products do: the range of the codes adds the same to all documents of
a query. The best are scored again with the unrounded query; equal scores rank by lower row.
"""

from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, Int64

from tercet.rank.quantized import Codes, integer_product
from tercet.rank.topk import Hits, TopK, check_queries

FACTOR: Final = 4  # candidates per hit

_QUERIES: Final = 256  # compared at a time
_SCORES: Final = 1 << 20  # of a block of documents: 4 MB of whole numbers
_CODES: Final = 1 << 24  # of such a block, unpacked: 16 MB
_AGAIN: Final = 1 << 20  # coordinates of candidates that are scored again at a time: 4 MB
_EXCLUDED: Final = -(1 << 31)  # below every score


def top_k_coded(  # noqa: PLR0913 (independent options with defaults)
    queries: Float[np.ndarray, "queries dim"],
    docs: Codes,
    k: int,
    *,
    factor: int = FACTOR,
    signs: bool = False,
    finer: Codes | Float[np.ndarray, "docs dim"] | None = None,
    allowed: Bool[np.ndarray, "docs"] | None = None,
) -> Hits:
    """Return the ``k`` documents of largest inner product with each query, or all if fewer.

    Only ``allowed`` documents are returned; None allows all.

    ``factor * k`` candidates are found by integers, with ``signs`` by the signs of the query's
    coordinates (for codes of one bit: by Hamming distance). The unrounded query scores them again
    with the decoded vectors, or with ``finer`` vectors of the same documents, of which only those
    of candidates are read. With ``binary`` codes the score is <q - m, x - m> + <q, m>, without what
    the signs add along the centre m, which is mostly error.

    Raises:
        ModelError: when queries and documents differ in width, or a query holds NaN.
    """
    assert factor >= 1, "a candidate for each place"
    assert finer is None or len(finer) == len(docs), "finer vectors of the same documents"
    check_queries(queries, docs.dims)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    there = len(docs) if allowed is None else int(allowed.sum())
    k = max(min(k, there), 0)
    if not len(queries) or not k:
        shape = (len(queries), k)
        return Hits(np.zeros(shape, np.float32), np.zeros(shape, np.int64))
    found = []
    for start in range(0, len(queries), _QUERIES):
        some = queries[start : start + _QUERIES]
        whole = _whole(_asked(some, docs), signs=signs)
        rows = _candidates(whole, docs, min(factor * k, there), allowed)
        found.append(rescored(some, docs if finer is None else finer, rows, k))
    return Hits(np.concatenate([h.scores for h in found]), np.concatenate([h.rows for h in found]))


def _asked(
    queries: Float32[np.ndarray, "queries dim"], docs: Codes
) -> Float32[np.ndarray, "queries dim"]:
    """Return what is compared with the codes; their centre adds the same to all documents."""
    centre = docs.quantizer.centre
    return (
        queries - centre if docs.quantizer.precision == "binary" and centre is not None else queries
    )


def _added(
    queries: Float32[np.ndarray, "queries dim"], docs: Codes
) -> Float32[np.ndarray, "queries"]:
    """Return what the centre adds to each query's scores."""
    centre = docs.quantizer.centre
    return np.zeros(len(queries), np.float32) if centre is None else queries @ centre


def scores_of(
    queries: Float32[np.ndarray, "queries dim"], docs: Codes
) -> Float32[np.ndarray, "queries docs"]:
    """Return the scores of all pairs, as :func:`top_k_coded` defines them."""
    return _asked(queries, docs) @ docs.around_centre().T + _added(queries, docs)[:, None]


def _whole(
    queries: Float32[np.ndarray, "queries dim"], *, signs: bool
) -> Int8[np.ndarray, "queries dim"]:
    """Scale each query so that its largest coordinate is 127 and round it, or take its signs.

    Scale and offset are the same for all scores of a query, so that they do not change the order.
    """
    if signs:
        return np.where(queries > 0, 1, -1).astype(np.int8)
    largest = np.abs(queries).max(axis=1, keepdims=True)
    return np.rint(queries * (127 / np.maximum(largest, np.float32(1e-30)))).astype(np.int8)


def _candidates(
    whole: Int8[np.ndarray, "queries dim"],
    docs: Codes,
    count: int,
    allowed: Bool[np.ndarray, "docs"] | None = None,
) -> Int64[np.ndarray, "queries count"]:
    """Return the rows of the best, in no particular order; as many are allowed at least."""
    best = TopK(len(whole), count, np.int32)
    block = max(1, min(_SCORES // len(whole), _CODES // docs.dims))
    for start in range(0, len(docs), block):
        some = slice(start, start + block)
        scores = integer_product(whole, docs.take(some).integers())
        if allowed is not None:
            scores[:, ~allowed[some]] = _EXCLUDED
        best.add(scores, start)
    return best.hits()[1]


def rescored(
    queries: Float32[np.ndarray, "queries dim"],
    docs: Codes | Float[np.ndarray, "docs dim"],
    rows: Int64[np.ndarray, "queries candidates"],
    k: int,
) -> Hits:
    """Return the best ``k`` of each query's candidates by true scores; read only their vectors."""
    rows, asked, added = np.sort(rows, axis=1), queries, np.zeros(len(queries), np.float32)
    if isinstance(docs, Codes):
        asked, added = _asked(queries, docs), _added(queries, docs)
    scores = np.empty(rows.shape, dtype=np.float32)
    block = max(1, _AGAIN // max(1, rows.shape[1] * queries.shape[1]))
    for start in range(0, len(queries), block):
        some = slice(start, start + block)
        wanted, place = np.unique(rows[some], return_inverse=True)
        taken = docs.take(wanted).around_centre() if isinstance(docs, Codes) else docs[wanted]
        vectors = taken.astype(np.float32, copy=False)[place.reshape(rows[some].shape)]
        scores[some] = np.einsum("qcd,qd->qc", vectors, asked[some]) + added[some, None]
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Hits(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))
