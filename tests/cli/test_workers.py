"""How many processes a job takes by default, and on which devices."""

import pytest
import torch

from tercet.cli import options
from tercet.cli.options import runner_of


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
