"""Which examples share a batch, and in which order batches come.

The order follows from the seed, the epoch, and the sizes of the examples. It does not follow from
the number of processes: each computes the whole batch and takes its share. So a run goes on from
two integers, also on another number of machines.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from tercet.data.sources import Source
from tercet.errors import RecipeError
from tercet.types import Example

Mixing: TypeAlias = Literal["single", "blended"]
Found = TypeVar("Found")

SMALLEST_BATCH: Final = 2  # with one example there is nothing to contrast
WINDOW_BATCHES: Final = 16  # rows are shuffled inside so many batches at least

MAX_EDGES: Final = 100  # a length group is a byte a row

# The first entry of every random seed: what the numbers are drawn for.
_ROWS, _PORTIONS, _TURNS = 1, 2, 3


@runtime_checkable
class Drawable(Protocol):
    """What rows are drawn of: a ``Source``, or what an objective makes of one."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def weight(self) -> float | int:
        """How often each row is used an epoch."""
        ...

    @property
    def sizes(self) -> np.ndarray:
        """Of each row: int32, in any unit."""
        ...

    @property
    def blocks(self) -> np.ndarray:
        """The first row of each block that is cheap to read whole."""
        ...

    @property
    def window(self) -> int:
        """Blocks that are cheap to read in turns."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when a row does."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How batches are put together. Sizes are in the unit of ``Drawable.sizes``."""

    batch_size: int  # examples a batch, over all processes
    seed: int
    epochs: float | int = 1
    mixing: Mixing = "single"  # one source a batch, or every source in every batch
    size_budget: int | None = None  # examples times the largest size of their length group
    length_edges: tuple[int, ...] = ()  # the largest size of each length group but the last
    batch_sizes: tuple[int, ...] = ()  # of each length group, in place of batch_size and budget


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


@dataclass(frozen=True, slots=True, eq=False)
class _Batches:
    """Rows, and which of them are a batch: ``rows[starts[i]:stops[i]]``, in the order of i."""

    rows: BatchRows
    starts: np.ndarray  # [batches] int64
    stops: np.ndarray  # [batches] int64

    def __len__(self) -> int:
        return len(self.starts)


class Sampler:
    """Hands out batches of rows, epoch after epoch.

    - ``single``: a batch holds one source, so that in-batch negatives stay hard: a code snippet
      is told from a recipe for soup without reading either. Sources take turns at random, in
      proportion to their batches.
    - ``blended``: a batch holds every source in proportion to its examples and weight. With a
      weight above 1, an example can meet itself where its source begins anew.

    A weight says how often a source's examples are used an epoch: all of them twice at 2, a half
    at 0.5 and the other half in the next epoch. With length edges, the examples of a batch are of
    similar length; those left over in a group join the next longer one, and the last batch of
    the longest is smaller. An example is left out only where it would be alone in a batch.

    Memory: a row costs 7 bytes, and while an epoch is prepared up to 30, blended up to 65.

    Raises:
        RecipeError: if the sources cannot form batches as planned.
    """

    def __init__(self, sources: Sequence[Drawable], plan: BatchPlan) -> None:
        _check_plan(plan)
        _check_sources(sources)
        self.sources, self.plan = tuple(sources), plan
        edges = np.asarray(plan.length_edges, np.int64)
        self._groups = [np.searchsorted(edges, source.sizes).astype(np.int8) for source in sources]
        largest = max(int(source.sizes.max()) for source in sources)
        self._limits = list(plan.batch_sizes) or [
            _examples_within(plan, size) for size in (*plan.length_edges, largest)
        ]
        self._weights_are_whole = all(float(source.weight).is_integer() for source in sources)
        self._counts: dict[int, int] = {}
        self._prepared: tuple[int, _Batches] | None = None
        self._epoch, self._batch = 0, 0

    def next_batch(self) -> BatchRows | None:
        """The next batch, of all processes together; None after the last epoch."""
        if self._batch >= self._batches_used(self._epoch):
            if self._batches_used(self._epoch + 1) == 0:
                return None
            self._epoch, self._batch = self._epoch + 1, 0
        batches = self._batches_of(self._epoch)
        part = slice(batches.starts[self._batch], batches.stops[self._batch])
        self._batch += 1
        return BatchRows(batches.rows.source[part], batches.rows.row[part])

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches of a whole epoch; with a weight that is not whole, epochs differ a little."""
        key = 0 if self._weights_are_whole else epoch
        if key not in self._counts:
            self._counts[key] = len(self._batches_of(epoch))
        return self._counts[key]

    @property
    def total_batches(self) -> int:
        """Batches of the run, a last partial epoch included."""
        return sum(self._batches_used(epoch) for epoch in range(math.ceil(self.plan.epochs)))

    def state(self) -> dict[str, int]:
        """What ``restore`` needs to go on after the batch handed out last."""
        return {"epoch": self._epoch, "batch": self._batch, "fingerprint": self._fingerprint()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on where another sampler was when it gave this state.

        Raises:
            RecipeError: if the data or the plan differ from those of that sampler. The number
                of epochs may differ: a run can be made longer.
        """
        if state["fingerprint"] != self._fingerprint():
            raise RecipeError(
                "the data, the seed or the batch settings are not those of the interrupted run, "
                "so it cannot go on in the same order; put them back, or start in a new run folder"
            )
        self._epoch, self._batch = state["epoch"], state["batch"]

    def _batches_used(self, epoch: int) -> int:
        """Batches the run takes of this epoch: all, a part in the last one, none after it."""
        part = min(self.plan.epochs - epoch, 1.0)
        if part <= 0:
            return 0
        return max(round(part * self.batches_per_epoch(epoch)), 1 if epoch == 0 else 0)

    def _batches_of(self, epoch: int) -> _Batches:
        if self._prepared is None or self._prepared[0] != epoch:
            self._prepared = None  # two epochs of indices need not be in memory together
            mixing = self._single if self.plan.mixing == "single" else self._blended
            self._prepared = epoch, mixing(epoch)
        return self._prepared[1]

    def _single(self, epoch: int) -> _Batches:
        parts: list[_Batches] = []
        turns: list[np.ndarray] = []
        for index in range(len(self.sources)):
            for rows in self._passes(index, epoch):
                parts.append(self._cut(BatchRows(np.full(len(rows), index, np.int16), rows)))
                turns.append(np.full(len(parts[-1]), index, np.int16))
        turn = np.concatenate(turns)
        self._random(_TURNS, epoch).shuffle(turn)
        # The batches of a source keep their order, which is local in its file; what is random is
        # whose turn it is.
        return _ordered(_joined(parts), np.argsort(turn, kind="stable").argsort())

    def _blended(self, epoch: int) -> _Batches:
        sources, rows = [], []
        for index in range(len(self.sources)):
            for some in self._passes(index, epoch):
                rows.append(some)
                sources.append(np.full(len(some), index, np.int16))
        return self._cut(BatchRows(np.concatenate(sources), np.concatenate(rows)))

    def _cut(self, rows: BatchRows) -> _Batches:
        """Batches of one length group each; groups come up evenly from first to last."""
        group = np.empty(len(rows), np.int8)
        for index in np.unique(rows.source).tolist():
            of_source = rows.source == index
            group[of_source] = self._groups[index][rows.row[of_source]]
        filled = np.unique(group).tolist()
        places, starts, stops, turns = [], [], [], []
        begin, left_over = 0, np.empty(0, np.int64)
        for number in filled:
            members = np.flatnonzero(group == number)
            members = members[_evenly(rows.source[members])]
            members = np.concatenate([left_over, members])
            size, is_longest = self._limits[number], number == filled[-1]
            used = len(members) if is_longest else len(members) - len(members) % size
            left_over = members[used:]
            places.append(members[:used])
            starts.append(np.arange(begin, begin + used, size))
            stops.append(np.minimum(starts[-1] + size, begin + used))
            turns.append((np.arange(len(starts[-1])) + 0.5) / max(len(starts[-1]), 1))
            begin += used
        place, start, stop = (np.concatenate(parts) for parts in (places, starts, stops))
        arranged = BatchRows(rows.source[place], rows.row[place])
        turn = np.argsort(np.concatenate(turns), kind="stable")
        turn = turn[(stop - start)[turn] >= SMALLEST_BATCH]
        return _Batches(arranged, start[turn], stop[turn])

    def _passes(self, index: int, epoch: int) -> Iterator[np.ndarray]:
        """A source's rows of an epoch: one whole pass a unit of weight, then the fraction."""
        source = self.sources[index]
        whole = math.floor(source.weight)
        for number in range(whole):
            yield self._order(index, self._random(_ROWS, epoch, index, number))
        fraction = (source.weight - whole) * len(source)
        first, last = round(epoch * fraction), round((epoch + 1) * fraction)
        if last == first:
            return
        # The fraction is the next stretch of a circle of all rows: no row comes twice before
        # each has come once. Then it is shuffled anew.
        circle = self._order(index, self._random(_PORTIONS, 0, index))
        chosen = np.zeros(len(source), np.bool_)
        chosen[circle[np.arange(first, last) % len(source)]] = True
        order = self._order(index, self._random(_ROWS, epoch, index, whole))
        yield order[chosen[order]]

    def _order(self, index: int, random: np.random.Generator) -> np.ndarray:
        source = self.sources[index]
        size = max(self.plan.batch_sizes, default=self.plan.batch_size)
        at_least = WINDOW_BATCHES * size if source.window > 1 else 1
        return _windowed_order(source, random, at_least=at_least)

    def _random(
        self, purpose: int, epoch: int, source: int = 0, number: int = 0
    ) -> np.random.Generator:
        return np.random.default_rng([purpose, self.plan.seed, epoch, source, number])

    def _fingerprint(self) -> int:
        plan = self.plan
        told: list[object] = [
            (plan.batch_size, plan.seed, plan.mixing, plan.size_budget, tuple(plan.length_edges)),
            [(source.fingerprint, float(source.weight)) for source in self.sources],
        ]
        if plan.batch_sizes:  # runs that were started before there were any still go on
            told.append(tuple(plan.batch_sizes))
        digest = hashlib.blake2b(repr(told).encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big")


def _windowed_order(source: Drawable, random: np.random.Generator, *, at_least: int) -> np.ndarray:
    """All rows at random, so that any stretch of them comes from few blocks.

    The blocks are shuffled, then the rows inside windows of some blocks. A window holds
    ``at_least`` rows, so a file of many tiny blocks is shuffled well. One block is one window.
    """
    rows, blocks = len(source), source.blocks
    order = np.arange(rows, dtype=np.int32 if rows < 2**31 else np.int64)
    ends = np.append(blocks[1:], rows)
    shuffled = random.permutation(len(blocks))
    order = np.concatenate([order[blocks[block] : ends[block]] for block in shuffled])
    bounds = np.cumsum((ends - blocks)[shuffled])
    begin, held = 0, 0
    for end in bounds.tolist():
        held += 1
        if (held >= source.window and end - begin >= at_least) or end == rows:
            random.shuffle(order[begin:end])
            begin, held = end, 0
    return order


def _evenly(source: np.ndarray) -> np.ndarray:
    """An order in which each source is spread evenly over the whole, its own rows in order.

    Row i of n of a source has its place at (i + 1/2) / n. So what one batch lacks of a source the
    next makes up for: the first rows of the order hold a source of share p among s sources to
    within (1 + p s) / 2 rows, and exactly where all shares are whole numbers.
    """
    counts = np.bincount(source)
    if np.count_nonzero(counts) == 1:
        return np.arange(len(source))
    by_source = np.argsort(source, kind="stable")
    begins = np.cumsum(counts) - counts
    position = np.empty(len(source), np.float64)
    position[by_source] = np.arange(len(source)) + 0.5
    position -= begins[source]
    return np.argsort(position / counts[source], kind="stable")


def _joined(parts: Sequence[_Batches]) -> _Batches:
    begins = np.cumsum([0, *(len(part.rows) for part in parts[:-1])])
    rows = BatchRows(
        np.concatenate([part.rows.source for part in parts]),
        np.concatenate([part.rows.row for part in parts]),
    )
    starts = np.concatenate([part.starts + b for part, b in zip(parts, begins, strict=True)])
    stops = np.concatenate([part.stops + b for part, b in zip(parts, begins, strict=True)])
    return _Batches(rows, starts, stops)


def _ordered(batches: _Batches, order: np.ndarray) -> _Batches:
    return _Batches(batches.rows, batches.starts[order], batches.stops[order])


def _examples_within(plan: BatchPlan, size: int) -> int:
    if plan.size_budget is None:
        return plan.batch_size
    return min(max(plan.size_budget // max(size, 1), SMALLEST_BATCH), plan.batch_size)


def _check_plan(plan: BatchPlan) -> None:
    edges = plan.length_edges
    budget = plan.size_budget
    sizes = plan.batch_sizes
    wrong = [
        (
            plan.batch_size < SMALLEST_BATCH,
            f"batch_size is {plan.batch_size}; give at least {SMALLEST_BATCH}, "
            "there is nothing to contrast in less",
        ),
        (plan.seed < 0, f"seed is {plan.seed}; give 0 or more"),
        (not 0 < plan.epochs < math.inf, f"epochs is {plan.epochs}; give a number above 0"),
        (budget is not None and budget < 1, f"size_budget is {budget}; give a number above 0"),
        (
            list(edges) != sorted(set(edges))
            or min(edges, default=1) < 1
            or len(edges) > MAX_EDGES,
            f"length_edges are {edges}; give up to {MAX_EDGES} sizes above 0, the smallest first",
        ),
        (
            bool(sizes) and len(sizes) != len(edges) + 1,
            f"batch_sizes are {sizes} for {len(edges) + 1} length groups; give one for each: there "
            "is a group below each of length_edges, and one above the last",
        ),
        (
            min(sizes, default=SMALLEST_BATCH) < SMALLEST_BATCH,
            f"batch_sizes are {sizes}; give at least {SMALLEST_BATCH} each, "
            "there is nothing to contrast in less",
        ),
        (
            bool(sizes) and budget is not None,
            "batch_sizes and a budget both say how large a batch is; give one of them",
        ),
    ]
    for is_wrong, problem in wrong:
        if is_wrong:
            raise RecipeError(problem)


def _check_sources(sources: Sequence[Drawable]) -> None:
    if not sources:
        raise RecipeError("there is no source to take examples from; name at least one data file")
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise RecipeError(
                f"source {source.name!r} has weight {source.weight}; give a number above 0, "
                "or leave the source out"
            )
        if len(source) * source.weight < SMALLEST_BATCH or len(source) < SMALLEST_BATCH:
            raise RecipeError(
                f"source {source.name!r} gives {len(source)} examples x weight {source.weight} "
                f"an epoch, and a batch needs {SMALLEST_BATCH}; add examples, raise the weight, "
                "or leave the source out"
            )
