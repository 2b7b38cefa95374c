"""A network's layers: some of them kept at equal distances; compiled ones compute the same."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AttentionInterface,
    AutoModel,
    Qwen2MoeConfig,
    SmolLM3Config,
)

from tercet.errors import ModelError, RecipeError
from tercet.models.network.attention import NAME, attend
from tercet.models.network.backbone import Backbone, sharing_copy
from tercet.models.network.chunked import Chunks, backward_in_chunks
from tercet.models.network.layers import compile_layers, keep_even_layers, layers_of
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


# ---- layers at equal distances -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert", "llama", "gemma2", "gemma3"])
def test_a_network_of_some_layers_is_that_which_transformers_makes_of_their_weights(kind):
    config = deepcopy({**toy.DECODERS, **toy.ENCODERS}[kind])
    config.num_hidden_layers = 4
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[place % 2] for place in range(4)]
    whole = toy.random_model(config)
    for name, weight in whole.named_parameters():  # a toy's are the same in each layer
        torch.nn.init.normal_(weight, std=0.2, mean=float("norm" in name.lower()))
    cut = deepcopy(config)
    cut.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        cut.layer_types = [config.layer_types[0], config.layer_types[3]]
    expected = toy.random_model(cut)
    expected.load_state_dict(
        {
            name.replace("layers.3.", "layers.1.").replace("layer.3.", "layer.1."): weight
            for name, weight in whole.state_dict().items()
            if not {"1", "2"} & set(name.split("."))
        }
    )
    backbone = Backbone(whole)
    keep_even_layers(backbone, 2)
    texts = toy.pack(*toy.random_texts(5, 9, 3))
    torch.testing.assert_close(backbone(texts), Backbone(expected)(texts), rtol=0, atol=0)
    assert backbone.config.to_dict() == expected.config.to_dict()


@pytest.mark.parametrize(
    ("kept", "places"),
    [(1, [0]), (2, [0, 11]), (3, [0, 6, 11]), (4, [0, 4, 7, 11]), (12, list(range(12)))],
)
def test_kept_layers_are_at_equal_distances_the_first_and_the_last_among_them(kept, places):
    config = deepcopy(toy.ENCODERS["bert"])
    config.num_hidden_layers = 12
    backbone = Backbone(toy.random_model(config))
    before = layers_of(backbone)
    keep_even_layers(backbone, kept)
    assert layers_of(backbone) == [before[place] for place in places]


def test_layers_without_rotary_positions_stay_without_them(tmp_path):
    small: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 300}
    small |= {"num_hidden_layers": 4, "num_key_value_heads": 2, "intermediate_size": 16}
    config = SmolLM3Config(**small, pad_token_id=0, no_rope_layers=[1, 1, 0, 0])
    backbone = Backbone(toy.random_model(config))
    keep_even_layers(backbone, 2)
    backbone.model.save_pretrained(tmp_path)
    texts = toy.pack(*toy.random_texts(5, 9, 3))
    saved = Backbone(AutoModel.from_pretrained(tmp_path))
    torch.testing.assert_close(saved(texts), backbone(texts), rtol=0, atol=1e-6)
    assert backbone.config.no_rope_layers == [1, 0]


def test_layers_that_cannot_be_kept_are_refused():
    backbone = Backbone(toy.random_model(toy.ENCODERS["bert"]))
    most = len(layers_of(backbone))
    for wrong in (0, most + 1):
        with pytest.raises(ModelError, match=f"between 1 and {most}; got {wrong}"):
            keep_even_layers(backbone, wrong)
    small: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64}
    small |= {"num_hidden_layers": 3, "num_key_value_heads": 2, "num_experts": 2}
    small |= {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
    small |= {"shared_expert_intermediate_size": 16}
    config = Qwen2MoeConfig(**small, intermediate_size=16, mlp_only_layers=[2])
    differing = Backbone(toy.random_model(config))
    with pytest.raises(ModelError, match="layers differ in their weights; set which_layers to"):
        keep_even_layers(differing, 2)
    shared = AlbertConfig(embedding_size=16, hidden_size=32, num_attention_heads=2, vocab_size=64)
    with pytest.raises(ModelError, match="no list of layers to choose from; set which_layers to"):
        keep_even_layers(Backbone(toy.random_model(shared)), 2)
