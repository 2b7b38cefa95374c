from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import RobertaConfig

from tercet.models.embedder import Embedder
from tercet.models.network.cpu.direct import DirectForward
from tests.toy import ENCODERS, SENTENCES, save_model

KINDS = ["bert", "roberta", "xlm-roberta"]


def varied(embedder):
    """The embedder with biases and norms that differ, which are 0 and 1 in a new model."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in embedder.backbone.parameters():
            if weight.ndim == 1:
                weight += torch.randn(weight.shape, generator=draw) / 4
    return embedder


def states_of(embedder, texts, *, direct):
    """States of the network that reads many texts, and whether it is written out."""
    with embedder.reading() as reader:
        backbone = reader.backbone
        kept, backbone.direct = backbone.direct, backbone.direct if direct else None
        assert kept is not None
        try:
            return backbone(embedder.tokenize(texts, "query").pack())
        finally:
            backbone.direct = kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_modules_bit_by_bit(tmp_path, kind, dtype, monkeypatch):
    likewise: Any = ENCODERS["xlm-roberta"].to_dict() | {"model_type": "roberta"}
    monkeypatch.setitem(ENCODERS, "roberta", RobertaConfig(**likewise))
    embedder = varied(Embedder.load(save_model(tmp_path / "model", kind), dtype=dtype))
    for texts in (SENTENCES[:1], SENTENCES, SENTENCES[::-1] * 9):
        direct = states_of(embedder, texts, direct=True)
        assert torch.equal(direct, states_of(embedder, texts, direct=False))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_short_text_is_read_by_the_weights_themselves(encoder_folder, dtype, error):
    embedder = varied(Embedder.load(encoder_folder, dtype=dtype))
    short = embedder.tokenize(SENTENCES[:1], "query").pack()
    with embedder.reading() as reader:
        assert reader.plain is not None and len(short.ids) <= reader.few
        alone = reader.states(short)
        assert not reader.compared
        expected = reader.backbone(short)  # by copies of the weights
    assert ((alone - expected).abs().max() / expected.abs().max()).item() < error


def test_a_network_with_a_reparametrized_layer_calls_its_modules(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    query = embedder.backbone.model.encoder.layer[0].attention.self.query
    nn.utils.parametrizations.weight_norm(query)
    assert DirectForward.of(embedder.backbone.model) is None
    before = embedder.encode(SENTENCES[:1])
    with torch.no_grad():
        query.parametrizations.weight.original0.mul_(-3)
    assert np.abs(embedder.encode(SENTENCES[:1]) - before).max() > 1e-3


def test_a_network_with_a_replaced_forward_calls_its_modules(encoder_folder):
    model = Embedder.load(encoder_folder).backbone.model
    assert DirectForward.of(model) is not None
    layer = model.encoder.layer[1]
    layer.forward = layer.forward
    assert DirectForward.of(model) is None


@pytest.mark.parametrize("kind", ["modernbert", "llama"])
def test_other_networks_call_their_modules(tmp_path, kind):
    embedder = Embedder.load(save_model(tmp_path / "model", kind), attention="bidirectional")
    assert DirectForward.of(embedder.backbone.model) is None
    assert embedder.encode(SENTENCES).shape == (len(SENTENCES), embedder.dim)


def test_a_network_with_a_hook_calls_its_modules(encoder_folder):
    embedder, seen = Embedder.load(encoder_folder), []
    before = embedder.encode(SENTENCES)
    layer = embedder.backbone.model.encoder.layer[0]
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    np.testing.assert_array_equal(embedder.encode(SENTENCES), before)
    assert seen
    handle.remove()
    count = len(seen)
    np.testing.assert_array_equal(embedder.encode(SENTENCES), before)
    assert len(seen) == count


def test_a_network_with_another_layer_calls_its_modules(encoder_folder):
    class Doubled(nn.LayerNorm):
        def forward(self, input):
            return 2 * super().forward(input)

    embedder = Embedder.load(encoder_folder)
    model = embedder.backbone.model
    norm = model.encoder.layer[0].output.LayerNorm
    before = embedder.encode(SENTENCES)
    doubled = Doubled(model.config.hidden_size, norm.eps)
    doubled.load_state_dict(norm.state_dict())
    model.encoder.layer[0].output.LayerNorm = doubled
    assert DirectForward.of(model) is None
    assert np.abs(embedder.encode(SENTENCES) - before).max() > 1e-4


def test_a_layer_cut_out_is_left_out_here_too(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    before = embedder.encode(SENTENCES)
    del embedder.backbone.model.encoder.layer[1:]
    shorter = Embedder.load(encoder_folder, keep_layers=1)
    np.testing.assert_array_equal(embedder.encode(SENTENCES), shorter.encode(SENTENCES))
    assert np.abs(embedder.encode(SENTENCES) - before).max() > 1e-4
