import math

import numpy as np
import pytest
import torch

from tercet.errors import ModelError, RecipeError
from tercet.evaluate.insight.latents import LatentUse, latent_use
from tercet.evaluate.report.figures import drawing, heat_maps
from tercet.models.choices import LayerSettings
from tercet.models.embedder import Embedder
from tercet.models.network.latent_attention import build_layer
from tests.toy import SENTENCES

PROMPT = "find it:\n"


@pytest.fixture(scope="module")
def embedder(decoder_folder):
    """Five latents and three heads behind a tiny decoder whose prompts are not pooled."""
    found = Embedder.load(decoder_folder, prompts={"query": PROMPT}, pool_prompt=False)
    torch.manual_seed(0)
    found.layer = build_layer(LayerSettings(latents=5, heads=3, head_size=16), 64)
    with torch.no_grad():
        found.layer.to_q.weight.mul_(4)
    return found


@torch.no_grad()
def by_hand(embedder, texts, role):
    """Softmax of Q K^T / sqrt(e), text by text and token by token, in plain sums."""
    layer, size = embedder.layer, 16
    keys = layer.to_kv(layer.norm_context(layer.latents))[:, : 3 * size]
    mass, entropy, count = np.zeros((3, 5)), np.zeros(3), 0
    for text in texts:
        packed = embedder.tokenize([text], role).pack()
        states = embedder.backbone(packed)[packed.pooled]
        queries = layer.to_q(layer.norm_query(states))
        for query in queries:
            count += 1
            for head in range(3):
                part = slice(head * size, (head + 1) * size)
                scores = [float(query[part] @ key[part]) / math.sqrt(size) for key in keys]
                weights = np.exp(scores) / np.exp(scores).sum()
                mass[head] += weights
                entropy[head] -= (weights * np.log(weights)).sum()
    return mass / count, entropy / count, count


@pytest.mark.parametrize("role", ["query", "document"])
def test_mass_and_entropy_equal_those_of_single_tokens(embedder, role, monkeypatch):
    monkeypatch.setattr(embedder, "batch_tokens", 40)  # several batches
    found = latent_use(embedder, SENTENCES, role)
    mass, entropy, count = by_hand(embedder, SENTENCES, role)
    assert found.tokens == count
    np.testing.assert_allclose(found.mass, mass, atol=1e-6)
    np.testing.assert_allclose(found.token_entropy, entropy, atol=1e-6)
    assert np.ptp(mass) > 0.05 and (found.entropy > found.token_entropy).all()


def test_tokens_of_a_prompt_are_not_looked_at(embedder):
    queries = latent_use(embedder, SENTENCES, "query")
    assert queries.tokens == latent_use(embedder, SENTENCES, "document").tokens


def test_the_mode_of_the_model_comes_back(embedder):
    embedder.train()
    latent_use(embedder, SENTENCES[:2])
    assert embedder.training and embedder.layer.training
    embedder.eval()


def test_rows_say_what_share_of_the_dictionary_is_used():
    # Head 1: all latents alike. Head 2: two of four, each token only one of them.
    mass = np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.0, 0.5, 0.0]])
    rows = LatentUse(mass, np.array([math.log(4), 0.0]), 8).rows()
    assert list(rows) == ["head 1", "head 2", "all heads"]
    assert rows["head 1"] == pytest.approx(
        {
            "entropy": math.log(4),
            "entropy of a token": math.log(4),
            "used": 1,
            "used by a token": 1,
            "largest": 0.25,
        }
    )
    assert rows["head 2"]["used"] == pytest.approx(0.5)
    assert rows["head 2"]["used by a token"] == pytest.approx(0.25)
    # Both: 3/8, 1/8, 3/8, 1/8.
    both = -2 * (3 / 8 * math.log(3 / 8) + 1 / 8 * math.log(1 / 8))
    assert rows["all heads"]["entropy"] == pytest.approx(both)
    assert rows["all heads"]["largest"] == pytest.approx(3 / 8)
    assert rows["all heads"]["used by a token"] == pytest.approx(0.5)


def test_the_heat_map_has_the_most_used_latents_first():
    mass = np.array([[0.1, 0.2, 0.7], [0.0, 0.8, 0.2]])
    found = LatentUse(mass, np.zeros(2), 8).heat_map()
    assert list(found.tokens) == ["1", "2", "0"]
    np.testing.assert_allclose(found.values, [[2 / 7, 1, 1 / 7], [1, 0.25, 0]])
    assert found.layer_means[0] == pytest.approx(math.exp(0.801819) / 3)
    with drawing():
        heat_maps({"model": found})


@pytest.mark.parametrize("layer", [None, LayerSettings(kind="self_attention", heads=4)])
def test_a_model_without_latents_is_refused(decoder_folder, layer):
    embedder = Embedder.load(decoder_folder)
    embedder.layer = layer and build_layer(layer, 64)
    with pytest.raises(ModelError, match="must have a latent attention layer"):
        latent_use(embedder, SENTENCES)


def test_no_texts_are_refused(embedder):
    with pytest.raises(RecipeError, match="0 texts have no pooled token"):
        latent_use(embedder, [])
