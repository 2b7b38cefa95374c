"""Rerankers of transformers against transformers itself, a pair at a time."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from tercet.errors import ModelError
from tercet.models.formats.cross_encoder import CrossEncoder, is_cross_encoder
from tests import toy

QUERIES = ["web server", "a", "battery monitor of a laptop", "web server"]
DOCUMENTS = [toy.SENTENCES[0], "b", " ".join(toy.SENTENCES * 9), "nginx serves files"]


def reranker(folder: Path, kind: str, *, labels: int = 1) -> Path:
    toy.save_model(folder, kind)
    config = t.AutoConfig.from_pretrained(folder, num_labels=labels)
    torch.manual_seed(1)
    model = t.AutoModelForSequenceClassification.from_config(config)
    for weight in model.parameters():  # logits that differ clearly
        weight.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def folder(request, tmp_path_factory) -> Path:
    return reranker(tmp_path_factory.mktemp("rerankers") / request.param, request.param)


def slow(folder: Path, most: int) -> torch.Tensor:
    """Each pair alone, cut to as many tokens as there are positions."""
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    model: Any = t.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for query, document in zip(QUERIES, DOCUMENTS, strict=True):
            read = tokenizer(
                query, document, truncation="longest_first", max_length=most, return_tensors="pt"
            )
            found.append(model(**read).logits[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_scores_are_the_logits_of_single_pairs(folder: Path, batch_tokens: int):
    """However pairs share a batch, whose shorter ones are padded; a long pair is cut."""
    teacher = CrossEncoder.load(str(folder), batch_tokens=batch_tokens)
    expected = slow(folder, teacher.max_tokens)
    assert len(set(expected.tolist())) == len(expected)
    torch.testing.assert_close(teacher.score(QUERIES, DOCUMENTS), expected, rtol=1e-4, atol=1e-5)
    assert len(teacher.tokenizer(DOCUMENTS[2])["input_ids"]) > teacher.max_tokens
    assert teacher.score([], []).shape == (0,)


def test_scores_are_those_of_sentence_transformers(folder: Path):
    library = pytest.importorskip("sentence_transformers")
    teacher = CrossEncoder.load(str(folder))
    theirs = library.CrossEncoder(str(folder), max_length=teacher.max_tokens, device="cpu")
    pairs = list(zip(QUERIES, DOCUMENTS, strict=True))
    expected = theirs.predict(pairs, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
    torch.testing.assert_close(teacher.score(QUERIES, DOCUMENTS), expected, rtol=1e-4, atol=1e-5)


def test_positions_of_roberta_begin_after_those_of_padding(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    teacher = CrossEncoder.load(str(folder))
    reserved = 0 if folder.name == "bert" else config["pad_token_id"] + 1
    teacher.tokenizer.model_max_length = int(1e30)
    limit = CrossEncoder(teacher.model, teacher.tokenizer).max_tokens
    assert limit == min(config["max_position_embeddings"] - reserved, 512)


@pytest.mark.parametrize("padding", [None, 5])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_decoder_scores_the_last_token_whatever_its_config_calls_padding(
    tmp_path: Path, kind: str, padding: int | None
):
    folder = reranker(tmp_path, kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": padding}))
    teacher = CrossEncoder.load(str(folder))
    expected = slow(folder, teacher.max_tokens)
    torch.testing.assert_close(teacher.score(QUERIES, DOCUMENTS), expected, rtol=1e-4, atol=1e-5)


def test_the_architecture_says_what_a_folder_holds(folder: Path, tmp_path: Path):
    assert is_cross_encoder(str(folder))
    assert not is_cross_encoder(str(toy.save_model(tmp_path / "bert", "bert")))
    assert not is_cross_encoder("minilm")


def test_the_config_of_a_hub_id_is_read_as_transformers_reads_it(folder: Path, monkeypatch):
    def found(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        if name != "owner/reranker":
            raise OSError(f"{name} is not a model of the hub")
        return json.loads((folder / "config.json").read_text()), {}

    monkeypatch.setattr(t.PreTrainedConfig, "get_config_dict", found)
    assert is_cross_encoder("owner/reranker")
    assert not is_cross_encoder("owner/lost")


def test_the_fingerprint_changes_with_the_type_and_the_tokenizer(folder: Path):
    teacher = CrossEncoder.load(str(folder))
    half = CrossEncoder.load(str(folder), dtype=torch.bfloat16)
    assert teacher.fingerprint() == CrossEncoder.load(str(folder)).fingerprint()
    whole = CrossEncoder(half.model.float(), half.tokenizer)
    assert len({teacher.fingerprint(), whole.fingerprint()}) == 2  # other weights
    before = whole.fingerprint()
    assert CrossEncoder(whole.model.bfloat16(), whole.tokenizer).fingerprint() != before
    changed = CrossEncoder.load(str(folder))
    changed.tokenizer.add_tokens(["nginx"])
    assert changed.fingerprint() != teacher.fingerprint()


def test_a_changed_weight_changes_the_fingerprint(folder: Path):
    teacher = CrossEncoder.load(str(folder))
    before = teacher.fingerprint()
    next(teacher.model.parameters()).data[3, 3] += 1
    assert teacher.fingerprint() != before


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path):
    place = str(reranker(tmp_path / "three", "bert", labels=3))
    with pytest.raises(ModelError) as caught:
        CrossEncoder.load(place)
    assert str(caught.value) == (
        f"{place}: a reranker must have 1 label; got 3, as a classifier has; give a model that was "
        "trained to score pairs"
    )


def test_missing_weights_are_refused(folder: Path, tmp_path: Path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copied / "model.safetensors")
    lost = next(name for name in weights if name.startswith("classifier"))
    del weights[lost]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"1 weights are missing, such as {lost}; the folder is"):
        CrossEncoder.load(str(copied))


def test_custom_code_is_refused(folder: Path, tmp_path: Path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "theirs.Model"}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"custom code .*, which tercet never runs"):
        CrossEncoder.load(str(copied))
