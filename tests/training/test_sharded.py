"""Weights spread over two processes against one. Run as a script, this file is one of the two."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tercet import distributed
from tercet.data.batches.sampler import BatchRows
from tercet.errors import RecipeError, TrainingError
from tercet.models.embedder import Embedder
from tercet.models.network.backbone import Backbone
from tercet.objectives import contrastive
from tercet.objectives.contrastive import Contrastive
from tercet.objectives.mntp import MNTP
from tercet.objectives.retromae import RetroMAE
from tercet.sharding import whole_of
from tercet.training import loop
from tercet.training.recipe import Lora, Model, Recipe, Run, Stage
from tercet.training.sharded import blocks_of, require_shardable
from tercet.training.trainer import Trainer
from tests import toy
from tests.processes import run_together
from tests.training import test_two_processes as two

SHARDED = replace(two.QUIET, shard_weights=True)
MIXED = replace(SHARDED, chunk_tokens=40, memory_gb=0.02)  # some graphs are kept, some are not
TWICE = replace(SHARDED, chunk_tokens=25, memory_gb=0.0)  # none is
AGAIN = replace(MIXED, checkpoint_activations=True)
LORA = Lora(rank=4, dropout=0.0)
STEPS: dict[str, tuple[str, Run]] = {  # what is trained, and how the batch is cut
    "chunks, some graphs kept": ("matryoshka", MIXED),
    "a dense layer": ("dense layer", MIXED),
    "chunks, no graph kept": ("B6 all kinds", TWICE),
    "low-rank updates, layers computed again": ("own negatives", AGAIN),
    "masked tokens": ("in-batch", TWICE),
}


def recipe_of(folder: Path, name: str) -> Recipe:
    """Of three steps, too small to move the weights between."""
    case, _ = STEPS[name]
    plain = two.recipe(folder, rate=1e-30, steps=3, **two.CASES[case])
    if name.startswith("low-rank updates"):
        return replace(plain, model=replace(plain.model, lora=LORA))
    if name == "masked tokens":
        (stage,) = plain.stages
        objective = MNTP(head=str(folder / "decoder"), block_tokens=32, train_head=True)
        model = Model(base=str(folder / "decoder"), attention="bidirectional")
        return replace(plain, model=model, stages=(replace(stage, objective=objective),))
    return plain


@contextmanager
def in_float64(wanted: bool = True):
    build = loop.build
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr(loop, "build", lambda model: build(model).double())
        yield patch


def gradients(folder: Path, out: str, recipe: Recipe, run: Run) -> list[list[Tensor]]:
    """The whole summed gradients of a run's steps; of weights in float64, unless in bfloat16."""
    found: list[list[Tensor]] = []
    clip = Trainer._clipped

    def recorded(self: Trainer, weights: list[nn.Parameter]) -> Tensor:
        found.append([whole_of(p.grad).clone() for p in weights if p.grad is not None])
        return clip(self, weights)

    with in_float64(run.dtype != "bfloat16") as patch:
        patch.setattr(Trainer, "_clipped", recorded)
        two.trained(folder, out, recipe, run)
    return found


def gradients_with_an_idle_process(folder: Path) -> list[list[Tensor]]:
    def unequal(self: BatchRows, rank: int, world: int) -> BatchRows:
        kept = slice(0, len(self)) if rank == 0 else slice(0)
        return BatchRows(self.source[kept], self.row[kept])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchRows, "share", unequal)
        return gradients(folder, "two idle", recipe_of(folder, "chunks, some graphs kept"), MIXED)


def quality(embedder: Embedder) -> float:
    """Some number that hangs on all weights, of an embedder that can do all that others can."""
    texts = ["a small web server", "maps of rivers"]
    assert not any(isinstance(p, DTensor) for p in embedder.parameters())
    assert len(embedder.fingerprint()) == 16
    return float(embedder.encode(texts).sum())


@contextmanager
def measured():
    """What a process holds when a stage ends, in memory, as shares of the whole network."""
    held: dict[str, float] = {}
    end = Trainer._end

    def recorded(self: Trainer) -> None:
        network = list(self.embedder.backbone.parameters())
        every = sum(p.numel() for p in network)
        held["share of weights"] = sum(map(numbers_in_memory, network)) / every
        state = [
            value for of_weight in self.optimizer.state.values() for value in of_weight.values()
        ]
        held["share of optimizer"] = sum(map(numbers_in_memory, state)) / (2 * every)
        end(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_end", recorded)
        yield held


def numbers_in_memory(tensor: Tensor) -> float:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().nbytes() / local.element_size()


def weights_after_six_steps(folder: Path, out: str, run: Run) -> dict[str, Any]:
    scored = replace(run, eval_steps=2, models_at=(4,))
    with in_float64(), measured() as held:
        model = two.trained(folder, out, two.recipe(folder), scored, score=quality)
    return {"weights": two.weights(model), **held}


def killed(folder: Path, out: str, run: Run) -> None:
    """Three steps of six, the last of which no checkpoint has."""
    backward, done = contrastive.backward_in_chunks, []

    def dying(*args: Any, **options: Any) -> Any:
        if len(done) == 3:
            raise two.Killed
        done.append(1)
        return backward(*args, **options)

    with in_float64() as patch, pytest.raises(two.Killed):
        patch.setattr(contrastive, "backward_in_chunks", dying)
        two.trained(folder, out, two.recipe(folder), run)


def resumed(folder: Path, out: str, run: Run) -> dict[str, Any]:
    said: list[str] = []
    with in_float64(), measured() as held:
        model = two.trained(folder, out, two.recipe(folder), run, say=said.append)
    return {"said": said, "weights": two.weights(model), **held}


def complaint_about_nan(folder: Path) -> str:
    """What is said when the second process alone has a bad loss, at step 2."""
    normal, calls = Contrastive.loss, []

    def broken(self: Contrastive, vectors: Any, batch: Any, step: int) -> dict[str, Tensor]:
        calls.append(1)
        bad = len(calls) == 2 and distributed.rank() == 1
        return {"loss": normal(self, vectors, batch)["loss"] * (float("nan") if bad else 1.0)}

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError) as caught:
        patch.setattr(Contrastive, "loss", broken)
        two.trained(folder, "two nan", two.recipe(folder), SHARDED)
    return str(caught.value)


def one_of_two(folder: Path) -> None:
    """What one of the two processes does, for the tests below to look at."""
    torch.set_num_threads(1)
    distributed.start()
    facts = {
        "gradients": {
            name: gradients(folder, f"two {name}", recipe_of(folder, name), run)
            for name, (_, run) in STEPS.items()
        },
        "in bfloat16": gradients(
            folder,
            "two bfloat16",
            recipe_of(folder, "chunks, some graphs kept"),
            replace(MIXED, dtype="bfloat16"),
        ),
        "idle": gradients_with_an_idle_process(folder),
        "six": weights_after_six_steps(folder, "two", SHARDED),
        "resumed": resumed(folder, "killed alone", SHARDED),
        "nan": complaint_about_nan(folder),
    }
    killed(folder, "killed together", SHARDED)
    distributed.barrier()
    torch.save(facts, folder / f"{distributed.rank()}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have trained."""
    folder = tmp_path_factory.mktemp("both")
    two.prepare(folder)
    decoder = t.LlamaForCausalLM(toy.DECODERS["llama"])  # pyright: ignore[reportArgumentType]
    decoder.save_pretrained(folder / "decoder")
    toy.byte_bpe().save_pretrained(folder / "decoder")
    killed(folder, "killed alone", two.QUIET)
    run_together(__file__, str(folder))
    return folder


@pytest.fixture(scope="module")
def both(folder) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Any]:
    """The same six steps in one process; and the last weights of them, whatever they score."""
    last = resumed(folder, "one, not measured", two.QUIET)["weights"]
    return {**weights_after_six_steps(folder, "one", two.QUIET), "last": last}


def assert_same_weights(
    found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-9
) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        if not name.endswith("key.bias"):  # whose gradient is rounding noise
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=limit)


@pytest.mark.parametrize("name", STEPS)
def test_sharded_weights_get_the_summed_gradient_of_one_process(folder, both, name):
    """Trap A1 of Arctic-Embed."""
    one = gradients(folder, f"one {name}", recipe_of(folder, name), two.QUIET)
    assert len(one) == 3
    limit = 1e-6 if name == "masked tokens" else 1e-12  # whose head is in float32
    for facts in both:
        for found, expected in zip(facts["gradients"][name], one, strict=True):
            assert two.gap(found, expected) < limit


def test_a_process_without_an_example_runs_in_step(both):
    for facts in both:
        usual = facts["gradients"]["chunks, some graphs kept"]
        for found, expected in zip(facts["idle"], usual, strict=True):
            assert two.gap(found, expected) < 1e-12


def test_products_in_bfloat16_give_nearly_the_gradient_of_float64(both):
    exact = both[0]["gradients"]["chunks, some graphs kept"]
    for found, expected in zip(both[0]["in bfloat16"], exact, strict=True):
        assert 1e-5 < two.gap([x.double() for x in found], expected) < 0.1


def test_each_process_holds_half_of_the_weights_and_of_the_optimizer(both, alone):
    assert [alone["share of weights"], alone["share of optimizer"]] == pytest.approx(
        [1, 1], rel=0.1
    )
    for facts in (facts[run] for facts in both for run in ("six", "resumed")):
        assert facts["share of weights"] == pytest.approx(0.5, abs=0.02)
        assert facts["share of optimizer"] == pytest.approx(0.5, abs=0.05)


def test_sharded_processes_end_with_the_weights_and_scores_of_one(folder, both, alone):
    for facts in both:
        assert_same_weights(facts["six"]["weights"], alone["weights"])
    logs = [two.read(folder / run / "log.jsonl") for run in ("two", "one")]
    for found, expected in zip(*logs, strict=True):
        for name in {"loss", "gradient_norm", "dev_score"} & expected.keys():
            assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_the_model_that_is_saved_is_whole(folder, both):
    saved = two.weights(Embedder.load(folder / "two" / "model"))
    trained = {name: weight.float() for name, weight in both[0]["six"]["weights"].items()}
    assert all(torch.equal(saved[name], trained[name]) for name in trained)


def test_a_model_that_is_kept_in_mid_run_is_whole(folder, alone):
    saved, plain = (Embedder.load(folder / run / "steps" / "4") for run in ("two", "one"))
    assert_same_weights(two.weights(saved), two.weights(plain), 1e-6)  # saved in float32


def test_a_run_goes_on_from_one_process_to_sharded_ones(both, alone):
    for facts in both:
        assert_same_weights(facts["resumed"]["weights"], alone["last"])
    assert both[0]["resumed"]["said"][0] == "going on from step 2 of 6"


def test_a_run_goes_on_from_sharded_processes_to_one(folder, both, alone):
    found = resumed(folder, "killed together", two.QUIET)
    assert found["said"][0] == "going on from step 2 of 6"
    assert_same_weights(found["weights"], alone["last"])


def test_a_bad_loss_in_one_process_stops_both(both):
    assert both[0]["nan"] == both[1]["nan"]
    assert "step 2: the loss is nan" in both[0]["nan"]


def test_one_process_holds_all_weights_whatever_was_asked(folder):
    two.trained(folder, "one sharded", two.recipe(folder, steps=1), SHARDED)


def test_an_objective_that_is_not_shardable_is_refused():
    stage = Stage(name="retromae", objective=RetroMAE())
    with pytest.raises(RecipeError, match="shard_weights, which RetroMAE does not support"):
        require_shardable(stage)


@pytest.mark.parametrize("kind", [*toy.ENCODERS, *toy.DECODERS])
def test_a_network_is_cut_into_its_layers_and_its_token_table(kind):
    model = toy.random_model({**toy.ENCODERS, **toy.DECODERS}[kind])
    table, *layers = blocks_of(Backbone(model))
    assert table is model.get_input_embeddings()
    assert len(layers) == 3
    within = {id(p) for block in (table, *layers) for p in block.parameters()}
    outside = [name for name, p in model.named_parameters() if id(p) not in within]
    assert all("norm" in n.lower() or "embed" in n or "pooler" in n for n in outside)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
