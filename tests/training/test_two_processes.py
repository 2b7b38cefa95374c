"""The training loop in two processes against one. Run as a script, this file is one of the two."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tercet import distributed
from tercet.data.batches.sampler import BatchRows
from tercet.data.files.sources import open_source, write_examples
from tercet.errors import RecipeError, TrainingError
from tercet.kinds import KINDS
from tercet.losses.unified import Mixture
from tercet.models.embedder import Embedder
from tercet.objectives import contrastive
from tercet.objectives.contrastive import Contrastive
from tercet.objectives.unified import Unified
from tercet.recipes.finetune import finetune
from tercet.training import checkpoint, loop, trainer
from tercet.training.log import read
from tercet.training.loop import train
from tercet.training.memory import memory_for
from tercet.training.recipe import Recipe, Run
from tercet.types import Example
from tests import toy
from tests.processes import ROOT, run_together

QUIET = Run(device="cpu", show_progress=False, save_steps=2)
CHUNKED = replace(QUIET, chunk_tokens=40, memory_gb=0.0)  # every chunk is embedded twice


def unified(**numbers: Any) -> Unified:
    return Unified(mixture=Mixture(temperature=0.1, **numbers))


CASES: dict[str, dict[str, Any]] = {
    "in-batch": {},
    "own negatives": {"in_batch": "none"},
    "matryoshka": {"objective": Contrastive(dims=(8, 32))},
    "scored pairs": {"objective": Contrastive(dims=(8,))},
    "dense layer": {"dense_dim": 96, "objective": Contrastive(dims=(8, 80))},
    "margin-mse": {"objective": Contrastive(dims=(8,), distil="margin-mse", distil_weight=0.1)},
    "B6 all kinds": {"objective": replace(unified(), dims=(8,))},
    "B6 own negatives": {"objective": unified(), "in_batch": "none"},
    "B6 kl": {"objective": unified(distil="kl")},
    "B6 listwise": {"objective": unified(distil="listwise")},
    "false negatives": {"ignore_rule": "percent", "ignore_own": True},
    "guide": {"ignore_rule": "margin", "ignore_value": -0.01, "guide": "base"},
    "B6 false negatives": {"objective": unified(), "ignore_rule": "margin", "ignore_value": -0.01},
}
DATA = {"scored pairs": "mixed"}  # of a case; others read the examples alone
FALSE_NEGATIVES = ("false negatives", "guide", "B6 false negatives")
IDLE = ("in-batch", "scored pairs", "margin-mse", "dense layer", "B6 all kinds", "B6 listwise")
IDLE += FALSE_NEGATIVES
# How far gradients may be apart, as a share of their length. In float32 one process that takes
# its texts in other chunks is 5e-7 away from itself.
LIMITS = {torch.float64: 1e-13, torch.float32: 2e-6}
IN_BOTH = (
    "in-batch",
    "own negatives",
    "matryoshka",
    "dense layer",
    "B6 all kinds",
    "B6 own negatives",
)
STEPS = [(case, dtype) for case in IN_BOTH for dtype in LIMITS]
STEPS += [(case, torch.float64) for case in CASES if case not in IN_BOTH]


class Killed(BaseException):
    """Both processes die in the middle of a step."""


def examples() -> list[Example]:
    """Nineteen, so that the third batch has three; more documents than a batch takes of each.

    The queries of the first and the last are equal, and so are some documents. Two of three bring
    the scores of a reranker.
    """
    text = toy.SENTENCES
    return [
        Example(
            query=f"{text[i % 12].split()[-1]} {i % 18}",
            positives=tuple(f"{text[i % 12]} {j}" for j in range(1 + i % 3)),
            negatives=tuple(text[(i + j) % 12] for j in range(1, 1 + i % 5)),
            positive_scores=tuple(2.0 - j / 4 for j in range(1 + i % 3)) if i % 3 else None,
            negative_scores=tuple(j / 3 for j in range(i % 5)) if i % 3 else None,
        )
        for i in range(19)
    ]


def prepare(folder: Path) -> None:
    """Data, and a model without dropout: its masks differ by process."""
    write_examples(folder / "pairs.jsonl", examples())
    text = toy.SENTENCES
    scored = [Example(text[i], (text[i + 1],), task="sts", score=float(i % 4)) for i in range(10)]
    write_examples(folder / "mixed.jsonl", [*examples()[:9], *scored])
    config = toy.save_model(folder / "base", "bert") / "config.json"
    said = json.loads(config.read_text())
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(said | off))


def recipe(
    folder: Path,
    rate: float = 1e-4,
    steps: int = 6,
    dense_dim: int | None = None,
    **changes: Any,
) -> Recipe:
    """Batches of 8, 8 and 3; up to two of up to three positives, and of up to four negatives."""
    plain = finetune(
        model=str(folder / "base"), batch_size=8, learning_rate=rate, steps=steps, negatives=2
    )
    if "guide" in changes:
        changes["guide"] = str(folder / changes["guide"])
    stage = replace(plain.stages[0], positives=2, **changes)
    kinds = KINDS if isinstance(stage.objective, Unified) else None
    model = replace(plain.model, kinds=kinds, multi_dim=16, dense_dim=dense_dim)
    return replace(plain, stages=(stage,), model=model)


def trained(
    folder: Path, out: str, recipe: Recipe, run: Run = QUIET, data: str = "pairs", **more: Any
) -> Embedder:
    return train(recipe, [open_source(folder / f"{data}.jsonl")], folder / out, run=run, **more)


def weights(embedder: Embedder) -> dict[str, Tensor]:
    return {
        name: weight.detach().clone() for name, weight in checkpoint.trainable(embedder).items()
    }


def weights_in_float64(folder: Path, out: str) -> dict[str, Tensor]:
    """After six steps. In float32 AdamW makes a step of its own of a gradient that is noise."""
    build = loop.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", lambda model: build(model).double())
        return weights(trained(folder, out, recipe(folder)))


def gradients(
    folder: Path, out: str, case: str, dtype: torch.dtype = torch.float64, *, run: Run = QUIET
) -> list[list[Tensor]]:
    """The summed gradients of an epoch's three steps, too small to move the weights between."""
    found: list[list[Tensor]] = []
    add, build = distributed.sum_gradients, loop.build

    def recorded(parameters: list[torch.nn.Parameter]) -> None:
        add(parameters)
        found.append([p.grad.clone() for p in parameters if p.grad is not None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "sum_gradients", recorded)
        patch.setattr(loop, "build", lambda model: build(model).to(dtype))
        built = recipe(folder, rate=1e-30, steps=3, **CASES[case])
        trained(folder, out, built, run, DATA.get(case, "pairs"))
    return found


def gradients_with_an_idle_process(folder: Path, out: str, case: str) -> list[list[Tensor]]:
    """The same, but the second process has no share of any batch."""

    def unequal(self: BatchRows, rank: int, world: int) -> BatchRows:
        kept = slice(0, len(self)) if rank == 0 else slice(0)
        return BatchRows(self.source[kept], self.row[kept])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchRows, "share", unequal)
        return gradients(folder, out, case)


def killed(folder: Path, out: str) -> None:
    """Three steps of six, the last two of which no checkpoint has."""
    backward, done = contrastive.backward_in_chunks, []

    def dying(*args: Any, **options: Any) -> Any:
        if len(done) == 3:
            raise Killed
        done.append(1)
        return backward(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(contrastive, "backward_in_chunks", dying)
        trained(folder, out, recipe(folder))


def complaint_about_nan(folder: Path, out: str) -> str:
    """What is said when the second process alone has a bad loss, at step 3."""
    normal, calls = Contrastive.loss, []

    def broken(self: Contrastive, vectors: Any, batch: Any, step: int) -> dict[str, Tensor]:
        calls.append(1)
        bad = len(calls) == 3 and distributed.rank() == 1
        return {"loss": normal(self, vectors, batch)["loss"] * (float("nan") if bad else 1.0)}

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError) as caught:
        patch.setattr(Contrastive, "loss", broken)
        trained(folder, out, recipe(folder))
    return str(caught.value)


def best_weights(folder: Path, out: str) -> dict[str, Tensor]:
    """Measured by the first process alone; step 1 is best."""
    values = iter([0.1, 0.9, 0.5, 0.4])
    run = replace(QUIET, eval_steps=1)
    model = trained(folder, out, recipe(folder, steps=3), run, score=lambda _: next(values))
    return weights(model)


def summed_numbers(folder: Path) -> list[int]:
    """How many numbers each sum over the processes has, in three steps that embed all twice."""
    found: list[int] = []
    add = distributed.dist.all_reduce

    def recorded(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        found.append(tensor.numel())
        return add(tensor, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.dist, "all_reduce", recorded)
        trained(folder, "two summed", recipe(folder, steps=3), CHUNKED)
    return found


def no_log(*_: Any, **__: Any) -> None:
    raise AssertionError("one file has one writer, the first process")


def refusal(ask: Callable[[], object]) -> str:
    with pytest.raises(RecipeError) as caught:
        ask()
    return str(caught.value)


def stopped(folder: Path, out: str) -> tuple[Any, int]:
    """What the second process alone gets a signal in step 3: the end, and the steps taken."""
    taken: list[int] = []
    step = trainer.Trainer._step

    def counted(self: trainer.Trainer, *arguments: Any) -> int:
        if len(taken) == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        taken.append(self.progress.step)
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", counted)
        try:
            trained(folder, out, recipe(folder))
        except SystemExit as end:
            return end.code, len(taken)
    return None, len(taken)


def one_of_two(folder: Path) -> None:
    """What one of the two processes does, for the tests below to look at."""
    torch.set_num_threads(1)
    distributed.start()
    rank = distributed.rank()
    if rank == 1:
        trainer.Log = no_log  # pyright: ignore[reportAttributeAccessIssue]
    facts = {
        "gradients": {step: gradients(folder, f"two {step}", *step) for step in STEPS},
        "chunked": gradients(folder, "two chunked", "in-batch", run=CHUNKED),
        "idle": {
            case: gradients_with_an_idle_process(folder, f"two idle {case}", case) for case in IDLE
        },
        "weights": weights_in_float64(folder, "two"),
        "nan": complaint_about_nan(folder, "two nan"),
        "best": best_weights(folder, "two best"),
        "summed": summed_numbers(folder),
        # A folder of its own for each process, one with a checkpoint in it.
        "lost": refusal(lambda: trained(folder, ["two", "none"][rank], recipe(folder))),
    }
    killed(folder, "killed")
    facts["stopped"] = stopped(folder, "stopped")
    distributed.barrier()
    torch.save(facts, folder / f"{rank}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have trained."""
    folder = tmp_path_factory.mktemp("both")
    prepare(folder)
    run_together(__file__, str(folder))
    return folder


@pytest.fixture(scope="module")
def both(folder) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Tensor]:
    """The weights after the same six steps in one process."""
    return weights_in_float64(folder, "one")


def gap(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The length of the difference as a share of the expected length, over all tensors."""
    one, other = (torch.cat([x.flatten() for x in side]) for side in (found, expected))
    return float((one - other).norm() / other.norm())


def test_gradients_are_summed_once_a_step_however_many_chunks_there_are(folder, both):
    """Trap A7 of Arctic-Embed."""
    weights = Embedder.load(folder / "base").named_parameters()
    count = sum(p.numel() for name, p in weights if ".pooler." not in name)  # BERT's own, unused
    for facts in both:
        assert facts["summed"].count(count) == 3
        assert max(facts["summed"]) == count


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read(run / "log.jsonl") if "loss" in record]


@pytest.mark.parametrize(("case", "dtype"), STEPS)
def test_the_loop_sums_the_gradient_of_one_process_in_two(folder, both, case, dtype):
    """Traps A1 and A20 of Arctic-Embed."""
    one = gradients(folder, f"one {case} {dtype}", case, dtype)
    assert [len(step) for step in one] == [len(one[0])] * 3
    for facts in both:
        for found, expected in zip(facts["gradients"][case, dtype], one, strict=True):
            assert gap(found, expected) < LIMITS[dtype]


@pytest.mark.parametrize("case", FALSE_NEGATIVES)
def test_two_processes_ignore_the_documents_that_one_ignores(folder, both, case):
    gradients(folder, f"one ignored {case}", case)
    shares = [
        [record["ignored"] for record in read(folder / run / "log.jsonl")]
        for run in (f"two {(case, torch.float64)}", f"one ignored {case}")
    ]
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)
    assert 0.05 < min(shares[1]) < 0.95


def test_chunks_change_no_gradient(both):
    for facts in both:
        usual = facts["gradients"]["in-batch", torch.float64]
        for found, expected in zip(facts["chunked"], usual, strict=True):
            assert gap(found, expected) < LIMITS[torch.float64]


@pytest.mark.parametrize("case", IDLE)
def test_a_process_without_an_example_changes_no_gradient(both, case):
    """Trap B6 of BGE-M3.

    It answers the others, by every kind and with a reranker's scores as well.
    """
    for facts in both:
        usual = facts["gradients"][case, torch.float64]
        for found, expected in zip(facts["idle"][case], usual, strict=True):
            assert gap(found, expected) < LIMITS[torch.float64]


def test_a_reranker_s_scores_change_the_gradient(both):
    """Else the cases above would look at nothing."""
    found = {case: both[0]["gradients"][case, torch.float64][0] for case in CASES}
    assert gap(found["B6 kl"], found["B6 listwise"]) > 0.01
    assert gap(found["B6 kl"], found["B6 all kinds"]) > 0.01


def test_the_weights_of_both_processes_are_equal_to_the_bit(both):
    for kind in ("weights", "best"):
        first, second = (facts[kind] for facts in both)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_end_with_the_weights_of_one(folder, both, alone):
    # A softmax does not see a bias of the keys: its gradient is rounding noise, and AdamW takes
    # steps of one length whatever the size of a gradient.
    names = [name for name in alone if not name.endswith("key.bias")]
    for name in names:
        torch.testing.assert_close(both[0]["weights"][name], alone[name], rtol=0, atol=1e-9)
    before = weights(loop.build(recipe(folder).model))
    assert gap([before[name] for name in names], [alone[name] for name in names]) > 1e-4


def test_the_log_of_two_processes_is_that_of_one(folder, alone):
    logs = [read(folder / run / "log.jsonl") for run in ("two", "one")]
    for found, expected in zip(*logs, strict=True):
        for name in ("step", "tokens", "examples", "truncated"):
            assert found[name] == expected[name]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)


def test_the_best_weights_are_those_of_the_first_step(folder, both):
    after_one = torch.load(folder / "two best" / trainer.BEST, weights_only=True)
    assert all(torch.equal(both[1]["best"][name], after_one[name]) for name in after_one)


def test_a_run_of_two_processes_goes_on_in_one(folder, alone):
    said: list[str] = []
    trained(folder, "killed", recipe(folder), say=said.append)
    assert said[0] == "going on from step 2 of 6"
    assert losses(folder / "killed") == pytest.approx(losses(folder / "one"), abs=1e-5)


def test_a_signal_to_one_process_stops_both_after_the_same_step(folder, both):
    assert [facts["stopped"] for facts in both] == [(143, 3), (143, 3)]
    assert checkpoint.read(folder / "stopped/checkpoint.pt")["progress"]["step"] == 3
    said: list[str] = []
    trained(folder, "stopped", recipe(folder), say=said.append)
    assert said[0] == "going on from step 3 of 6"


def test_a_bad_loss_in_one_process_stops_both_and_names_the_batch(both):
    assert both[0]["nan"] == both[1]["nan"]
    assert "step 3: the loss is nan; its batch holds pairs example" in both[0]["nan"]
    assert "the last good checkpoint is" in both[0]["nan"]


def test_a_batch_smaller_than_the_number_of_processes_is_refused(folder, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(RecipeError, match="a batch of 2 has no example for each of 3 processes"):
        trained(folder, "small", recipe(folder, batch_size=2))


def test_processes_that_find_different_checkpoints_are_stopped(both):
    for facts in both:
        assert "processes find different checkpoints there; give an --out that" in facts["lost"]


def test_processes_beside_each_other_share_the_free_memory(monkeypatch):
    one = memory_for(torch.device("cpu"))
    monkeypatch.setattr(distributed, "local_world_size", lambda: 4)
    assert memory_for(torch.device("cpu")) == pytest.approx(one / 4, rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", ["", "--set run.shard_weights=true --set run.checkpoint_activations=true"]
)
def test_the_command_line_trains_in_two_processes(tmp_path, more):
    prepare(tmp_path)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m tercet"
    flags = (
        "train finetune --model base --data pairs.jsonl --dev pairs.jsonl --out run --device cpu"
    )
    ended = subprocess.run(
        [sys.executable, *torchrun.split(), *flags.split(), "--set", "batch_size=8", *more.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "run/model\n"
    steps = [record["step"] for record in read(tmp_path / "run/log.jsonl") if "loss" in record]
    assert steps == [1, 2, 3]
    assert Embedder.load(tmp_path / "run/model").encode(["words"]).shape == (1, 64)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
