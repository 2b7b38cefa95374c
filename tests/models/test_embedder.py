import json
import logging
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tercet.errors import ModelError, RecipeError, StorageError
from tercet.models.embedder import Embedder
from tests.toy import SENTENCES, save_model

TEXTS = [*SENTENCES, "x", "maps " * 60]


def test_vectors_do_not_depend_on_batch_order_or_company(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    together = embedder.encode(TEXTS)
    embedder.batch_tokens = 30
    np.testing.assert_allclose(embedder.encode(TEXTS[::-1])[::-1], together, atol=1e-6)
    alone = np.concatenate([embedder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, together, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_an_empty_a_one_token_and_a_longest_text_in_one_batch(tmp_path, kind, caplog):
    embedder = Embedder.load(save_model(tmp_path / "model", kind), document_tokens=128)
    texts = ["", "a", "the moon " * 200, "mail"]
    with caplog.at_level(logging.WARNING, logger="tercet"):
        vectors = embedder.encode(texts)
    embedder.encode(texts)
    assert caplog.messages == ["1 of 4 document texts were cut to 128 tokens"]  # said once
    assert embedder.tokenize(texts, "document").lengths[2] == 128
    alone = np.concatenate([embedder.encode([text]) for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_no_texts_give_no_vectors(encoder_folder):
    assert Embedder.load(encoder_folder).encode([]).shape == (0, 64)


def test_one_string_instead_of_a_list_is_refused(encoder_folder):
    with pytest.raises(TypeError, match="list of strings"):
        Embedder.load(encoder_folder).encode("a text")


def test_dims_keeps_the_leading_coordinates_at_unit_length(encoder_folder):  # trap A6
    embedder = Embedder.load(encoder_folder)
    short, full = embedder.encode(TEXTS, dims=16), embedder.encode(TEXTS)
    expected = full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)
    with pytest.raises(RecipeError, match=r"dims must be between 1 and .* 64; got 65"):
        embedder.encode(TEXTS, dims=65)


def test_prompts_live_in_the_saved_model_and_are_used_by_default(encoder_folder, tmp_path):
    plain = Embedder.load(encoder_folder)
    prompts = {"query": "query: ", "document": "passage: "}
    Embedder.load(encoder_folder, prompts=prompts).save(tmp_path / "saved")
    saved = Embedder.load(tmp_path / "saved")
    expected = plain.encode(["query: " + text for text in TEXTS])
    np.testing.assert_allclose(saved.encode(TEXTS, "query"), expected, atol=1e-6)
    assert np.abs(saved.encode(TEXTS, "document") - expected).max() > 0.01


def test_a_task_has_prompts_of_its_own(encoder_folder):
    tasks = {"mail": {"query": "which mail: "}}
    embedder = Embedder.load(encoder_folder, task_prompts=tasks)
    expected = Embedder.load(encoder_folder).encode(["which mail: today"])
    np.testing.assert_allclose(embedder.encode(["today"], "query", task="mail"), expected)
    with pytest.raises(RecipeError, match="no prompt for the task 'post'; it knows: mail"):
        embedder.encode(["today"], "query", task="post")


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "llama", "qwen3", "mistral"])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "first", "last"])
def test_sentence_transformers_reads_the_saved_folder_alike(tmp_path, kind, pooling):
    folder = save_model(tmp_path / "base", kind)
    way = "causal" if kind == "llama" and pooling == "last" else "bidirectional"
    lengths: Any = {"query_tokens": 40, "document_tokens": 40}
    embedder = Embedder.load(folder, attention=way, pooling=pooling, **lengths)
    embedder.save(tmp_path / "saved")
    ours = embedder.encode(TEXTS)
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(peer.encode(TEXTS), ours, atol=1e-5)
    reloaded = Embedder.load(tmp_path / "saved")
    assert reloaded.settings == embedder.settings
    assert reloaded.backbone.attention == way
    np.testing.assert_array_equal(reloaded.encode(TEXTS), ours)
    assert reloaded.fingerprint() == embedder.fingerprint()


def test_sentence_transformers_applies_the_saved_prompts(encoder_folder, tmp_path):
    prompts = {"query": "find: ", "document": "text: "}
    embedder = Embedder.load(encoder_folder, prompts=prompts)
    embedder.save(tmp_path / "saved")
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(
        peer.encode_query(list(TEXTS)), embedder.encode(TEXTS, "query"), atol=1e-5
    )
    np.testing.assert_allclose(
        peer.encode_document(list(TEXTS)), embedder.encode(TEXTS, "document"), atol=1e-5
    )


def with_lora(embedder: Embedder) -> Embedder:
    embedder.backbone.add_lora(rank=2, alpha=4, dropout=0.0)
    for name, weight in embedder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return embedder


def test_lora_is_merged_on_save_and_an_adapter_reloads_both_ways(decoder_folder, tmp_path):
    base = str(tmp_path / "base")
    Embedder.load(decoder_folder, attention="bidirectional").save(base)
    embedder = with_lora(Embedder.load(base))
    expected = embedder.encode(TEXTS)
    embedder.save_adapter(tmp_path / "adapter", base=base)
    adapted = Embedder.load(tmp_path / "adapter")
    assert adapted.backbone.attention == "bidirectional"
    embedder.save(tmp_path / "merged")
    np.testing.assert_allclose(embedder.encode(TEXTS), expected, atol=1e-5)
    merged = Embedder.load(tmp_path / "merged")
    for reloaded in (adapted, merged):  # spec 2: difference 0
        np.testing.assert_array_equal(reloaded.encode(TEXTS), embedder.encode(TEXTS))


def test_an_adapter_is_refused_on_a_base_that_would_be_read_one_way(decoder_folder, tmp_path):
    turned = with_lora(Embedder.load(decoder_folder, attention="bidirectional"))
    with pytest.raises(ModelError, match=r"must say that it is bidirectional .*with save\(\)"):
        turned.save_adapter(tmp_path / "adapter", base=str(decoder_folder))
    assert not (tmp_path / "adapter").exists()
    causal = with_lora(Embedder.load(decoder_folder))
    causal.save_adapter(tmp_path / "adapter", base=str(decoder_folder))
    causal.save(tmp_path / "merged")
    reloaded = Embedder.load(tmp_path / "adapter")
    np.testing.assert_array_equal(reloaded.encode(TEXTS), causal.encode(TEXTS))


def test_an_adapter_names_its_base_to_peft(decoder_folder, tmp_path):
    Embedder.load(decoder_folder, attention="bidirectional").save(tmp_path / "base")
    turned = with_lora(Embedder.load(decoder_folder, attention="bidirectional"))
    turned.save_adapter(tmp_path / "adapter", base=str(tmp_path / "base"))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"suffixes": {"query": " [end]"}}, "a suffix after texts"),
        ({"pool_special": False}, "special tokens that are not pooled"),
        ({"echo": True}, "echo"),
    ],
)
def test_what_sentence_transformers_cannot_do_is_not_written_for_it(
    tmp_path, settings, what, caplog, encoder_folder
):
    Embedder.load(encoder_folder).save(tmp_path / "saved")  # its modules.json must go
    embedder = Embedder.load(encoder_folder, **settings)
    with caplog.at_level(logging.WARNING, logger="tercet"):
        embedder.save(tmp_path / "saved")
    (message,) = caplog.messages
    assert f"sentence-transformers cannot express {what}, so no modules.json" in message
    assert not (tmp_path / "saved" / "modules.json").exists()
    reloaded = Embedder.load(tmp_path / "saved")
    assert reloaded.settings == embedder.settings
    np.testing.assert_array_equal(reloaded.encode(TEXTS), embedder.encode(TEXTS))
    assert embedder.fingerprint() != Embedder.load(encoder_folder).fingerprint()


def test_an_empty_text_is_refused_where_the_settings_say_so(encoder_folder):
    embedder = Embedder.load(encoder_folder, on_empty="error")
    with pytest.raises(RecipeError, match=r"text 3 of 3 is empty, and .*set on_empty"):
        embedder.encode(["a", "b", " \n"])
    assert embedder.encode(["a"]).shape == (1, 64)


def test_bfloat16_gives_nearly_the_same_float32_vectors(encoder_folder):
    exact = Embedder.load(encoder_folder).encode(TEXTS)
    rough = Embedder.load(encoder_folder, dtype=torch.bfloat16).encode(TEXTS)
    assert rough.dtype == np.float32
    assert (exact * rough).sum(1).min() > 0.99


def test_a_settings_file_of_another_kind_is_refused(encoder_folder, tmp_path):
    Embedder.load(encoder_folder).save(tmp_path / "saved")
    path = tmp_path / "saved" / "tercet.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ModelError, match="newer tercet"):
        Embedder.load(tmp_path / "saved")
    path.write_text("{")
    with pytest.raises(ModelError, match="not a tercet settings file"):
        Embedder.load(tmp_path / "saved")


def test_a_full_disk_leaves_the_old_model_whole(encoder_folder, tmp_path, monkeypatch):
    embedder = Embedder.load(encoder_folder)
    embedder.save(tmp_path / "saved")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedder.tokenizer.stock, "save_pretrained", full)
    with pytest.raises(StorageError, match="No space left on device"):
        embedder.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    Embedder.load(tmp_path / "saved")


def test_an_unknown_setting_is_named(encoder_folder):
    with pytest.raises(RecipeError, match="no such setting: poling"):
        Embedder.load(encoder_folder, poling="mean")


def test_a_folder_of_other_things_is_not_overwritten(encoder_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="is not a model and would be overwritten"):
        Embedder.load(encoder_folder).save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(("prompt", "counted"), [("find it: ", False), ("find it:\n", True)])
def test_a_prompt_that_sentence_transformers_miscounts_is_told(
    decoder_folder, tmp_path, caplog, prompt, counted
):
    """Tokens of a prompt alone are not those before a text where a space joins the next word."""
    embedder = Embedder.load(decoder_folder, prompts={"query": prompt}, pool_prompt=False)
    embedder.save(tmp_path / "model")
    told = [record.getMessage() for record in caplog.records if "miscounts" in record.message]
    assert len(told) == (0 if counted else 1)
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    gap = np.abs(
        theirs.encode(SENTENCES, prompt_name="query") - embedder.encode(SENTENCES, "query")
    )
    assert (gap.max() < 1e-5) == counted


def test_prompts_that_are_pooled_or_special_tokens_are_not_miscounted(
    encoder_folder, tmp_path, caplog
):
    for pooled in (True, False):
        embedder = Embedder.load(encoder_folder, prompts={"query": "find it: "}, pool_prompt=pooled)
        embedder.save(tmp_path / str(pooled))
    assert not caplog.records
