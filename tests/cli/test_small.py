"""Vectors in few bytes, from the command line."""

import json

import pytest

from tercet.kinds import KINDS
from tercet.models.embedder import Embedder
from tests.cli.lines import cells, write


@pytest.fixture
def model(encoder_folder, tmp_path):
    Embedder.load(encoder_folder, dims=(16,)).save(tmp_path / "model")
    return tmp_path / "model"


def test_ranges_are_learned_shown_and_kept(tercet, model, files):
    shown = tercet("calibrate", model, files / "texts.txt")
    rows = [cells(line) for line in shown.out.splitlines()]
    assert rows[0] == ["coordinates", "codes", "range", "beyond it", "error", "bytes"]
    wanted = [("64", "int8", "64"), ("64", "int4", "32"), ("64", "binary", "8")]
    wanted += [("16", "int8", "16"), ("16", "int4", "8"), ("16", "binary", "2")]
    assert [(row[0], row[1], row[5]) for row in rows[1:]] == wanted
    assert "12 texts are few" in shown.err and "nothing was saved" in shown.err
    assert Embedder.load(model).settings.ranges == {}
    kept = tercet("calibrate", model, files / "texts.txt", "--save", "--dims", "8")
    assert kept.out.endswith(f"{model}: saved these ranges\n")
    assert "was not trained to be cut to 8 coordinates" in kept.err
    ranges = Embedder.load(model).settings.ranges
    assert list(ranges) == [8] and len(ranges[8].centre) == 8
    assert f"{ranges[8].int4:.4f}" == cells(kept.out.splitlines()[2])[2]


def test_eval_measures_documents_in_codes(tercet, model, files, tmp_path):
    figures = tmp_path / "figures.json"
    words = ["eval", model, files / "pairs.jsonl", "--no-bm25", "--dims", "16", "--json", figures]
    ended = tercet(*words, "--precision", "int4")
    assert ended.status == 0
    assert f"{model}: documents in int4, 8 bytes each, queries in full; range " in ended.err
    assert "learned from these documents, not from queries" in ended.err
    found = json.loads(figures.read_text())["search"][str(model)]
    assert (found["bytes"], found["dims"], found["learned_here"]) == (8, 16, True)
    tercet("calibrate", model, files / "texts.txt", "--save")
    again = tercet(*words, "--precision", "int4")
    kept = Embedder.load(model).settings.ranges[16].int4
    assert f"range {kept:.4f}, saved with the model" in again.err
    assert json.loads(figures.read_text())["search"][str(model)]["limit"] == kept


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--weights", "1,1,1"], "applies to dense vectors only; remove --weights"),
        (["--kinds", "dense,sparse"], "dense, sparse are measured; add --kinds dense"),
        ([], "dense, sparse, multi are measured; add --kinds dense"),
    ],
)
def test_codes_are_of_dense_vectors(refused, encoder_folder, files, tmp_path, words, problem):
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8).save(tmp_path / "kinds")
    command = ["eval", tmp_path / "kinds", files / "pairs.jsonl", "--precision", "int8"]
    assert problem in refused(*command, *words)


def test_dense_vectors_of_a_model_with_others_can_be_measured_in_codes(
    tercet, encoder_folder, files, tmp_path
):
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8).save(tmp_path / "kinds")
    command = ["eval", tmp_path / "kinds", files / "pairs.jsonl", "--precision", "binary"]
    ended = tercet(*command, "--kinds", "dense", "--no-bm25")
    assert ended.status == 0 and "documents in binary, 8 bytes each" in ended.err


def test_sets_without_documents_are_not_measured_in_codes(refused, model, tmp_path):
    pairs = [{"text1": "a b", "text2": "c", "score": i} for i in range(3)]
    file = write(tmp_path / "pairs.jsonl", *pairs)
    told = refused("eval", model, file, "--precision", "int4")
    assert "is not a retrieval set" in told and "codes of --precision do not apply" in told


def test_sizes_shows_every_way_to_store_vectors(tercet, model, files, tmp_path):
    figures, plot = tmp_path / "sizes.json", tmp_path / "sizes.png"
    ended = tercet("sizes", model, files / "pairs.jsonl", "--json", figures, "--plot", plot)
    rows = [cells(line) for line in ended.out.splitlines()]
    assert (ended.status, rows[0]) == (0, ["22 queries, 24 documents"])
    header = ["coordinates", "stored as", "bytes", "ndcg@10", "minus the first", "kept"]
    assert rows[1] == header and len(rows) == 12
    assert rows[2][:3] == ["64", "float32", "256"] and rows[2][-1] == "100.0%"
    assert rows[-1][:3] == ["16", "binary", "2"]
    assert "codes of 64, 16 coordinates were learned from the documents of this set" in ended.err
    record = json.loads(figures.read_text())
    assert record["metric"] == "ndcg@10" and len(record["rows"]) == 10
    assert record["rows"][0]["minus_first"]["mean"] == 0
    assert [f"{row['ndcg@10']['mean']:.3f}" for row in record["rows"]] == [
        row[3].split()[0] for row in rows[2:]
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--dims", "65"], "--dims must be between 1 and 64; got 65"),
        (["--metric", "good@1"], 'no metric "good@1"'),
        (["--split", "test"], "--split applies to folders only"),
        (["--task", "lookup"], "no prompt for the task 'lookup'"),
    ],
)
def test_what_cannot_be_shown_is_told(refused, model, files, words, problem):
    assert problem in refused("sizes", model, files / "pairs.jsonl", *words)


def test_what_cannot_be_learned_is_told(refused, encoder_folder, model, files, tmp_path):
    write(tmp_path / "blank.jsonl", {"text": " "})
    assert "contains no text" in refused("calibrate", model, tmp_path / "blank.jsonl")
    told = refused("calibrate", encoder_folder, files / "texts.txt", "--save")
    assert "so ranges of codes cannot be kept there" in told
