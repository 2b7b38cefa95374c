"""What a GPU computes, against the CPU: attention, gradients, encoding, training, resumption.

On a bare machine, with torch, transformers and pytest alone:

    python -m pytest -o addopts= -m gpu -o filterwarnings= tests/gpu

Without a GPU the same tests run on a pretended one, but for those of two devices.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tercet.models.embedder import Embedder
from tercet.models.network.attention import Layout, attend
from tercet.models.network.backbone import Backbone
from tercet.models.network.chunked import Chunks, backward_in_chunks
from tercet.training.loop import train
from tercet.training.recipe import Run
from tercet.training.trainer import Trainer
from tests import toy
from tests.every_recipe import BUILD, Workplace, losses, workplace
from tests.pretend import Pretend, pretended_cuda

LENGTHS = (7, 31, 13, 1, 31, 5)
CASES = [(name, way) for name in toy.DECODERS for way in ("causal", "bidirectional")]
CASES += [(name, "bidirectional") for name in toy.ENCODERS]
QUIET: dict[str, Any] = {"show_progress": False, "chunk_tokens": 64, "memory_gb": 0.0005}


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "pretended"])
def gpu(request):
    """A real device, or a pretended one."""
    if request.param == "cuda":
        yield torch.device("cuda", 0)
    elif torch.cuda.is_available():
        pytest.skip("a real device is here")
    else:
        with pretended_cuda():
            yield torch.device("cuda", 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("recipes"))


def on_cpu(x: Tensor | None) -> Tensor:
    assert x is not None
    return (x.inner if isinstance(x, Pretend) else x).detach().float().cpu()


def gap(got: Tensor, expected: Tensor) -> float:
    return float((on_cpu(got) - expected).norm() / expected.norm())


@pytest.mark.parametrize("window", [None, 4, 64], ids=["full", "window 4", "window 64"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["equal heads", "grouped heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_and_its_gradients_are_those_of_float32_on_the_cpu(
    gpu, dtype, heads, causal, window
):
    """In 16 bits by the kernel for rows of varying length."""
    torch.manual_seed(0)
    texts = toy.pack(*toy.random_texts(*LENGTHS))
    shapes = [(1, many, sum(LENGTHS), 16) for many in (heads[0], heads[1], heads[1], heads[0])]
    *rows, weights = [torch.randn(shape).to(dtype).float() for shape in shapes]
    module = nn.Module()
    module.config = SimpleNamespace(sliding_window=window)  # pyright: ignore
    rule = {"is_causal": causal, "sliding_window": window, "scaling": 0.25}

    def result(device: torch.device | str, dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(device, dtype).requires_grad_() for x in rows]
        states, _ = attend(module, *given, layout=Layout(texts.to(device)), **rule)
        states.backward(weights.transpose(1, 2).to(device, dtype))
        return [on_cpu(x) for x in (states, *(row.grad for row in given))]

    limit = 2e-3 if dtype == torch.float32 else 2e-2  # TF32 in the first
    for got, expected in zip(result(gpu, dtype), result("cpu", torch.float32), strict=True):
        assert gap(got, expected) < limit


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize(("name", "way"), CASES)
@torch.no_grad()
def test_states_in_16_bits_are_near_those_of_float32_on_the_cpu(gpu, name, way, how):
    config = {**toy.DECODERS, **toy.ENCODERS}[name]
    texts = toy.pack(*toy.random_texts(*LENGTHS))
    exact = Backbone(toy.random_model(config), attention=way)(texts)
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    half = Backbone(toy.random_model(config).to(dtype), attention=way).to(gpu)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=how == "autocast"):
        got = on_cpu(half(texts.to(gpu)))
    assert torch.nn.functional.cosine_similarity(got, exact).min() > 0.99


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_dropout_is_the_same_when_a_chunk_is_computed_again(gpu, name):
    config = {**toy.DECODERS, **toy.ENCODERS}[name]
    model = Backbone(toy.random_model(config), attention="bidirectional").to(gpu).train()
    model.attention_dropout = 0.2
    texts = toy.pack(*toy.random_texts(*LENGTHS)).to(gpu)

    def embed(packed):
        return torch.stack([part.mean(0) for part in model(packed).split(packed.lengths)])

    def gradient(kept: int | None, seed: int) -> Tensor:
        model.zero_grad()
        chunks = Chunks(40, kept, seed)
        backward_in_chunks(embed, texts, lambda v: {"loss": v.square().sum()}, chunks=chunks)
        return torch.cat(
            [on_cpu(p.grad).flatten() for p in model.parameters() if p.grad is not None]
        )

    expected = gradient(None, 1)
    assert gap(gradient(0, 1), expected) < 1e-4
    assert gap(gradient(40, 1), expected) < 1e-4
    assert gap(gradient(None, 2), expected) > 1e-2


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_vectors_are_those_of_the_cpu(gpu, place, kind):
    expected = Embedder.load(place.folder / kind).encode(toy.SENTENCES)
    got = Embedder.load(place.folder / kind).to(gpu).encode(toy.SENTENCES)
    assert (got * expected).sum(1).min() > 0.9999
    half = Embedder.load(place.folder / kind, dtype=torch.bfloat16).to(gpu).encode(toy.SENTENCES)
    assert (half * expected).sum(1).min() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_one_step_of_each_recipe_has_the_loss_of_the_cpu(gpu, place, name, tmp_path):
    recipe = place.recipe(name, 1)
    data = place.data(recipe)
    model = train(recipe, data, tmp_path / "gpu", run=Run(device="cuda", **QUIET))
    assert np.isfinite(model.encode(toy.SENTENCES)).all()
    train(recipe, data, tmp_path / "cpu", run=Run(device="cpu", dtype="float32", **QUIET))
    # Dropout draws other numbers on a GPU.
    np.testing.assert_allclose(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=0.3)


class Killed(BaseException):
    """The run dies after a step."""


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_that_was_not(gpu, place, tmp_path, monkeypatch):
    recipe = place.recipe("finetune an encoder", 4)
    data, run = place.data(recipe), Run(device="cuda", save_steps=1, **QUIET)
    train(recipe, data, tmp_path / "whole", run=run)
    step, seen = Trainer._step, []

    def dying(trainer, *args):
        if len(seen) == 2:
            raise Killed
        seen.append(0)
        return step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", dying)
        with pytest.raises(Killed):
            train(recipe, data, tmp_path / "killed", run=run)
    train(recipe, data, tmp_path / "killed", run=run)
    got, expected = losses(tmp_path / "killed"), losses(tmp_path / "whole")
    assert len(got) == len(expected) == 4
    np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.gpu
def test_two_processes_on_two_devices_have_the_losses_of_one(place, tmp_path):
    """By NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}"]
        options = ["--master_port=0", __file__, str(place.folder), str(tmp_path / str(count))]
        root = Path(__file__).parents[2]
        subprocess.run([*command, *options], check=True, cwd=root, env=_with_path(root))
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    np.testing.assert_allclose(two, one, rtol=1e-3)


def _with_path(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root)}


def one_of_several(folder: Path, out: Path) -> None:
    """Train three steps without dropout, as torchrun starts it."""
    from tercet import distributed

    distributed.start()
    torch.nn.functional.dropout = lambda x, *args, **options: x  # pyright: ignore
    place = Workplace(folder)
    recipe = place.recipe("finetune an encoder", 3)
    train(recipe, place.data(recipe), out, run=Run(dtype="float32", **QUIET))
    if distributed.is_main():
        out.with_suffix(".json").write_text(json.dumps(losses(out)))
    distributed.stop()


if __name__ == "__main__":
    one_of_several(Path(sys.argv[1]), Path(sys.argv[2]))
