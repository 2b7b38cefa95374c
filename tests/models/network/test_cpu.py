import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from tercet.models.embedder import Embedder
from tercet.models.network import cpu
from tercet.models.network.cpu import Prepacked
from tests.toy import SENTENCES, save_model


def plainly(embedder, texts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "MAX_BYTES", 0)
        return embedder.encode(texts)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert", "llama", "gemma3"])
def test_prepacked_layers_give_the_same_vectors(tmp_path, kind, monkeypatch):
    embedder = Embedder.load(save_model(tmp_path / "model", kind), attention="bidirectional")
    expected = plainly(embedder, SENTENCES, monkeypatch)
    np.testing.assert_allclose(embedder.encode(SENTENCES), expected, atol=1e-6)


def test_every_linear_layer_is_replaced_and_put_back(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    layers = [m for m in embedder.modules() if type(m) is nn.Linear]
    with torch.inference_mode(), embedder._prepacked.in_use():
        assert all("forward" in layer.__dict__ for layer in layers)
    assert not any("forward" in module.__dict__ for module in embedder.modules())


def test_the_gelu_of_bert_is_applied_once(encoder_folder):
    model = Embedder.load(encoder_folder).backbone.model
    found = cpu._followed_by_gelu(model)
    assert len(found) == model.config.num_hidden_layers


@pytest.mark.parametrize("fused", [False, True])  # fused ones do not count up the version
def test_changed_weights_are_packed_again(encoder_folder, monkeypatch, fused):
    embedder = Embedder.load(encoder_folder)
    before = embedder.encode(SENTENCES)
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=0.01, fused=fused)
    embedder(embedder.tokenize(SENTENCES, "query").pack()).square().sum().backward()
    optimizer.step()
    after = embedder.encode(SENTENCES)
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(after, plainly(embedder, SENTENCES, monkeypatch), atol=1e-6)


def test_training_never_runs_on_packed_weights(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    with torch.no_grad(), Prepacked(embedder).in_use():
        assert not any("forward" in module.__dict__ for module in embedder.modules())


def test_an_error_inside_leaves_the_model_as_it_was(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    with (
        pytest.raises(KeyError),
        torch.inference_mode(),
        embedder._prepacked.in_use(),
    ):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in embedder.modules())


# ---- bfloat16 --------------------------------------------------------------------------------


@pytest.fixture
def ratio(monkeypatch):
    """Pretend that bfloat16 takes so many times as long."""
    return lambda value: monkeypatch.setattr(cpu, "bfloat16_ratio", lambda: value)


def test_bfloat16_is_warned_of_where_it_takes_longer(ratio):
    ratio(4.0)
    said = cpu.warning_of(torch.bfloat16, "cpu")
    assert said is not None and "4.0 times as long as float32" in said


def test_nothing_is_said_where_it_is_fast_or_not_used_or_on_a_gpu(ratio):
    ratio(0.5)
    assert cpu.warning_of(torch.bfloat16, "cpu") is None
    ratio(4.0)
    assert cpu.warning_of(torch.float32, "cpu") is None
    assert cpu.warning_of(torch.bfloat16, "cuda") is None


def test_the_ratio_is_measured():
    assert 0.05 < cpu.bfloat16_ratio() < 100


# ---- freed memory ----------------------------------------------------------------------------

COUNT = """
import resource, torch
from tercet.models.network.cpu import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if {kept}:
    keep_freed_memory()
for turn in range(20):
    if turn == 15:
        before = faults()
    held = [torch.ones((1 << 20) + 1024 * turn) for _ in range(3)]  # 4 MiB, and a page more a turn
    del held
print(faults() - before)
"""


def faults(kept: bool) -> int:
    """Pages that the system hands out in the last five turns, in a process of its own."""
    code = COUNT.format(kept=kept)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what other libraries do is theirs")
def test_freed_memory_is_not_fetched_from_the_system_again():
    assert faults(kept=True) < 500 < faults(kept=False)
