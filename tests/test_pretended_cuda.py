"""Steps and encoding as on a GPU, with no GPU: nothing on two devices, few waits, the same numbers.

See ``tests/pretend.py`` for what this device refuses and counts, and for what it cannot show.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from tercet.errors import ModelError
from tercet.kinds import KINDS
from tercet.models import encode_loop
from tercet.models.embedder import Embedder
from tercet.models.network import attention, backbone
from tercet.models.network.backbone import Backbone
from tercet.training import loop
from tercet.training.loop import train
from tercet.training.recipe import Run
from tests.every_recipe import BUILD, Workplace, losses, workplace
from tests.pretend import Log, pretended_cuda, quiet, to_gpu
from tests.toy import DECODERS, ENCODERS, SENTENCES, pack, random_model, random_texts

ROTARY = [name for name in DECODERS if name != "gemma2"]  # which bends its scores
OF_A_CHUNK = ("models/network/", "segments", "vectors", "models/embedder")
ONCE = ("models/network/fingerprints.py",)  # at the start and the end of a stage
ONE_KIND = {"layer_types": None}
SHORT, LONG = 2, 4  # steps of a stage in two runs, whose difference is that of their steps


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("recipes"))


@contextmanager
def what_is_done_once_is_not_counted():
    """The proof of a model after a move, the plan of a run, and saving at the end of a stage."""
    with ExitStack() as stack:
        for owner, name in ((backbone, "_probe"), (loop, "forecast_stages"), (Embedder, "save")):
            stack.enter_context(mock.patch.object(owner, name, not_counted(getattr(owner, name))))
        yield


def not_counted(function):
    def run(*args, **options):
        with quiet():
            return function(*args, **options)

    return run


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    log: Log


def trained(place: Workplace, name: str, out: Path, steps: int, **changes) -> Trained:
    """Train a recipe in small chunks, of which some keep their graphs and some do not."""
    settings = {"device": "cpu", "dtype": "float32", "show_progress": False}
    run = Run(**settings | {"chunk_tokens": 64, "memory_gb": 0.0005} | changes)
    recipe = place.recipe(name, steps)
    with ExitStack() as stack:
        log = Log()
        if run.device == "cuda":
            stack.enter_context(what_is_done_once_is_not_counted())
            log = stack.enter_context(pretended_cuda())
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


def of_a_chunk(log: Log) -> Counter[str]:
    """Waits and blocking copies where a chunk of a batch is embedded, by place."""
    return Counter(
        {
            f"{what} at {where}": n
            for kept in (log.waits, log.copies)
            for (what, where), n in kept.items()
            if where.startswith(OF_A_CHUNK) and not where.startswith(ONCE)
        }
    )


def a_step(runs, name: str, kept: str) -> Counter[str]:
    """What the steps between the short run and the long one add, by place."""
    short, long = (getattr(runs(name, "bfloat16", steps).log, kept) for steps in (SHORT, LONG))
    return Counter({f"{what} at {where}": n for (what, where), n in (long - short).items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_a_training_on_a_gpu_has_the_losses_of_the_cpu(name, place, runs, tmp_path):
    """No mixture of devices is met on the way: it would raise."""
    expected = trained(place, name, tmp_path / "run", SHORT).losses
    got = runs(name, "float32", SHORT).losses
    assert len(got) == SHORT * len(place.recipe(name, 1).stages)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    # Adam lets the rounding of the first step grow, on some CPUs to 2e-5 in the fourth one.
    near = 0.05 if name == "llm2vec" else 5e-5  # the dropout of SimCSE draws other numbers
    np.testing.assert_allclose(got, expected, rtol=near)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BUILD)
def test_a_chunk_never_makes_the_host_wait_for_the_gpu(name, dtype, runs):
    found = of_a_chunk(runs(name, dtype, SHORT).log)
    assert not found, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune an encoder", "LoRA", "bge_m3"])
def test_a_step_makes_the_host_wait_at_most_once(name, place, runs):
    stages = len(place.recipe(name, 1).stages)
    found = a_step(runs, name, "waits")
    assert sum(found.values()) <= stages * (LONG - SHORT), found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune an encoder", "LoRA", "bge_m3"])
def test_a_step_has_no_blocking_copy(name, runs):
    found = a_step(runs, name, "copies")
    assert not found, found


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_vectors_encoded_on_a_gpu_are_those_of_the_cpu(kind, place):
    embedder = Embedder.load(place.folder / kind)
    expected = embedder.encode(SENTENCES)
    with what_is_done_once_is_not_counted(), pretended_cuda() as log:
        got = embedder.to("cuda").encode(SENTENCES)
    assert not log.copies
    assert sum(log.waits.values()) == 1, log.waits  # the vectors of the only batch
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_vectors_of_a_batch_are_read_from_a_gpu_once_the_next_batch_is_asked_for(place):
    embedder = Embedder.load(place.folder / "bert")
    embedder.batch_tokens = 32
    expected, order = embedder.encode(SENTENCES), []
    run, arrived = encode_loop.Step.__init__, encode_loop._arrived

    def asked(self, *given, **replaced):
        if not replaced:  # a step that is kept until its vectors arrive is copied, without states
            order.append("asked")
        run(self, *given, **replaced)

    def read(*late):
        order.append("read")
        return arrived(*late)

    with what_is_done_once_is_not_counted(), pretended_cuda() as log:
        with mock.patch.object(encode_loop.Step, "__init__", asked):
            with mock.patch.object(encode_loop, "_arrived", read):
                got = embedder.to("cuda").encode(SENTENCES)
    batches = order.count("asked")
    assert batches > 2
    assert order == ["asked", *["asked", "read"] * (batches - 1), "read"]
    assert not log.copies and {what for what, _ in log.waits} == {"Event.synchronize"}
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_vectors_of_all_kinds_encoded_on_a_gpu_are_those_of_the_cpu(place):
    embedder = Embedder.load(place.folder / "xlm-roberta", kinds=KINDS, multi_dim=16)
    expected = embedder.encode_vectors(SENTENCES)
    with what_is_done_once_is_not_counted(), pretended_cuda() as log:
        embedder.to("cuda")
        got = embedder.encode_vectors(SENTENCES)
        assert not log.copies
        waits = {what for what, _ in log.waits}
        assert waits == {"Event.synchronize"}  # of the only batch
        for one, other in zip(got.tensors(), expected.tensors(), strict=True):
            torch.testing.assert_close(one.cpu(), other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [*ROTARY, "modernbert", "bert"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@torch.no_grad()
def test_sixteen_bits_on_a_gpu_take_one_kernel_a_layer(name, how):
    texts = pack(*random_texts(7, 31, 13, 1, 31, 5))
    model = random_model({**DECODERS, **ENCODERS}[name])
    exact = Backbone(random_model({**DECODERS, **ENCODERS}[name]), attention="bidirectional")(texts)
    half = Backbone(model.bfloat16() if how == "bfloat16" else model, attention="bidirectional")
    with pretended_cuda() as log:
        to_gpu(half)
        packed = texts.to("cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=how == "autocast"):
            states = half(packed)
        with quiet():
            got = states.cpu().float()
    assert torch.nn.functional.cosine_similarity(got, exact).min() > 0.99
    assert log.launches["varlen_attn"] == 3
    assert not any("scaled_dot_product" in launch for launch in log.launches)


LAUNCHES = {"bert": 90, "llama": 142, "modernbert": 120}  # with 2 % of room


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_a_layer_do_not_grow_with_the_lengths_of_texts(name):
    few, many = (launches_of_a_layer(name, lengths) for lengths in ([9] * 8, range(2, 10)))
    assert many <= few + 2
    assert many <= LAUNCHES[name]


def launches_of_a_layer(name: str, lengths) -> float:
    """Of a forward and a backward in training, under autocast."""
    texts = pack(*random_texts(*lengths))
    found = []
    for layers in (1, 3):
        config = {**DECODERS, **ENCODERS}[name]
        config = type(config)(**config.to_dict() | {"num_hidden_layers": layers, **ONE_KIND})
        network = Backbone(random_model(config), attention="bidirectional").train()
        with pretended_cuda() as log:
            to_gpu(network)
            packed = texts.to("cuda")
            before = log.kernels
            with torch.autocast("cuda", dtype=torch.bfloat16):
                network(packed).sum().backward()
            found.append(log.kernels - before)
    return (found[1] - found[0]) / 2


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_the_probe_refuses_a_kernel_whose_window_is_one_too_wide(how, monkeypatch):
    """On a CPU the window was proved by other code; so a GPU's kernel is proved where it runs."""
    network = Backbone(random_model(ENCODERS["modernbert"]))
    network.prove()
    with pretended_cuda():
        to_gpu(network)
        if how == "bfloat16":
            network.bfloat16()
        kernel = attention.varlen.varlen_attn

        @wraps(kernel)
        def wider(*given, window_size, **named):
            left, right = (reach + (reach > 0) for reach in window_size)
            return kernel(*given, window_size=(left, right), **named)

        monkeypatch.setattr(attention.varlen, "varlen_attn", wider)
        autocast = torch.autocast("cuda", dtype=torch.bfloat16, enabled=how == "autocast")
        with autocast, pytest.raises(ModelError, match="differ from the model's own"):
            network.prove()


def test_dropout_of_attention_is_left_out_unless_simcse_asks_for_it():
    network = Backbone(random_model(ENCODERS["bert"])).train()
    texts = pack(*random_texts(7, 31, 13))
    for asked, kernels in ((None, 3), (0.3, 0)):
        network.attention_dropout = asked
        with pretended_cuda() as log:
            to_gpu(network)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                network(texts.to("cuda"))
            assert network.dropout_left_out == (0.1 if asked is None else 0)
        assert log.launches["varlen_attn"] == kernels


def test_heads_that_share_keys_are_spread_where_the_kernel_does_not_run(monkeypatch):
    """For shared keys SDPA has no kernel on a GPU that takes float32 and keeps no scores."""
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, **named):
        seen.append((q.shape[1] == k.shape[1] == v.shape[1], named["enable_gqa"]))
        return plain(q, k, v, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    network = Backbone(random_model(DECODERS["llama"]))
    texts = pack(*random_texts(7, 31, 13))
    with torch.no_grad():
        expected = network(texts)
        assert set(seen) == {(False, True)}
        seen.clear()
        with pretended_cuda():
            to_gpu(network)
            got = network(texts.to("cuda"))
            torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-4)
    assert set(seen) == {(True, False)}
