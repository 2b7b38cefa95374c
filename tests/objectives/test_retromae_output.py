"""The output layer that RetroMAE names tokens with: the model's own, or a new one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t

from tercet.data.files.texts import open_texts
from tercet.errors import ModelError
from tercet.models.embedder import Embedder
from tests.objectives.retromaes import ALL, at_work, gradients, quiet_model, rows
from tests.toy import SENTENCES

KINDS = ("bert", "xlm-roberta", "modernbert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: quiet_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(SENTENCES) + "\n")
    return open_texts(path)


def test_seen_leaves_out_nothing_but_what_is_nowhere_in_the_data(folders, source):
    embedder, work = at_work(folders["bert"], source, vocabulary="seen")
    stock = embedder.tokenizer.stock
    ids = {i for text in SENTENCES for i in stock(text)["input_ids"]} | set(stock.all_special_ids)
    assert work._known is not None and work._known.tolist() == sorted(ids)
    assert 50 < len(ids) < 250


def test_seen_is_exact_when_everything_is(folders, source):
    embedder, work = at_work(folders["bert"], source, vocabulary="all")
    batch = work.batch(rows(0, 1), [0])
    whole, by_whole = work.backward(batch, ALL), gradients(embedder)
    work._known = torch.arange(300)
    seen, by_seen = work.backward(batch, ALL), gradients(embedder)
    torch.testing.assert_close(seen, whole)
    torch.testing.assert_close(by_seen, by_whole)


def test_a_new_output_layer_begins_with_how_common_tokens_are(folders, source):
    _, work = at_work(folders["bert"], source)
    ids = work.drawn[0].ids >> 1
    counts = np.bincount(ids)[np.unique(ids)]
    entropy = -(counts / counts.sum() * np.log(counts / counts.sum())).sum()
    losses = work.backward(work.batch(rows(0, 1, 2), [0]), ALL)
    assert losses["decoder_loss"].item() < entropy + 1.5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert"])
def test_a_models_own_output_layer_gives_its_logits(folders, source, tmp_path, caplog, kind, tied):
    config = t.AutoConfig.from_pretrained(folders[kind])
    config.tie_word_embeddings = tied
    setattr(config, "norm_eps" if kind == "modernbert" else "layer_norm_eps", 0.05)
    model = t.AutoModelForMaskedLM.from_config(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(tmp_path)
    Embedder.load(folders[kind]).tokenizer.stock.save_pretrained(tmp_path)
    if not tied:
        with pytest.raises(ModelError, match="is not dense, GELU, norm and the token table"):
            at_work(tmp_path, source, head=str(tmp_path))
        _, work = at_work(tmp_path, source, head=str(tmp_path), head_needed=False)
        assert "a new masked-language head is made: " in caplog.text
        assert torch.equal(work.head.dense.weight, torch.eye(64).double())
        return
    embedder, work = at_work(tmp_path, source, head=str(tmp_path))
    ids = torch.arange(5, 16)
    assert work._known is not None
    with torch.no_grad():
        states = model.double().base_model(input_ids=ids[None]).last_hidden_state[0]
        wanted = model(input_ids=ids[None]).logits[0][:, work._known]
        table = embedder.backbone.model.get_input_embeddings().weight
        found = work.head.output(table[work._known]).logits(work.head(states))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_promised_and_missing_is_refused(folders, source, tmp_path):
    config = t.AutoConfig.from_pretrained(folders["bert"])
    t.AutoModel.from_config(config).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["architectures"] = ["BertForMaskedLM"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="weights of its masked-language head are missing"):
        at_work(folders["bert"], source, head=str(tmp_path))


def test_a_base_without_an_output_layer_gets_a_new_one(folders, source, caplog):
    caplog.set_level("INFO", logger="tercet")
    _, work = at_work(folders["bert"], source, head=str(folders["bert"]))
    assert "has no masked-language head; a new one is made" in caplog.text
    assert torch.equal(work.head.dense.weight, torch.eye(64).double())
