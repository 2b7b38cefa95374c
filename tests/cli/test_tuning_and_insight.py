"""What ``tercet diagnose``, ``probe``, ``sizes`` and ``tune-weights`` print and save."""

import json
import re

import numpy as np
import pytest

from tercet.kinds import KINDS, Weights
from tercet.models.choices import LayerSettings
from tercet.models.embedder import Embedder
from tests.cli.lines import cells, write
from tests.toy import SENTENCES


@pytest.fixture(scope="session")
def triples(tmp_path_factory):
    """Beginnings, and three ways for each to go on."""
    rest = {"query": " in a file", "positive": " in a map", "negative": " of the moon"}
    file = tmp_path_factory.mktemp("triples") / "triples.jsonl"
    return write(file, *({"prefix": text, **rest} for text in SENTENCES[:4]))


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Words of the sentences, labelled by their length."""
    file = tmp_path_factory.mktemp("labelled") / "words.conll"
    kinds = ("SHORT", "LONG")
    rows = ["\n".join(f"{w} x {kinds[len(w) > 3]}" for w in text.split()) for text in SENTENCES]
    file.write_text("\n\n".join(rows) + "\n")
    return file


# --- diagnose ---------------------------------------------------------------------------------


def test_diagnose_prints_readings_and_layers_and_where_the_report_is(
    tercet, decoder_folder, encoder_folder, triples, tmp_path
):
    out = tmp_path / "diagnosis"
    ended = tercet(
        *("diagnose", "--model", decoder_folder, "--compare-with", encoder_folder),
        *("--triples", triples, "--out", out),
    )
    assert (ended.status, ended.err) == (0, "")
    rows = [cells(line) for line in ended.out.splitlines()]
    assert rows[0] == ["model and reading", "cosine, same", "cosine, other", "gap", "gap > 0"]
    ways = [f"{decoder_folder} {way}" for way in ("causal", "echo", "bidirectional")]
    assert [row[0] for row in rows[1:5]] == [*ways, f"{encoder_folder} bidirectional"]
    assert rows[5] == ["both ways and causal", "mean cosine", "lowest", "in layer", "last layer"]
    record = json.loads((out / "diagnosis.json").read_text())["models"]
    layers = record[str(decoder_folder)]["direction_map"]["layer_means"][1:]
    lowest = int(np.argmin(layers))
    numbers = [f"{number:.3f}" for number in (np.mean(layers), layers[lowest], layers[-1])]
    where = f"{lowest + 1} of 3"
    assert rows[6] == [str(decoder_folder), numbers[0], numbers[1], where, numbers[2]]
    assert rows[7:] == [[f"{out}/report.html"]] and (out / "report.html").exists()


def test_diagnose_of_an_encoder_alone_has_no_layers_to_compare(
    tercet, encoder_folder, triples, tmp_path
):
    ended = tercet("diagnose", "--model", encoder_folder, "--triples", triples, "--out", tmp_path)
    rows = [cells(line)[0] for line in ended.out.splitlines()]
    assert rows[1:] == [f"{encoder_folder} bidirectional", f"{tmp_path}/report.html"]


def test_material_that_cannot_be_read_is_named_before_a_model_is_loaded(
    refused, decoder_folder, triples, tmp_path, monkeypatch
):
    monkeypatch.setattr(Embedder, "load", None)
    words = ["diagnose", "--model", decoder_folder, "--out", tmp_path / "out"]
    bad = write(tmp_path / "bad.jsonl", {"prefix": "a", "query": "b", "positive": "c"})
    said = refused(*words, "--triples", bad)
    assert said.startswith(f"{bad}:1: ") and '"negative" is missing' in said
    said = refused(*words, "--triples", triples, tmp_path / "lost.txt")
    assert said == f"{tmp_path}/lost.txt: no such file"
    assert not (tmp_path / "out").exists()


def test_a_diagnosis_does_not_replace_the_report_of_a_run(
    refused, decoder_folder, triples, tmp_path
):
    (tmp_path / "report.html").write_text("of a run")
    said = refused("diagnose", "--model", decoder_folder, "--triples", triples, "--out", tmp_path)
    assert said.startswith(f"{tmp_path}: is not a diagnosis and would be overwritten")
    assert (tmp_path / "report.html").read_text() == "of a run"


# --- probe ------------------------------------------------------------------------------------


def test_probe_compares_models_with_what_words_alone_tell(
    tercet, decoder_folder, encoder_folder, labelled
):
    words = ["probe", "--model", decoder_folder, labelled, "--train-data", labelled]
    ended = tercet(*words, "--compare-with", encoder_folder)
    assert (ended.status, ended.err) == (0, "")
    rows = [cells(line) for line in ended.out.splitlines()]
    assert rows[0] == ["model", "accuracy", "minus first", "macro F1", "minus first", "cut"]
    models = [str(decoder_folder), str(encoder_folder)]
    assert [row[0] for row in rows[1:]] == ["most frequent label", "label of the word", *models]
    assert all(re.fullmatch(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", row[1]) for row in rows[1:])
    assert rows[2][1].startswith("1.000") and rows[3][2] == "-"
    assert tercet(*words, "--predictor").out != tercet(*words).out
    assert tercet(*words, "--attention", "bidirectional").out != tercet(*words).out


@pytest.mark.parametrize(
    ("train", "test", "problem"),
    [
        ("a X\nb Y Z\n", "a X\n", "train.conll:2: has 3 columns, but line 1 has 2"),
        ("a X\nb Y\n", "a X\nb\n", "test.conll:2: has 1 columns, but line 1 has 2"),
        ("a X\nb X\n", "a X\n", "the training sentences have only one label, 'X'"),
        ("a _\nb _\n", "a X\n", "the training sentences have no labelled word"),
        ("a X\nb Y\n", "a _\n", "the test sentences have no labelled word"),
        ("\n\n", "a X\n", "train.conll: holds no sentences"),
    ],
)
def test_labels_that_cannot_be_learned_are_named(
    refused, decoder_folder, tmp_path, train, test, problem
):
    files = []
    for name, text in (("train", train), ("test", test)):
        (tmp_path / f"{name}.conll").write_text(text)
        files += [f"--{name}", tmp_path / f"{name}.conll"]
    files[0], files[2:] = "--train-data", files[3:]
    assert problem in refused("probe", "--model", decoder_folder, *files)


def test_a_column_that_holds_no_labels_is_named(refused, decoder_folder, labelled):
    words = ["probe", "--model", decoder_folder, labelled, "--train-data", labelled, "--column"]
    assert "words.conll:1: has only 3 columns; there is no column 4" in refused(*words, "4")
    assert refused(*words, "1").startswith("column 1 cannot hold labels")
    assert refused(*words, "2") == (
        "the training sentences have only one label, 'x'; a probe needs at least two labels"
    )


def test_diagnose_shows_how_much_of_its_dictionary_each_head_uses(tercet, decoder_folder, tmp_path):
    layer = LayerSettings(latents=6, heads=2, init="normal")
    Embedder.load(decoder_folder, attention="bidirectional", layer=layer).save(tmp_path / "model")
    triples = tmp_path / "triples.jsonl"
    words = {"prefix": "the editor", "query": " for mail", "positive": " of mail"}
    triples.write_text(json.dumps(words | {"negative": " for music"}) + "\n")
    out = tmp_path / "out"
    ended = tercet("diagnose", "--model", tmp_path / "model", "--triples", triples, "--out", out)
    assert ended.status == 0, ended.err
    shown = [line.split() for line in ended.out.splitlines() if line.startswith(("head ", "all "))]
    assert [row[:2] for row in shown] == [["head", "1"], ["head", "2"], ["all", "heads"]]
    assert all(0 < float(row[4]) <= 1 for row in shown)
    assert (out / "latents.png").stat().st_size > 1_000


# --- sizes ----------------------------------------------------------------------------------------


@pytest.fixture
def short_model(encoder_folder, tmp_path):
    Embedder.load(encoder_folder, dims=(16,)).save(tmp_path / "model")
    return tmp_path / "model"


def test_sizes_shows_every_way_to_store_vectors(tercet, short_model, files, tmp_path):
    figures, out = tmp_path / "sizes.json", tmp_path / "out"
    words = ["eval", files / "pairs.jsonl", "--model", short_model, "--compressed"]
    ended = tercet(*words, "--json", figures, "--out", out)
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
    assert (out / "sizes.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "scores.json").read_text()) == record


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--dims", "65"], "--dims must be between 1 and 64; got 65"),
        (["--metric", "good@1"], 'no metric "good@1"'),
        (["--split", "test"], "--split applies to folders only"),
        (["--task", "lookup"], "no prompt for the task 'lookup'"),
    ],
)
def test_what_cannot_be_shown_is_told(refused, short_model, files, words, problem):
    assert problem in refused(
        "eval", files / "pairs.jsonl", "--model", short_model, "--compressed", *words
    )


# --- tune-weights ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(encoder_folder, tmp_path_factory):
    """A model whose sparse vectors are the overlap of words, and whose dense ones know nothing."""
    folder = tmp_path_factory.mktemp("kinds") / "model"
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8).save(folder)
    return folder


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    file = tmp_path_factory.mktemp("dev") / "dev.jsonl"
    return write(file, *({"query": " ".join(t.split()[1:4]), "positives": [t]} for t in SENTENCES))


def test_weights_are_shown_beside_the_usual_ones_and_each_kind(tercet, model, dev):
    before = (model / "tercet.json").read_bytes()
    ended = tercet("tune", "weights", dev, "--model", model)
    rows = [cells(line) for line in ended.out.splitlines()]
    assert (ended.status, rows[0]) == (0, ["12 queries, 12 documents"])
    assert rows[1] == ["weights", *KINDS, "ndcg@10, held out", "tuned minus these"]
    assert [row[0] for row in rows[2:]] == ["tuned", "usual", *KINDS]
    assert rows[3][1:4] == ["1", "0.3", "1"] and rows[5][1:4] == ["0", "1", "0"]
    assert all(re.fullmatch(r"[+-]\d\.\d{3} \[[+-].*\]", row[5]) for row in rows[3:])
    assert float(rows[2][2]) > 0, "words tell which document is right"
    assert "which is too optimistic" in ended.err and "nothing was saved" in ended.err
    assert (model / "tercet.json").read_bytes() == before


def test_saved_weights_are_taken_by_eval_for_their_task(tercet, model, dev, tmp_path):
    ended = tercet(
        "tune", "weights", dev, "--model", model, "--task", "lookup", "--save", "--folds", "3"
    )
    assert f"{model}: saved these weights for the task 'lookup'" in ended.out
    kept = Embedder.load(model).settings.weights
    assert list(kept) == ["lookup"]
    shown = [cells(line) for line in ended.out.splitlines()][2]
    assert shown[1:4] == [f"{kept['lookup'].of(kind):g}" for kind in KINDS]
    file = tmp_path / "figures.json"
    words = ["eval", dev, "--model", model, "--no-bm25", "--json", file]
    assert tercet(*words, "--task", "lookup").status == 0
    search = json.loads(file.read_text())["search"][str(model)]
    assert Weights(**search["weights"]) == kept["lookup"]
    assert tercet(*words).status == 0
    search = json.loads(file.read_text())["search"][str(model)]
    assert Weights(**search["weights"]) == Weights()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--metric", "good@1"], 'no metric "good@1"'),
        (["--folds", "13"], "folds must be between 2 and the number of queries, 12; got 13"),
        (["--kind", "dense"], "makes only dense vectors"),
        (["--kind", "dense", "--kind", "colbert"], "'colbert' is not one of"),
    ],
)
def test_what_cannot_be_tuned_is_told(refused, model, dev, words, problem):
    assert problem in refused("tune", "weights", dev, "--model", model, *words)


def test_a_model_of_one_kind_and_one_without_settings_are_told(
    refused, encoder_folder, dev, tmp_path, monkeypatch
):
    assert "makes only dense vectors" in refused("tune", "weights", dev, "--model", encoder_folder)
    monkeypatch.setattr(Embedder, "load", None)  # found out before the work
    assert "has no tercet.json" in refused(
        "tune", "weights", dev, "--model", encoder_folder, "--save"
    )
    assert "lost.jsonl" in refused(
        "tune", "weights", tmp_path / "lost.jsonl", "--model", encoder_folder
    )


def test_a_folder_in_the_layout_of_beir_is_read_by_its_split(tercet, model, tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", *({"_id": f"d{i}", "text": t} for i, t in enumerate(SENTENCES)))
    queries = [{"_id": f"q{i}", "text": t.split()[-1]} for i, t in enumerate(SENTENCES)]
    write(folder / "queries.jsonl", *queries)
    for split, count in (("dev", 7), ("test", 9)):
        lines = "".join(f"q{i}\td{i}\t1\n" for i in range(count))
        (folder / f"qrels/{split}.tsv").write_text(lines)
    assert tercet("tune", "weights", folder, "--model", model).out.startswith(
        "7 queries, 12 documents"
    )
    ended = tercet(
        "tune",
        "weights",
        folder,
        "--model",
        model,
        "--split",
        "test",
        "--kind",
        "dense",
        "--kind",
        "sparse",
    )
    assert ended.out.startswith("9 queries, 12 documents")
    assert cells(ended.out.splitlines()[1])[:3] == ["weights", "dense", "sparse"]


def test_kinds_that_are_left_out_get_no_weight_and_that_is_said(tercet, model, dev):
    """What was measured is what is kept: the others' weights were found without these kinds."""
    words = ["tune", "weights", dev, "--model", model, "--task", "two", "--save", "--folds", "3"]
    ended = tercet(*words, "--kind", "dense", "--kind", "sparse")
    kept = Embedder.load(model).settings.weights["two"]
    assert kept.multi == 0 and kept.sparse > 0
    assert "for the task 'two'; multi has the weight 0: sums leave it out\n" in ended.out
    assert "weights before" not in ended.err
    again = tercet(*words)
    assert "has the weight 0" not in again.out
    before = f"the weights before: {kept.dense:g},{kept.sparse:g},0"
    assert before in again.err.splitlines()
    unsaved = tercet(
        *(word for word in words if word != "--save"), "--kind", "dense", "--kind", "sparse"
    )
    assert "has the weight 0" not in unsaved.out
