from dataclasses import replace

import numpy as np
import pytest

from tercet import distributed
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.objectives.contrastive import Contrastive
from tercet.training.batches import (
    PRESETS,
    Batching,
    ExampleShape,
    Groups,
    StepCosts,
    bytes_per_token,
    fitted,
    groups_of,
    in_tokens,
    sampler_of,
    shape_of,
    usual_edges,
)
from tercet.training.memory import COPIES, MemoryBudget
from tercet.training.recipe import Refresh, Stage
from tercet.types import Example

STAGE = Stage(name="toy", objective=Contrastive(), batch_size=32)
ROOM = MemoryBudget(total=1e9, token_graph=100, kinds=("dense",), dim=64, width=None)


@pytest.fixture(scope="module")
def embedder(encoder_folder):
    return Embedder.load(encoder_folder, query_tokens=64, document_tokens=64)


@pytest.fixture
def source(tmp_path):
    """A hundred texts of 8 to 11 words; "editor" is one token of the tokenizer."""
    examples = [Example(f"query {i}", ("editor " * (8 + i % 4),)) for i in range(100)]
    write_examples(tmp_path / "pairs.jsonl", examples)
    return open_source(tmp_path / "pairs.jsonl")


def sizes_of_batches(sampler) -> list[int]:
    sizes = []
    while (rows := sampler.next_batch()) is not None:
        sizes.append(len(rows))
    return sizes


def test_bytes_per_token_are_those_of_the_longest_texts(source, embedder):
    # 7 bytes a word; 8 to 11 words and two special tokens: 9.5 words of 11.5 tokens on average
    assert bytes_per_token([source], embedder) == pytest.approx(7 * 9.5 / 11.5, rel=0.02)


def test_a_token_budget_alone_counts_tokens_and_not_bytes(source, embedder):
    # The longest text has 13 tokens: 10 of them are 130 tokens, or 770 bytes.
    sizes = sizes_of_batches(sampler_of(replace(STAGE, token_budget=130), [source], 0, embedder))
    assert max(sizes) in (9, 10)


def test_length_edges_are_in_tokens_too(source, embedder):
    sampler = sampler_of(replace(STAGE, length_edges=(12,), batch_size=10), [source], 0, embedder)
    sides = []
    while (rows := sampler.next_batch()) is not None:
        words = source.sizes[rows.row] // 7
        sides.append((words.max() <= 9, words.min() >= 10))
    assert all(short or long for short, long in sides)  # 9 words and 2 special tokens: 11


def test_edges_that_are_the_same_in_bytes_are_one(source, embedder):
    tiny = replace(source, sizes=np.ones_like(source.sizes))
    stage = replace(STAGE, length_edges=(1, 2, 3))
    assert sum(sizes_of_batches(sampler_of(stage, [tiny], 0, embedder))) == 100


def test_a_text_that_will_be_cut_is_counted_as_long_as_it_is_then(tmp_path, embedder):
    examples = [Example(f"query {i}", ("editor " * 60,)) for i in range(100)]
    examples[7] = replace(examples[7], positives=("editor " * 20_000,))
    write_examples(tmp_path / "pairs.jsonl", examples)
    source = open_source(tmp_path / "pairs.jsonl")
    sampler = sampler_of(replace(STAGE, token_budget=64 * 16), [source], 0, embedder)
    assert max(sizes_of_batches(sampler)) >= 15


def source_of(folder, name, text, counts) -> Source:
    """Examples whose positive says a text so many times."""
    examples = [Example(f"query {i}", (text * count,)) for i, count in enumerate(counts)]
    write_examples(folder / f"{name}.jsonl", examples)
    return open_source(folder / f"{name}.jsonl")


def tokens_of(embedder, source, row: int) -> int:
    return embedder.tokenizer(list(source.examples([row])[0].positives), 1000).lengths[0]


@pytest.fixture
def two_languages(tmp_path, embedder):
    """A word of six letters is one token, and so is one of an alphabet that it does not know."""
    english = source_of(tmp_path, "english", "editor ", [8 + i % 20 for i in range(60)])
    korean = source_of(
        tmp_path, "korean", "\ud55c\uad6d\uc5b4\uc758\ub9d0 ", [8 + i % 20 for i in range(60)]
    )
    assert tokens_of(embedder, english, 0) == tokens_of(embedder, korean, 0) == 10
    return english, korean


def test_texts_are_measured_alike_where_a_token_has_more_bytes(two_languages, embedder):
    english, korean = (in_tokens(source, embedder, 64) for source in two_languages)
    np.testing.assert_allclose(english.sizes, korean.sizes, atol=1)
    exact = [tokens_of(embedder, two_languages[0], row) for row in range(60)]
    np.testing.assert_allclose(english.sizes, exact, rtol=0.11)  # special tokens weigh less
    assert abs(int(two_languages[0].sizes[0]) - int(two_languages[1].sizes[0])) > 60  # bytes


def test_no_text_is_longer_than_where_it_is_cut(two_languages, embedder):
    assert in_tokens(two_languages[0], embedder, 12).sizes.max() == 12


def test_each_length_group_of_a_stage_has_its_batch_size(two_languages, embedder):
    stage = replace(STAGE, length_edges=(16, 22), batch_sizes=(20, 10, 5))
    groups = groups_of(stage, two_languages, embedder, ROOM, 100)
    sampler = sampler_of(stage, two_languages, 0, embedder, groups)
    sizes = []
    while (rows := sampler.next_batch()) is not None:
        longest = max(
            tokens_of(embedder, two_languages[s], row)
            for s, row in zip(rows.source.tolist(), rows.row.tolist(), strict=True)
        )
        sizes.append((longest, len(rows)))
    assert {size for _, size in sizes} == {20, 10, 5}
    assert all(size == 20 for longest, size in sizes if longest < 15)
    assert all(size == 5 for longest, size in sizes if longest > 24)
    assert sum(size for _, size in sizes) == 120


def test_a_table_is_of_one_device_and_times_the_number_of_processes(
    two_languages, embedder, monkeypatch
):
    stage = replace(STAGE, batching="bge-m3-finetune-80gb")
    monkeypatch.setattr(distributed, "world", lambda: 3)
    groups = groups_of(stage, two_languages, embedder, ROOM, 100)
    assert groups is not None and groups.sizes[:2] == (144, 96)


def test_a_fit_grows_with_memory_up_to_the_batch_size(two_languages, embedder):
    stage = replace(STAGE, batching="fit", length_edges=(16,), batch_size=400)
    sizes = []
    for total in (1e6, 4e6, 1e9):
        room = replace(ROOM, total=total, kinds=("dense", "multi"))
        groups = groups_of(stage, two_languages, embedder, room, 100)
        assert groups is not None and groups.edges == (16,)
        sizes.append(groups.sizes)
    assert sizes[0] < sizes[1] < sizes[2] == (400, 400)
    assert sizes[0][0] > sizes[0][1]


def test_the_shape_of_examples_is_that_of_what_a_stage_takes(tmp_path, embedder):
    word = "editor "  # one token; two more are around each text
    rows = [
        Example(word * 2, (word * 6, word * 6), (word * 18, word * 8, word * 8)),
        Example(word * 2, (word * 18,)),
    ]
    write_examples(tmp_path / "pairs.jsonl", rows)
    source = open_source(tmp_path / "pairs.jsonl")
    shape = shape_of([source], replace(STAGE, positives=1, negatives=2), embedder)
    # first row: 4 + 8 + 2 * (20 + 10 + 10) / 3 tokens, longest 20; second row: 4 + 20, longest 20
    assert shape.documents == 2.0
    assert shape.tokens == pytest.approx((12 + 80 / 3 + 24) / 40)
    assert shape.query_tokens == pytest.approx(8 / 40)
    refreshed = replace(STAGE, negatives=2, refresh=Refresh(every=5))
    assert shape_of([source], refreshed, embedder).documents == 3.0  # each will have two


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (4, 4)}, "batch_sizes are (4, 4); give 1, of 2 or more"),
        ({"batch_sizes": (1,)}, "batch_sizes are (1,); give 1, of 2 or more"),
        ({"batching": "fit", "token_budget": 9}, "batching and token_budget each set the size"),
        ({"batching": "bge-m3-pairs-80gb", "length_edges": (9,)}, "remove length_edges"),
        ({"shuffle_segments": 2.0}, "shuffle_segments is 2.0; give a share, from 0 to 1"),
    ],
)
def test_a_stage_refuses_what_cannot_be(changes, message):
    with pytest.raises(RecipeError) as caught:
        replace(STAGE, **changes)
    assert message in str(caught.value)


def test_batches_smaller_than_the_number_of_processes_are_refused(
    two_languages, embedder, monkeypatch
):
    monkeypatch.setattr(distributed, "world", lambda: 8)
    with pytest.raises(RecipeError, match="a batch of 5 has no example for each of 8 processes"):
        sampler_of(STAGE, two_languages, 0, embedder, Groups((9,), (16, 5)))


KEPT_GRAPHS = MemoryBudget(
    total=2e8, token_graph=50_000, kinds=("dense", "sparse", "multi"), dim=64, width=32
)
SHAPE = ExampleShape(documents=3.0, tokens=2.5, query_tokens=0.25)


def test_the_tables_are_those_of_the_paper_over_all_of_its_devices():
    totals: dict[Batching, tuple[int, tuple[int, ...]]] = {
        "bge-m3-pairs-80gb": (96, (67200, 54720, 37248, 27648, 21504, 17280, 15072, 12288, 9984)),
        "bge-m3-finetune-80gb": (24, (1152, 768, 480, 432, 336, 336, 288, 240, 192)),
    }
    for name, (devices, sizes) in totals.items():
        assert PRESETS[name].times(devices).sizes == sizes
        assert PRESETS[name].edges == (500, 1000, 2000, 3000, 4000, 5000, 6000, 7000)


def slow_bytes(
    own: int, length: int, budget: MemoryBudget, chunk_tokens: int, processes: int
) -> float:
    """The same sum with a number for each array that is there."""
    documents, tokens = 3 * own, 2.5 * own * length
    query_tokens = 0.25 * own * length
    floats = (own + documents) * budget.dim + tokens * budget.width  # pyright: ignore
    own_vectors = COPIES * (4 * floats + 12 * tokens)
    document_tokens = tokens - query_tokens
    theirs = 4 * (documents * budget.dim + document_tokens * budget.width)  # pyright: ignore
    theirs = (processes - 1) * 2 * (theirs + 12 * document_tokens)
    pairs = own * documents * processes
    winners = query_tokens * documents * processes
    graph = max(chunk_tokens, length) * budget.token_graph
    return own_vectors + theirs + 3 * 16 * pairs + 16 * winners + graph


@pytest.mark.parametrize("processes", [1, 3])
def test_a_fitted_batch_is_the_largest_one_that_fits(processes):
    costs = StepCosts(shape=SHAPE, budget=KEPT_GRAPHS, chunk_tokens=300, processes=processes)
    groups = fitted((32, 128, 512), 700, costs=costs, at_most=10_000)
    assert groups.edges == (32, 128, 512)
    for length, size in zip((32, 128, 512, 700), groups.sizes, strict=True):
        assert size % processes == 0
        sizes = range(1, 2 * size)
        fit = [
            n
            for n in sizes
            if slow_bytes(n, length, KEPT_GRAPHS, 300, processes) <= KEPT_GRAPHS.total
        ]
        assert size // processes == max(fit)
    assert list(groups.sizes) == sorted(groups.sizes, reverse=True)


def test_longer_texts_never_make_a_step_cheaper_where_attention_weights_are_kept():
    """A group that ends above 512 tokens has chunks of texts of 512, whose tokens cost most."""
    budget = replace(KEPT_GRAPHS, pair_graph=500)
    costs = StepCosts(shape=SHAPE, budget=budget, chunk_tokens=2048)
    taken = [costs.of_step(4, length) for length in (64, 511, 512, 513, 700, 2048, 4096, 8192)]
    assert taken == sorted(taken)
    vectors = replace(costs, budget=replace(budget, token_graph=0, pair_graph=0))
    graphs = [costs.of_step(4, length) - vectors.of_step(4, length) for length in (100, 513, 2048)]
    assert graphs == [2048 * 100_000, 2048 * 306_000, 2048 * 306_000]
    alone = costs.of_step(4, 40_000) - vectors.of_step(4, 40_000)
    assert alone == 40_000 * 50_000  # a text by itself, whose weights are not kept


def test_no_batch_is_larger_than_asked_for_and_edges_beyond_the_limit_are_left_out():
    costs = StepCosts(shape=SHAPE, budget=KEPT_GRAPHS, chunk_tokens=300)
    assert fitted((32, 128, 512), 128, costs=costs, at_most=40).sizes == (40, 40)
    assert usual_edges(512) == (64, 128, 256, 500)
    assert usual_edges(8192)[-1] == 7000


def test_memory_for_not_even_two_examples_is_refused_with_what_would_help():
    costs = StepCosts(shape=SHAPE, budget=KEPT_GRAPHS, chunk_tokens=5_000)
    with pytest.raises(RecipeError, match="examples of 32 tokens takes about 0\\.25"):
        fitted((32,), 64, costs=costs, at_most=100)


def test_sizes_are_told_from_short_to_long():
    assert Groups((5,), (9, 2)).summary == "9 (short) to 2 (long)"
    assert Groups((5,), (4, 4)).summary == "4"
