from dataclasses import replace

import pytest
import torch

from tercet.train.memory import COPIES, Room
from tercet.vectors import Terms, TokenRows, Vectors
from tests import toy

ROOM = Room(total=1e6, token_graph=1000, kinds=("dense", "sparse", "multi"), dim=8, width=4)


def bytes_of(vectors: Vectors) -> int:
    """What the arrays of three kinds take; offsets are not worth counting."""
    arrays = [vectors.dense, vectors.multi and vectors.multi.vectors]
    arrays += [vectors.sparse and vectors.sparse.ids, vectors.sparse and vectors.sparse.weights]
    return sum(array.nbytes for array in arrays if array is not None)


@pytest.mark.parametrize("kinds", [("dense",), ("sparse",), ("multi",), ("dense", "multi")])
def test_vectors_take_what_their_arrays_take(kinds):
    offsets = torch.tensor([0, 3, 3, 10])
    vectors = Vectors(
        torch.zeros(3, 8),
        Terms(torch.zeros(10, dtype=torch.int64), torch.zeros(10), offsets),
        TokenRows(torch.zeros(10, 4), offsets),
    )
    assert replace(ROOM, kinds=kinds).vectors(3, 10) == bytes_of(vectors.only(kinds))


def test_a_token_of_a_model_without_a_width_is_as_wide_as_a_text():
    assert replace(ROOM, kinds=("multi",), width=None).vectors(3, 10) == 10 * 8 * 4


def test_graphs_are_kept_in_what_the_vectors_leave():
    texts = toy.pack(*toy.random_texts(30, 20))
    left = 1e6 - COPIES * ROOM.vectors(2, 50)
    assert ROOM.graph_tokens(texts) == int(left / 1000) < 1000
    assert replace(ROOM, kinds=()).graph_tokens(texts) == 1000
    assert replace(ROOM, total=100.0).graph_tokens(texts) == 0
