"""The documents of highest score for each query; equal scores are ranked by lower document row.

:func:`top_k` compares queries with every document, in blocks that fit into memory. :class:`TopK`
selects from any blocks of scores: once a query has ``k`` documents, a block is compared with the
score of the last one, and only what exceeds it is looked at.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64, Shaped
from torch import Tensor

from tercet.errors import BROKEN_MODEL, ModelError
from tercet.segments import ragged_places

_QUERY_BLOCK: Final = 256  # with 16,384 documents a block: 16 MB of scores
_FEW: Final = 64  # queries, for which documents @ queries is up to twice as fast as the reverse
_SCORES: Final = 1 << 18  # of few queries that are selected from together

_WAITING: Final = 256  # keys of a query that wait for the next selection; twice k where more
_EMPTY: Final = np.iinfo(np.int64).min
_ROWS: Final = (1 << 32) - 1  # the lower half of a key
_BITS: Final = np.int32(0x7FFFFFFF)  # all but the sign
_NAN: Final = np.int32(0x7FC00000)


@dataclass(frozen=True, slots=True)
class Hits:
    """The best documents of each query, best first."""

    scores: Float32[np.ndarray, "queries ranks"]
    rows: Int64[np.ndarray, "queries ranks"]


def top_k(
    queries: Float[np.ndarray, "queries dim"],
    docs: Float[np.ndarray, "docs doc_dim"],
    k: int,
    *,
    block: int = 16_384,
) -> Hits:
    """Return the ``k`` documents of largest inner product with each query, or all if fewer.

    Vectors are compared in float32.

    Args:
        queries: vectors to search with, ``queries x dim``.
        docs: vectors to search, ``docs x dim``; a memory-mapped array may be larger than RAM.
        k: hits for each query.
        block: rows of ``docs`` that are compared at a time.

    Raises:
        ModelError: if queries and documents differ in width, or hold NaN. (A NaN among the
            vectors of good documents is not searched for, which would be slow: engines do that.)

    Examples:
        >>> top_k(embedder.encode(["web server"], "query"), embedder.encode(texts), 2).rows
        array([[0, 1]])
    """
    check_queries(queries, docs.shape[1])
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    k = max(min(k, len(docs)), 0)
    if not len(queries) or not k:
        return Hits(np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64))
    found = [
        _search(queries[start : start + _QUERY_BLOCK], docs, k, block)
        for start in range(0, len(queries), _QUERY_BLOCK)
    ]
    hits = Hits(np.concatenate([h.scores for h in found]), np.concatenate([h.rows for h in found]))
    if np.isnan(hits.scores).any():
        raise ModelError(f"the documents' vectors hold NaN; {BROKEN_MODEL}")
    return hits


def check_queries(queries: Float[np.ndarray, "queries dim"], dim: int) -> None:
    """Check that queries have the documents' dimension and finite numbers.

    Raises:
        ModelError: naming both dimensions, or the query.
    """
    if queries.shape[1] != dim:
        raise ModelError(
            f"queries have {queries.shape[1]} dimensions and documents {dim}; "
            "embed both with the same model and the same number of dimensions"
        )
    finite = np.isfinite(queries).all(axis=1)
    if not finite.all():
        raise ModelError(
            f"the vector of query {int(finite.argmin())} holds NaN or infinity; {BROKEN_MODEL}"
        )


def _search(
    queries: Float32[np.ndarray, "queries dim"],
    docs: Float[np.ndarray, "docs dim"],
    k: int,
    block: int,
) -> Hits:
    best, few = TopK(len(queries), k), len(queries) < _FEW
    waiting: list[np.ndarray] = []  # scores of few queries, since each selection has a fixed cost
    begin = 0
    for start in range(0, len(docs), block):
        part = np.asarray(docs[start : start + block], dtype=np.float32)
        waiting.append((part @ queries.T).T if few else queries @ part.T)
        end = start + len(part)
        if not few or end == len(docs) or (end - begin) * len(queries) >= _SCORES:
            scores = np.concatenate(waiting, axis=1) if len(waiting) > 1 else waiting[0]
            best.add(np.ascontiguousarray(scores), begin)
            waiting, begin = [], end
    return Hits(*best.hits())


def largest(
    scores: Float32[Tensor, "queries docs"], k: int
) -> tuple[Float32[Tensor, "queries ranks"], Int64[Tensor, "queries ranks"]]:
    """Return the ``k`` largest of each row and their columns; lower columns first among equals."""
    k = min(k, scores.shape[1])
    columns = torch.zeros(len(scores), k, dtype=torch.int64)
    if columns.numel():
        best = TopK(len(scores), k)
        best.add(scores.numpy(), 0)
        columns = torch.from_numpy(best.hits()[1])
    return scores.gather(1, columns), columns


class TopK:
    """The ``k`` best documents of each query, from scores that come in blocks.

    A document's score and row make one whole number, its key. No two documents share one, so there
    are no ties to break, and numbers are all that is selected from.
    """

    def __init__(
        self, queries: int, k: int, dtype: type[np.float32 | np.int32] = np.float32
    ) -> None:
        """Start without documents; ``dtype`` is that of the scores."""
        assert k >= 1, "k must be at least 1"
        self._k = k
        self._dtype = dtype
        self._keys = np.full((queries, k + max(_WAITING, 2 * k)), _EMPTY)
        self._filled = np.zeros(queries, np.int64)
        lowest: Any = -np.inf if dtype is np.float32 else np.iinfo(np.int32).min
        self._last = np.full((queries, 1), lowest, dtype)  # the score of the k-th, if there
        self._better = np.empty((0, 0), np.bool_)
        self._full = False  # whether each query has k documents

    def add(self, scores: Shaped[np.ndarray, "queries docs"], start: int) -> None:
        """Add the scores of the documents from row ``start`` on; rows rise from block to block."""
        assert start + scores.shape[1] <= _ROWS, "rows of 32 bits"
        if not self._full and scores.shape[1] > self._k:
            # At most k of this block matter. "Not below" keeps NaN, which the caller reports.
            column = scores.shape[1] - self._k
            last = np.partition(scores, column, axis=1)[:, column, None]
            better = ~(scores < np.maximum(last, self._last))
        elif self._full:
            # An equal score is not better: its row is higher. New memory would cost as much.
            if self._better.shape != scores.shape:
                self._better = np.empty(scores.shape, np.bool_)
            better = np.greater(scores, self._last, out=self._better)
        else:
            better = np.ones(scores.shape, np.bool_)
        query, doc = np.divmod(np.flatnonzero(better), scores.shape[1])  # faster than nonzero
        self._put(query, self._keys_of(scores[query, doc], start + doc))
        if not self._full and self._filled.min(initial=self._k) >= self._k:
            self._select()

    def hits(self) -> tuple[Shaped[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
        """Return scores and rows, best first, once ``k`` documents or more were added."""
        self._select()
        keys = -np.sort(-self._keys[:, : self._k], axis=1)
        return self._scores_of(keys), _ROWS - (keys & _ROWS)

    def _put(self, query: Int[np.ndarray, "better"], keys: Int64[np.ndarray, "better"]) -> None:
        """Append keys, in the order of their queries, to those that wait."""
        counts = np.bincount(query, minlength=len(self._keys))
        if (self._filled + counts).max(initial=0) > self._keys.shape[1]:
            self._select()
            short = (self._filled + counts).max() - self._keys.shape[1]
            if short > 0:  # many equal scores, or documents that come by rising score
                more = np.full((len(self._keys), short), _EMPTY)
                self._keys = np.concatenate([self._keys, more], axis=1)
        filled = torch.from_numpy(self._filled)
        places, _ = ragged_places(filled, filled + torch.from_numpy(counts))
        self._keys[query, places.numpy()] = keys
        self._filled += counts

    def _select(self) -> None:
        """Keep the best ``k`` keys only."""
        width = int(self._filled.max(initial=0))
        if width > self._k:
            column = width - self._k
            self._keys[:, :width].partition(column, axis=1)
            self._keys[:, : self._k] = self._keys[:, column:width].copy()
            self._keys[:, self._k :] = _EMPTY
            np.minimum(self._filled, self._k, out=self._filled)
        self._full = bool(self._filled.min(initial=self._k) >= self._k)
        if self._full:
            self._last = self._scores_of(self._keys[:, : self._k].min(axis=1, keepdims=True))

    def _keys_of(
        self, scores: Shaped[np.ndarray, "better"], rows: Int64[np.ndarray, "better"]
    ) -> Int64[np.ndarray, "better"]:
        """Score and row as one number: larger for a higher score, then for a lower row."""
        ordered = scores
        if self._dtype is np.float32:
            bits = (scores + np.float32(0)).view(np.int32)  # minus zero becomes zero
            bits[np.isnan(scores)] = _NAN  # above infinity
            ordered = bits ^ ((bits >> 31) & _BITS)  # whole numbers in the order of the scores
        return (ordered.astype(np.int64) << 32) | (_ROWS - rows)

    def _scores_of(self, keys: Int64[np.ndarray, "*some"]) -> Shaped[np.ndarray, "*some"]:
        ordered = (keys >> 32).astype(np.int32)
        if self._dtype is np.int32:
            return ordered
        return (ordered ^ ((ordered >> 31) & _BITS)).view(np.float32)
