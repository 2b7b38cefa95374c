from itertools import pairwise

import pytest
import torch

from tercet.models.network import pooling
from tercet.segments import Packed, offsets_of


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


# ---- MCLS ------------------------------------------------------------------------------------

CLS, END = 1, 2


def spread(*bodies: int, every: int = 3) -> Packed:
    """Texts of so many tokens, with a CLS before every three, and an end."""
    rows = []
    for body in bodies:
        ids = torch.randint(5, 90, (body,))
        parts = [torch.cat([torch.tensor([CLS]), part]) for part in ids.split(every)]
        rows.append(torch.cat([*parts, torch.tensor([END])]))
    offsets = offsets_of(torch.tensor([len(row) for row in rows]))
    ids = torch.cat(rows)
    return Packed(ids, offsets, torch.ones_like(ids, dtype=torch.bool))


def test_the_vector_is_the_mean_of_the_states_of_all_cls_tokens():
    """Trap B11 of BGE-M3. B11; the text of six tokens has its end where another CLS would be."""
    packed = spread(7, 2, 6)
    hidden = torch.randn(len(packed.ids), 5)
    expected = []
    for start, end in pairwise(packed.offsets.tolist()):
        rows = [i for i in range(start, end) if packed.ids[i] == CLS]
        expected.append(hidden[rows].mean(0))
    assert (packed.ids == CLS).sum() == 3 + 1 + 2
    torch.testing.assert_close(pooling.cls_mean(hidden, packed, 3), torch.stack(expected))


def test_the_same_token_elsewhere_in_a_text_is_no_cls():
    """Trap B11 of BGE-M3. B11."""
    packed = spread(7)
    hidden = torch.randn(len(packed.ids), 5)
    before = pooling.cls_mean(hidden, packed, 3)
    packed.ids[2] = CLS
    assert torch.equal(pooling.cls_mean(hidden, packed, 3), before)


def test_a_short_text_is_pooled_as_its_first_token():
    """Trap B11 of BGE-M3. B11: the same bits."""
    packed = spread(4, 1, 5, every=9)
    hidden = torch.randn(len(packed.ids), 5)
    found = pooling.cls_mean(hidden, packed, 9)
    assert torch.equal(found, pooling.first(hidden, packed))


def test_a_text_has_the_same_vector_alone_and_in_a_batch():
    """Trap B11 of BGE-M3. B11."""
    packed = spread(7, 4, 12)
    hidden = torch.randn(len(packed.ids), 5)
    together = pooling.cls_mean(hidden, packed, 3)
    for number, (start, end) in enumerate(pairwise(packed.offsets.tolist())):
        alone = pooling.cls_mean(hidden[start:end], packed.take([number]), 3)
        assert torch.equal(alone[0], together[number])


def test_all_cls_tokens_get_their_share_of_the_gradient():
    """Trap B11 of BGE-M3. B11, in training."""
    packed = spread(5, 3)
    hidden = torch.randn(len(packed.ids), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: pooling.cls_mean(h, packed, 3), (hidden,))
    pooling.cls_mean(hidden, packed, 3).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[:, 0].tolist() == [0.5, 0, 0, 0, 0.5, 0, 0, 0, 1, 0, 0, 0, 0]
