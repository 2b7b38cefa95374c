"""Attention of long texts, whose weights are not kept for the backward."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tercet.models.network import attention
from tercet.models.network.attention import _attend_equal, _attend_run, _Rule
from tercet.models.network.backbone import Backbone
from tests.toy import ENCODERS, pack, random_model, random_texts

RULES = {
    "dropout": _Rule(causal=False, limit=None, scale=None, dropout=0.3),
    "causal dropout": _Rule(causal=True, limit=None, scale=0.5, dropout=0.3),
    "soft cap": _Rule(causal=False, limit=3, scale=None, dropout=0.0, softcap=2.0),
    "sinks": _Rule(causal=True, limit=None, scale=None, dropout=0.0, sinks=torch.arange(4.0)),
}


def run(way, rule: _Rule, *, learns: bool = True) -> tuple[Tensor, list[Tensor]]:
    """States of three texts of five tokens, and gradients; four heads, of which pairs share."""
    torch.manual_seed(0)
    shapes = [(3, 4, 5, 6), (3, 2, 5, 6), (3, 2, 5, 7)]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.manual_seed(1)
    with torch.set_grad_enabled(learns):
        states = way(*given, rule)
    if not learns:
        return states, []
    torch.manual_seed(2)
    return states, list(torch.autograd.grad((states * torch.randn_like(states)).sum(), given))


@pytest.mark.parametrize("name", RULES)
def test_weights_that_are_computed_again_give_the_same_states_and_gradients(name, monkeypatch):
    plain, gradients = run(_attend_equal, RULES[name])
    monkeypatch.setattr(attention, "KEPT_LENGTH", 4)
    again, their_gradients = run(_attend_run, RULES[name])
    torch.testing.assert_close(again, plain)
    for found, expected in zip(their_gradients, gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", RULES)
def test_heads_that_are_taken_in_turn_have_one_dropout_with_a_graph_and_without(name, monkeypatch):
    plain, gradients = run(_attend_equal, RULES[name])
    monkeypatch.setattr(attention, "KEPT_LENGTH", 4)
    monkeypatch.setattr(attention, "_PAIRS", 1)
    states, their_gradients = run(_attend_run, RULES[name])
    without, _ = run(_attend_run, RULES[name], learns=False)
    assert torch.equal(states, without)
    if not RULES[name].dropout:
        torch.testing.assert_close(states, plain)
        for found, expected in zip(their_gradients, gradients, strict=True):
            torch.testing.assert_close(found, expected)


def trained(asked: float | None, how: str) -> list[list[Tensor]]:
    """States and gradients of two steps on a CPU, of a BERT whose only dropout is attention's."""
    torch.manual_seed(0)
    model = random_model(ENCODERS["bert"])
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not name.endswith("attention.self.dropout"):
            module.p = 0.0
    network = Backbone(model).train()
    network.attention_dropout = asked
    if how == "bfloat16 weights":
        network.to(torch.bfloat16)
    texts = pack(*random_texts(7, 31, 13, 13))
    found = []
    for _ in range(2):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            states = network(texts).float()
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        gradients = [each.grad.float() for each in network.parameters() if each.grad is not None]
        found.append([states.detach(), *gradients])
    return found


@pytest.mark.parametrize(("how", "error"), [("autocast", 0.03), ("bfloat16 weights", 0.05)])
def test_training_in_bfloat16_on_a_cpu_leaves_out_the_usual_dropout_of_attention(how, error):
    exact, _ = trained(0.0, "float32")
    first, second = trained(None, how)
    assert all(map(torch.equal, first, second))
    checked = first if how == "autocast" else first[:1]  # gradients in bfloat16 are rough
    for found, expected in zip(checked, exact, strict=False):
        assert (found - expected).norm() < error * expected.norm() + 1e-2


@pytest.mark.parametrize(("asked", "how"), [(0.3, "autocast"), (None, "float32")])
def test_dropout_of_attention_stays_where_it_was_asked_for_and_in_float32(asked, how):
    first, second = trained(asked, how)
    assert not torch.equal(first[0], second[0])


def test_no_dropout_is_left_out_of_scores_with_sinks():
    network = Backbone(random_model(ENCODERS["bert"]))
    assert network.dropout_left_out == 0.1
    network.model.encoder.layer[0].sinks = nn.Parameter(torch.zeros(4))
    assert network.changes_scores and network.dropout_left_out == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_bfloat16_attention_keeps_little_memory_for_each_length_of_text():
    """Batched products keep 1.4 MB for each length and number of texts: 300 MB here."""
    script = """
import torch
from pathlib import Path
from tercet.models.network.attention import _attend_equal, _Rule

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10

rule = _Rule(causal=False, limit=None, scale=None, dropout=0.0)
with torch.inference_mode():
    for length in range(8, 232):
        if length == 24:
            before = memory()
        q, k, v = torch.randn(3, 1, 2, length, 16).bfloat16()
        _attend_equal(q, k, v, rule)
print(memory() - before)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 180


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("limit", [None, 3, 30])
@pytest.mark.parametrize("extra", ["plain", "soft cap", "sinks"])
def test_texts_of_similar_lengths_may_be_padded_without_a_change(causal, limit, extra, monkeypatch):
    """On a GPU a call costs more than padding; what is behind a text is never seen."""
    lengths = [9, 8, 8, 5, 2, 1]
    options = {"soft cap": {"softcap": 2.0}, "sinks": {"s_aux": torch.arange(4.0).double()}}
    module = nn.Module()
    config = SimpleNamespace(sliding_window=(limit or 1) - 1)
    vars(module).update(is_causal=causal, config=config)
    window = None if limit is None else limit
    expected = attend_with_gradients(lengths, module, window, options.get(extra, {}))
    cut = attention._groups
    monkeypatch.setattr(attention, "_groups", lambda lengths, spare: cut(lengths, 60))
    assert [group.lengths for group in cut(lengths, 60)] == [(9, 8, 8), (5, 2, 1)]
    padded = attend_with_gradients(lengths, module, window, options.get(extra, {}))
    for found, wanted in zip(padded, expected, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted)


def attend_with_gradients(lengths, module, window, options) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(1, 4, sum(lengths), 6), (1, 2, sum(lengths), 6), (1, 2, sum(lengths), 7)]
    given = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    layout = attention.Layout(pack(*random_texts(*lengths)))
    states, _ = attention.attend(module, *given, layout=layout, sliding_window=window, **options)
    return [states, *torch.autograd.grad((states * torch.randn_like(states)).sum(), given)]


def test_without_room_for_padding_texts_of_one_length_run_together():
    groups = list(attention._groups([7, 7, 3, 3, 3, 8, 1], 0))
    assert [group.lengths for group in groups] == [(7, 7), (3, 3, 3), (8,), (1,)]
    assert not any(group.is_padded for group in groups)


def test_a_group_ends_where_padding_would_cost_more_than_a_call():
    lengths = [100, 99, 98, 97, 50, 49, 10, 10]
    assert [group.lengths for group in attention._groups(lengths, 1_300)] == [
        (100, 99, 98, 97),
        (50, 49),
        (10, 10),
    ]


def test_long_texts_are_not_padded_since_their_mask_would_be_large():
    groups = list(attention._groups([600, 600, 599, 512, 511], 1e9))
    assert [group.lengths for group in groups] == [(600, 600), (599,), (512, 511)]
