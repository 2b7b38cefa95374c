import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tercet.data.files.sources import open_source
from tercet.errors import RecipeError, StorageError, TrainingError
from tercet.files.atomic import sole_writer
from tercet.models.embedder import Embedder
from tercet.models.frozen import FrozenInHalf
from tercet.objectives import contrastive
from tercet.objectives.contrastive import Contrastive
from tercet.training import loop
from tercet.training.log import read
from tercet.training.loop import train
from tercet.training.recipe import Lora, Run
from tests.toy import SENTENCES

QUIET = Run(device="cpu", show_progress=False, save_steps=3)


def weights(embedder: Embedder) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in embedder.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(BaseException):
    """What a kill looks like from inside: nothing below gets to clean up by catching it."""


def stop_after(monkeypatch, steps: int) -> None:
    """Training dies in the middle of the step after this many."""
    backward = contrastive.backward_in_chunks
    done = []

    def dying(*args, **kwargs):
        if len(done) == steps:
            raise Killed
        done.append(1)
        return backward(*args, **kwargs)

    monkeypatch.setattr(contrastive, "backward_in_chunks", dying)


def test_training_lowers_the_loss_and_saves_a_model(data, recipe, tmp_path):
    recipe = replace(recipe, stages=(replace(recipe.stages[0], steps=40),))
    embedder = train(recipe, [data], tmp_path / "run", run=QUIET)
    log = read(tmp_path / "run/log.jsonl")
    assert [record["step"] for record in log] == list(range(1, 41))
    losses = [record["loss"] for record in log]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    reloaded = Embedder.load(tmp_path / "run/model")
    np.testing.assert_array_equal(reloaded.encode(SENTENCES), embedder.encode(SENTENCES))


@pytest.mark.parametrize("killed_after", [0, 1, 4, 5])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    data, recipe, tmp_path, monkeypatch, killed_after
):
    whole = weights(train(recipe, [data], tmp_path / "whole", run=QUIET))
    with monkeypatch.context() as patch:
        stop_after(patch, killed_after)
        with pytest.raises(Killed):
            train(recipe, [data], tmp_path / "killed", run=QUIET)
    resumed = weights(train(recipe, [data], tmp_path / "killed", run=QUIET))
    assert same_bits(whole, resumed)
    logs = [read(tmp_path / name / "log.jsonl") for name in ("whole", "killed")]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]


def test_a_run_on_a_packed_table_goes_on_after_a_kill_also_without_its_copy(
    data, recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"{data.name}.csv.gz"
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "positive", "negative_1"])
        for each in data.examples(range(len(data))):
            table.writerow([each.query, *each.positives, *each.negatives])
    assert open_source(path).examples([3, 0]) == data.examples([3, 0])
    whole = weights(train(recipe, [data], tmp_path / "whole", run=QUIET))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Killed):
            train(recipe, [open_source(path)], tmp_path / "killed", run=QUIET)
    shutil.rmtree(tmp_path / "cache/unpacked")
    resumed = weights(train(recipe, [open_source(path)], tmp_path / "killed", run=QUIET))
    logs = [read(tmp_path / name / "log.jsonl") for name in ("whole", "killed")]
    assert [r["step"] for r in logs[1]] == [r["step"] for r in logs[0]]
    assert same_bits(whole, resumed)


def test_the_same_holds_for_the_best_weights_on_a_dev_set(data, recipe, tmp_path, monkeypatch):
    # Steps 0 to 4 before the kill, then 4 to 6 again from the checkpoint at step 3.
    values = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.2, 0.15, 0.14])
    kept = {}

    def score(embedder):
        value = next(values)
        kept[value] = weights(embedder)
        return value

    run = replace(QUIET, eval_steps=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)  # three steps are in the checkpoint, the fourth runs again
        with pytest.raises(Killed):
            train(recipe, [data], tmp_path / "run", run=run, score=score)
    final = weights(train(recipe, [data], tmp_path / "run", run=run, score=score))
    assert same_bits(final, kept[0.5])


def test_lora_resumes_too_and_ends_merged(data, recipe, tmp_path, monkeypatch):
    recipe = replace(recipe, model=replace(recipe.model, lora=Lora(rank=2, alpha=4, dropout=0.1)))
    whole = weights(train(recipe, [data], tmp_path / "whole", run=QUIET))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Killed):
            train(recipe, [data], tmp_path / "killed", run=QUIET)
    assert same_bits(whole, weights(train(recipe, [data], tmp_path / "killed", run=QUIET)))
    assert not any("lora" in name for name in whole)


def test_what_belongs_to_the_machine_changes_no_gradient(data, recipe, tmp_path):
    """Chunks are recomputed or kept: the same masks, the same bits."""
    ends = [
        weights(
            train(
                recipe,
                [data],
                tmp_path / str(memory),
                run=replace(QUIET, chunk_tokens=40, memory_gb=memory),
            )
        )
        for memory in (0.0, 0.0005, 8.0)
    ]
    assert same_bits(ends[0], ends[1]) and same_bits(ends[0], ends[2])


def test_bfloat16_learns_whether_graphs_are_kept_or_not(data, recipe, tmp_path):
    half = replace(QUIET, dtype="bfloat16", chunk_tokens=40)
    kept = weights(train(recipe, [data], tmp_path / "kept", run=half))
    again = weights(train(recipe, [data], tmp_path / "again", run=replace(half, memory_gb=0.0)))
    base = weights(loop.build(recipe.model))
    change = sum((kept[name] - base[name]).norm() for name in kept)
    apart = sum((kept[name] - again[name]).norm() for name in kept)
    assert change > 0 and apart < 0.05 * change


def test_lora_in_bfloat16_ends_with_the_bits_of_one_whose_frozen_weights_stay_in_float32(
    data, recipe, tmp_path, monkeypatch
):
    """Also measurements, models on the way and the merged model: all read the exact base."""
    lora = replace(recipe.model, lora=Lora(rank=2, alpha=4, dropout=0.1))
    recipe = replace(recipe, model=lora)
    run = replace(QUIET, dtype="bfloat16", chunk_tokens=40, eval_steps=2, models_at=(2,))
    shrunk = []

    def score(embedder: Embedder) -> float:
        linear = [p for n, p in embedder.backbone.named_parameters() if "base_layer" in n]
        assert all(p.dtype == torch.float32 for p in linear)
        return float(embedder.encode(SENTENCES, "query").sum())

    shrink = FrozenInHalf.shrink
    monkeypatch.setattr(FrozenInHalf, "shrink", lambda self: shrunk.append(1) or shrink(self))
    half = weights(train(recipe, [data], tmp_path / "half", run=run, score=score))
    assert shrunk
    monkeypatch.setattr(FrozenInHalf, "shrink", lambda self: None)
    usual = weights(train(recipe, [data], tmp_path / "usual", run=run, score=score))
    assert same_bits(half, usual)
    kept = ("loss", "dev_score", "gradient_norm")
    logs = [read(tmp_path / f"{name}/log.jsonl") for name in ("half", "usual")]
    figures = [[{k: row[k] for k in kept if k in row} for row in log] for log in logs]
    assert figures[0] == figures[1]
    models = [weights(Embedder.load(tmp_path / f"{n}/steps/2")) for n in ("half", "usual")]
    assert same_bits(*models)


def test_the_type_of_numbers_is_that_of_the_device_and_a_run_keeps_its_own(
    data, recipe, tmp_path, monkeypatch
):
    usual = Run(device="cpu", show_progress=False)
    assert usual.resolved().dtype == "float32"
    train(recipe, [data], tmp_path / "run", run=usual)
    assert json.loads((tmp_path / "run/recipe.json").read_text())["run"]["dtype"] == "float32"
    monkeypatch.setattr("tercet.training.recipe.number_type", lambda device: "bfloat16")  # a GPU
    with pytest.raises(RecipeError, match="precision was 'float32', now 'bfloat16'"):
        train(recipe, [data], tmp_path / "run", run=usual)
    train(recipe, [data], tmp_path / "run", run=replace(usual, dtype="float32"))


def test_a_run_with_other_settings_is_not_mixed_into_an_old_one(data, recipe, tmp_path):
    train(recipe, [data], tmp_path / "run", run=QUIET)
    other = replace(recipe, stages=(replace(recipe.stages[0], learning_rate=5e-4),))
    with pytest.raises(RecipeError, match=r"learning_rate was '0\.001', now '0\.0005'"):
        train(other, [data], tmp_path / "run", run=QUIET)


def test_a_refused_run_does_not_touch_the_description_of_the_old_one(data, recipe, tmp_path):
    train(recipe, [data], tmp_path / "run", run=QUIET)
    before = (tmp_path / "run/recipe.json").read_bytes()
    with pytest.raises(RecipeError, match="seed was 0, now 1"):
        train(replace(recipe, seed=1), [data], tmp_path / "run", run=QUIET)
    assert (tmp_path / "run/recipe.json").read_bytes() == before


def test_a_second_process_is_kept_out_of_a_run_folder(data, recipe, tmp_path):
    with sole_writer(tmp_path / "run"), pytest.raises(RecipeError) as caught:
        train(recipe, [data], tmp_path / "run", run=QUIET)
    assert str(caught.value).startswith(f"{tmp_path}/run: process {os.getpid()} on ")
    assert str(caught.value).endswith("wait until it is done, stop it, or give another folder")
    train(recipe, [data], tmp_path / "run", run=QUIET)


def test_the_best_weights_stay_the_best_whether_the_next_call_measures_or_not(
    data, recipe, tmp_path
):
    values = iter([0.1, 0.9, *[0.2] * 9])
    run = replace(QUIET, eval_steps=1)
    best = train(recipe, [data], tmp_path / "run", run=run, score=lambda _: next(values))
    assert same_bits(weights(best), weights(train(recipe, [data], tmp_path / "run", run=run)))
    last = train(recipe, [data], tmp_path / "other", run=run)
    again = train(recipe, [data], tmp_path / "other", run=run, score=lambda _: 1.0)
    assert same_bits(weights(last), weights(again))


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt"])
@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_a_damaged_file_of_a_run_is_named(data, recipe, tmp_path, name, content):
    values = iter([0.9, *[0.2] * 9])
    train(recipe, [data], tmp_path / "run", run=QUIET, score=lambda _: next(values))
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(RecipeError, match=f"{name}: this file of an earlier run is gone or dam"):
        train(recipe, [data], tmp_path / "run", run=QUIET)


def test_a_finished_run_is_not_run_again(data, recipe, tmp_path):
    first = weights(train(recipe, [data], tmp_path / "run", run=QUIET))
    said = []
    again = train(recipe, [data], tmp_path / "run", run=QUIET, say=said.append)
    assert same_bits(first, weights(again))
    assert any("finished already" in line for line in said)


def test_a_loss_that_is_not_a_number_stops_names_the_batch_and_keeps_the_checkpoint(
    data, recipe, tmp_path, monkeypatch
):
    normal = Contrastive.loss
    calls = []

    def broken(self, vectors, batch, step):
        calls.append(1)
        losses = normal(self, vectors, batch)
        return {"loss": losses["loss"] * (float("nan") if len(calls) == 5 else 1.0)}

    with monkeypatch.context() as patch:
        patch.setattr(Contrastive, "loss", broken)
        with pytest.raises(TrainingError) as caught:
            train(recipe, [data], tmp_path / "run", run=QUIET)
    message = str(caught.value)
    assert "step 5: the loss is nan; its batch holds pairs example" in message
    assert "the last good checkpoint is" in message
    whole = weights(train(recipe, [data], tmp_path / "whole", run=QUIET))
    assert same_bits(whole, weights(train(recipe, [data], tmp_path / "run", run=QUIET)))


def test_patience_stops_early_and_returns_the_best(data, recipe, tmp_path):
    recipe = replace(recipe, stages=(replace(recipe.stages[0], steps=50, patience=2),))
    values = iter([0.5, 0.6, 0.4, 0.3, 0.2])
    run = replace(QUIET, eval_steps=1)
    train(recipe, [data], tmp_path / "run", run=run, score=lambda embedder: next(values))
    steps = [record["step"] for record in read(tmp_path / "run/log.jsonl")]
    assert max(steps) == 3  # scored at 0, 1 (best), 2, 3


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(data, recipe, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(record, path):
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(record, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(StorageError, match="No space left on device"):
            train(recipe, [data], tmp_path / "run", run=QUIET)
    whole = weights(train(recipe, [data], tmp_path / "whole", run=QUIET))
    assert same_bits(whole, weights(train(recipe, [data], tmp_path / "run", run=QUIET)))


def test_matryoshka_trains_the_short_prefix(data, recipe, tmp_path):
    stage = replace(recipe.stages[0], objective=Contrastive(dims=(8, 32)), steps=80)
    embedder = train(replace(recipe, stages=(stage,)), [data], tmp_path / "run", run=QUIET)
    assert Embedder.load(tmp_path / "run/model").settings.dims == (8, 32)
    base = loop.build(recipe.model)
    examples = data.examples(range(len(data)))

    def mean_rank(model):
        queries = model.encode([e.query for e in examples], "query", dims=8)
        documents = model.encode([e.positives[0] for e in examples], dims=8)
        scores = queries @ documents.T
        return (scores > scores.diagonal()[:, None]).sum(1).mean() + 1

    assert mean_rank(embedder) < 0.75 * mean_rank(base)


def test_frozen_embeddings_stay_as_they_were(data, recipe, tmp_path):
    recipe = replace(recipe, model=replace(recipe.model, freeze_embeddings=True))
    before = loop.build(recipe.model).backbone.model.get_input_embeddings().weight.clone()
    embedder = train(recipe, [data], tmp_path / "run", run=QUIET)
    after = embedder.backbone.model.get_input_embeddings().weight
    assert torch.equal(before, after)


def test_length_groups_and_two_sources_train(data, recipe, tmp_path):
    stage = replace(recipe.stages[0], length_edges=(12,), token_budget=100, mixing="blended")
    other = replace(data, name="other")
    train(replace(recipe, stages=(stage,)), [data, other], tmp_path / "run", run=QUIET)
    assert (tmp_path / "run/model/tercet.json").exists()


def test_dims_wider_than_the_model_are_refused_before_training(data, recipe, tmp_path):
    stage = replace(recipe.stages[0], objective=Contrastive(dims=(8, 65)))
    with pytest.raises(RecipeError, match=r"dims are \[8, 65\], but .* have 64 coordinates"):
        train(replace(recipe, stages=(stage,)), [data], tmp_path / "run", run=QUIET)
    assert not (tmp_path / "run/recipe.json").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(data, recipe, tmp_path, device):
    with pytest.raises(RecipeError, match=f"the device '{device}' cannot be used here"):
        train(recipe, [data], tmp_path / "run", run=replace(QUIET, device=device))


def test_tensorboard_files_are_written_on_request(data, recipe, tmp_path):
    train(recipe, [data], tmp_path / "run", run=replace(QUIET, tensorboard=True))
    assert list((tmp_path / "run/tensorboard").iterdir())


@pytest.mark.slow
def test_kill_9_at_any_time_and_the_same_command_goes_on(data, encoder_folder, tmp_path):
    def command(name):
        flags = f"--model {encoder_folder} --device cpu --set batch_size=4 --set epochs=5 "
        flags += "--set run.save_steps=2"
        start = [sys.executable, "-m", "tercet", "train", "finetune", "--data", str(data.path)]
        return [*start, "--out", str(tmp_path / name), *flags.split()]

    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, env=environment, **quiet)
    log = tmp_path / "killed/log.jsonl"
    for wanted in (3, 20):  # lines in the log when the blow falls
        process = subprocess.Popen(command("killed"), env=environment, **quiet)
        while not log.exists() or len(log.read_text().splitlines()) < wanted:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed/model").exists()
    subprocess.run(command("killed"), check=True, env=environment, **quiet)
    ends = [Embedder.load(tmp_path / name / "model") for name in ("whole", "killed")]
    assert same_bits(weights(ends[0]), weights(ends[1]))


def test_what_is_measured_while_training_is_what_is_saved(data, recipe, tmp_path):
    """An encoder that remembers weights from before a step would measure another model."""
    measured = []

    def score(embedder):
        measured.append(embedder.encode(SENTENCES))
        return float(len(measured))  # always better: the last weights stay

    embedder = train(
        recipe, [data], tmp_path / "run", run=replace(QUIET, eval_steps=1), score=score
    )
    saved = Embedder.load(tmp_path / "run/model").encode(SENTENCES)
    np.testing.assert_array_equal(saved, embedder.encode(SENTENCES))
    np.testing.assert_array_equal(saved, measured[-1])
    assert all(np.abs(a - b).max() > 1e-4 for a, b in pairwise(measured))
