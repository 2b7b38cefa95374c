import numpy as np
import pytest
import torch
from torch import nn

from tercet.models.embedder import Embedder
from tercet.models.network import prepacked
from tercet.models.network.prepacked import Prepacked
from tests.toy import DECODERS, ENCODERS, SENTENCES, save_model


def plainly(embedder, texts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepacked, "MAX_BYTES", 0)
        return embedder.encode(texts)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert", "llama", "gemma3"])
def test_prepacked_layers_give_the_same_vectors(tmp_path, kind, monkeypatch):
    embedder = Embedder.load(save_model(tmp_path / "model", kind), attention="bidirectional")
    expected = plainly(embedder, SENTENCES, monkeypatch)
    np.testing.assert_allclose(embedder.encode(SENTENCES), expected, atol=1e-6)


def test_every_linear_layer_is_replaced_and_put_back(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    layers = [m for m in embedder.modules() if type(m) is nn.Linear]
    with torch.inference_mode(), embedder._prepacked.in_use():
        assert all("forward" in layer.__dict__ for layer in layers)
    assert not any("forward" in module.__dict__ for module in embedder.modules())


def test_the_gelu_of_bert_is_applied_once(encoder_folder):
    model = Embedder.load(encoder_folder).backbone.model
    found = prepacked._followed_by_gelu(model)
    assert len(found) == model.config.num_hidden_layers


@pytest.mark.parametrize("fused", [False, True])  # fused ones do not count up the version
def test_changed_weights_are_packed_again(encoder_folder, monkeypatch, fused):
    embedder = Embedder.load(encoder_folder)
    before = embedder.encode(SENTENCES)
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=0.01, fused=fused)
    embedder(embedder.tokenize(SENTENCES, "query").pack()).square().sum().backward()
    optimizer.step()
    after = embedder.encode(SENTENCES)
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(after, plainly(embedder, SENTENCES, monkeypatch), atol=1e-6)


def test_training_never_runs_on_packed_weights(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    with torch.no_grad(), Prepacked(embedder).in_use():
        assert not any("forward" in module.__dict__ for module in embedder.modules())


def test_an_error_inside_leaves_the_model_as_it_was(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    with (
        pytest.raises(KeyError),
        torch.inference_mode(),
        embedder._prepacked.in_use(),
    ):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in embedder.modules())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bfloat16_attention_by_products_equals_the_fused_kernel(kind, monkeypatch):
    from tercet.models.network import attention

    config = {**DECODERS, **ENCODERS}[kind]
    heads = config.num_attention_heads
    rule = attention._Rule(causal=False, limit=None, scale=None, dropout=0.0)
    q, k, v = (torch.randn(3, heads, 17, 16, dtype=torch.bfloat16) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    with torch.inference_mode():
        got = attention._attend_equal(q, k, v, rule)
    torch.testing.assert_close(got.float(), exact, atol=0.02, rtol=0.02)
