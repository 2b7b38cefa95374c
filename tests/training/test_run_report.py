"""The page about a run: what it shows, that it survives a kill, and that it costs nothing."""

import logging
from dataclasses import replace

import pytest

from tercet.errors import RecipeError
from tercet.training import run_report
from tercet.training.log import read_messages
from tercet.training.loop import train
from tercet.training.recipe import Run
from tercet.training.run_report import run_page, stage_charts, write_run_report
from tests.evaluate.report.pages import assert_self_contained, spoken, text_of
from tests.training.test_loop import Killed, stop_after

QUIET = Run(device="cpu", show_progress=False, save_steps=2, eval_steps=2)


def score(embedder):
    return {"dev_score": 0.5, "dev_dense": 0.4}


def page_of(out):
    return (out / "report.html").read_text(encoding="utf-8")


def test_a_training_leaves_a_page_about_itself(data, recipe, tmp_path):
    said = []
    train(recipe, [data], tmp_path / "run", run=QUIET, score=score, say=said.append)
    page = page_of(tmp_path / "run")
    assert_self_contained(page)
    text = text_of(page)
    for part in (
        f"Training: finetune from {recipe.model.base}",
        "in one stage on 48 rows of one source, with the seed 0.",
        "Dev set: 0.5000 before training, 0.5000 at best, after step 0 of 6; its weights were",
        "6 steps of up to 8 rows",
        "tokens per second",
        "about 16 documents for each query",
        "pairs - 48 48 100.0%",
        "There were no warnings.",
        f"tercet index docs.jsonl --model {tmp_path}/run/model --out {tmp_path}/run/index",
        "seed 0",
        "torch",
        "model.base" if "model.base" in text else "base",
    ):
        assert part in text, part
    names = [each.split(":")[0] for each in spoken(page)]
    assert names == ["loss", "scores on the dev set", "learning rate", "tokens per second"]
    assert "score, first 0.5, last 0.5; dense" in spoken(page)[1]
    assert said[-1] == f"report: {tmp_path}/run/report.html"


def test_each_stage_has_its_curves(data, recipe, tmp_path):
    (stage,) = recipe.stages
    several = replace(recipe, stages=(stage, replace(stage, name="second", steps=3)))
    train(several, [data], tmp_path / "run", run=QUIET)
    page = page_of(tmp_path / "run")
    assert f"Stage 1: {stage.name}" in text_of(page)
    assert "Stage 2: second" in text_of(page)
    assert [name.split(":")[0] for name in spoken(page)].count("loss") == 2
    assert "3 steps of up to 8 rows" in text_of(page)


def test_a_killed_run_that_goes_on_has_the_whole_curve(data, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Killed):
            train(recipe, [data], tmp_path / "run", run=QUIET)
    assert not (tmp_path / "run/report.html").exists()
    train(recipe, [data], tmp_path / "run", run=QUIET)
    whole = tmp_path / "whole"
    train(recipe, [data], whole, run=QUIET)
    assert spoken(page_of(tmp_path / "run"))[0] == spoken(page_of(whole))[0]
    said = [each["text"] for each in read_messages(tmp_path / "run")]
    assert any(text.startswith("each query is compared") for text in said)
    assert "going on from step 4 of 6" in said


def test_warnings_of_the_run_stand_in_its_page(data, recipe, tmp_path):
    def warn(embedder):
        logging.getLogger("tercet").warning("the data are odd")
        return 0.5

    train(recipe, [data], tmp_path / "run", run=QUIET, score=warn)
    page = page_of(tmp_path / "run")
    assert text_of(page).count("warning: the data are odd") == 1
    handlers = logging.getLogger("tercet").handlers
    assert not [each for each in handlers if type(each).__name__ == "_Kept"]


def test_a_page_that_fails_costs_no_training(data, recipe, tmp_path, monkeypatch):
    def fail(out):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(run_report, "write_run_report", fail)
    said = []
    train(recipe, [data], tmp_path / "run", run=QUIET, say=said.append)
    assert (tmp_path / "run/model").is_dir()
    assert said[-1] == (f"tercet: note: {tmp_path}/run/report.html could not be written: no luck")


def test_the_page_of_an_existing_run_can_be_written_again(data, recipe, tmp_path):
    train(recipe, [data], tmp_path / "run", run=QUIET)
    before = page_of(tmp_path / "run")
    (tmp_path / "run/report.html").unlink()
    assert write_run_report(tmp_path / "run") == tmp_path / "run/report.html"
    assert page_of(tmp_path / "run") == before


def test_a_run_of_an_earlier_version_has_a_page_too(data, recipe, tmp_path):
    train(recipe, [data], tmp_path / "run", run=QUIET)
    for name in ("messages.jsonl", "mixture.json", "log.jsonl", "model/tercet.json"):
        (tmp_path / "run" / name).unlink()
    write_run_report(tmp_path / "run")
    text = text_of(page_of(tmp_path / "run"))
    assert "There is no log of its steps." in text
    assert "batch size 8" in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(
        RecipeError, match=r"holds no training \(recipe.json\); give a run's folder"
    ):
        run_page(tmp_path)


def test_figures_of_empty_vectors_are_no_scores():
    records = [
        {"step": 1, "loss": 1.0, "learning_rate": 0.1, "tokens_per_second": 9.0},
        {"step": 1, "dev_score": 0.3, "dev_sparse": 0.3, "dev_query_empty": 0.9},
    ]
    said = spoken("".join(stage_charts(records)))
    assert said[1] == "scores on the dev set: score, first 0.3, last 0.3"  # the sparse one is equal
