"""Compiled layers: the same states and gradients, whatever the number of tokens."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from tercet.errors import RecipeError
from tercet.models.network.attention import NAME, attend
from tercet.models.network.backbone import Backbone, sharing_copy
from tercet.models.network.chunked import Chunks, backward_in_chunks
from tercet.models.network.compiling import compile_layers
from tercet.training.recipe import Run
from tests import toy


@pytest.fixture(autouse=True)
def attention_as_before():
    yield
    AttentionInterface.register(NAME, attend)
    torch.compiler.reset()


def gradients(backbone: Backbone, graph_tokens: int | None) -> list[Tensor]:
    """Those of a step in three chunks with dropout on."""
    torch.manual_seed(3)
    texts = toy.pack(*toy.random_texts(5, 9, 9, 3, 8))
    backbone.zero_grad()
    backward_in_chunks(
        lambda part: backbone(part)[part.offsets[:-1]],
        texts,
        lambda vectors: {"loss": vectors.square().sum()},
        chunks=Chunks(14, graph_tokens, seed=1),
    )
    return [p.grad.clone() for p in backbone.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile looks at attributes that warn
def test_compiled_layers_give_the_same_gradients_for_any_number_of_tokens():
    usual = Backbone(toy.random_model(toy.ENCODERS["bert"])).train()
    usual.attention_dropout = 0.0
    compiled = deepcopy(usual)
    assert compile_layers(compiled) == len(compiled.model.encoder.layer)
    expected = gradients(usual, None)
    for graph_tokens in (None, 0):  # all graphs kept, and every chunk embedded twice
        for found, wanted in zip(gradients(compiled, graph_tokens), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_copy_for_inference_is_not_compiled():
    backbone = Backbone(toy.random_model(toy.ENCODERS["bert"]))
    compile_layers(backbone)
    assert backbone.model.encoder.layer[0]._compiled_call_impl is not None
    assert sharing_copy(backbone).model.encoder.layer[0]._compiled_call_impl is None


@pytest.mark.parametrize("other", ["shard_weights", "checkpoint_activations"])
def test_compiled_layers_exclude_what_was_not_tried_with_them(other):
    with pytest.raises(RecipeError, match=f"compile_layers and {other} do not go together"):
        replace(Run(compile_layers=True), **{other: True})
