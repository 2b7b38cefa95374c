"""The best documents of queries so far, while blocks of scores go by.

Once a query has as many as are wanted, a block is compared with the score of its last one, and
only what is better is looked at: one pass over the scores in place of a selection.
"""

from typing import Final

import numpy as np
from jaxtyping import Float32, Int, Int64

_ROOM: Final = 256  # candidates of a query that wait for the next selection; twice k where more
_NONE: Final = np.iinfo(np.int64).min
_ROWS: Final = (1 << 32) - 1  # the lower half of a key
_BITS: Final = np.int32(0x7FFFFFFF)  # all but the sign


class Best:
    """The ``k`` best documents of each query; equal scores are ranked by lower document row.

    A document's score and row make one whole number, which no two documents share: so there is
    nothing to break ties of, and a selection is one of numbers.
    """

    def __init__(self, queries: int, k: int) -> None:
        assert k >= 1, "something is looked for"
        self._k = k
        self._keys = np.full((queries, k + max(_ROOM, 2 * k)), _NONE)
        self._filled = np.zeros(queries, np.int64)
        self._last = np.full((queries, 1), -np.inf, np.float32)  # the score of the k-th, if there
        self._better = np.empty((0, 0), np.bool_)
        self._whole = False  # whether each query has k

    def add(self, scores: Float32[np.ndarray, "queries docs"], start: int) -> None:
        """Look at the scores of the documents from row ``start`` on; blocks come by rising rows."""
        assert start + scores.shape[1] <= _ROWS, "rows of 32 bits"
        if not self._whole and scores.shape[1] > self._k:
            # No more than k of this block matter. Not below: NaN is found, and told by the caller.
            column = scores.shape[1] - self._k
            last = np.partition(scores, column, axis=1)[:, column, None]
            better = ~(scores < np.maximum(last, self._last))
        elif self._whole:
            # An equal score is not better: its row is higher. Fresh memory would cost as much.
            if self._better.shape != scores.shape:
                self._better = np.empty(scores.shape, np.bool_)
            better = np.greater(scores, self._last, out=self._better)
        else:
            better = np.ones(scores.shape, np.bool_)
        query, doc = np.divmod(np.flatnonzero(better), scores.shape[1])  # faster than nonzero
        self._put(query, _keys(scores[query, doc], start + doc))
        if not self._whole and self._filled.min(initial=self._k) >= self._k:
            self._select()

    def hits(self) -> tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
        """Scores and rows, best first. At least ``k`` documents have to have gone by."""
        self._select()
        keys = -np.sort(-self._keys[:, : self._k], axis=1)
        return _scores(keys), _ROWS - (keys & _ROWS)

    def _put(self, query: Int[np.ndarray, "better"], keys: Int64[np.ndarray, "better"]) -> None:
        """Put keys, in the order of their queries, behind those that wait."""
        counts = np.bincount(query, minlength=len(self._keys))
        if (self._filled + counts).max(initial=0) > self._keys.shape[1]:
            self._select()
            short = (self._filled + counts).max() - self._keys.shape[1]
            if short > 0:  # many equal scores, or documents that come by rising score
                more = np.full((len(self._keys), short), _NONE)
                self._keys = np.concatenate([self._keys, more], axis=1)
        place = np.arange(len(query)) - np.repeat(counts.cumsum() - counts - self._filled, counts)
        self._keys[query, place] = keys
        self._filled += counts

    def _select(self) -> None:
        """Keep the best only."""
        width = int(self._filled.max(initial=0))
        if width > self._k:
            column = width - self._k
            self._keys[:, :width].partition(column, axis=1)
            self._keys[:, : self._k] = self._keys[:, column:width].copy()
            self._keys[:, self._k :] = _NONE
            np.minimum(self._filled, self._k, out=self._filled)
        self._whole = bool(self._filled.min(initial=self._k) >= self._k)
        if self._whole:
            self._last = _scores(self._keys[:, : self._k].min(axis=1, keepdims=True))


def _keys(
    scores: Float32[np.ndarray, "better"], rows: Int64[np.ndarray, "better"]
) -> Int64[np.ndarray, "better"]:
    """Score and row in one number: the higher score, and of equal ones the lower row, is larger."""
    bits = (scores + np.float32(0)).view(np.int32)  # minus zero is zero
    ordered = bits ^ ((bits >> 31) & _BITS)  # whole numbers that rank as the scores do
    return (ordered.astype(np.int64) << 32) | (_ROWS - rows)


def _scores(keys: Int64[np.ndarray, "*some"]) -> Float32[np.ndarray, "*some"]:
    ordered = (keys >> 32).astype(np.int32)
    return (ordered ^ ((ordered >> 31) & _BITS)).view(np.float32)
