"""``benchmarks/judged.py`` on tiny sets made here: what it keeps, compares and may choose by."""

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import judged, judged_cells, judged_rows, judged_sets, judged_training
from benchmarks.judged_rows import Row
from benchmarks.judged_sets import Cell, Found, Job, Place
from tercet.curate.mining.rules import MiningRule
from tercet.data.batches.sampler import BatchPlan, Sampler
from tercet.data.files.conll import LabelledSentence
from tercet.data.files.sources import iter_examples, open_source
from tercet.evaluate.report.intervals import Interval
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tests.toy import SENTENCES


def lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def sets(tmp_path) -> Path:
    """SciFact of 12 abstracts; training claims 0 to 7, test claims 8 to 11."""
    folder = tmp_path / "sets"
    beir(folder / "scifact", train=range(8), test=range(8, 12))
    pairs = [
        {"text1": a, "text2": b, "score": n % 6} for n, (a, b) in enumerate(pairwise(SENTENCES))
    ]
    for name in ("en.stsb", "ko.korsts", "ja.jsts"):
        for split in ("dev", "test"):
            lines(folder / f"sts/{name}.{split}.jsonl", pairs)
        others = zip(SENTENCES, SENTENCES[2:], strict=False)  # not those of the test
        trained = [{"text1": a, "text2": b, "score": 5 - n % 6} for n, (a, b) in enumerate(others)]
        lines(folder / f"sts/{name}.train.jsonl", trained)
    for name in ("xquad/en", "xquad/de-en"):
        beir(folder / name, test=range(12))
    return folder


def beir(folder: Path, **splits: range) -> None:
    """Write claims, of which each is answered by the abstract of its number."""
    texts = list(enumerate(SENTENCES))
    lines(folder / "corpus.jsonl", [{"_id": f"d{n}", "title": "", "text": it} for n, it in texts])
    claims = [{"_id": f"{n}", "text": f"claim {n}: {it[:12]}"} for n, it in texts]
    lines(folder / "queries.jsonl", claims)
    (folder / "qrels").mkdir()
    for split, rows in splits.items():
        judged_pairs = "".join(f"{n}\td{n}\t1\n" for n in rows)
        (folder / "qrels" / f"{split}.tsv").write_text(f"query\tcorpus\tscore\n{judged_pairs}")


@pytest.fixture
def place(sets, tmp_path, monkeypatch) -> Place:
    monkeypatch.setattr(judged_sets, "DEV", 3)
    judged_sets.opened.cache_clear()
    return Place(sets, tmp_path / "out")


def texts_of(cell: str, scores: Any, place: Place, *, of: str, seed: int = 0) -> None:
    """Keep answers as a cell would."""
    path = place.result(cell, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"rate": 1e-4, "steps": 5, "training_minutes": 1.0}
    record = {
        "cell": cell,
        "facts": facts,
        "minutes": 2.0,
        "commit": "abc",
        "answers": {of: scores},
    }
    path.write_text(json.dumps(record))


# ---- what is trained on and what chooses ---------------------------------------------------------


def test_no_model_trains_on_claims_of_the_dev_set_or_of_the_test(place):
    data = judged_sets.both_claims(place.sets)
    rows = list(iter_examples(judged_cells.claims(place)))
    assert len(rows) == 5 and len(data.queries) == 3 + 4
    assert not {row.query for row in rows} & {*data.queries}
    test = RetrievalSet.from_folder(place.sets / "scifact", "test")
    assert data.queries[3:] == test.queries


def test_both_sets_of_claims_are_measured_as_each_alone(place):
    answers = judged_sets.split_answers(judged_sets.opened(place, "scifact").words())
    test = judged_sets.open_set(place.sets / "scifact", split="test")
    assert np.allclose(answers["scifact"], test.words())
    assert len(answers["scifact dev"]) == 3


def test_a_rate_is_chosen_by_the_dev_set_alone(place):
    for cell, dev, test in (("a/low", 0.2, 0.9), ("a/high", 0.6, 0.1)):
        texts_of(cell, [dev] * 3, place, of="scifact dev")
        path = place.result(cell, 0)
        record = json.loads(path.read_text())
        record["answers"]["scifact"] = [test] * 4
        path.write_text(json.dumps(record))
    assert place.best(["a/low", "a/high"], "scifact dev") == "a/high"


def test_the_dev_set_of_a_similarity_chooses_by_its_correlation(place):
    gold = np.arange(11) % 6
    texts_of("a/right", (gold / 10).tolist(), place, of="sts/en dev")
    texts_of("a/large", (1 - gold / 10).tolist(), place, of="sts/en dev")
    assert place.best(["a/large", "a/right"], "sts/en dev") == "a/right"


def test_a_part_of_the_queries_keeps_its_judgements(place):
    data = judged_sets.both_claims(place.sets)
    dev = judged_cells.subset(data, slice(3))
    assert dev.queries == data.queries[:3] and len(dev.judgements) == 3
    assert [int(row) for row in dev.judgements.docs] == [
        int(row) for row in data.judgements.docs[:3]
    ]


def test_training_claims_that_equal_measured_ones_are_left_out_and_counted(place, capsys):
    path = place.sets / "scifact" / "queries.jsonl"
    queries = [json.loads(line) for line in path.read_text().splitlines()]
    before = [row.query for row in iter_examples(judged_cells.claims(place))]
    same = next(each for each in queries if each["text"] == before[0])
    same["text"] = f"  {queries[8]['text'].upper()} "  # a test claim, but for case and spaces
    lines(path, queries)
    judged_cells.claims(place).unlink()
    capsys.readouterr()
    after = [row.query for row in iter_examples(judged_cells.claims(place))]
    assert after == before[1:]
    assert "claims: 1 of 5 rows equal one of the dev set or the test" in capsys.readouterr().out


def test_training_pairs_that_equal_measured_ones_in_either_order_are_left_out(place, capsys):
    path = place.sets / "sts" / f"{judged_sets.STS['ko']}.train.jsonl"
    clean = [json.loads(line) for line in path.read_text().splitlines()]
    swapped = {"text1": SENTENCES[1].upper(), "text2": f" {SENTENCES[0]}", "score": 5}
    lines(path, [swapped, *clean])
    graded = judged_cells.graded(place, "ko")
    assert [json.loads(line) for line in graded.read_text().splitlines()] == clean
    assert f"1 of {len(clean) + 1} rows equal one of the dev set or the" in capsys.readouterr().out
    rows = list(iter_examples(judged_cells.as_positives(place, "ko")))
    high = {frozenset((it["text1"], it["text2"])) for it in clean if it["score"] >= 4}
    assert rows and {frozenset((row.query, *row.positives)) for row in rows} <= high


def test_a_file_for_later_cells_is_named_after_the_numbers_that_decide_it(place, monkeypatch):
    before = judged_cells.claims(place), judged_cells.mined_claims(place, "minilm")
    monkeypatch.setattr(judged_sets, "DEV", 4)
    assert before[0].name == "claims.dev-3.seed-0.jsonl"
    assert judged_cells.claims(place) != before[0]
    assert len(list(iter_examples(judged_cells.claims(place)))) == 4
    assert judged_cells.mined_claims(place, "minilm") != before[1]
    monkeypatch.setitem(judged_cells.MINING, "minilm", MiningRule(kind="percent", value=0.5))
    assert "percent-0.5" in judged_cells.mined_claims(place, "minilm").name


@pytest.mark.parametrize(("rows", "size", "sizes"), [(7, 2, [2, 2, 2]), (8, 3, [3, 3, 2])])
def test_the_peer_gets_the_batches_of_our_training(place, rows, size, sizes):
    path = judged_cells.mined_claims(place, "minilm")
    texts = [
        {"query": f"q{n}", "positives": [f"p{n}", "more"], "negatives": ["a", "b"]}
        for n in range(rows)
    ]
    # a row without a negative would leave a hole in the peer's columns
    lines(path, [*texts, {"query": "q", "positives": ["p"]}])
    source = open_source(judged_cells.one_positive(place))
    assert len(source) == rows
    found = judged_cells.batches_in_order(source, steps=5, batch_size=size, seed=3)
    sampler, expected = Sampler([source], BatchPlan(size, 3, epochs=5)), []
    for _ in range(5):
        batch = sampler.next_batch()
        assert batch is not None
        expected.append(
            [[it.query, it.positives[0], it.negatives[0]] for it in batch.examples([source])]
        )
    assert found == expected and [len(batch) for batch in found] == [*sizes, *sizes[:2]]


def test_a_sentence_counts_its_labelled_words_also_where_the_model_cut_it():
    test = [
        LabelledSentence(("a", "b", "c"), ("X", "_", "Y")),
        LabelledSentence(("d",), ("X",)),
    ]
    assert judged_sets.tallies(test, [("X", "X"), ("Y",)]).tolist() == [[1, 2], [0, 1]]


def test_the_difference_of_two_probes_is_that_of_their_accuracies(place):
    (place.sets / "ud").mkdir()
    for split in ("dev", "test"):
        path = place.sets / "ud" / f"en_ewt-ud-{split}.conllu"
        word = "\t".join(["1", "word", "word", "NOUN", *"_" * 6])
        path.write_text(f"{word}\n\n")
    words = judged_sets.word_set(place.sets)
    one, other = np.array([[3, 4], [1, 1]]), np.array([[1, 4], [1, 1]])
    assert words.figure(one, 0).mean == pytest.approx(4 / 5)
    assert words.minus(one, other, 0).mean == pytest.approx(2 / 5)


# ---- running -------------------------------------------------------------------------------------


def answer(job: Job) -> Found:
    return Found({"sts/en": np.arange(11) / 3}, {"steps": job.seed})


CELLS = {
    cell.name: cell
    for cell in (
        Cell("a/second", answer, 1, ("a/first",), seeds=2),
        Cell("a/first", answer, 2),
        Cell("b/other", answer, 4, ("a/second",)),
    )
}


def test_a_cell_is_run_after_those_that_it_needs_and_once():
    found = [(cell.name, seed) for cell, seed in judged.jobs_of(CELLS, ["b/*", "a/second"])]
    assert found == [("a/first", 0), ("a/second", 0), ("b/other", 0), ("a/second", 1)]


def test_the_first_seed_of_a_chosen_cell_takes_no_time():
    cells = judged_cells.all_cells()
    mined = cells["scifact/minilm-mined"]
    assert mined.estimate(0) < 1 < mined.estimate(1)
    assert cells["scifact/minilm-pairs"].estimate(0) > 1


def test_an_unknown_cell_is_named():
    with pytest.raises(SystemExit, match="no cell is named c/x; --list shows all"):
        judged.jobs_of(CELLS, ["c/x"])


def test_cells_that_are_done_are_not_run_again_unless_asked_for(place, monkeypatch, capsys):
    ran: list[tuple[str, int]] = []

    def run(given, cell: Cell, seed: int) -> bool:
        ran.append((cell.name, seed))
        judged.run_here(place, cell, seed)
        return True

    monkeypatch.setattr(judged, "all_cells", lambda: CELLS)
    monkeypatch.setattr(judged, "run_in_process", run)
    monkeypatch.setattr(judged, "tables", lambda: {"T": [Row("x", "a/first", "sts/en")]})
    words = ["--sets", str(place.sets), "--out", str(place.out)]
    words += ["--results", str(place.out / "judged.json")]
    judged.main([*words, "--only", "a/first"])
    assert ran == [("a/first", 0)]
    judged.main([*words, "--only", "a/*"])
    assert ran == [("a/first", 0), ("a/second", 0), ("a/second", 1)]
    judged.main([*words, "--only", "a/*"])
    assert len(ran) == 3
    judged.main([*words, "--only", "a/first", "--again"])
    assert len(ran) == 4
    judged.main([*words, "--list"])
    said = capsys.readouterr().out
    assert "b/other, seed 0: about 4 min" in said
    assert "1 of 4 are left: about 0.1 hours of one core" in said
    (row,) = json.loads((place.out / "judged.json").read_text())["rows"]
    assert row["set"] == "sts/en" and row["seeds"] == 1 and row["commit"]


def test_a_cell_that_is_run_again_is_trained_again(place, monkeypatch):
    cell = Cell("a/kept", answer, 1, keeps_model=True)
    folder = place.model("a/kept")
    found: list[bool] = []

    def run(given, cell: Cell, seed: int) -> bool:
        found.append(folder.exists())
        judged.run_here(place, cell, seed)
        return True

    monkeypatch.setattr(judged, "all_cells", lambda: {cell.name: cell})
    monkeypatch.setattr(judged, "run_in_process", run)
    monkeypatch.setattr(judged, "tables", dict)
    words = ["--sets", str(place.sets), "--out", str(place.out), "--again"]
    (folder / "model").mkdir(parents=True)
    judged.main([*words, "--results", str(place.out / "judged.json")])
    assert found == [False]


@pytest.mark.parametrize("left", ["model/weights", "checkpoint.pt"])
def test_a_training_that_was_begun_before_has_no_minutes(place, left, capsys):
    job = Job(place, "a/first", 0)
    (job.folder / left).parent.mkdir(parents=True)
    (job.folder / left).touch()
    assert job.was_begun
    judged.run_here(place, CELLS["a/first"], 0)
    kept = place.kept("a/first")
    assert kept is not None and kept["minutes"] is None
    judged.show(place, [(CELLS["a/first"], 0)], [])
    assert "a/first, seed 0: done, commit" in capsys.readouterr().out
    assert judged.sum_of([2.0, None]) is None and judged.sum_of([2.0, 1.5]) == 3.5


def test_a_cell_that_fails_stops_only_those_that_need_it(place, monkeypatch):
    ran: list[str] = []

    def run(given, cell: Cell, seed: int) -> bool:
        ran.append(cell.name)
        if cell.name == "a/first":
            return False
        judged.run_here(place, cell, seed)
        return True

    cells = {**CELLS, "c/alone": Cell("c/alone", answer, 1)}
    monkeypatch.setattr(judged, "all_cells", lambda: cells)
    monkeypatch.setattr(judged, "run_in_process", run)
    monkeypatch.setattr(judged, "tables", lambda: {"T": [Row("x", "c/alone", "sts/en")]})
    words = ["--sets", str(place.sets), "--out", str(place.out)]
    with pytest.raises(SystemExit) as failure:
        judged.main([*words, "--results", str(place.out / "judged.json")])
    assert ran == ["a/first", "c/alone"]
    said = str(failure.value).splitlines()
    assert said[:3] == [
        "these cells failed:",
        "a/first, seed 0",
        "a/second, seed 0: a/first is missing",
    ]
    assert json.loads((place.out / "judged.json").read_text())["rows"]


def test_answers_are_kept_with_seed_minutes_and_commit_and_the_model_is_deleted(place):
    job = Job(place, "a/second", 1)
    job.folder.mkdir(parents=True)
    judged.run_here(place, CELLS["a/second"], 1)
    kept = place.kept("a/second", 1)
    assert kept is not None and not job.folder.exists()
    assert kept["facts"] == {"steps": 1} and kept["seed"] == 1
    assert kept["commit"] and kept["minutes"] >= 0
    assert kept["answers"]["sts/en"][1] == 0.333333


def test_a_chosen_cell_is_recorded_with_the_commit_and_minutes_of_its_training(place):
    texts_of("a/high", [0.5], place, of="scifact")
    judged.run_here(place, Cell("a/best", lambda job: Found(same_as="a/high"), 1), 0)
    kept = place.kept("a/best")
    assert kept is not None and kept["cell"] == "a/best" and kept["same_as"] == "a/high"
    assert (kept["minutes"], kept["commit"], kept["facts"]["rate"]) == (2.0, "abc", 1e-4)


def test_a_model_that_later_cells_need_stays(place):
    job = Job(place, "a/first", 0)
    job.folder.mkdir(parents=True)
    judged.run_here(place, Cell("a/first", answer, 1, keeps_model=True), 0)
    assert job.folder.exists()


# ---- comparing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ((0.01, 0.03), "better"),
        ((-0.01, 0.03), "no difference shown"),
        ((-0.03, -0.01), "worse"),
        ((0.0, 0.03), "no difference shown"),
    ],
)
def test_a_verdict_follows_from_the_interval(bounds, said):
    assert judged.verdict(Interval(sum(bounds) / 2, bounds[0], bounds[1], 300)) == said


def rows_of(place: Place, monkeypatch, *rows: Row) -> list[dict]:
    monkeypatch.setattr(judged, "tables", lambda: {"SciFact": list(rows)})
    seeds = {row.cell: 2 if place.result(row.cell, 1).exists() else 1 for row in rows}
    cells = {cell: Cell(cell, answer, 1, seeds=count) for cell, count in seeds.items()}
    return judged.measured_rows(place, cells)


def test_a_row_compares_the_mean_over_seeds_query_by_query(place, monkeypatch):
    texts_of("s/base", [0.0, 0.5, 0.5, 1.0], place, of="scifact")
    texts_of("s/new", [0.2, 0.7, 0.7, 1.0], place, of="scifact", seed=0)
    texts_of("s/new", [0.2, 0.5, 0.7, 1.0], place, of="scifact", seed=1)
    base, new = rows_of(
        place,
        monkeypatch,
        Row("base", "s/base", "scifact"),
        Row("new", "s/new", "scifact", "s/base"),
    )
    assert base["verdict"] is None and base["seeds"] == 1 and base["spread"] is None
    assert new["figure"][0] == 0.625 and new["difference"][0] == 0.125
    assert new["seeds"] == 2 and new["minutes"] == 4.0 and new["training_minutes"] == 1.0
    assert new["spread"] == pytest.approx(0.0354, abs=1e-4)  # of 0.65 and 0.6
    assert (new["metric"], new["commit"], new["steps"]) == ("nDCG@10", "abc", 5)


def test_two_cells_are_compared_on_the_seeds_that_both_have(place, monkeypatch):
    for seed, score in ((0, 0.5), (2, 0.7)):  # seed 1 failed
        texts_of("s/base", [score] * 4, place, of="scifact", seed=seed)
    for seed, score in ((0, 0.6), (1, 0.0), (2, 0.9)):
        texts_of("s/new", [score] * 4, place, of="scifact", seed=seed)
    monkeypatch.setattr(judged, "tables", lambda: {"T": [Row("new", "s/new", "scifact", "s/base")]})
    cells = {name: Cell(name, answer, 1, seeds=3) for name in ("s/base", "s/new")}
    (row,) = judged.measured_rows(place, cells)
    assert row["seeds"] == 2 and row["figure"][0] == 0.75
    assert row["difference"][0] == pytest.approx(0.15)
    cells["s/base"] = Cell("s/base", answer, 1)  # of one seed, which all are compared with
    (row,) = judged.measured_rows(place, cells)
    assert row["seeds"] == 3 and row["figure"][0] == 0.5 and row["difference"][0] == 0.0


def test_similarity_is_compared_on_the_seeds_that_both_have(place, monkeypatch):
    gold = np.arange(11) % 6 / 10
    for cell, seeds in (("s/base", (0, 2)), ("s/new", (0, 1, 2))):
        for seed in seeds:
            texts_of(cell, gold.tolist(), place, of="sts/en", seed=seed)
    monkeypatch.setattr(judged, "tables", lambda: {"T": [Row("new", "s/new", "sts/en", "s/base")]})
    cells = {name: Cell(name, answer, 1, seeds=3) for name in ("s/base", "s/new")}
    (row,) = judged.measured_rows(place, cells)
    assert row["seeds"] == 2 and row["difference"] == [0.0, 0.0, 0.0]


def test_a_row_that_brings_nothing_stays_and_one_without_answers_waits(place, monkeypatch):
    texts_of("s/base", [0.5, 0.4, 0.3, 0.2], place, of="scifact")
    texts_of("s/same", [0.5, 0.4, 0.3, 0.2], place, of="scifact")
    rows = rows_of(
        place,
        monkeypatch,
        Row("base", "s/base", "scifact"),
        Row("same", "s/same", "scifact", "s/base"),
        Row("late", "s/late", "scifact", "s/base"),
    )
    assert [row["name"] for row in rows] == ["base", "same"]
    assert rows[1]["verdict"] == "no difference shown"


def test_a_kind_of_vectors_is_a_column_of_the_answers(place, monkeypatch):
    texts_of("s/base", [0.0, 0.0, 0.0, 0.0], place, of="scifact")
    columns = np.zeros((4, len(judged_cells.PARTS)))
    columns[:, 1] = 0.25
    texts_of("s/three", columns.tolist(), place, of="scifact")
    _, sparse, over = rows_of(
        place,
        monkeypatch,
        Row("base", "s/base", "scifact"),
        Row("sparse", "s/three", "scifact", "s/base", "sparse"),
        Row("sparse - dense", "s/three", "scifact", "s/three", "sparse", "dense"),
    )
    assert sparse["difference"] == [0.25, 0.25, 0.25] and sparse["verdict"] == "better"
    assert over["against"] == "s/three dense" and over["difference"][0] == 0.25


def all_measured(figure: float, loss: float, verdict: str) -> list[dict[str, Any]]:
    """Every row of the tables; the dev set chooses ``scifact/minilm-mined``."""
    rows: list[dict[str, Any]] = []
    for row in judged.expected():
        reached = figure if "mined" in row["cell"] or row["cell"] == "scifact/m3" else 0.9
        if row["set"] == "scifact dev":
            reached = 0.6 if row["cell"] == "scifact/minilm-mined" else 0.5
        if row["cell"] == "scifact/student":
            reached = figure + 0.15
        minutes = 1.0 if row["cell"] == "scifact/student" else 3.6
        more = {"name": "x", "figure": [reached] * 3, "measuring_minutes": minutes}
        rows.append({**row, **more, "difference": [0.1] * 3, "verdict": "better"})
    for table in (judged.KEPT_TABLE, judged.INT8_TABLE):
        first = next(row for row in rows if row["table"] == table)
        first["difference"] = [loss] * 3
    for row in rows:
        if row["cell"] == "similarity/cosent-ja":
            row["verdict"] = verdict
    return rows


@pytest.mark.parametrize(
    ("figure", "loss", "verdict", "met"),
    [
        (0.75, -0.005, "better", [True] * 6),
        (0.69, -0.02, "no difference shown", [False] * 6),
    ],
)
def test_an_aim_is_met_or_not_by_the_rows_that_show_it(figure, loss, verdict, met):
    found = judged.aims(all_measured(figure, loss, verdict))
    assert [each["met"] for each in found] == met
    assert found[0]["found"] == f"x: {figure:.3f}" and f"{loss:+.3f}" in found[2]["found"]
    assert all(each["aim"][0].isupper() and each["aim"][-1] == "." for each in found)


@pytest.mark.parametrize(
    ("cell", "undecided"),
    [
        ("scifact/minilm-rule", 0),
        ("scifact/m3", 1),
        ("scifact/minilm-pairs", 2),
        ("scifact/student", 3),
        ("int8/minilm", 4),
        ("similarity/cosent-ja", 5),
    ],
)
def test_an_aim_is_not_decided_until_all_of_its_cells_and_seeds_are_there(cell, undecided):
    rows = all_measured(0.75, -0.005, "better")
    without = [row for row in rows if row["cell"] != cell]
    fewer = [{**row, "seeds": row["seeds"] - (row["cell"] == cell)} for row in rows]
    for some in (without, fewer):
        met = [each["met"] for each in judged.aims(some)]
        assert met[undecided] is None
        assert " have all of their seeds" in judged.aims(some)[undecided]["found"]
    assert None not in [each["met"] for each in judged.aims(rows)]


def test_rows_of_the_file_that_were_not_measured_now_stay_in_the_order_of_the_tables(tmp_path):
    first, second, third = judged.expected()[:3]
    gone = {**first, "cell": "scifact/gone"}  # which no table shows any more
    file = tmp_path / "judged.json"
    old = [{**row, "commit": "old"} for row in (gone, third, second, first)]
    file.write_text(json.dumps({"rows": old}))
    found = judged.with_kept([{**second, "commit": "new"}], file)
    assert [row["commit"] for row in found] == ["old", "new", "old"]
    assert list(map(judged.identity, found)) == list(map(judged.identity, (first, second, third)))
    assert judged.with_kept([second], tmp_path / "missing.json") == [second]


def test_the_tables_replace_the_last_section_of_a_page(place, monkeypatch, tmp_path):
    texts_of("s/base", [0.5, 0.4, 0.3, 0.2], place, of="scifact")
    texts_of("s/new", [0.6, 0.5, 0.4, 0.3], place, of="scifact")
    rows = rows_of(
        place,
        monkeypatch,
        Row("base", "s/base", "scifact"),
        Row("new", "s/new", "scifact", "s/base"),
    )
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nText.\n\n## Tables\n\nold\n")
    judged.write_page(page, judged.markdown(rows))
    text = page.read_text()
    assert text.startswith("# Page\n\nText.\n\n## Tables\n\n### SciFact\n") and "old" not in text
    assert "| new | 0.450 [0.350, 0.550] | s/base | +0.100 [+0.100, +0.100] | better |" in text
    mixed = [rows[0], {**rows[1], "set": "sts/en", "metric": "Spearman"}]
    text = judged.markdown(mixed)
    assert "|  | set | figure | against |" in text
    assert (
        "| base | scifact, nDCG@10 | 0.350" in text and "| new | sts/en, Spearman | 0.450" in text
    )
    page.write_text("# Page\n")
    with pytest.raises(SystemExit, match="has no line '## Tables'"):
        judged.write_page(page, "")


def test_every_row_is_of_a_cell_that_exists_and_whose_baseline_exists():
    cells = judged_cells.all_cells()
    for row in (row for rows in judged_rows.tables().values() for row in rows):
        assert row.cell in cells and (not row.against or row.against in cells), row
    for cell in cells.values():
        assert all(need in cells for need in cell.needs)
        assert isinstance(cell.run, partial) or callable(cell.run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the peer
def test_the_peer_trains_on_given_batches_also_where_an_epoch_ends_with_a_small_one():
    peer = pytest.importorskip("benchmarks.judged_peer")
    batches = peer.GivenBatches(range(11), [3, 3, 2, 3])
    assert list(batches) == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9, 10]] and len(batches) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the peer
def test_the_cells_of_claims_and_of_similarity_run(place, encoder_folder, monkeypatch):
    for name in ("minilm", "me5-small"):
        monkeypatch.setitem(judged_training.BASES, name, str(encoder_folder))
        monkeypatch.setitem(judged_cells.SCIFACT_STEPS, name, 2)
        monkeypatch.setitem(judged_cells.MINING, name, MiningRule(kind="naive"))
    monkeypatch.setattr(judged_cells, "PEER_STEPS", 2)
    monkeypatch.setattr(judged_cells, "CALIBRATING", 20)
    monkeypatch.setattr(judged_sets, "DEV", 5)
    monkeypatch.setitem(judged_training.LIMITS, "document_tokens", 64)
    for numbers in (judged_cells.SCIFACT_NUMBERS, judged_cells.STS_NUMBERS):
        monkeypatch.setitem(numbers, "batch_size", 2)
    monkeypatch.setitem(judged_cells.SCIFACT_NUMBERS, "document_tokens", 64)
    monkeypatch.setitem(judged_cells.STS_NUMBERS, "steps", 2)
    for name, number in {"STEPS": 2, "BATCH": 2, "LAYERS": 1}.items():
        monkeypatch.setattr(judged_cells, f"STUDENT_{name}", number)
    place = replace(place, peer=sys.executable)
    cells = {
        name: replace(cell, seeds=min(cell.seeds, 2))
        for name, cell in judged_cells.all_cells().items()
    }
    for cell, seed in judged.jobs_of(cells, ["scifact/*", "similarity/*", "int8/minilm"]):
        judged.run_here(place, cell, seed)
    rows = judged.measured_rows(place, cells)
    shown = {row["cell"] for row in rows}
    assert {row.cell for row in of_parts("scifact", "similarity", "int8/minilm")} == shown
    for row in rows:
        low, high = row["figure"][1:]
        assert -1 <= low <= row["figure"][0] <= high <= 1
    trained = [row for row in rows if row["cell"] == "scifact/minilm-mined"]
    assert trained and all(row["seeds"] == 2 and row["steps"] == 2 for row in trained)


def of_parts(*parts: str) -> list[Row]:
    """The rows whose cells are of these parts."""
    rows = [row for rows in judged_rows.tables().values() for row in rows]
    return [row for row in rows if row.cell.startswith(parts)]
