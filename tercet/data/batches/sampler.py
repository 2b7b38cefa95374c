"""Which examples share a batch, and in which order batches come.

The order follows from the seed, the epoch, and the sizes of the examples. It does not follow from
the number of processes: each computes the whole batch and takes its share. So a run goes on from
two integers, also on another number of machines.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from tercet.data.batches.epochs import SMALLEST_BATCH, BatchRows, Blended, Cut, Lazy, Single
from tercet.data.batches.order import Pass, Windows, windows_of
from tercet.errors import RecipeError

Mixing: TypeAlias = Literal["single", "blended"]
WINDOW_BATCHES: Final = 16  # rows are shuffled inside so many batches at least

MAX_EDGES: Final = 100  # a length group is a byte a row
_AT_ONCE: Final = 1 << 20  # rows whose length group is looked up together

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

    Memory: of ``single`` without length edges, a window of each source and two bytes a batch. With
    edges a row costs 4 bytes and up to 21 while an epoch is prepared, blended 6 and up to 37.

    Raises:
        RecipeError: if the sources cannot form batches as planned.
    """

    def __init__(self, sources: Sequence[Drawable], plan: BatchPlan) -> None:
        _check_plan(plan)
        _check_sources(sources)
        self.sources, self.plan = tuple(sources), plan
        largest = max(int(source.sizes.max()) for source in sources)
        self._limits = list(plan.batch_sizes) or [
            _examples_within(plan, size) for size in (*plan.length_edges, largest)
        ]
        self._weights_are_whole = all(float(source.weight).is_integer() for source in sources)
        self._counts: dict[int, int] = {}
        self._prepared: tuple[int, Single | Blended] | None = None
        self._epoch, self._batch = 0, 0

    def next_batch(self) -> BatchRows | None:
        """The next batch, of all processes together; None after the last epoch."""
        if self._batch >= self._batches_used(self._epoch):
            if self._batches_used(self._epoch + 1) == 0:
                return None
            self._epoch, self._batch = self._epoch + 1, 0
        batch = self._batches_of(self._epoch).batch(self._batch)
        self._batch += 1
        return batch

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

    def _batches_of(self, epoch: int) -> Single | Blended:
        if self._prepared is None or self._prepared[0] != epoch:
            self._prepared = None  # two epochs of indices need not be in memory together
            mixing = self._single if self.plan.mixing == "single" else self._blended
            self._prepared = epoch, mixing(epoch)
        return self._prepared[1]

    def _single(self, epoch: int) -> Single:
        # The batches of a source keep their order, which is local in its file; what is random is
        # whose turn it is.
        parts = [
            [self._of_one(index, some) for some in self._passes(index, epoch)]
            for index in range(len(self.sources))
        ]
        counts = [sum(map(len, of_source)) for of_source in parts]
        turn = np.repeat(np.arange(len(parts), dtype=np.int16), counts)
        np.random.default_rng(self._seed(_TURNS, epoch)).shuffle(turn)
        return Single(parts, turn)

    def _of_one(self, index: int, rows: Pass) -> Lazy | Cut:
        """The batches of a pass over one source: known place by place, or cut by length."""
        if not self.plan.length_edges:
            return Lazy(rows, self._limits[0])
        every = rows.rows(0, len(rows))
        return self._cut(every, self._groups(index, every))

    def _blended(self, epoch: int) -> Blended:
        passes = [(i, some) for i in range(len(self.sources)) for some in self._passes(i, epoch)]
        total = sum(len(some) for _, some in passes)
        kinds = {some.windows.kind for _, some in passes}
        rows = np.empty(total, np.int64 if np.int64 in kinds else np.int32)
        source, group = np.empty(total, np.int16), np.empty(total, np.int8)
        begin = 0
        for index, some in passes:
            own = slice(begin, begin + len(some))
            rows[own], source[own] = some.rows(0, len(some)), index
            group[own] = self._groups(index, rows[own])
            begin += len(some)
        return Blended(self._cut(rows, group, source))

    def _groups(self, index: int, rows: np.ndarray) -> np.ndarray:
        """The length group of each row."""
        found = np.zeros(len(rows), np.int8)
        if self.plan.length_edges:
            edges = np.asarray(self.plan.length_edges, np.int32)
            for start in range(0, len(rows), _AT_ONCE):  # what searchsorted gives is eight bytes
                some = rows[start : start + _AT_ONCE]
                found[start : start + _AT_ONCE] = np.searchsorted(
                    edges, self.sources[index].sizes[some]
                )
        return found

    def _cut(self, rows: np.ndarray, group: np.ndarray, source: np.ndarray | None = None) -> Cut:
        """Batches of one length group each; groups come up evenly from first to last."""
        arranged, owner = np.empty_like(rows), None if source is None else np.empty_like(source)
        filled = np.flatnonzero(np.bincount(group)).tolist()
        starts, stops, turns = [], [], []
        begin, left_over = 0, np.empty(0, np.int64)
        for number in filled:
            members = np.flatnonzero(group == number)
            if source is not None:
                members = members[_evenly(source[members])]
            if len(left_over):
                members = np.concatenate([left_over, members])
            size, is_longest = self._limits[number], number == filled[-1]
            used = len(members) if is_longest else len(members) - len(members) % size
            members, left_over = members[:used], members[used:]
            arranged[begin : begin + used] = rows[members]
            if source is not None and owner is not None:
                owner[begin : begin + used] = source[members]
            starts.append(np.arange(begin, begin + used, size))
            stops.append(np.minimum(starts[-1] + size, begin + used))
            turns.append((np.arange(len(starts[-1])) + 0.5) / max(len(starts[-1]), 1))
            begin += used
        start, stop = np.concatenate(starts), np.concatenate(stops)
        turn = np.argsort(np.concatenate(turns), kind="stable")
        turn = turn[(stop - start)[turn] >= SMALLEST_BATCH]
        return Cut(arranged, start[turn], stop[turn], owner)

    def _passes(self, index: int, epoch: int) -> list[Pass]:
        """A source's rows of an epoch: one whole pass a unit of weight, then the fraction."""
        source = self.sources[index]
        whole = math.floor(source.weight)
        found = [Pass.whole(self._windows(index, _ROWS, epoch, n)) for n in range(whole)]
        fraction = (source.weight - whole) * len(source)
        first, last = round(epoch * fraction), round((epoch + 1) * fraction)
        if last > first:
            # The fraction is the next stretch of a circle of all rows: no row comes twice before
            # each has come once. Then it is shuffled anew.
            circle = self._windows(index, _PORTIONS, 0, 0)
            seed = self._seed(_ROWS, epoch, index, whole)
            found.append(Pass.stretch(circle, first, last, seed))
        return found

    def _windows(self, index: int, purpose: int, epoch: int, number: int) -> Windows:
        source = self.sources[index]
        size = max(self.plan.batch_sizes, default=self.plan.batch_size)
        at_least = WINDOW_BATCHES * size if source.window > 1 else 1
        return windows_of(source, self._seed(purpose, epoch, index, number), at_least=at_least)

    def _seed(self, purpose: int, epoch: int, source: int = 0, number: int = 0) -> tuple[int, ...]:
        return purpose, self.plan.seed, epoch, source, number

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
