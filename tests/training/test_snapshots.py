"""Models saved in the course of a stage: which ones, what they hold, and a run that goes on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.recipes.arctic_embed import arctic_embed
from tercet.recipes.finetune import finetune
from tercet.training.loop import train
from tercet.training.recipe import Recipe, Run
from tercet.training.snapshots import models_in
from tercet.training.trainer import Trainer
from tercet.types import Example
from tests.toy import SENTENCES

QUIET = Run(device="cpu", show_progress=False, save_steps=2)


@pytest.fixture
def data(tmp_path) -> list[Source]:
    rows = [
        Example(text.split()[-1], (text,), (SENTENCES[(i + 1) % 12],))
        for i, text in enumerate(SENTENCES)
    ]
    write_examples(tmp_path / "pairs.jsonl", rows)
    return [open_source(tmp_path / "pairs.jsonl")]


def recipe_of(base: Path, **changes: Any) -> Recipe:
    return finetune(
        model=str(base), batch_size=4, epochs=2.0, learning_rate=1e-3, **changes
    )  # 6 steps


def same(one: Path, other: Path) -> bool:
    first, second = (Embedder.load(each).state_dict() for each in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


def stop_before(monkeypatch, step: int) -> None:
    """End the process, as it were, before this step is taken."""
    real = Trainer._step

    def stopped(self: Trainer, *given: Any) -> None:
        if self.progress.step == step:
            raise KeyboardInterrupt
        real(self, *given)

    monkeypatch.setattr(Trainer, "_step", stopped)


@pytest.mark.parametrize("lora", [None, 2])
def test_a_model_after_a_step_is_the_one_that_a_run_stopped_there_leaves(
    encoder_folder, data, tmp_path, monkeypatch, lora
):
    recipe = recipe_of(encoder_folder, lora_rank=lora)
    train(recipe, data, tmp_path / "run", run=replace(QUIET, models_at=(0, 2, 3, 6)))
    found = models_in(tmp_path / "run")
    assert list(found) == [0, 2, 3, 6]
    assert same(found[0], encoder_folder)
    assert same(found[6], tmp_path / "run/model")
    assert not any(list(folder.glob("adapter*")) for folder in found.values())
    stop_before(monkeypatch, 3)
    kept: list[Embedder] = []
    monkeypatch.setattr(Trainer, "_keep_model", lambda self: kept.append(self.embedder))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, tmp_path / "other", run=QUIET)
    kept[-1].save(tmp_path / "stopped")  # merges what is low in rank
    assert same(found[3], tmp_path / "stopped")
    assert Embedder.load(found[3]).about["stages"][-1]["steps"] == 3


def test_saving_models_on_the_way_changes_nothing_of_the_run(encoder_folder, data, tmp_path):
    recipe = recipe_of(encoder_folder, lora_rank=2)
    for name, steps in (("with", (0, 1, 4)), ("without", ())):
        train(recipe, data, tmp_path / name, run=replace(QUIET, models_at=steps))
    assert same(tmp_path / "with/model", tmp_path / "without/model")
    assert not models_in(tmp_path / "without")


def test_a_run_that_goes_on_keeps_its_models_and_makes_the_others(
    encoder_folder, data, tmp_path, monkeypatch
):
    recipe, run = recipe_of(encoder_folder), replace(QUIET, models_at=(1, 3, 5))
    train(recipe, data, tmp_path / "whole", run=run)
    with monkeypatch.context() as patched:
        stop_before(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, data, tmp_path / "run", run=run)
    assert list(models_in(tmp_path / "run")) == [1, 3]
    train(recipe, data, tmp_path / "run", run=run)
    for step, folder in models_in(tmp_path / "whole").items():
        assert same(folder, tmp_path / f"run/steps/{step}")


def test_what_a_run_is_past_is_told(encoder_folder, data, tmp_path):
    said: list[str] = []
    train(recipe_of(encoder_folder), data, tmp_path / "run", run=QUIET)
    asked = replace(QUIET, models_at=(2, 9))
    train(recipe_of(encoder_folder), data, tmp_path / "run", run=asked, say=said.append)
    assert any("no model after step 2, 9, which the run has behind it" in line for line in said)


@pytest.mark.parametrize(
    ("steps", "problem"),
    [((2, 7), "models_at is 2, 7, but the stage has 6 steps"), ((-1,), "give steps, 0 for")],
)
def test_steps_that_never_come_are_refused(encoder_folder, data, tmp_path, steps, problem):
    with pytest.raises(RecipeError, match=problem):
        train(
            recipe_of(encoder_folder), data, tmp_path / "run", run=replace(QUIET, models_at=steps)
        )
    assert not models_in(tmp_path / "run")


def test_of_several_stages_the_first_has_a_series_with_its_widths(encoder_folder, data, tmp_path):
    sizes: dict[str, Any] = {"pretraining_batch_size": 4, "finetuning_batch_size": 4}
    sizes |= {"pretraining_steps": 2, "finetuning_steps": 1}
    recipe = arctic_embed(model=str(encoder_folder), dims=[16], **sizes)
    given: dict[str, Sequence[Source]] = {"pairs": data, "mined": data}
    train(recipe, given, tmp_path / "run", run=replace(QUIET, models_at=(1, 2)))
    found = models_in(tmp_path / "run")
    assert found == {step: tmp_path / f"run/1-pretraining/steps/{step}" for step in (1, 2)}
    assert Embedder.load(found[1]).settings.dims == (16,)
    assert same(found[2], tmp_path / "run/1-pretraining/model")
