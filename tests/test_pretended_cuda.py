"""Steps and encoding as on a GPU, with no GPU: nothing on two devices, few waits, the same numbers.

See ``tests/pretend.py`` for what this device refuses and counts, and for what it cannot show.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from tercet.training.loop import train
from tercet.training.recipe import Run
from tests.every_recipe import BUILD, Workplace, losses, workplace
from tests.pretend import Log, pretended_cuda
from tests.toy import DECODERS

ROTARY = [name for name in DECODERS if name != "gemma2"]  # which bends its scores
OF_A_CHUNK = ("models/network/", "segments", "vectors", "models/embedder")
SHORT, LONG = 2, 4  # steps of a stage in two runs, whose difference is that of their steps


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("recipes"))


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    log: Log
    tokens: int = 0


def trained(place: Workplace, name: str, out: Path, steps: int, **changes) -> Trained:
    """Train a recipe in small chunks, of which some keep their graphs and some do not."""
    settings = {"device": "cpu", "dtype": "float32", "show_progress": False}
    run = Run(**settings | {"chunk_tokens": 64, "memory_gb": 0.0005} | changes)
    recipe = place.recipe(name, steps)
    with pretended_cuda() if run.device == "cuda" else mock.MagicMock() as log:
        train(recipe, place.data(recipe), out, run=run)
    return Trained(losses(out), log)


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """Trainings on the pretended device, each made once."""
    made: dict[tuple[str, str, int], Trained] = {}

    def run(name: str, dtype: str, steps: int) -> Trained:
        key = name, dtype, steps
        if key not in made:
            out = tmp_path_factory.mktemp("run") / "out"
            torch.manual_seed(0)
            made[key] = trained(place, name, out, steps, device="cuda", dtype=dtype)
        return made[key]

    return run


def a_step(runs, name: str, dtype: str, kept: str) -> Counter[str]:
    """What the steps between the short run and the long one add, by place."""
    short, long = (getattr(runs(name, dtype, steps).log, kept) for steps in (SHORT, LONG))
    return Counter({f"{what} at {where}": n for (what, where), n in (long - short).items()})


@pytest.mark.parametrize("name", BUILD)
def test_a_training_on_a_gpu_has_the_losses_of_the_cpu(name, place, runs, tmp_path):
    expected = trained(place, name, tmp_path / "run", SHORT).losses
    got = runs(name, "float32", SHORT).losses
    assert len(got) == SHORT * len(place.recipe(name, 1).stages)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BUILD)
def test_a_chunk_never_makes_the_host_wait_for_the_gpu(name, dtype, runs):
    log = runs(name, dtype, SHORT).log
    found = {
        f"{what} at {where}": n
        for kept in (log.waits, log.copies)
        for (what, where), n in kept.items()
        if where.startswith(OF_A_CHUNK) and "fingerprints" not in where
    }
    assert not found, found
