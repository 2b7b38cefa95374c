"""Sampling: which examples share a batch, and the order of batches.

The order depends on the seed, the epoch, and the sizes of the examples. It does not depend on the
number of processes: each computes the whole batch and takes its share. So a run is resumed from
two integers, also on another number of machines.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tercet.data.batches.order import (
    SMALLEST_BATCH,
    BatchRows,
    CutBatches,
    Drawable,
    LazyBatches,
    Pass,
    SingleSourceBatches,
    Windows,
    windows_of,
)
from tercet.errors import RecipeError
from tercet.files.artifacts import fingerprint
from tercet.types import Mixing

WINDOW_BATCHES: Final = 16  # rows are shuffled within at least this many batches

MAX_EDGES: Final = 100  # a length group takes one byte per row
_ROWS_AT_ONCE: Final = 1 << 20  # whose length group is looked up together

# The first entry of every random seed: the purpose of the numbers.
_ROWS, _PORTIONS, _TURNS = 1, 2, 3


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How batches are composed. Sizes are in the unit of ``Drawable.sizes``."""

    batch_size: int  # examples per batch, over all processes
    seed: int
    epochs: float | int = 1
    mixing: Mixing = "single"  # one source a batch, or every source in every batch
    size_budget: int | None = None  # examples times the largest size of their length group
    length_edges: tuple[int, ...] = ()  # the largest size of each length group but the last
    batch_sizes: tuple[int, ...] = ()  # of each length group, instead of batch_size and budget


class Sampler:
    """Yields batches of rows, epoch after epoch.

    - ``single``: a batch holds one source, so that in-batch negatives stay hard: a code snippet
      is easy to distinguish from a recipe for soup. Sources take turns at random, in proportion
      to their batches.
    - ``blended``: a batch holds every source in proportion to its examples and weight. With a
      weight above 1, an example can occur twice in a batch where a pass over its source ends.

    A weight is how often a source's examples are used per epoch: all of them twice at 2, a half
    at 0.5 and the other half in the next epoch. With length edges, the examples of a batch are of
    similar length; those left over in a group join the next longer one, and the last batch of
    the longest is smaller. An example is left out only if it would be alone in a batch.

    Memory: ``single`` without length edges holds a window of each source and two bytes per batch.
    With edges a row costs 4 bytes and up to 21 while an epoch is prepared, blended 6 and up to 37.

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
        self._prepared: tuple[int, SingleSourceBatches | CutBatches] | None = None
        self._epoch, self._batch = 0, 0

    def next_batch(self) -> BatchRows | None:
        """Return the next batch, of all processes together; None after the last epoch."""
        if self._batch >= self._batches_used(self._epoch):
            if self._batches_used(self._epoch + 1) == 0:
                return None
            self._epoch, self._batch = self._epoch + 1, 0
        batch = self._batches_of(self._epoch).batch(self._batch)
        self._batch += 1
        return batch

    def batches_per_epoch(self, epoch: int) -> int:
        """Return the batches of a whole epoch; with fractional weights, epochs differ a little."""
        key = 0 if self._weights_are_whole else epoch
        if key not in self._counts:
            self._counts[key] = len(self._batches_of(epoch))
        return self._counts[key]

    @property
    def total_batches(self) -> int:
        """The number of batches of the run, a last partial epoch included."""
        return sum(self._batches_used(epoch) for epoch in range(math.ceil(self.plan.epochs)))

    def state(self) -> dict[str, int]:
        """Return what ``restore`` needs to continue after the last batch."""
        return {"epoch": self._epoch, "batch": self._batch, "fingerprint": self._fingerprint()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where another sampler was when it returned this state.

        Raises:
            RecipeError: if the data or the plan differ from those of that sampler. The number
                of epochs may differ: a run can be made longer.
        """
        if state["fingerprint"] != self._fingerprint():
            raise RecipeError(
                "the data, the seed or the batch settings differ from those of the interrupted "
                "run, so it cannot be resumed; restore them, or start in a new run folder"
            )
        self._epoch, self._batch = state["epoch"], state["batch"]

    def _batches_used(self, epoch: int) -> int:
        """Return the number of this epoch's batches that are used."""
        part = min(self.plan.epochs - epoch, 1.0)
        if part <= 0:
            return 0
        return max(round(part * self.batches_per_epoch(epoch)), 1 if epoch == 0 else 0)

    def _batches_of(self, epoch: int) -> SingleSourceBatches | CutBatches:
        if self._prepared is None or self._prepared[0] != epoch:
            self._prepared = None  # two epochs of indices need not be in memory together
            mixing = self._single if self.plan.mixing == "single" else self._blended
            self._prepared = epoch, mixing(epoch)
        return self._prepared[1]

    def _single(self, epoch: int) -> SingleSourceBatches:
        # The batches of a source keep their order, which is local in its file; only the turns of
        # the sources are random.
        parts = [
            [self._of_one(index, some) for some in self._passes(index, epoch)]
            for index in range(len(self.sources))
        ]
        counts = [sum(map(len, of_source)) for of_source in parts]
        turn = np.repeat(np.arange(len(parts), dtype=np.int16), counts)
        np.random.default_rng(self._seed(_TURNS, epoch)).shuffle(turn)
        return SingleSourceBatches(parts, turn)

    def _of_one(self, index: int, rows: Pass) -> LazyBatches | CutBatches:
        """Return the batches of a pass over one source: read lazily, or cut by length."""
        if not self.plan.length_edges:
            return LazyBatches(rows, self._limits[0])
        every = rows.rows(0, len(rows))
        return self._cut(every, self._groups(index, every))

    def _blended(self, epoch: int) -> CutBatches:
        passes = [(i, some) for i in range(len(self.sources)) for some in self._passes(i, epoch)]
        total = sum(len(some) for _, some in passes)
        dtypes = {some.windows.dtype for _, some in passes}
        rows = np.empty(total, np.int64 if np.int64 in dtypes else np.int32)
        source, group = np.empty(total, np.int16), np.empty(total, np.int8)
        begin = 0
        for index, some in passes:
            own = slice(begin, begin + len(some))
            rows[own], source[own] = some.rows(0, len(some)), index
            group[own] = self._groups(index, rows[own])
            begin += len(some)
        return self._cut(rows, group, source)

    def _groups(self, index: int, rows: np.ndarray) -> np.ndarray:
        """Return the length group of each row."""
        found = np.zeros(len(rows), np.int8)
        edges, sizes = np.array(self.plan.length_edges, np.int32), self.sources[index].sizes
        # searchsorted needs eight bytes per row
        for start in range(0, len(rows) if len(edges) else 0, _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            found[some] = np.searchsorted(edges, sizes[rows[some]])
        return found

    def _cut(
        self, rows: np.ndarray, group: np.ndarray, source: np.ndarray | None = None
    ) -> CutBatches:
        """Return batches of one length group each, the groups evenly spread over the epoch."""
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
        return CutBatches(arranged, start[turn], stop[turn], owner)

    def _passes(self, index: int, epoch: int) -> list[Pass]:
        """Return the passes over a source in an epoch: one per unit of weight, then a fraction."""
        source = self.sources[index]
        whole = math.floor(source.weight)
        found = [Pass.whole(self._windows(index, _ROWS, epoch, n)) for n in range(whole)]
        fraction = (source.weight - whole) * len(source)
        first, last = round(epoch * fraction), round((epoch + 1) * fraction)
        if last > first:
            # The fraction is the next stretch of a circle of all rows, so that no row is repeated
            # before each has been used once. The stretch itself is shuffled again.
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
        facts: list[object] = [
            (plan.batch_size, plan.seed, plan.mixing, plan.size_budget, tuple(plan.length_edges)),
            [(source.fingerprint, float(source.weight)) for source in self.sources],
        ]
        if plan.batch_sizes:  # left out if empty: old runs, which had none, can be resumed
            facts.append(tuple(plan.batch_sizes))
        return int(fingerprint(facts, size=7), 16)


def _evenly(source: np.ndarray) -> np.ndarray:
    """Return an order in which each source is evenly spread, its own rows in order.

    Row i of n of a source has its place at (i + 1/2) / n. So the rows that one batch lacks of a
    source are in the next: any first rows of the order hold a source of share p among s sources
    to within (1 + p s) / 2 rows, and exactly if all shares are whole numbers.
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
            f"batch_size must be at least {SMALLEST_BATCH}, got {plan.batch_size}: "
            "a smaller batch has nothing to contrast",
        ),
        (plan.seed < 0, f"seed must be 0 or more, got {plan.seed}"),
        (not 0 < plan.epochs < math.inf, f"epochs must be above 0, got {plan.epochs}"),
        (budget is not None and budget < 1, f"size_budget must be above 0, got {budget}"),
        (
            list(edges) != sorted(set(edges))
            or min(edges, default=1) < 1
            or len(edges) > MAX_EDGES,
            f"length_edges must be up to {MAX_EDGES} rising sizes above 0, got {edges}",
        ),
        (
            bool(sizes) and len(sizes) != len(edges) + 1,
            f"batch_sizes must be one for each of {len(edges) + 1} length groups, got {sizes}: "
            "there is a group below each of length_edges, and one above the last",
        ),
        (
            min(sizes, default=SMALLEST_BATCH) < SMALLEST_BATCH,
            f"batch_sizes must be at least {SMALLEST_BATCH} each, got {sizes}: "
            "a smaller batch has nothing to contrast",
        ),
        (
            bool(sizes) and budget is not None,
            "batch_sizes and a budget both set the size of a batch; give only one of them",
        ),
    ]
    for is_wrong, problem in wrong:
        if is_wrong:
            raise RecipeError(problem)


def _check_sources(sources: Sequence[Drawable]) -> None:
    if not sources:
        raise RecipeError("there is no source to take examples from; give at least one data file")
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise RecipeError(
                f"the weight of {source.name!r} must be above 0, got {source.weight}; "
                "change it or leave the source out"
            )
        if len(source) * source.weight < SMALLEST_BATCH or len(source) < SMALLEST_BATCH:
            raise RecipeError(
                f"source {source.name!r} gives {len(source)} examples x weight {source.weight} "
                f"an epoch, and a batch needs {SMALLEST_BATCH}; add examples, raise the weight, "
                "or leave the source out"
            )
