from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data.batches.sampler import BatchPlan, Sampler
from tercet.data.files.examples import parse_example
from tercet.data.files.readers import LineReader
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import RecipeError
from tercet.types import Example


def source_of(name, sizes, *, weight=1.0, blocks=(0,), window=8):
    """A source of which only the sizes matter; nothing can be read from it."""
    return Source(
        path=Path(name),
        name=name,
        weight=weight,
        sizes=np.asarray(sizes, np.int32),
        blocks=np.asarray(blocks, np.int64),
        window=window,
        fingerprint=name,
        reader=LineReader(Path(name), (0, 0), np.zeros(1, np.int64)),
        parse=parse_example,
    )


def batches_of(sampler):
    """Every batch that is left, as lists of (source, row)."""
    batches = []
    while (batch := sampler.next_batch()) is not None:
        batches.append(list(zip(batch.source.tolist(), batch.row.tolist(), strict=True)))
    return batches


def epoch_of(sources, **plan):
    return batches_of(Sampler(sources, BatchPlan(**{"seed": 0, **plan})))


A, B = source_of("a", [5] * 30), source_of("b", [5] * 11)


def test_single_batches_hold_one_source_and_every_example_once():
    batches = epoch_of([A, B], batch_size=4)
    assert all(len({source for source, _ in batch}) == 1 for batch in batches)
    assert sorted(pair for batch in batches for pair in batch) == sorted(
        [(0, row) for row in range(30)] + [(1, row) for row in range(11)]
    )
    assert Counter(len(batch) for batch in batches) == {4: 9, 2: 1, 3: 1}


def test_sources_take_turns_in_proportion_to_their_batches():
    sources = [source_of("a", [5] * 6000), source_of("b", [5] * 2000)]
    turns = [batch[0][0] for batch in epoch_of(sources, batch_size=4)]
    for part in np.array_split(turns, 4):
        assert np.mean(part) == pytest.approx(0.25, abs=0.06)
    assert turns != sorted(turns)


def test_blended_batches_hold_every_source_in_exact_proportion():
    sources = [source_of("a", [5] * 60), source_of("b", [5] * 40, weight=0.5)]
    for batch in epoch_of(sources, batch_size=8, mixing="blended"):
        # 60 and 40 / 2 examples an epoch: 3 to 1
        assert Counter(source for source, _ in batch) == {0: 6, 1: 2}


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    batch_size=st.integers(2, 16),
    seed=st.integers(0, 3),
)
def test_what_a_blended_batch_lacks_of_a_source_the_next_makes_up_for(counts, batch_size, seed):
    sources = [source_of(str(i), [5] * count) for i, count in enumerate(counts)]
    total, given_out, held = sum(counts), 0, Counter()
    for batch in epoch_of(sources, batch_size=batch_size, mixing="blended", seed=seed):
        held.update(source for source, _ in batch)
        given_out += len(batch)
        for source, count in enumerate(counts):
            share = Fraction(count, total)
            bound = (1 + share * len(counts)) / 2
            assert abs(held[source] - share * given_out) <= bound
    assert total - given_out == (1 if total % batch_size == 1 else 0)


def test_a_length_group_has_batches_of_its_own_within_the_budget():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 1000, 500)
    batches = epoch_of([source_of("a", sizes)], batch_size=16, length_edges=(50, 200))
    mixed = 0
    for batch in batches:
        mixed += len({int(np.searchsorted([50, 200], sizes[row])) for _, row in batch}) > 1
    assert mixed <= 2  # where one group's left-over rows join the next
    assert [len(batch) for batch in batches].count(16) == 500 // 16

    batches = epoch_of(
        [source_of("a", sizes)], batch_size=16, length_edges=(50, 200), size_budget=2000
    )
    limits = {0: 16, 1: 10, 2: 2}  # 2000 // 50 is above 16, 2000 // 200 = 10, 2000 // 999 = 2
    for batch in batches:
        longest = max(sizes[row] for _, row in batch)
        assert len(batch) <= limits[int(np.searchsorted([50, 200], longest))]
    assert sorted(row for batch in batches for _, row in batch) == list(range(500))


def test_a_size_on_an_edge_belongs_to_the_shorter_group():
    sizes = [10, 10, 11, 11]
    batches = epoch_of([source_of("a", sizes)], batch_size=2, length_edges=(10,))
    assert sorted(sorted(sizes[row] for _, row in batch) for batch in batches) == [
        [10, 10],
        [11, 11],
    ]


def test_a_batch_holds_two_examples_even_over_the_budget():
    batches = epoch_of([source_of("a", [100] * 4)], batch_size=8, size_budget=10)
    assert [len(batch) for batch in batches] == [2, 2]


def test_left_over_examples_pass_over_empty_groups_and_fill_the_next():
    sizes = [1] * 3 + [100] * 5
    batches = epoch_of([source_of("a", sizes)], batch_size=4, length_edges=(1, 10, 20, 30))
    assert sorted(len(batch) for batch in batches) == [4, 4]
    short_alone = epoch_of([source_of("a", [1] * 3)], batch_size=4, length_edges=(1, 10))
    assert [len(batch) for batch in short_alone] == [3]


def test_the_left_over_examples_of_a_group_do_not_travel_past_the_next_group():
    sizes = [1] * 5 + [10] * 8 + [100] * 9
    batches = epoch_of([source_of("a", sizes)], batch_size=4, length_edges=(1, 10))
    for batch in batches:
        assert not {1, 100} <= {sizes[row] for _, row in batch}


def test_blended_length_groups_keep_the_proportion():
    sizes = [5] * 40 + [50] * 80
    sources = [source_of("a", sizes), source_of("b", sizes)]
    batches = epoch_of(sources, batch_size=8, mixing="blended", length_edges=(10,))
    for batch in batches:
        assert Counter(source for source, _ in batch) == {0: 4, 1: 4}
        assert len({sizes[row] for _, row in batch}) == 1
    # groups come up evenly: one of 5 to two of 50, from the first to the last
    short = [sizes[batch[0][1]] == 5 for batch in batches]
    assert sum(short[:15]) == 5


def test_only_an_example_that_would_be_alone_is_left_out():
    nine = source_of("a", [5] * 9)
    assert [len(batch) for batch in epoch_of([nine], batch_size=4)] == [4, 4]
    assert [len(batch) for batch in epoch_of([nine], batch_size=7)] == [7, 2]


def test_a_source_smaller_than_a_batch_is_one_smaller_batch():
    assert [len(batch) for batch in epoch_of([source_of("a", [5] * 3)], batch_size=64)] == [3]


def test_a_weight_of_two_uses_every_example_twice_and_never_twice_in_a_batch():
    batches = epoch_of([source_of("a", [5] * 10, weight=2)], batch_size=4)
    assert Counter(row for batch in batches for _, row in batch) == dict.fromkeys(range(10), 2)
    assert all(len(set(batch)) == len(batch) for batch in batches)


def test_a_weight_below_one_uses_another_part_each_epoch():
    batches = epoch_of([source_of("a", [5] * 16, weight=0.25)], batch_size=4, epochs=8)
    rows = [tuple(sorted(row for _, row in batch)) for batch in batches]
    assert len(rows) == 8
    assert sorted(row for four in rows[:4] for row in four) == list(range(16))
    assert any(batch != sorted(batch) for batch in batches)
    assert rows[4:] == rows[:4]  # the second round has the same parts, shuffled anew


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=3),
    weight=st.sampled_from([1, 1.5, 2.3, 3]),
    batch_size=st.integers(2, 9),
    mixing=st.sampled_from(["single", "blended"]),
    edges=st.sampled_from([(), (3,), (2, 5, 90)]),
    budget=st.sampled_from([None, 12]),
)
def test_every_batch_has_two_examples_and_none_is_used_too_often(
    counts, weight, batch_size, mixing, edges, budget
):
    random = np.random.default_rng(counts)
    sources = [
        source_of(str(i), random.integers(1, 9, count), weight=weight)
        for i, count in enumerate(counts)
    ]
    plan = BatchPlan(
        batch_size=batch_size, seed=1, mixing=mixing, size_budget=budget, length_edges=edges
    )
    sampler = Sampler(sources, plan)
    batches = batches_of(sampler)
    assert len(batches) == sampler.total_batches
    assert all(2 <= len(batch) <= batch_size for batch in batches)
    used = Counter(pair for batch in batches for pair in batch)
    assert max(used.values()) <= np.ceil(weight)
    passes = int(np.ceil(weight)) * len(counts) if mixing == "single" else 1
    whole = int(weight)
    expected = sum(whole * count + round((weight - whole) * count) for count in counts)
    assert expected - passes <= sum(used.values()) <= expected


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(sources=(A, B), **plan):
        return epoch_of(sources, batch_size=4, **plan)

    one = order(epochs=1)
    two = order(epochs=2)
    assert order(epochs=1) == one
    assert order(seed=1) != one
    assert two[: len(one)] == one
    assert two[len(one) :] != one
    assert sorted(map(len, two[len(one) :])) == sorted(map(len, one))


@pytest.mark.parametrize("blocks", [(0,), range(0, 64, 2), range(0, 64, 16)])
def test_rows_come_in_another_order_each_epoch(blocks):
    source = source_of("a", [5] * 64, blocks=blocks)
    rows = [row for batch in epoch_of([source], batch_size=4, epochs=2) for _, row in batch]
    assert sorted(rows[:64]) == sorted(rows[64:]) == list(range(64))
    assert rows[:64] != rows[64:]
    followers = sum(second == first + 1 for first, second in pairwise(rows))
    assert followers < 16  # of 126 pairs; about 2 by chance


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_share_a_batch_between_them(world):
    sampler = Sampler([A, B], BatchPlan(batch_size=6, seed=0))
    while (batch := sampler.next_batch()) is not None:
        rows = [batch.share(rank, world).row.tolist() for rank in range(world)]
        assert sorted(row for some in rows for row in some) == sorted(batch.row.tolist())
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.mark.parametrize("mixing", ["single", "blended"])
@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_a_restored_sampler_goes_on_exactly(mixing, weight):
    sources = [A, source_of("b", [5] * 11, weight=weight)]
    plan = BatchPlan(batch_size=4, seed=3, mixing=mixing, epochs=2.5)
    whole = batches_of(Sampler(sources, plan))
    sampler = Sampler(sources, plan)
    for done in range(len(whole) + 1):
        other = Sampler(sources, plan)
        other.restore(sampler.state())
        assert batches_of(other) == whole[done:]
        sampler.next_batch()


def test_the_state_is_a_few_integers():
    sampler = Sampler([A, B], BatchPlan(batch_size=4, seed=0))
    sampler.next_batch()
    state = sampler.state()
    assert {"epoch": 0, "batch": 1} == {key: state[key] for key in ("epoch", "batch")}
    assert all(type(value) is int and value < 2**63 for value in state.values())


def test_a_run_can_be_made_longer_but_not_go_on_with_other_data_or_settings():
    plan = BatchPlan(batch_size=4, seed=0, epochs=1)
    state = Sampler([A, B], plan).state()
    Sampler([A, B], BatchPlan(batch_size=4, seed=0, epochs=5)).restore(state)
    others = [
        ([A], plan),
        ([B, A], plan),
        ([A, source_of("b", [5] * 11, weight=2.0)], plan),
        ([A, B], BatchPlan(batch_size=5, seed=0)),
        ([A, B], BatchPlan(batch_size=4, seed=1)),
        ([A, B], BatchPlan(batch_size=4, seed=0, mixing="blended")),
        ([A, B], BatchPlan(batch_size=4, seed=0, length_edges=(9,))),
    ]
    for sources, other in others:
        with pytest.raises(RecipeError, match="differ from those of the interrupted run"):
            Sampler(sources, other).restore(state)


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, 8), (2, 16), (0.5, 4), (1.25, 10), (0.01, 1), (3.0000001, 24)]
)
def test_a_partial_epoch_is_a_part_of_its_batches(epochs, expected):
    sampler = Sampler([source_of("a", [5] * 32)], BatchPlan(batch_size=4, seed=0, epochs=epochs))
    assert sampler.total_batches == expected
    assert len(batches_of(sampler)) == expected
    assert sampler.next_batch() is None


def test_batches_per_epoch_does_not_disturb_the_order():
    sources = [source_of("a", [5] * 30, weight=0.7), B]
    plan = BatchPlan(batch_size=4, seed=0, epochs=3)
    asked, plain = Sampler(sources, plan), Sampler(sources, plan)
    for _ in range(5):
        asked.next_batch()
        plain.next_batch()
    assert [asked.batches_per_epoch(epoch) for epoch in (2, 0)] == [
        plain.batches_per_epoch(epoch) for epoch in (2, 0)
    ]
    assert batches_of(asked) == batches_of(plain)


def loads(blocks, *, kept):
    """How often a block is read, if the ``kept`` blocks used last stay in memory."""
    memory, count = [], 0
    for block in blocks:
        if block in memory:
            memory.remove(block)
        else:
            count += 1
        memory = [*memory, block][-kept:]
    return count


@pytest.mark.parametrize("window", [1, 4, 8])
@pytest.mark.parametrize(("edges", "most"), [((), 40), ((4,), 80)])
def test_rows_of_many_blocks_come_in_an_order_that_is_cheap_to_read(window, edges, most):
    sizes = np.random.default_rng(0).integers(1, 9, 40 * 512)
    source = source_of("a", sizes, blocks=range(0, 40 * 512, 512), window=window)
    batches = epoch_of([source], batch_size=16, length_edges=edges)
    rows = [row for batch in batches for _, row in batch]
    assert sorted(rows) == list(range(40 * 512))
    assert loads([row // 512 for row in rows], kept=2 * window) <= most
    first_window = {row // 512 for row in rows[: 512 * window]}
    assert len(first_window) >= window
    assert first_window != set(range(window))


def test_the_rows_of_a_tiny_block_seldom_share_a_batch():
    source = source_of("a", [5] * 3000, blocks=range(0, 3000, 2))
    batches = epoch_of([source], batch_size=16)
    pairs = 0
    for batch in batches:
        pairs += len(batch) - len({row // 2 for _, row in batch})
    # A window of 16 batches parts a pair 15 times in 16: 94 of 1500 stay. A window of eight such
    # blocks is one batch, and would part none.
    assert pairs < 150


def test_the_examples_of_a_batch_come_in_its_order(tmp_path):
    sources = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        write_examples(path, [Example(f"{name}{i}", ("p",)) for i in range(6)])
        sources.append(open_source(path))
    sampler = Sampler(sources, BatchPlan(batch_size=5, seed=0, mixing="blended"))
    batch = sampler.next_batch()
    assert batch is not None
    expected = [f"{'ab'[source]}{row}" for source, row in zip(batch.source, batch.row, strict=True)]
    assert [example.query for example in batch.examples(sources)] == expected
    assert batch.share(9, 10).examples(sources) == []


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2, got 1: a smaller batch has nothing"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"epochs": float("nan")}, "epochs must be above 0, got nan"),
        ({"size_budget": 0}, "size_budget must be above 0, got 0"),
        (
            {"length_edges": (5, 5)},
            "length_edges must be up to 100 rising sizes above 0, got (5, 5)",
        ),
        ({"length_edges": (9, 5)}, "length_edges must be up to 100"),
        ({"length_edges": (0, 5)}, "length_edges must be up to 100"),
        ({"length_edges": tuple(range(1, 102))}, "length_edges must be up to 100"),
    ],
)
def test_an_impossible_plan_is_refused(plan, problem):
    with pytest.raises(RecipeError) as caught:
        Sampler([A], BatchPlan(**{"batch_size": 4, "seed": 0, **plan}))
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        ([], "there is no source to take examples from"),
        ([A, source_of("tiny", [5])], "source 'tiny' gives 1 examples x weight 1.0 an epoch, and"),
        ([source_of("tiny", [5], weight=9)], "source 'tiny' gives 1 examples x weight 9 an epoch"),
        ([source_of("rare", [5] * 9, weight=0.2)], "source 'rare' gives 9 examples x weight 0.2"),
        ([source_of("off", [5] * 9, weight=0.0)], "the weight of 'off' must be above 0, got 0.0"),
        (
            [source_of("nan", [5], weight=float("nan"))],
            "the weight of 'nan' must be above 0, got nan",
        ),
    ],
)
def test_a_source_that_cannot_form_a_batch_is_named(sources, problem):
    with pytest.raises(RecipeError) as caught:
        Sampler(sources, BatchPlan(batch_size=4, seed=0))
    assert str(caught.value).startswith(problem)


EDGES, SIZES = (20, 40), (12, 6, 3)
MIXED = [
    source_of("a", [*range(1, 61), *range(1, 61), 55, 56], blocks=(0, 50), window=1),
    source_of("b", [5] * 29 + [60] * 4),
]


def test_each_length_group_has_its_own_batch_size():
    batches = epoch_of(MIXED, batch_size=64, length_edges=EDGES, batch_sizes=SIZES)
    rows = sorted(pair for batch in batches for pair in batch)
    assert rows == sorted(
        (s, row) for s, source in enumerate(MIXED) for row in range(len(source.sizes))
    )
    seen = set()
    for batch in batches:
        longest = max(int(MIXED[source].sizes[row]) for source, row in batch)
        group = int(np.searchsorted(EDGES, longest))
        seen.add((group, len(batch) == SIZES[group]))
        assert len(batch) <= SIZES[group]  # what is left over of a group joins a longer one
    assert {(0, True), (1, True), (2, True)} <= seen
    assert [len(batch) for batch in batches if len(batch) not in SIZES] == [2]  # the tail of a


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_processes_draw_the_same_group_and_no_row_is_lost(world):
    """Trap B5 of BGE-M3: other loaders drop batches of varying size."""
    plan = BatchPlan(batch_size=64, seed=3, epochs=2, length_edges=EDGES, batch_sizes=SIZES)
    samplers = [Sampler(MIXED, plan) for _ in range(world)]
    whole = Sampler(MIXED, plan)
    count = 0
    while (batch := whole.next_batch()) is not None:
        drawn = [own for sampler in samplers if (own := sampler.next_batch()) is not None]
        shares = [own.share(rank, world) for rank, own in enumerate(drawn)]
        rows = sorted(pair for s in shares for pair in np.stack([s.source, s.row], 1).tolist())
        assert rows == sorted(np.stack([batch.source, batch.row], 1).tolist())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        count += len(batch)
    assert all(sampler.next_batch() is None for sampler in samplers)
    assert count == 2 * sum(map(len, MIXED))


def test_runs_that_were_started_with_earlier_versions_are_recognised():
    source = source_of("abc", [5] * 40, weight=1.5)
    plan = BatchPlan(batch_size=8, seed=3)
    sized = BatchPlan(batch_size=8, seed=3, length_edges=(4,), batch_sizes=(8, 4))
    assert Sampler([source], plan).state()["fingerprint"] == 48821783373633889
    assert Sampler([source], sized).state()["fingerprint"] == 9341897958651928


def test_a_run_with_other_batch_sizes_is_another_run():
    plan = {"batch_size": 64, "seed": 0, "length_edges": EDGES}
    state = Sampler(MIXED, BatchPlan(**plan, batch_sizes=SIZES)).state()
    Sampler(MIXED, BatchPlan(**plan, batch_sizes=SIZES)).restore(state)
    for sizes in ((12, 6, 4), ()):
        with pytest.raises(RecipeError, match="batch settings differ from those"):
            Sampler(MIXED, BatchPlan(**plan, batch_sizes=sizes)).restore(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_sizes": (4, 4)},
            "batch_sizes must be one for each of 3 length groups, got (4, 4)",
        ),
        ({"batch_sizes": (4, 4, 1)}, "batch_sizes must be at least 2 each, got (4, 4, 1)"),
        ({"batch_sizes": SIZES, "size_budget": 9}, "both set the size of a batch"),
    ],
)
def test_batch_sizes_that_cannot_be_used_are_refused(changes, message):
    with pytest.raises(RecipeError) as caught:
        epoch_of([A], batch_size=4, length_edges=EDGES, **changes)
    assert message in str(caught.value)
