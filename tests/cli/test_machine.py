"""What commands take by default: processes, devices and types of numbers."""

import json

import pytest
import torch

from tercet.cli import options
from tercet.cli.options import load, runner_of
from tercet.models import devices, fastest


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        ({}, 0, (1, True)),
        ({}, 1, (1, True)),
        ({}, 8, (8, True)),
        ({"workers": 3}, 8, (3, True)),
        ({"device": "cuda"}, 8, (8, True)),
        ({"device": "cuda:1"}, 8, (1, False)),
        ({"device": "cpu"}, 8, (1, False)),
        ({"engine": "loop"}, 8, (1, True)),
        ({"engine": "ray", "address": "head:6379"}, 8, (1, True)),
        ({"alone": True}, 8, (1, True)),
    ],
)
def test_a_job_takes_all_gpus_unless_a_device_or_number_is_named(
    monkeypatch, given, gpus, expected
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(options, "has_package", lambda name: True)
    found = runner_of(
        **{"engine": "auto", "workers": None, "address": None, "device": None} | given
    )
    assert (found.workers, found.own_gpus) == expected


def test_without_daft_one_gpu_is_used_and_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(options, "has_package", lambda name: False)
    assert runner_of("auto", None, None, None).workers == 1
    assert "one of 8 GPUs is used; to use all, install Daft" in capsys.readouterr().err


def test_processes_of_torchrun_start_no_others(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert runner_of("auto", None, None, None).workers == 1


def test_weights_are_in_the_type_of_the_device_unless_one_is_named(monkeypatch, encoder_folder):
    def kind(*words: str) -> torch.dtype:
        return next(load(str(encoder_folder), *words, device="cpu").parameters()).dtype

    assert kind() == torch.float32
    monkeypatch.setattr(devices, "number_type", lambda device: "bfloat16")  # a GPU that has it
    assert kind() == torch.bfloat16
    assert kind("float32") == torch.float32


def test_an_index_goes_on_in_the_type_that_it_was_made_in(
    tercet, files, encoder_folder, tmp_path, monkeypatch
):
    words = ["index", files / "docs.jsonl", "--model", encoder_folder, "--out", tmp_path / "index"]

    def kept() -> str:
        return json.loads((tmp_path / "index/index.json").read_text())["settings"]["precision"]

    assert tercet(*words).status == 0
    assert kept() == "float32"
    monkeypatch.setattr(fastest, "fastest_type", lambda model, device, say: "bfloat16")
    again = tercet(*words)
    assert again.status == 0 and "0 encoded" in again.err
    assert kept() == "float32"
    assert tercet(*words, "--fresh").status == 0
    assert kept() == "bfloat16"
    assert tercet(*words, "--fresh", "--store-as", "int8").status == 0
    assert kept() == "int8"
