"""The batches of an epoch: which rows each holds, known for all of them or one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from tercet.data.batches.order import Pass
from tercet.data.files.sources import Source
from tercet.types import Example

Found = TypeVar("Found")

SMALLEST_BATCH: Final = 2  # with one example there is nothing to contrast


@dataclass(frozen=True, slots=True, eq=False)
class BatchRows:
    """The examples of a batch: which source, and which row of it."""

    source: np.ndarray  # [examples] int16
    row: np.ndarray  # [examples]

    def __len__(self) -> int:
        return len(self.row)

    def share(self, rank: int, world: int) -> "BatchRows":
        """What one process of ``world`` takes; nothing, if there are fewer examples than that."""
        return BatchRows(self.source[rank::world], self.row[rank::world])

    def examples(self, sources: Sequence[Source]) -> list[Example]:
        """The examples themselves, in the order of the batch; each source is read once."""
        return self.read([source.examples for source in sources])

    def read(self, readers: Sequence[Callable[[Sequence[int]], list[Found]]]) -> list[Found]:
        """What the reader of each source finds, in the order of the batch."""
        found: dict[int, Found] = {}
        for index in np.unique(self.source).tolist():
            places = np.flatnonzero(self.source == index)
            rows = readers[index](self.row[places].tolist())
            found.update(zip(places.tolist(), rows, strict=True))
        return [found[place] for place in range(len(self))]


class Lazy:
    """Batches of one pass over one source, read from the pass when they are asked for."""

    def __init__(self, rows: Pass, size: int) -> None:
        self._rows, self._size = rows, size

    def __len__(self) -> int:
        whole, rest = divmod(len(self._rows), self._size)
        return whole + (rest >= SMALLEST_BATCH)

    def batch(self, number: int) -> np.ndarray:
        """The rows of a batch."""
        first = number * self._size
        return self._rows.rows(first, min(first + self._size, len(self._rows)))


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Rows, and which of them are a batch: ``rows[starts[i]:stops[i]]``, in the order of i."""

    rows: np.ndarray
    starts: np.ndarray  # [batches] int64
    stops: np.ndarray  # [batches] int64
    source: np.ndarray | None = None  # [rows] int16, where there are several

    def __len__(self) -> int:
        return len(self.starts)

    def part(self, number: int) -> slice:
        """Where the rows of a batch stand."""
        return slice(int(self.starts[number]), int(self.stops[number]))

    def batch(self, number: int) -> np.ndarray:
        """The rows of a batch."""
        return self.rows[self.part(number)]


class Single:
    """The batches of an epoch with one source each."""

    def __init__(self, parts: Sequence[Sequence[Lazy | Cut]], turn: np.ndarray) -> None:
        self._parts, self._turn = parts, turn  # of each source its passes; [batches] int16
        self._place, self._used = 0, np.zeros(len(parts), np.int64)

    def __len__(self) -> int:
        return len(self._turn)

    def batch(self, number: int) -> BatchRows:
        """A batch; the next one after the last costs least."""
        if number != self._place:
            self._used = np.bincount(self._turn[:number], minlength=len(self._parts))
        source = int(self._turn[number])
        own = int(self._used[source])
        self._used[source] += 1
        self._place = number + 1
        for part in self._parts[source]:
            if own < len(part):
                rows = part.batch(own)
                return BatchRows(np.full(len(rows), source, np.int16), rows)
            own -= len(part)
        raise AssertionError("a source has as many turns as batches")


@dataclass(frozen=True, slots=True, eq=False)
class Blended:
    """The batches of an epoch with every source in each."""

    cut: Cut

    def __len__(self) -> int:
        return len(self.cut)

    def batch(self, number: int) -> BatchRows:
        """The rows of a batch, and the source of each."""
        part = self.cut.part(number)
        assert self.cut.source is not None, "cut with sources"
        return BatchRows(self.cut.source[part], self.cut.rows[part])
