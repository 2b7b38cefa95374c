import copy

import numpy as np
import pytest
import torch
from torch import nn

from tercet.models.embedder import Embedder
from tercet.models.network.cpu import linear
from tests.toy import SENTENCES, save_model


def plainly(embedder, texts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(linear, "MAX_BYTES", 0)
        embedder._readers.clear()
        vectors = embedder.encode(texts)
    embedder._readers.clear()
    return vectors


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert", "llama", "gemma3"])
def test_prepacked_layers_give_the_same_vectors(tmp_path, kind, monkeypatch):
    embedder = Embedder.load(save_model(tmp_path / "model", kind), attention="bidirectional")
    with torch.no_grad():
        for module in embedder.backbone.modules():  # biases are 0 in a new model
            if type(module) is nn.Linear and module.bias is not None:
                module.bias.add_(torch.linspace(-0.5, 0.5, module.out_features))
    expected = plainly(embedder, SENTENCES, monkeypatch)
    np.testing.assert_allclose(embedder.encode(SENTENCES), expected, atol=1e-6)


def packed_in(module):
    return [each for each in module.modules() if "forward" in each.__dict__]


def test_every_linear_layer_of_the_copy_that_encodes_is_packed(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    with embedder.reading() as reader:
        layers = [m for m in reader.backbone.modules() if type(m) is nn.Linear]
        assert layers and set(layers) <= set(packed_in(reader.backbone))
    assert not packed_in(embedder)


def test_the_gelu_of_bert_is_applied_once(encoder_folder):
    model = Embedder.load(encoder_folder).backbone.model
    found = linear._followed_by_gelu(model)
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


def neuron(weight):
    weight[5] = 0


def column(weight):
    weight[:, 5] = 0


def number(weight):
    weight[7, 9] += 0.5


def signs(weight):
    weight.mul_(-1)


def exchanged(weight):
    weight[[3, 4]] = weight[[4, 3]]


def every_second(weight):
    weight.view(-1)[1::2] *= 0.5


@pytest.mark.parametrize("edit", [neuron, column, number, signs, exchanged, every_second])
def test_weights_changed_through_their_data_are_never_stale(encoder_folder, edit):
    edited, new = Embedder.load(encoder_folder), Embedder.load(encoder_folder)
    before = edited.encode(SENTENCES)
    for embedder in (edited, new):
        layers = [m for m in embedder.backbone.model.modules() if type(m) is nn.Linear]
        edit(layers[4].weight.data)
    after = edited.encode(SENTENCES)
    np.testing.assert_array_equal(after, new.encode(SENTENCES))
    assert np.abs(after - before).max() > 1e-4


def changed_by_hand(embedder):
    with torch.inference_mode():
        next(embedder.backbone.parameters()).mul_(-1)


def loaded(embedder):
    state = {name: value.flip(0) for name, value in embedder.backbone.state_dict().items()}
    embedder.backbone.load_state_dict(state)


def replaced(embedder):
    layer = next(m for m in embedder.backbone.modules() if type(m) is nn.Linear)
    layer.weight = nn.Parameter(-layer.weight.detach())


def stepped(embedder):
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=0.01)
    embedder(embedder.tokenize(SENTENCES, "query").pack()).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [changed_by_hand, loaded, replaced, stepped])
def test_a_frozen_model_still_follows_changes_that_torch_counts(encoder_folder, change):
    frozen, usual = Embedder.load(encoder_folder).freeze(), Embedder.load(encoder_folder)
    before = frozen.encode(SENTENCES)
    for embedder in (frozen, usual):
        change(embedder)
    after = frozen.encode(SENTENCES)
    np.testing.assert_array_equal(after, usual.encode(SENTENCES))
    assert np.abs(after - before).max() > 1e-4


def test_a_frozen_model_compares_no_weights_once_its_copy_is_made(encoder_folder, monkeypatch):
    embedder = Embedder.load(encoder_folder).freeze()
    expected = embedder.encode(SENTENCES)

    def fail(self):
        raise AssertionError("a weight was compared")

    monkeypatch.setattr(linear.PackedLinear, "refresh", fail)
    for texts in (SENTENCES, SENTENCES[:1]):  # a few tokens are read by the copies as well
        np.testing.assert_allclose(embedder.encode(texts), expected[: len(texts)], atol=1e-6)
    with embedder.reading() as one, embedder.reading() as other:
        assert one is other and one.compared


def test_a_copy_of_a_frozen_model_is_not_frozen(encoder_folder):
    embedder = copy.deepcopy(Embedder.load(encoder_folder).freeze())
    with embedder.reading() as one, embedder.reading() as other:
        assert one is not other
