import copy

import pytest
import torch
from torch import Tensor, nn

from tercet.models.frozen import FrozenInHalf, linear_numbers
from tercet.models.network.backbone import Backbone
from tests import toy


def with_lora(kind: str, *, exact: bool = False) -> Backbone:
    """A backbone with updates of rank 4; ``exact``: with weights that bfloat16 can express."""
    torch.manual_seed(0)
    model = toy.random_model({**toy.DECODERS, **toy.ENCODERS}[kind])
    backbone = Backbone(model.bfloat16().float() if exact else model)
    backbone.add_lora(4, 8, 0.1)
    for name, p in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return backbone.train()


def gradients(backbone: Backbone) -> dict[str, Tensor]:
    torch.manual_seed(1)
    texts = toy.pack(*toy.random_texts(5, 9, 3))
    with torch.autocast("cpu", torch.bfloat16):
        backbone(texts).float().square().sum().backward()
    return {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [*toy.DECODERS, "bert", "modernbert"])
def test_gradients_are_those_of_float32_weights_under_autocast_to_the_bit(kind):
    usual, half = with_lora(kind), with_lora(kind)
    FrozenInHalf(half.model).shrink()
    expected, got = gradients(usual), gradients(half)
    assert got.keys() == expected.keys() and len(got) > 4
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("exact", [False, True])
def test_weights_come_back_to_the_bit_and_only_linear_ones_leave(exact):
    backbone = with_lora("llama", exact=exact)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    frozen = FrozenInHalf(backbone.model)
    frozen.shrink()
    frozen.shrink()  # a second time does nothing
    halves = {name for name, p in backbone.named_parameters() if p.dtype == torch.bfloat16}
    assert halves == {name for name in before if "base_layer" in name}
    assert all((held.exact is None) == exact for held in frozen._held)
    frozen.restore()
    after = dict(backbone.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.requires_grad == ("lora" in name) for name, p in after.items())


def test_a_merged_model_is_that_of_the_float32_base():
    usual, half = with_lora("mistral"), with_lora("mistral")
    frozen = FrozenInHalf(half.model)
    frozen.shrink()
    frozen.restore()
    usual.merge_lora()
    half.merge_lora()
    merged = half.model.state_dict()
    for name, weight in usual.model.state_dict().items():
        assert torch.equal(merged[name], weight)


def test_a_weight_of_several_layers_stays_one_and_a_token_table_stays():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.one.weight

    model = Tied().requires_grad_(False)
    assert linear_numbers(model, frozen=True) == 24 + 16 + 4 + 4
    frozen = FrozenInHalf(model)
    frozen.shrink()
    assert model.head.weight is model.table.weight and model.table.weight.dtype == torch.float32
    assert model.one.weight is model.other.weight and model.one.weight.dtype == torch.bfloat16
    frozen.restore()
    assert model.one.weight is model.other.weight and model.one.weight.dtype == torch.float32


def test_kept_chunks_share_the_frozen_weights():
    """Under autocast, each chunk's graph would hold its own copy of float32 weights."""

    def kept(backbone: Backbone, chunks: int) -> int:
        """Bytes of 16-bit copies of weights that the graphs of some chunks hold."""
        own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        shapes = {tuple(p.shape) for n, p in backbone.named_parameters() if "base_layer" in n}
        copies: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            place = x.untyped_storage().data_ptr()
            if place not in own and {tuple(x.shape), tuple(x.shape[::-1])} & shapes:
                copies[place] = x
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            states = [backbone(toy.pack(*toy.random_texts(7, 7))) for _ in range(chunks)]
        assert len(states) == chunks
        return sum(x.untyped_storage().nbytes() for x in copies.values())

    usual = with_lora("llama")
    half = copy.deepcopy(usual)
    FrozenInHalf(half.model).shrink()
    assert kept(usual, 2) == 2 * kept(usual, 1) > 0
    assert kept(half, 1) == kept(half, 4) == 0
