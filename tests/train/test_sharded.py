"""Weights spread over two processes against one. Run as a script, this file is one of the two."""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tercet import distributed
from tercet.data.sampler import BatchRows
from tercet.errors import RecipeError, TrainingError
from tercet.nn.embedder import Embedder
from tercet.objectives import contrastive
from tercet.objectives.contrastive import Contrastive
from tercet.objectives.mntp import MNTP
from tercet.sharding import whole_of
from tercet.train import checkpoint, loop, trainer
from tercet.train.recipe import Lora, Recipe
from tercet.train.run import Run
from tercet.train.trainer import Trainer
from tests.processes import run_together
from tests.train import test_two_processes as two

SHARDED = replace(two.QUIET, shard_weights=True)
RUNS = {
    "whole batch": SHARDED,
    "chunks of both kinds": replace(SHARDED, chunk_tokens=40, memory_gb=0.05),
    "every chunk twice": replace(SHARDED, chunk_tokens=25, memory_gb=0.0),
}
CASES = ("matryoshka", "B6 all kinds")


@contextmanager
def in_float64():
    build = loop.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", lambda model: build(model).double())
        yield patch


def trained(folder: Path, out: str, run: Run, recipe: Recipe | None = None, **more: Any):
    recipe = recipe or two.recipe(folder)
    with in_float64():
        return two.trained(folder, out, recipe, run, **more)


def gradients(folder: Path, out: str, case: str, run: Run) -> list[list[Tensor]]:
    """The whole summed gradients of three steps."""
    found: list[list[Tensor]] = []
    clip = Trainer._clipped

    def recorded(self: Trainer, weights: list[nn.Parameter]) -> float:
        found.append([whole_of(p.grad).clone() for p in weights if p.grad is not None])
        return clip(self, weights)

    recipe = two.recipe(folder, rate=1e-30, steps=3, **two.CASES[case])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_clipped", recorded)
        trained(folder, out, run, recipe)
    return found


def one_of_two(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    facts = {
        "gradients": {
            (case, name): gradients(folder, f"two {case} {name}", case, run)
            for case in CASES
            for name, run in RUNS.items()
        },
    }
    distributed.barrier()
    torch.save(facts, folder / f"{distributed.rank()}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have trained."""
    folder = tmp_path_factory.mktemp("both")
    two.prepare(folder)
    run_together(__file__, str(folder))
    return folder


@pytest.fixture(scope="module")
def both(folder) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("case", CASES)
def test_the_summed_gradient_is_that_of_one_process(folder, both, case, name):
    one = gradients(folder, f"one {case} {name}", case, two.QUIET)
    for facts in both:
        for found, expected in zip(facts["gradients"][case, name], one, strict=True):
            assert two.gap(found, expected) < 1e-13


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
