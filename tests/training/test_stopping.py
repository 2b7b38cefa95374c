"""What SIGTERM and Ctrl-C do to a training, and what the next one says."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from tercet.files import signals
from tercet.models.embedder import Embedder
from tercet.training.log import read
from tercet.training.loop import train
from tercet.training.recipe import Run
from tercet.training.trainer import Trainer

QUIET = Run(device="cpu", show_progress=False)
BOTH = [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, SystemExit, 143)]


def bits(embedder: Embedder) -> list[bytes]:
    return [weight.numpy().tobytes() for weight in embedder.state_dict().values()]


def signalled(monkeypatch, number: int, step: int) -> None:
    """Send a signal to this process in the middle of a step."""
    backward = Trainer._backward

    def sending(self, batch):
        if self.progress.step + 1 == step:
            os.kill(os.getpid(), number)
        return backward(self, batch)

    monkeypatch.setattr(Trainer, "_backward", sending)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_a_line(
    data, recipe, tmp_path, monkeypatch, capfd, step
):
    number, kind, status = BOTH[step % 2]
    whole = bits(train(recipe, [data], tmp_path / "whole", run=QUIET))
    run, handlers = tmp_path / "run", [signal.getsignal(each) for each in signals.SIGNALS]
    with monkeypatch.context() as patch, pytest.raises(kind) as end:
        signalled(patch, number, step)
        train(recipe, [data], run, run=QUIET)
    if kind is SystemExit:
        assert end.value.code == status
    (line,) = re.findall("tercet: .*\n", capfd.readouterr().err)
    assert line == (
        f"tercet: stopped after step {step} of 6 (contrastive); {run}/checkpoint.pt is written, "
        "and the same command goes on from there\n"
    )
    assert [signal.getsignal(each) for each in signals.SIGNALS] == handlers
    assert [record["step"] for record in read(run / "log.jsonl")] == list(range(1, step + 1))
    said: list[str] = []
    assert bits(train(recipe, [data], run, run=QUIET, say=said.append)) == whole
    assert f"going on from step {step} of 6" in said


def test_a_signal_during_a_measurement_lets_it_end_and_repeats_none(
    data, recipe, tmp_path, monkeypatch
):
    run, measured = replace(QUIET, eval_steps=2), list[int]()

    def score(embedder, sends=0):
        measured.append(len(measured))
        if len(measured) == sends:
            os.kill(os.getpid(), signal.SIGTERM)
        return float(-abs(len(measured) - 3))

    whole = bits(train(recipe, [data], tmp_path / "whole", run=run, score=score))
    for sends in (2, 4):  # after step 2, and after the last one
        out = tmp_path / f"run{sends}"
        measured.clear()
        with pytest.raises(SystemExit):
            train(recipe, [data], out, run=run, score=lambda e, n=sends: score(e, n))
        assert len(measured) == sends
        assert bits(train(recipe, [data], out, run=run, score=score)) == whole
        assert len(measured) == 4


def test_a_signal_before_the_first_step_has_its_usual_effect(data, recipe, tmp_path):
    def score(embedder):
        os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    with pytest.raises(KeyboardInterrupt) as end:
        train(recipe, [data], tmp_path / "run", run=QUIET, score=score)
    assert type(end.value) is KeyboardInterrupt
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_in_another_thread_and_for_an_ignored_signal_nothing_changes(
    data, recipe, tmp_path, monkeypatch
):
    seen: list[Any] = []
    step = Trainer._step

    def looking(self, *arguments):
        seen.append(tuple(signal.getsignal(each) for each in signals.SIGNALS))
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", looking)
    handlers = tuple(signal.getsignal(each) for each in signals.SIGNALS)
    thread = threading.Thread(target=train, args=(recipe, [data], tmp_path / "a"))
    thread.start()
    thread.join()
    assert set(seen) == {handlers} and len(seen) == 6
    seen.clear()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(recipe, [data], tmp_path / "b", run=QUIET)
    finally:
        signal.signal(signal.SIGINT, before)
    assert {interrupt for interrupt, _ in seen} == {signal.SIG_IGN}
    assert all(isinstance(handler, signals.Listener) for _, handler in seen)


def test_a_run_that_finds_no_checkpoint_says_that_it_starts_over(
    data, recipe, tmp_path, monkeypatch
):
    said: list[str] = []
    run = tmp_path / "run"
    over = f"{run}: an earlier run left no checkpoint here (checkpoint.pt); starting over"
    train(recipe, [data], run, run=QUIET, say=said.append)
    assert not any(line.startswith(over) for line in said)
    train(recipe, [data], run, run=QUIET, say=said.append)
    assert not any(line.startswith(over) for line in said)
    (run / "checkpoint.pt").unlink()
    train(recipe, [data], run, run=QUIET, say=said.append)
    assert any(line.startswith(over) for line in said)
    said.clear()
    killed = tmp_path / "killed"  # before its first step
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("tercet.training.loop.build", _die)
        train(recipe, [data], killed, run=QUIET)
    train(recipe, [data], killed, run=QUIET, say=said.append)
    assert any(f"{killed}: an earlier run left no checkpoint here" in line for line in said)


def _die(*_):
    raise MemoryError


# ---- as a program ----------------------------------------------------------------------------


def command(data, base, out, *more: str) -> list[str]:
    words = [sys.executable, "-m", "tercet", "train", "finetune", "--data", str(data.path)]
    flags = f"--model {base} --out {out} --set batch_size=4 --set epochs=40 --device cpu"
    return [*words, *flags.split(), *more]


def started(words: list[str], log, lines: int) -> "subprocess.Popen[str]":
    """Start a training, and wait until so many steps are in its log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None
        time.sleep(0.005)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_program_that_gets_a_signal_says_where_it_stands(
    data, encoder_folder, tmp_path, number, status
):
    words = command(data, encoder_folder, tmp_path / "run")
    process = started(words, tmp_path / "run/log.jsonl", 3)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == status
    last = err.splitlines()[-1]
    found = re.fullmatch(r"tercet: stopped after step (\d+) of 480 \(contrastive\); .*", last)
    assert found and err.count("stopped") == 1 and "Traceback" not in err
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] == int(found[1]) == len(read(tmp_path / "run/log.jsonl"))


SLOW_STEP = """
import os, sys, time
from tercet.cli.app import main
from tercet.training.trainer import Trainer
backward = Trainer._backward
def slow(self, batch):
    if self.progress.step == 2:
        print("asleep", flush=True)
        {sleep}
    return backward(self, batch)
Trainer._backward = slow
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("sleep", ["time.sleep(60)", "os.system('exec sleep 5 >/dev/null 2>&1')"])
def test_a_second_signal_ends_a_program_at_once(data, encoder_folder, tmp_path, sleep):
    words = command(data, encoder_folder, tmp_path / "run")
    words[1:3] = ["-c", SLOW_STEP.format(sleep=sleep)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    assert time.monotonic() - began < 2 and process.returncode == 143
    assert not (tmp_path / "run/checkpoint.pt").exists()
    process.communicate()


@pytest.mark.slow
def test_processes_of_torchrun_stop_after_the_same_step(data, encoder_folder, tmp_path):
    words = command(data, encoder_folder, tmp_path / "run")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m tercet"
    words[1:3] = torchrun.split()
    process = started(words, tmp_path / "run/log.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    found = re.findall(r"tercet: stopped after step (\d+) of 480", err)
    assert len(found) == 1 and process.returncode != 0
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] == int(found[0]) == len(read(tmp_path / "run/log.jsonl"))
