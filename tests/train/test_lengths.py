from dataclasses import replace

import pytest

from tercet.errors import RecipeError
from tercet.train.lengths import PRESETS, Batching, Costs, Groups, Shape, fitted, usual_edges
from tercet.train.memory import COPIES, Room

ROOM = Room(total=2e8, token_graph=50_000, kinds=("dense", "sparse", "multi"), dim=64, width=32)
SHAPE = Shape(documents=3.0, tokens=2.5, query_tokens=0.25)


def test_the_tables_are_those_of_the_paper_over_all_of_its_devices():
    totals: dict[Batching, tuple[int, tuple[int, ...]]] = {
        "bge-m3-pairs-80gb": (96, (67200, 54720, 37248, 27648, 21504, 17280, 15072, 12288, 9984)),
        "bge-m3-finetune-80gb": (24, (1152, 768, 480, 432, 336, 336, 288, 240, 192)),
    }
    for name, (devices, sizes) in totals.items():
        assert PRESETS[name].times(devices).sizes == sizes
        assert PRESETS[name].edges == (500, 1000, 2000, 3000, 4000, 5000, 6000, 7000)


def slow_bytes(own: int, length: int, room: Room, chunk_tokens: int, processes: int) -> float:
    """The same sum with a number for each array that is there."""
    documents, tokens = 3 * own, 2.5 * own * length
    query_tokens = 0.25 * own * length
    floats = (own + documents) * room.dim + tokens * room.width  # pyright: ignore
    own_vectors = COPIES * (4 * floats + 12 * tokens)
    document_tokens = tokens - query_tokens
    theirs = 4 * (documents * room.dim + document_tokens * room.width)  # pyright: ignore
    theirs = (processes - 1) * 2 * (theirs + 12 * document_tokens)
    pairs = own * documents * processes
    winners = query_tokens * documents * processes
    graph = max(chunk_tokens, length) * room.token_graph
    return own_vectors + theirs + 3 * 16 * pairs + 16 * winners + graph


@pytest.mark.parametrize("processes", [1, 3])
def test_a_fitted_batch_is_the_largest_one_that_fits(processes):
    costs = Costs(shape=SHAPE, room=ROOM, chunk_tokens=300, processes=processes)
    groups = fitted((32, 128, 512), 700, costs=costs, at_most=10_000)
    assert groups.edges == (32, 128, 512)
    for length, size in zip((32, 128, 512, 700), groups.sizes, strict=True):
        assert size % processes == 0
        sizes = range(1, 2 * size)
        fit = [n for n in sizes if slow_bytes(n, length, ROOM, 300, processes) <= ROOM.total]
        assert size // processes == max(fit)
    assert list(groups.sizes) == sorted(groups.sizes, reverse=True)


def test_longer_texts_never_make_a_step_cheaper_where_attention_weights_are_kept():
    """A group that ends above 512 tokens has chunks of texts of 512, whose tokens cost most."""
    room = replace(ROOM, pair_graph=500)
    costs = Costs(shape=SHAPE, room=room, chunk_tokens=2048)
    taken = [costs.of_step(4, length) for length in (64, 511, 512, 513, 700, 2048, 4096, 8192)]
    assert taken == sorted(taken)
    vectors = replace(costs, room=replace(room, token_graph=0, pair_graph=0))
    graphs = [costs.of_step(4, length) - vectors.of_step(4, length) for length in (100, 513, 2048)]
    assert graphs == [2048 * 100_000, 2048 * 306_000, 2048 * 306_000]
    alone = costs.of_step(4, 40_000) - vectors.of_step(4, 40_000)
    assert alone == 40_000 * 50_000  # a text by itself, whose weights are not kept


def test_no_batch_is_larger_than_asked_for_and_edges_beyond_the_limit_are_left_out():
    costs = Costs(shape=SHAPE, room=ROOM, chunk_tokens=300)
    assert fitted((32, 128, 512), 128, costs=costs, at_most=40).sizes == (40, 40)
    assert usual_edges(512) == (64, 128, 256, 500)
    assert usual_edges(8192)[-1] == 7000


def test_memory_for_not_even_two_examples_is_refused_with_what_would_help():
    costs = Costs(shape=SHAPE, room=ROOM, chunk_tokens=5_000)
    with pytest.raises(RecipeError, match="examples of 32 tokens takes about 0\\.25"):
        fitted((32,), 64, costs=costs, at_most=100)


def test_sizes_are_told_from_short_to_long():
    assert Groups((5,), (9, 2)).told == "9 (short) to 2 (long)"
    assert Groups((5,), (4, 4)).told == "4"
