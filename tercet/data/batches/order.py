"""The random order of the rows of a source, and the batches of an epoch made of them.

A pass over a source is cut into windows of some blocks, the windows come in random order, and so
do the rows inside each. The random order depends on a seed and the number of the window alone: the
rows at any place of a pass are known without those before them, and only one window is in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import numpy as np

from tercet.data.files.readers import gathered
from tercet.data.files.sources import Source
from tercet.types import Example

Row = TypeVar("Row")

SMALLEST_BATCH: Final = 2  # with one example there is nothing to contrast


@runtime_checkable
class Drawable(Protocol):
    """Rows to sample from: a ``Source``, or what an objective makes of one."""

    @property
    def name(self) -> str:
        """The name in messages."""
        ...

    @property
    def weight(self) -> float | int:
        """How often each row is used per epoch."""
        ...

    @property
    def sizes(self) -> np.ndarray:
        """The size of each row: int32, in any unit."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when a row does."""
        ...

    @property
    def blocks(self) -> np.ndarray:
        """The first row of each block of rows that is cheap to read whole."""
        ...

    @property
    def window(self) -> int:
        """The number of blocks that are cheap to read in turns."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """All rows of a source in windows. The rows of a window are in random order."""

    starts: np.ndarray  # [blocks] int64, the first row of each block, blocks in random order
    counts: np.ndarray  # [blocks] int64, its rows
    firsts: np.ndarray  # [windows + 1] int64, the first block of each, and the number of blocks
    bounds: np.ndarray  # [windows + 1] int64, the first place of each, and the number of rows
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.firsts) - 1

    @property
    def dtype(self) -> type[np.integer[Any]]:
        """The type of row numbers: int32 if that is enough."""
        return np.int32 if self.bounds[-1] < 2**31 else np.int64

    def rows(self, window: int) -> np.ndarray:
        """Return the rows of a window."""
        some = slice(self.firsts[window], self.firsts[window + 1])
        size = int(self.bounds[window + 1] - self.bounds[window])
        starts, counts = self.starts[some], self.counts[some]
        order = np.arange(size, dtype=self.dtype)
        order += np.repeat(starts - (np.cumsum(counts) - counts), counts)
        np.random.default_rng([*self.seed, 1, window]).shuffle(order)
        return order


def windows_of(source: Drawable, seed: Sequence[int], *, at_least: int) -> Windows:
    """Shuffle the blocks of a source and join them to windows of ``at_least`` rows.

    So a file of many tiny blocks is shuffled well too. One block is one window.
    """
    blocks, rows = source.blocks, len(source)
    counts = np.diff(np.append(blocks, rows))
    order = np.random.default_rng([*seed, 0]).permutation(len(blocks))
    starts, counts = blocks[order], counts[order]
    ends = np.cumsum(counts)
    firsts, bounds = [0], [0]
    for place, end in enumerate(ends.tolist(), start=1):
        held = place - firsts[-1]
        if (held >= source.window and end - bounds[-1] >= at_least) or end == rows:
            firsts.append(place)
            bounds.append(end)
    return Windows(starts, counts, np.array(firsts), np.array(bounds), tuple(seed))


class Pass:
    """One pass over a source, or over a stretch of a circle of all its rows, shuffled again.

    The pieces of a stretch come in random order, and so do the rows of each piece. The last piece
    that was read is kept in memory.
    """

    def __init__(self, windows: Windows, pieces: np.ndarray, seed: Sequence[int] | None) -> None:
        self.windows, self._pieces, self._seed = windows, pieces, seed
        self._bounds = np.concatenate(([0], np.cumsum(pieces[:, 2] - pieces[:, 1])))
        self._held: tuple[int, np.ndarray] | None = None

    @staticmethod
    def whole(windows: Windows) -> "Pass":
        """Return a pass over every row, the windows in their order."""
        numbers = np.arange(len(windows))
        return Pass(windows, np.stack([numbers, 0 * numbers, np.diff(windows.bounds)], 1), None)

    @staticmethod
    def stretch(windows: Windows, first: int, last: int, seed: Sequence[int]) -> "Pass":
        """Return a pass over places ``first`` to ``last`` of the circle, at most one round."""
        rows = int(windows.bounds[-1])
        pieces: list[tuple[int, int, int]] = []
        begin, left = first % rows, last - first
        while left:
            number = int(np.searchsorted(windows.bounds, begin, side="right")) - 1
            inside = begin - int(windows.bounds[number])
            size = min(left, int(windows.bounds[number + 1]) - begin)
            pieces.append((number, inside, inside + size))
            begin, left = (begin + size) % rows, left - size
        order = np.random.default_rng([*seed, 2]).permutation(len(pieces))
        return Pass(windows, np.array(pieces, np.int64)[order], tuple(seed))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return the rows at these places."""
        found = np.empty(last - first, self.windows.dtype)
        place = first
        while place < last:
            piece = int(np.searchsorted(self._bounds, place, side="right")) - 1
            begin, end = int(self._bounds[piece]), min(last, int(self._bounds[piece + 1]))
            found[place - first : end - first] = self._piece(piece)[place - begin : end - begin]
            place = end
        return found

    def _piece(self, piece: int) -> np.ndarray:
        if self._held is None or self._held[0] != piece:
            window, first, last = self._pieces[piece].tolist()
            rows = self.windows.rows(window)
            if self._seed is not None:
                rows = rows[first:last].copy()
                np.random.default_rng([*self._seed, 3, piece]).shuffle(rows)
            self._held = piece, rows
        return self._held[1]


@dataclass(frozen=True, slots=True, eq=False)
class BatchRows:
    """The examples of a batch as source and row."""

    source: np.ndarray  # [examples] int16
    row: np.ndarray  # [examples]

    def __len__(self) -> int:
        return len(self.row)

    def share(self, rank: int, world: int) -> "BatchRows":
        """Return the part of one process of ``world``; empty if there are fewer examples."""
        return BatchRows(self.source[rank::world], self.row[rank::world])

    def examples(self, sources: Sequence[Source]) -> list[Example]:
        """Return the examples in the order of the batch; each source is read once."""
        return self.read([source.examples for source in sources])

    def read(self, readers: Sequence[Callable[[Sequence[int]], list[Row]]]) -> list[Row]:
        """Return what the reader of each source finds, in the order of the batch."""
        return gathered(
            self.source, lambda index, places: readers[index](self.row[places].tolist())
        )


class LazyBatches:
    """Batches of one pass over one source, read from the pass when they are needed."""

    def __init__(self, rows: Pass, size: int) -> None:
        self._rows, self._size = rows, size

    def __len__(self) -> int:
        whole, rest = divmod(len(self._rows), self._size)
        return whole + (rest >= SMALLEST_BATCH)

    def rows_of(self, number: int) -> np.ndarray:
        """Return the rows of a batch."""
        first = number * self._size
        return self._rows.rows(first, min(first + self._size, len(self._rows)))


@dataclass(frozen=True, slots=True, eq=False)
class CutBatches:
    """Batches in memory: batch ``i`` is ``rows[starts[i]:stops[i]]``."""

    rows: np.ndarray
    starts: np.ndarray  # [batches] int64
    stops: np.ndarray  # [batches] int64
    source: np.ndarray | None = None  # [rows] int16, if there are several

    def __len__(self) -> int:
        return len(self.starts)

    def rows_of(self, number: int) -> np.ndarray:
        """Return the rows of a batch."""
        return self.rows[self.starts[number] : self.stops[number]]

    def batch(self, number: int) -> BatchRows:
        """Return the rows of a batch with their sources."""
        assert self.source is not None, "cut with sources"
        source = self.source[self.starts[number] : self.stops[number]]
        return BatchRows(source, self.rows_of(number))


class SingleSourceBatches:
    """The batches of an epoch with one source each."""

    def __init__(
        self, parts: Sequence[Sequence[LazyBatches | CutBatches]], turn: np.ndarray
    ) -> None:
        self._parts, self._turn = parts, turn  # the passes of each source; [batches] int16
        self._place, self._used = 0, np.zeros(len(parts), np.int64)

    def __len__(self) -> int:
        return len(self._turn)

    def batch(self, number: int) -> BatchRows:
        """Return a batch; the one after the last is cheapest."""
        if number != self._place:
            self._used = np.bincount(self._turn[:number], minlength=len(self._parts))
        source = int(self._turn[number])
        own = int(self._used[source])
        self._used[source] += 1
        self._place = number + 1
        for part in self._parts[source]:
            if own < len(part):
                rows = part.rows_of(own)
                return BatchRows(np.full(len(rows), source, np.int16), rows)
            own -= len(part)
        raise AssertionError("a source has as many turns as batches")
