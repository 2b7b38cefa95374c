import logging
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tercet.errors import MissingExtraError, ModelError
from tercet.models.choices import DenseSettings, LayerSettings
from tercet.models.embedder import Embedder, Settings
from tercet.models.network.backbone import Backbone
from tests.toy import DECODERS, ENCODERS, SENTENCES, byte_bpe, random_model, wordpiece

TEXTS = [*SENTENCES, "7 days", "x", "maps " * 60]
DENSE = (
    DenseSettings(width=96, bias=True, residual=True),
    DenseSettings(width=40, activation="tanh"),
)
KINDS = ["llama", "mistral", "gemma2", "gemma3", "bert", "xlm-roberta", "modernbert"]
LAYERS = [
    None,
    LayerSettings(latents=5, heads=2, head_size=12),
    LayerSettings(kind="self_attention", heads=4),
]


def embedder_of(kind: str, **settings) -> Embedder:
    config = {**DECODERS, **ENCODERS}[kind]
    decoder = kind in DECODERS
    tokenizer = byte_bpe() if decoder else wordpiece(padding=config.pad_token_id)
    backbone = Backbone(random_model(config), attention="bidirectional")
    return Embedder(backbone, tokenizer, Settings(**settings)).eval()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_the_embedder_with_and_without_a_prompt(kind, layer):
    embedder = embedder_of(
        kind, layer=layer, prompts={"query": "find it:\n"}, pool_prompt=False, append_end=True
    )
    model = embedder.as_sentence_transformer()
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    np.testing.assert_allclose(queries, embedder.encode(TEXTS, "query"), atol=1e-5)
    np.testing.assert_allclose(documents, embedder.encode(TEXTS, "document"), atol=1e-5)
    assert embedder.backbone.config._attn_implementation == "tercet"


@pytest.mark.parametrize("prompt", ["find: ", "Instruct: play\nQuery: ", "find"])
def test_with_a_layer_a_prompt_whose_end_joins_the_text_is_left_out_exactly(prompt):
    embedder = embedder_of("llama", layer=LAYERS[1], prompts={"query": prompt}, pool_prompt=False)
    model = embedder.as_sentence_transformer()
    expected = embedder.encode(TEXTS, "query")
    np.testing.assert_allclose(model.encode_query(TEXTS), expected, atol=1e-5)
    pooled = embedder_of("llama", layer=LAYERS[1], prompts={"query": prompt})
    pooled = pooled.as_sentence_transformer()
    assert np.abs(pooled.encode_query(TEXTS) - expected).max() > 1e-3


@pytest.mark.parametrize("pooling", ["weighted_mean", "first", "last"])
def test_every_pooling_leaves_the_prompt_out_behind_a_layer(pooling):
    embedder = embedder_of(
        "llama", layer=LAYERS[1], prompts={"query": "find: "}, pool_prompt=False, pooling=pooling
    )
    model = embedder.as_sentence_transformer()
    for side in ("right", "left"):
        model.tokenizer.padding_side = side
        found = model.encode_query(TEXTS)
        np.testing.assert_allclose(found, embedder.encode(TEXTS, "query"), atol=1e-5)


def test_an_unknown_prompt_is_counted_as_sentence_transformers_does():
    embedder = embedder_of("llama", layer=LAYERS[1], prompts={"query": "find: "}, pool_prompt=False)
    unknown = embedder_of("llama", layer=LAYERS[1], prompts={"query": "read:\n"}, pool_prompt=False)
    unknown.layer = embedder.layer
    model = embedder.as_sentence_transformer()
    found = model.encode(TEXTS, prompt="read:\n")  # as many tokens as the known one
    np.testing.assert_allclose(found, unknown.encode(TEXTS, "query"), atol=1e-5)


def test_dense_layers_come_behind_the_pooling_and_a_layer_before_it():
    embedder = embedder_of("llama", layer=LAYERS[1], dense_layers=DENSE, pooling="last")
    model = embedder.as_sentence_transformer()
    names = [type(module).__name__ for module in model]
    assert names == ["Transformer", "Layer", "Pooling", "Dense", "Dense", "Normalize"]
    np.testing.assert_allclose(model.encode(TEXTS), embedder.encode(TEXTS), atol=1e-6)


def test_both_hold_the_same_parameters_so_that_one_learns_what_the_other_does():
    embedder = embedder_of("llama", layer=LAYERS[1], dense_layers=DENSE)
    model = embedder.as_sentence_transformer()
    assert {id(p) for p in model.parameters()} == {id(p) for p in embedder.parameters()}
    before = model.encode(TEXTS)
    with torch.no_grad():
        for weight in embedder.parameters():
            weight.mul_(1.1)
    np.testing.assert_allclose(model.encode(TEXTS), embedder.encode(TEXTS), atol=1e-5)
    assert np.abs(model.encode(TEXTS) - before).max() > 1e-3


def test_frozen_parameters_stay_frozen():
    embedder = embedder_of("llama", layer=LAYERS[1])
    assert embedder.layer is not None
    embedder.layer.to_q.weight.requires_grad_(False)
    model = embedder.as_sentence_transformer()
    assert not model[1].to_q.weight.requires_grad
    assert model[1].to_kv.weight.requires_grad


def test_what_it_saves_is_a_folder_like_the_embedders_own(tmp_path):
    embedder = embedder_of("llama", layer=LAYERS[1], prompts={"query": "find:\n"})
    embedder.as_sentence_transformer().save(str(tmp_path / "theirs"), create_model_card=False)
    theirs = SentenceTransformer(str(tmp_path / "theirs"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(
        theirs.encode_query(TEXTS), embedder.encode(TEXTS, "query"), atol=1e-5
    )
    assert Embedder.load(tmp_path / "theirs").settings.layer == embedder.settings.layer


def test_features_handed_in_stay_as_they_are():
    embedder = embedder_of("llama", layer=LAYERS[1], prompts={"query": "find: "}, pool_prompt=False)
    layer = embedder.as_sentence_transformer()[1]
    ids = torch.tensor([embedder.tokenize(["maps"], "query").ids[0].tolist()])
    features = {
        "token_embeddings": torch.randn(*ids.shape, 64),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "prompt_length": len(layer.prompts[0]),
    }
    before = dict(features)
    assert layer(features)["attention_mask"].sum() < ids.numel()
    assert features == before
    assert features["attention_mask"].all()


def test_texts_end_to_end_as_flash_attention_takes_them_give_the_same_states():
    for sizes in LAYERS[1:]:
        layer = embedder_of("llama", layer=sizes).as_sentence_transformer()[1]
        lengths, states = [3, 1, 5], torch.randn(9, 64)
        flat = {
            "token_embeddings": states[None],
            "input_ids": torch.arange(9)[None],
            "cu_seq_lens_q": torch.tensor([0, 3, 4, 9]),
            "cu_seq_lens_k": torch.tensor([0, 3, 4, 9]),
        }
        found = layer(flat)
        assert not any(name.startswith("cu_seq") for name in found)
        assert found["attention_mask"].sum(1).tolist() == lengths
        for row, part in zip(found["token_embeddings"], states.split(lengths), strict=True):
            mask = torch.ones(1, len(part), dtype=torch.long)
            alone = layer({"token_embeddings": part[None], "attention_mask": mask})
            torch.testing.assert_close(row[: len(part)], alone["token_embeddings"][0])


def test_what_it_cannot_express_is_refused():
    with pytest.raises(ModelError, match="cannot express echo; use encode"):
        embedder_of("llama", echo=True).as_sentence_transformer()
    embedder = embedder_of("llama")
    embedder.backbone.add_lora(rank=2, alpha=4, dropout=0.0)
    with pytest.raises(ModelError, match=r"not merged; call backbone.merge_lora\(\)"):
        embedder.as_sentence_transformer()


def test_without_sentence_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match="as_sentence_transformer needs an extra package"):
        embedder_of("llama").as_sentence_transformer()


def test_nothing_is_printed_or_logged(caplog, capfd):
    embedder = embedder_of("llama", layer=LAYERS[1])
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        embedder.as_sentence_transformer()
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
