import json

import pytest

from tercet.evaluate.suites import mteb as ours
from tercet.evaluate.suites.mteb import TaskScore


@pytest.fixture
def two_tasks(monkeypatch):
    """One task that is run, and one that is skipped; mteb itself is not needed."""
    found = TaskScore(
        "SciFact", "default", ("eng-Latn",), "test", "1", "ndcg_at_10", 0.25, (("recall@100", 0.5),)
    )
    away = TaskScore("NFCorpus", skipped="the hub cannot be reached (no network)")
    monkeypatch.setattr(ours, "named_tasks", lambda names: list(names))
    monkeypatch.setattr(ours, "as_mteb", lambda embedder, name, dims: dims)
    monkeypatch.setattr(ours, "run_tasks", lambda model, tasks: iter([found, away][: len(tasks)]))


def test_scores_are_shown_and_what_was_skipped_is_said_and_both_are_written(
    tercet, encoder_folder, two_tasks, tmp_path
):
    file = tmp_path / "figures.json"
    tasks = ("--mteb", "SciFact", "--mteb", "NFCorpus")
    ended = tercet("eval", encoder_folder, *tasks, "--dims", 8, "--json", file)
    assert ended.status == 0
    assert ended.out.split()[-4:] == ["default", "ndcg_at_10", "0.250", "0.500"]
    assert "NFCorpus: skipped: the hub cannot be reached (no network)" in ended.err
    record = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN
    rows = record["results"][str(encoder_folder)]
    assert [(row["task"], row["score"]) for row in rows] == [("SciFact", 0.25), ("NFCorpus", None)]
    assert record["models"][str(encoder_folder)]["dims"] == 8
    assert record["models"][str(encoder_folder)]["query_tokens"] > 0
    assert "torch" in record["versions"]


def test_nothing_is_shown_where_all_were_skipped(tercet, encoder_folder, monkeypatch, two_tasks):
    away = TaskScore("SciFact", skipped="the hub cannot be reached")
    monkeypatch.setattr(ours, "run_tasks", lambda model, tasks: iter([away]))
    ended = tercet("eval", encoder_folder, "--mteb", "SciFact")
    assert (ended.status, ended.out) == (0, "")


def test_a_task_takes_the_place_of_data(refused, encoder_folder, files):
    said = refused("eval", encoder_folder, files / "pairs.jsonl", "--mteb", "SciFact")
    assert said == "give either data to measure on, or --mteb with a task"
    said = refused("eval", encoder_folder, "--mteb", "SciFact", "--precision", "int4")
    assert said == "--precision does not apply to --mteb; remove it"
