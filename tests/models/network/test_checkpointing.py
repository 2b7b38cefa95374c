from copy import deepcopy

import pytest
import torch
import transformers as t
from torch import Tensor

from tercet.errors import RecipeError
from tercet.models.network.backbone import Backbone
from tercet.models.network.checkpointing import recomputable, recomputed
from tercet.models.network.chunked import own_random_state
from tercet.models.network.layers import layers_of
from tercet.training.memory import graph_bytes
from tests import toy

# StableLM hands no keywords down to its layers, so that the layout comes to them another way.
CONFIGS = {
    "bert": toy.ENCODERS["bert"],
    "modernbert": toy.ENCODERS["modernbert"],
    "llama": toy.DECODERS["llama"],
    "stablelm": t.StableLmConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=300,
        max_position_embeddings=128,
    ),
}


def step(backbone: Backbone, *, again: bool) -> tuple[list[Tensor], int]:
    """The gradients of a step with dropout on, and how often a layer ran."""
    backbone = deepcopy(backbone).train()
    backbone.attention_dropout = 0.2
    layers, ran = layers_of(backbone), []
    first = layers[1].forward

    def counted(*given, **named):
        ran.append(1)
        return first(*given, **named)

    layers[1].forward = counted
    texts = toy.pack(*toy.random_texts(5, 9, 9, 3))
    with own_random_state(texts, 1, 1), recomputed(layers if again else []):
        states = backbone(texts)
        torch.rand(7)  # what is drawn in between does not matter
        states.square().sum().backward()
    return [p.grad for p in backbone.parameters() if p.grad is not None], len(ran)


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_that_are_computed_again_give_the_same_gradient_to_the_bit(kind):
    backbone = Backbone(toy.random_model(CONFIGS[kind]))
    torch.manual_seed(0)
    usual, once = step(backbone, again=False)
    torch.manual_seed(0)
    found, twice = step(backbone, again=True)
    assert (once, twice) == (1, 2)
    assert len(found) == len(usual)
    assert all(torch.equal(a, b) for a, b in zip(found, usual, strict=True))


def test_less_is_kept_of_layers_that_are_computed_again():
    backbone = Backbone(toy.random_model(CONFIGS["llama"])).train()
    texts = toy.pack(*toy.random_texts(*[20] * 10))

    def kept(again: bool) -> int:
        """Bytes that the graph holds, weights aside."""
        own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            recomputed(layers_of(backbone) if again else []),
        ):
            states = backbone(texts)
        found = sum(sizes.values())
        del states
        return found

    assert kept(True) < kept(False) / 5
    assert kept(True) < 4 * 200 * graph_bytes(backbone, recomputed=True)
    assert graph_bytes(backbone, recomputed=True) < graph_bytes(backbone) / 10


def test_without_gradients_a_layer_runs_once_and_is_left_as_it_was():
    backbone = Backbone(toy.random_model(CONFIGS["llama"]))
    with torch.no_grad(), recomputed(layers_of(backbone)):
        found = backbone(toy.pack(*toy.random_texts(4)))
    assert not found.requires_grad
    assert all("forward" not in layer.__dict__ for layer in layers_of(backbone))


def test_a_model_that_repeats_one_layer_has_none_to_name():
    config = t.AlbertConfig(
        hidden_size=64,
        embedding_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=300,
    )
    backbone = Backbone(toy.random_model(config))
    assert layers_of(backbone) == []
    with pytest.raises(RecipeError, match="AlbertModel has no list of layers to compute again"):
        recomputable(backbone)
