"""Batches that threads prepare: the same losses, weights and checkpoints as without them."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet import distributed
from tercet.data.batches.collate import Collator
from tercet.data.files.sources import open_source, write_examples
from tercet.errors import DataError
from tercet.objectives import contrastive
from tercet.training.log import read
from tercet.training.loop import train
from tercet.training.recipe import Recipe, Refresh, Run
from tercet.training.trainer import Trainer
from tercet.types import Example
from tests.toy import SENTENCES

TIMES = ("tokens_per_second", "seconds")


def run_with(workers: int, **more: Any) -> Run:
    return Run(device="cpu", show_progress=False, workers=workers, **more)


def facts(folder: Path) -> list[dict[str, Any]]:
    """Every number of the log that is not a time."""
    paths = sorted(folder.rglob("log.jsonl"))
    return [
        {k: v for k, v in row.items() if k not in TIMES} for path in paths for row in read(path)
    ]


def checkpoint(folder: Path) -> dict[str, Any]:
    found = torch.load(next(folder.rglob("checkpoint.pt")), weights_only=True)
    found["progress"].pop("seconds")
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def threads_ahead() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.fixture
def drawn_negatives(tmp_path):
    """Examples with more negatives than a batch takes, so that each step draws some."""
    examples = [
        Example(
            f"{text.split()[-1]} {i}",
            (f"{text} number {i}",),
            tuple(SENTENCES[(i + j) % 12] for j in range(1, 7)),
        )
        for i in range(4)
        for text in SENTENCES
    ]
    write_examples(tmp_path / "drawn.jsonl", examples)
    return open_source(tmp_path / "drawn.jsonl")


def dropped_out(recipe: Recipe) -> Recipe:
    return replace(recipe, stages=(replace(recipe.stages[0], negatives=2, epochs=2.0),))


def test_losses_and_checkpoints_are_equal_to_the_bit_with_any_number_of_workers(
    drawn_negatives, recipe, tmp_path
):
    for workers in (0, 1, 3):
        out = tmp_path / str(workers)
        train(dropped_out(recipe), [drawn_negatives], out, run=run_with(workers))
        assert not threads_ahead()
    plain = tmp_path / "0"
    assert len(facts(plain)) == 12
    for workers in ("1", "3"):
        assert facts(tmp_path / workers) == facts(plain)
        assert same(checkpoint(tmp_path / workers), checkpoint(plain))


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3), (1, 2)])
def test_a_run_goes_on_to_the_bit_with_another_number_of_workers(
    drawn_negatives, recipe, tmp_path, monkeypatch, before, after
):
    recipe = dropped_out(recipe)
    train(recipe, [drawn_negatives], tmp_path / "whole", run=run_with(0, save_steps=2))
    backward, done = contrastive.backward_in_chunks, []

    def dying(*args, **kwargs):
        done.append(1)
        if len(done) == 6:
            raise Killed
        return backward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "backward_in_chunks", dying)
        with pytest.raises(Killed):
            train(recipe, [drawn_negatives], tmp_path / "run", run=run_with(before, save_steps=2))
    assert not threads_ahead()
    place = checkpoint(tmp_path / "run")["sampler"]
    assert (place["epoch"], place["batch"]) == (0, 4)  # trained, not only drawn
    train(recipe, [drawn_negatives], tmp_path / "run", run=run_with(after, save_steps=2))
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    assert same(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "whole"))


def test_no_batch_with_the_negatives_before_a_refresh_is_trained_after_it(
    drawn_negatives, recipe, tmp_path, monkeypatch
):
    stage = replace(recipe.stages[0], negatives=2, epochs=2.0, refresh=Refresh(every=4))
    recipe, drawn = replace(recipe, stages=(stage,)), []
    batch = Trainer._batch

    def noted(self, rows, step, place):
        assert self.refresher is not None
        drawn.append((step, self.refresher.state and self.refresher.state["step"]))
        return batch(self, rows, step, place)

    for workers in (0, 3):
        drawn.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_batch", noted)
            train(recipe, [drawn_negatives], tmp_path / str(workers), run=run_with(workers))
        in_force = [*[None] * 4, *[4] * 4, *[8] * 4]
        assert sorted(drawn) == list(enumerate(in_force))
    assert facts(tmp_path / "3") == facts(tmp_path / "0")
    assert same(checkpoint(tmp_path / "3"), checkpoint(tmp_path / "0"))


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_of_a_batch_ends_the_run_at_its_step_with_the_same_message(
    drawn_negatives, recipe, tmp_path, monkeypatch, workers
):
    collate = Collator.__call__

    def damaged(self, examples, seed):
        if list(seed)[1] == 4:
            raise DataError(drawn_negatives.path, 7, "has changed since it was opened")
        return collate(self, examples, seed)

    monkeypatch.setattr(Collator, "__call__", damaged)
    with pytest.raises(DataError, match=r"drawn\.jsonl.*7.*has changed since it was opened"):
        train(recipe, [drawn_negatives], tmp_path / "run", run=run_with(workers))
    assert [row["step"] for row in read(tmp_path / "run/log.jsonl")] == [1, 2, 3, 4]
    assert not threads_ahead()


def test_patience_ends_a_run_and_its_threads(drawn_negatives, recipe, tmp_path):
    stage = replace(recipe.stages[0], steps=60, patience=2)
    recipe = replace(recipe, stages=(stage,))
    for workers in (0, 2):
        run = run_with(workers, eval_steps=3)
        train(recipe, [drawn_negatives], tmp_path / str(workers), run=run, score=lambda model: 1.0)
        assert not threads_ahead()
    assert facts(tmp_path / "2")[-1]["step"] == 6
    assert same(checkpoint(tmp_path / "2"), checkpoint(tmp_path / "0"))


def test_a_stage_asks_other_processes_once_for_losses_and_counts(
    drawn_negatives, recipe, tmp_path, monkeypatch
):
    asked, gather = [], distributed.gather_rows

    def counted(x):
        asked.append(tuple(x.shape))
        return gather(x)

    monkeypatch.setattr(distributed, "gather_rows", counted)
    train(recipe, [drawn_negatives], tmp_path / "run", run=run_with(1))
    assert asked == [(1, 4)] * 6  # a loss and three counts
