"""In which order the rows of a source come: at random, and cheap to read and to know.

A pass over a source is cut into windows of some blocks, the windows come in random order, and so
do the rows inside each. What is random hangs on a seed and the number of the window alone: the
rows at any place of a pass are known without those before them, and a window is all that is in
memory of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Blocked(Protocol):
    """What has rows in blocks that are cheap to read whole."""

    @property
    def blocks(self) -> np.ndarray:
        """The first row of each block."""
        ...

    @property
    def window(self) -> int:
        """Blocks that are cheap to read in turns."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """All rows of a source in windows. The rows of a window stand in random order."""

    starts: np.ndarray  # [blocks] int64, the first row of each block, blocks in random order
    counts: np.ndarray  # [blocks] int64, its rows
    firsts: np.ndarray  # [windows + 1] int64, the first block of each, and the number of blocks
    bounds: np.ndarray  # [windows + 1] int64, the first place of each, and the number of rows
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.firsts) - 1

    @property
    def kind(self) -> type[np.integer[Any]]:
        """What holds the number of a row."""
        return np.int32 if self.bounds[-1] < 2**31 else np.int64

    def rows(self, window: int) -> np.ndarray:
        """The rows of a window, as int32 where that is enough."""
        some = slice(self.firsts[window], self.firsts[window + 1])
        size = int(self.bounds[window + 1] - self.bounds[window])
        order = np.empty(size, self.kind)
        begin = 0
        for start, count in zip(
            self.starts[some].tolist(), self.counts[some].tolist(), strict=True
        ):
            order[begin : begin + count] = np.arange(start, start + count)
            begin += count
        np.random.default_rng([*self.seed, 1, window]).shuffle(order)
        return order


def windows_of(source: Blocked, seed: Sequence[int], *, at_least: int) -> Windows:
    """The blocks of a source shuffled, and put together to windows.

    A window holds ``at_least`` rows, so a file of many tiny blocks is shuffled well. One block is
    one window.
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
    """One pass over a source, or a stretch of a circle of all its rows, shuffled anew.

    A stretch is cut at the windows of the circle; its pieces come in random order, and the rows
    of each piece too. The last piece that was read is kept.
    """

    def __init__(self, windows: Windows, pieces: np.ndarray, seed: Sequence[int] | None) -> None:
        self.windows, self._pieces, self._seed = windows, pieces, seed
        self._bounds = np.concatenate(([0], np.cumsum(pieces[:, 2] - pieces[:, 1])))
        self._held: tuple[int, np.ndarray] | None = None

    @staticmethod
    def whole(windows: Windows) -> "Pass":
        """Every row once, the windows in their order."""
        numbers = np.arange(len(windows))
        return Pass(windows, np.stack([numbers, 0 * numbers, np.diff(windows.bounds)], 1), None)

    @staticmethod
    def stretch(windows: Windows, first: int, last: int, seed: Sequence[int]) -> "Pass":
        """The rows at the places from ``first`` up to ``last`` of the circle, at most one round."""
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
        """The rows at these places."""
        found = np.empty(last - first, self.windows.kind)
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
