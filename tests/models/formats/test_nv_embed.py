import json
import logging
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tercet.errors import ModelError
from tercet.models.embedder import Embedder
from tercet.models.formats.nv_embed import is_nv_embed, read_nv_embed, weight_files
from tercet.models.settings import as_prompt
from tests.oracles import NvEmbedEncoder
from tests.published import CONFIG, INSTRUCTION, TEXT_CONFIG, TEXTS, publish, reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def embedder(folder) -> Embedder:
    return Embedder.load(folder)


@pytest.mark.parametrize("instruction", [INSTRUCTION, "Query:", ""])
def test_vectors_are_those_of_the_reference_formula(folder, embedder, instruction):
    expected = reference(folder, list(TEXTS), instruction)
    found = NvEmbedEncoder(embedder).encode(TEXTS, instruction)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_text_that_is_cut_loses_its_end_as_in_the_reference_unless_switched_off(folder, embedder):
    limit, encoder = 20, NvEmbedEncoder(embedder)
    expected = reference(folder, list(TEXTS), INSTRUCTION, limit)
    np.testing.assert_allclose(encoder.encode(TEXTS, INSTRUCTION, limit), expected, atol=1e-5)
    kept = NvEmbedEncoder(embedder, eos_before_truncation=False)
    (cut,), (whole,) = (
        [texts.ids.tolist()]
        for texts in (
            encoder.tokenize(TEXTS[-1:], INSTRUCTION, limit),
            kept.tokenize(TEXTS[-1:], INSTRUCTION, limit),
        )
    )
    end = embedder.tokenizer.stock.eos_token_id
    assert len(cut) == len(whole) == limit
    assert cut[:-1] == whole[:-1]
    assert (end in cut, whole[-1]) == (False, end)


def test_tercets_own_way_is_that_of_the_switches_off_and_differs_from_the_count(embedder):
    exact = NvEmbedEncoder(embedder, count_mask=False, eos_before_truncation=False)
    texts = TEXTS[:-2]  # without the empty one
    own = embedder.encode(texts, "query", task="Programs")
    np.testing.assert_allclose(exact.encode(texts, INSTRUCTION), own, atol=1e-5)
    gaps = np.abs(NvEmbedEncoder(embedder).encode(texts, INSTRUCTION) - own).max(1)
    assert (gaps > 1e-3).tolist() == [text.startswith("7") for text in texts]


def test_loading_gives_no_warning(folder, caplog):
    with caplog.at_level(logging.WARNING):
        Embedder.load(folder)
    assert caplog.records == []


def test_the_settings_are_those_of_the_folder(embedder):
    settings = embedder.settings
    assert (settings.pooling, settings.normalize, settings.append_end) == ("mean", True, True)
    assert settings.pool_prompt is False
    assert settings.prompts == {}
    name = as_prompt("name the section")
    assert settings.task_prompts == {
        "Programs": {"query": INSTRUCTION},
        "Sections": {"query": name, "document": name},
    }
    assert embedder.backbone.attention == "bidirectional"
    assert embedder.backbone.window == "full"


def test_a_document_is_pooled_with_both_of_its_ends(embedder):
    texts = embedder.tokenize(["maps"], "document").pack()
    assert texts.ids[[0, -1]].tolist() == [1, 2]
    assert texts.pooled.all()


def test_a_folder_whose_instructions_are_pooled_says_so(tmp_path):
    for name, value in {"is_mask_instruction": False, "padding_side": "left"}.items():
        changes: dict[str, Any] = {name: value}
        embedder = Embedder.load(publish(tmp_path / name, **changes))
        assert embedder.settings.pool_prompt
        assert NvEmbedEncoder(embedder).tokenize(["maps"], INSTRUCTION).pooled.all()


def test_an_instruction_that_fills_the_window_gives_numbers_all_the_same(embedder):
    encoder = NvEmbedEncoder(embedder)
    assert not encoder.tokenize(["maps"], INSTRUCTION, 5).pooled.any()
    assert np.isfinite(encoder.encode(["maps"], INSTRUCTION, 5)).all()


def test_no_texts_give_no_vectors(embedder):
    assert NvEmbedEncoder(embedder).encode([]).shape == (0, 32)


def test_one_file_and_several_give_the_same_model_in_any_dtype(tmp_path, embedder):
    one = Embedder.load(publish(tmp_path / "one", shards=1))
    np.testing.assert_array_equal(one.encode(TEXTS), embedder.encode(TEXTS))
    rough = Embedder.load(tmp_path / "one", dtype=torch.bfloat16)
    assert {weight.dtype for weight in rough.parameters()} == {torch.bfloat16}


def test_a_loaded_model_is_saved_and_loaded_as_any_other(embedder, tmp_path):
    embedder.save(tmp_path / "saved")
    again = Embedder.load(tmp_path / "saved")
    assert again.settings == embedder.settings
    np.testing.assert_allclose(again.encode(TEXTS), embedder.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        ({"latent_attention_model.latents": None}, r"1 missing: latent_attention_model"),
        ({"embedding_model.norm.weight": "norm.weight"}, r"1 unknown: norm.weight"),
        (
            {"latent_attention_model.latents": "latent_attention_model.keys"},
            r"missing: .*; 1 unknown: latent_attention_model.keys;",
        ),
    ],
)
def test_weights_of_other_names_are_refused(tmp_path, renamed, message):
    publish(tmp_path, shards=1)
    weights = load_file(tmp_path / "model.safetensors")
    for old, new in renamed.items():
        weight = weights.pop(old)
        if new:
            weights[new] = weight
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        Embedder.load(tmp_path)


def test_weights_of_another_size_or_kind_are_refused(tmp_path):
    sizes = {**CONFIG["latent_attention_config"], "num_latents_value": 9}
    publish(tmp_path, latent_attention_config=sizes)
    with pytest.raises(ModelError, match=r"latents \(7 x 32, expected 9 x 32\)"):
        Embedder.load(tmp_path)
    (tmp_path / "model-00001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"model-00001.safetensors: cannot be read"):
        Embedder.load(tmp_path)


def test_the_window_of_the_configuration_is_of_no_meaning(tmp_path, embedder):
    text = {**TEXT_CONFIG, "sliding_window": None}
    wide = Embedder.load(publish(tmp_path, text_config=text))
    np.testing.assert_allclose(wide.encode(TEXTS), embedder.encode(TEXTS), atol=1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"] == text


def test_what_is_asked_of_a_published_folder_is_done_or_refused(folder, embedder):
    causal = Embedder.load(folder, attention="causal", normalize=False)
    assert (causal.backbone.attention, causal.settings.normalize) == ("causal", False)
    bare = Embedder.load(folder, layer=None)
    assert (bare.layer, bare.settings.layer) == (None, None)
    texts = ["a small server"]
    assert not np.allclose(bare.encode(texts), embedder.encode(texts), atol=1e-3)
    assert not np.allclose(causal.encode(texts), embedder.encode(texts), atol=1e-3)
    with pytest.raises(ModelError, match="is loaded whole; save it with tercet first"):
        Embedder.load(folder, keep_layers=1)


POOLER = CONFIG["latent_attention_config"]


def test_a_folder_is_known_by_its_kind_of_model(tmp_path, decoder_folder):
    assert is_nv_embed(publish(tmp_path / "published"))
    assert not is_nv_embed(decoder_folder)
    assert not is_nv_embed(tmp_path)


def test_what_the_configuration_says_is_read(tmp_path):
    said = read_nv_embed(publish(tmp_path))
    assert (said.latents, said.heads, said.head_size) == (7, 3, 20)
    assert (said.normalize, said.masks_instruction) == (True, True)
    assert said.text_config["hidden_size"] == 32
    assert not {"model_type", "architectures"} & {*said.text_config}
    assert said.instructions == {
        "Programs": {"query": "find the program"},
        "Sections": {"query": "name the section", "document": "name the section"},
    }


def test_sizes_that_are_left_open_are_those_of_the_7b_model(tmp_path):
    text = {name: value for name, value in TEXT_CONFIG.items() if name != "hidden_size"}
    publish(tmp_path, text_config=text, latent_attention_config={"model_type": "latent_attention"})
    (tmp_path / "instructions.json").unlink()
    said = read_nv_embed(tmp_path)
    assert (said.latents, said.heads, said.head_size, said.normalize) == (512, 8, 4096, True)
    assert said.instructions == {}
    publish(tmp_path, text_config=text, latent_attention_config=None)
    assert read_nv_embed(tmp_path).heads == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "must hold a JSON object"),
        ({"text_config": {"model_type": "llama"}}, "must be that of a Mistral"),
        (
            {"latent_attention_config": {**POOLER, "latent_dim": 40}},
            "must be equal; got 32, 40",
        ),
        (
            {"latent_attention_config": {**POOLER, "num_cross_heads": "3"}},
            "\"num_cross_heads\" must be like 8; got '3'",
        ),
        (
            {"latent_attention_config": {**POOLER, "num_latents_value": 0}},
            '"num_latents_value" must be like 512; got 0',
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=f"config.json: .*{message}"):
        read_nv_embed(publish(tmp_path, **changes))


@pytest.mark.parametrize("content", ['{"A": 3}', '{"A": {"query": 3}}', "[]", "{"])
def test_instructions_of_another_form_are_refused(tmp_path, content):
    publish(tmp_path)
    (tmp_path / "instructions.json").write_text(content)
    with pytest.raises(ModelError, match=r"instructions.json: .*is the download complete"):
        read_nv_embed(tmp_path)


def test_a_missing_or_damaged_configuration_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"config.json: is missing"):
        read_nv_embed(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json: is not JSON"):
        is_nv_embed(tmp_path)


def test_the_files_of_the_index_are_all_there_or_the_missing_one_is_named(tmp_path):
    publish(tmp_path, shards=3)
    names = [f"model-0000{i}.safetensors" for i in (1, 2, 3)]
    assert [path.name for path in weight_files(tmp_path)] == names
    (tmp_path / names[1]).unlink()
    with pytest.raises(ModelError, match=f"lacks {names[1]}; is the download complete"):
        weight_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelError, match="lacks weights"):
        weight_files(tmp_path)
    index.unlink()
    with pytest.raises(ModelError, match=r"lacks model.safetensors"):
        weight_files(tmp_path)
