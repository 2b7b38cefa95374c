"""Rows of a segment by id: 20 bytes of memory a record, whatever the lengths of ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

from tercet.files.artifacts import fingerprint
from tercet.search.exact.segment import RecordTable

_AT_ONCE = 4096  # ids that are texts at the same time


@dataclass(frozen=True, slots=True, eq=False)
class IdRows:
    """128 bits of each id, sorted, and its row."""

    keys: UInt64[np.ndarray, "docs 2"]
    rows: Int32[np.ndarray, "docs"]

    @classmethod
    def sorted(
        cls, keys: UInt64[np.ndarray, "docs 2"], rows: Int32[np.ndarray, "docs"]
    ) -> "IdRows":
        """Sort keys with their rows."""
        order = np.argsort(keys[:, 0], kind="stable")
        return cls(keys[order], rows[order])

    @classmethod
    def of(cls, documents: RecordTable) -> "IdRows":
        """Read the ids of a segment."""
        keys = np.empty((len(documents), 2), np.uint64)
        ids, start = documents.ids(), 0
        while some := list(islice(ids, _AT_ONCE)):
            keys[start : start + len(some)] = keys_of(some)
            start += len(some)
        return cls.sorted(keys, np.arange(len(keys), dtype=np.int32))

    @classmethod
    def merged(cls, parts: Sequence[tuple["IdRows", Bool[np.ndarray, "docs"]]]) -> "IdRows":
        """Return the rows that are alive in these segments, end to end."""
        keys, rows, before = [], [], 0
        for part, alive in parts:
            kept = alive[part.rows]
            renumbered = np.cumsum(alive, dtype=np.int32) + np.int32(before - 1)
            keys.append(part.keys[kept])
            rows.append(renumbered[part.rows[kept]])
            before += int(alive.sum())
        return cls.sorted(np.concatenate(keys), np.concatenate(rows))

    def find(self, keys: UInt64[np.ndarray, "ids 2"]) -> Int64[np.ndarray, "ids"]:
        """Return the row of each key; -1 if there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        places = np.minimum(np.searchsorted(self.keys[:, 0], keys[:, 0]), len(self.keys) - 1)
        known = (self.keys[places] == keys).all(axis=1)
        return np.where(known, self.rows[places], -1).astype(np.int64)


def keys_of(ids: Sequence[str]) -> UInt64[np.ndarray, "ids 2"]:
    """Return 128 bits of each id, as two numbers."""
    digests = bytes.fromhex("".join(map(fingerprint, ids)))
    return np.frombuffer(digests, "<u8").astype(np.uint64).reshape(-1, 2)
