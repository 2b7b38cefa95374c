from itertools import pairwise

import pytest
import torch

from tercet.nn import pooling
from tercet.segments import offsets_of
from tercet.types import Packed


def texts(*pooled: list[bool]) -> Packed:
    """Texts of these many tokens, with those tokens pooled."""
    flat = [mark for text in pooled for mark in text]
    lengths = torch.tensor([len(text) for text in pooled])
    return Packed(torch.zeros(len(flat), dtype=torch.long), offsets_of(lengths), torch.tensor(flat))


ALL = texts([True] * 3, [True], [True] * 2)
PROMPTED = texts([False, True, True], [True], [False, True])


def slow(name: str, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    """One text at a time, in plain loops."""
    out = []
    bounds = packed.offsets.tolist()
    for start, end in pairwise(bounds):
        rows = hidden[start:end][packed.pooled[start:end]]
        rows = rows if len(rows) else hidden[start:end]
        places = torch.arange(1, len(rows) + 1, dtype=hidden.dtype)
        out.append(
            {
                "mean": rows.mean(0),
                "weighted_mean": (rows * places[:, None]).sum(0) / places.sum(),
                "first": rows[0],
                "last": rows[-1],
            }[name]
        )
    return torch.stack(out)


@pytest.mark.parametrize("name", list(pooling.POOLINGS))
@pytest.mark.parametrize("packed", [ALL, PROMPTED])
def test_pooling_equals_a_loop_over_texts(name, packed):
    hidden = torch.randn(6, 5)
    torch.testing.assert_close(pooling.POOLINGS[name](hidden, packed), slow(name, hidden, packed))


@pytest.mark.parametrize("name", list(pooling.POOLINGS))
def test_an_instruction_that_is_not_pooled_changes_nothing(name):
    hidden = torch.randn(6, 5)
    changed = hidden.clone()
    changed[0], changed[4] = 100.0, -100.0
    pool = pooling.POOLINGS[name]
    torch.testing.assert_close(pool(changed, PROMPTED), pool(hidden, PROMPTED))


@pytest.mark.parametrize("name", list(pooling.POOLINGS))
def test_a_text_that_pools_nothing_is_pooled_whole_alone_or_in_a_batch(name):
    hidden = torch.randn(5, 4)
    pool = pooling.POOLINGS[name]
    alone = pool(hidden[:2], texts([False, False]))
    torch.testing.assert_close(alone, pool(hidden[:2], texts([True, True])))
    torch.testing.assert_close(pool(hidden, texts([False, False], [False, True, True]))[:1], alone)


def test_a_mean_of_bfloat16_is_summed_in_float32():
    hidden = torch.ones(257, 1, dtype=torch.bfloat16)
    packed = texts([True] * 257)
    # 257 does not exist in bfloat16: a sum in that type would be 256, and the mean 0.996.
    assert pooling.mean(hidden, packed).item() == 1.0
    assert pooling.mean(hidden, packed).dtype == torch.float32


@pytest.mark.parametrize("name", list(pooling.POOLINGS))
def test_pooling_has_the_right_gradient(name):
    hidden = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: pooling.POOLINGS[name](h, PROMPTED), (hidden,))
