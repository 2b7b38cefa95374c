import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tercet.errors import ModelError
from tercet.kinds import KINDS
from tercet.models.embedder import Embedder
from tercet.models.formats.llm2vec import read_llm2vec
from tercet.models.merge import lineage, load_adapters
from tests import toy
from tests.oracles import Llm2VecEncoder

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llm2vec"
BASE, MNTP, SIMCSE = FIXTURE / "base", FIXTURE / "mntp", FIXTURE / "simcse"
TEXTS = list(toy.SENTENCES[:5])


@pytest.fixture
def base(tmp_path, decoder_folder) -> Path:
    """A decoder that reads both ways, as a first stage leaves it."""
    Embedder.load(decoder_folder, attention="bidirectional").save(tmp_path / "base")
    return tmp_path / "base"


def trained(base: Path, folder: Path, seed: int, pooling: str = "mean") -> Embedder:
    """An embedder with a random adapter, which is saved as well."""
    embedder = Embedder.load(base, pooling=pooling)
    embedder.backbone.add_lora(rank=3, alpha=6, dropout=0.0)
    torch.manual_seed(seed)
    for name, weight in embedder.backbone.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    embedder.save_adapter(folder, str(base))
    return embedder


def test_adapters_of_two_stages_give_the_vectors_of_training_them_in_turn(tmp_path, base):
    # Spec test 15: LoRA 1 is merged, LoRA 2 sits on top of it and is not.
    first = trained(base, tmp_path / "1", 1)
    first.save(tmp_path / "merged")
    second = trained(tmp_path / "merged", tmp_path / "2", 2, "weighted_mean")
    found = load_adapters([tmp_path / "1", tmp_path / "2"])
    assert second.backbone.has_lora
    assert not found.backbone.has_lora
    assert found.backbone.attention == "bidirectional"
    assert found.settings.pooling == "weighted_mean"
    np.testing.assert_allclose(found.encode(TEXTS), second.encode(TEXTS), atol=1e-5)
    path = tmp_path / "1" / "adapter_config.json"  # peft's name for the base is not needed
    nameless = {**json.loads(path.read_text()), "base_model_name_or_path": None}
    path.write_text(json.dumps(nameless))
    one = load_adapters([tmp_path / "1"])
    assert np.abs(one.encode(TEXTS) - found.encode(TEXTS)).max() > 0.01


def test_a_merged_model_is_saved_whole_with_what_it_is_made_of(tmp_path, base):
    trained(base, tmp_path / "1", 1)
    trained(base, tmp_path / "2", 2)
    folders = [tmp_path / "1", tmp_path / "2"]
    merged = load_adapters(folders)
    made_of = lineage(str(base), folders)
    merged.save(tmp_path / "out", about=made_of)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["is_causal"] is False
    about = json.loads((tmp_path / "out" / "tercet.json").read_text())["about"]
    assert about == made_of
    assert [part["adapter"] for part in about["merged"]] == [str(folder) for folder in folders]
    assert about["merged"][0]["sha256"] != about["merged"][1]["sha256"]
    again = Embedder.load(tmp_path / "out")
    assert np.array_equal(again.encode(TEXTS), merged.encode(TEXTS))


def test_the_heads_that_were_trained_with_an_adapter_are_merged_too(tmp_path, base):
    embedder = Embedder.load(base, kinds=KINDS, multi_dim=8)
    embedder.backbone.add_lora(rank=2, alpha=4, dropout=0.0)
    for weight in embedder.heads.parameters():
        torch.nn.init.normal_(weight)
    embedder.save_adapter(tmp_path / "1", str(base))
    merged = load_adapters([tmp_path / "1"])
    assert merged.kinds == KINDS and merged.settings.multi_dim == 8
    merged.save(tmp_path / "out")
    expected = embedder.heads.state_dict()
    for found in (merged, Embedder.load(tmp_path / "out")):
        state = found.heads.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_an_adapter_of_unknown_direction_is_refused_unless_one_is_given():
    with pytest.raises(ModelError) as error:
        load_adapters([MNTP], base=BASE)
    assert str(error.value) == (
        f"{MNTP}: records no direction of attention, and peft would load it as causal; "
        "give the attention, or compat if llm2vec trained it"
    )
    assert load_adapters([MNTP], base=BASE, attention="causal").backbone.attention == "causal"


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base():
    alone = load_adapters([SIMCSE], base=BASE, attention="causal")
    ids = alone.tokenize(TEXTS, "query").pack().ids
    assert ids.tolist() == Embedder.load(BASE).tokenize(TEXTS, "query").pack().ids.tolist()


def test_adapters_of_two_directions_are_refused(tmp_path, base):
    trained(base, tmp_path / "1", 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    path = tmp_path / "2" / "tercet.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention": "causal"}))
    with pytest.raises(ModelError, match="trained in different directions; give the attention"):
        load_adapters([tmp_path / "1", tmp_path / "2"])


def test_adapters_need_a_base_and_there_has_to_be_one(tmp_path):
    with pytest.raises(ModelError, match="adapters must name at least one folder"):
        load_adapters([], base=BASE)
    folder = Path(shutil.copytree(MNTP, tmp_path / "mntp"))
    config = json.loads((folder / "adapter_config.json").read_text())
    nameless = {**config, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(nameless))
    with pytest.raises(ModelError, match="does not name its base"):
        load_adapters([folder], compat="llm2vec")


def test_a_published_model_reads_both_ways_with_its_own_pooling_and_length(monkeypatch):
    monkeypatch.chdir(FIXTURE)  # the adapter names its base "base"
    embedder = load_adapters([MNTP, SIMCSE], compat="llm2vec")
    settings = embedder.settings
    assert embedder.backbone.attention == "bidirectional"
    assert (settings.pooling, settings.normalize) == ("weighted_mean", False)
    assert (settings.query_tokens, settings.document_tokens) == (96, 96)


def test_tercets_own_reading_of_a_published_model_differs_only_where_counting_errs(tmp_path):
    # An instruction goes before the text, the template around both.
    mntp = Path(shutil.copytree(MNTP, tmp_path / "mntp"))
    config = json.loads((mntp / "config.json").read_text())
    named = {**config, "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2"}
    (mntp / "config.json").write_text(json.dumps(named))
    embedder = load_adapters([mntp], base=BASE, compat="llm2vec")
    assert embedder.settings.prompts == {"query": "[INST] ", "document": "[INST] "}
    encoder = Llm2VecEncoder(embedder.backbone, read_llm2vec([mntp]))
    pairs = [("", text) for text in TEXTS]
    counted, exact = encoder.tokenize(pairs), embedder.tokenize(TEXTS, "document").pack()
    assert counted.ids.tolist() == exact.ids.tolist()
    same = [i for i in range(5) if torch.equal(counted.take([i]).pooled, exact.take([i]).pooled)]
    assert 0 < len(same)
    found, recorded = embedder.encode(TEXTS), encoder.encode(pairs)
    np.testing.assert_allclose(found[same], recorded[same], atol=1e-5)


def test_without_an_instruction_tercets_own_reading_gives_the_peers_vectors():
    recorded = np.load(FIXTURE / "vectors.npz")["mntp/mean"]
    pairs = json.loads((FIXTURE / "recorded.json").read_text(encoding="utf-8"))["pairs"]
    separator = "!@#$%^&*()"  # is nothing special in a text
    plain = [
        i
        for i, (instruction, text) in enumerate(pairs)
        if not instruction and len(text) < 500 and separator not in text
    ]
    embedder = load_adapters([MNTP], base=BASE, compat="llm2vec")
    found = embedder.encode([pairs[i][1] for i in plain])
    assert len(plain) > 9
    np.testing.assert_allclose(found, recorded[plain], atol=1e-5)


def test_a_published_model_is_saved_with_its_own_reading(tmp_path):
    embedder = load_adapters([MNTP], base=BASE, compat="llm2vec")
    embedder.save(tmp_path / "out")
    again = Embedder.load(tmp_path / "out")
    assert again.settings == embedder.settings
    assert not again.settings.pool_special
    assert np.array_equal(again.encode(TEXTS), embedder.encode(TEXTS))
