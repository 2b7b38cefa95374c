import json
import re

import pytest

from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tests.cli.lines import cells, write
from tests.toy import SENTENCES


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
    ended = tercet("tune-weights", model, dev)
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
    ended = tercet("tune-weights", model, dev, "--task", "lookup", "--save", "--folds", "3")
    assert f"{model}: saved these weights for the task 'lookup'" in ended.out
    kept = Embedder.load(model).settings.weights
    assert list(kept) == ["lookup"]
    shown = [cells(line) for line in ended.out.splitlines()][2]
    assert shown[1:4] == [f"{kept['lookup'].of(kind):g}" for kind in KINDS]
    file = tmp_path / "figures.json"
    words = ["eval", model, dev, "--no-bm25", "--json", file]
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
        (["--kinds", "dense"], "makes only dense vectors"),
        (["--kinds", "dense,colbert"], "kinds are 'dense,colbert'; choose from"),
    ],
)
def test_what_cannot_be_tuned_is_told(refused, model, dev, words, problem):
    assert problem in refused("tune-weights", model, dev, *words)


def test_a_model_of_one_kind_and_one_without_settings_are_told(
    refused, encoder_folder, dev, tmp_path, monkeypatch
):
    assert "makes only dense vectors" in refused("tune-weights", encoder_folder, dev)
    monkeypatch.setattr(Embedder, "load", None)  # found out before the work
    assert "has no tercet.json" in refused("tune-weights", encoder_folder, dev, "--save")
    assert "lost.jsonl" in refused("tune-weights", encoder_folder, tmp_path / "lost.jsonl")


def test_a_folder_in_the_layout_of_beir_is_read_by_its_split(tercet, model, tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", *({"_id": f"d{i}", "text": t} for i, t in enumerate(SENTENCES)))
    queries = [{"_id": f"q{i}", "text": t.split()[-1]} for i, t in enumerate(SENTENCES)]
    write(folder / "queries.jsonl", *queries)
    for split, count in (("dev", 7), ("test", 9)):
        lines = "".join(f"q{i}\td{i}\t1\n" for i in range(count))
        (folder / f"qrels/{split}.tsv").write_text(lines)
    assert tercet("tune-weights", model, folder).out.startswith("7 queries, 12 documents")
    ended = tercet("tune-weights", model, folder, "--split", "test", "--kinds", "dense,sparse")
    assert ended.out.startswith("9 queries, 12 documents")
    assert cells(ended.out.splitlines()[1])[:3] == ["weights", "dense", "sparse"]


def test_kinds_that_are_left_out_get_no_weight_and_that_is_said(tercet, model, dev):
    """What was measured is what is kept: the others' weights were found without these kinds."""
    words = ["tune-weights", model, dev, "--task", "two", "--save", "--folds", "3"]
    ended = tercet(*words, "--kinds", "dense,sparse")
    kept = Embedder.load(model).settings.weights["two"]
    assert kept.multi == 0 and kept.sparse > 0
    assert "for the task 'two'; multi has the weight 0: sums leave it out\n" in ended.out
    assert "weights before" not in ended.err
    again = tercet(*words)
    assert "has the weight 0" not in again.out
    before = f"the weights before: {kept.dense:g},{kept.sparse:g},0"
    assert before in again.err.splitlines()
    unsaved = tercet(*(word for word in words if word != "--save"), "--kinds", "dense,sparse")
    assert "has the weight 0" not in unsaved.out
