import pytest
import torch

from tercet.models.network.cpu import precision


@pytest.fixture
def ratio(monkeypatch):
    """Pretend that bfloat16 has no instructions here, and what its time is over that of float32."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    return lambda value: monkeypatch.setattr(precision, "bfloat16_ratio", lambda: value)


def test_bfloat16_is_warned_of_where_it_takes_longer(ratio):
    ratio(4.0)
    said = precision.warning_of(torch.bfloat16, "cpu")
    assert said is not None and "4.0 times as long as float32" in said


def test_nothing_is_said_where_it_is_fast_or_not_used_or_on_a_gpu(ratio):
    ratio(0.5)
    assert precision.warning_of(torch.bfloat16, "cpu") is None
    ratio(4.0)
    assert precision.warning_of(torch.float32, "cpu") is None
    assert precision.warning_of(torch.bfloat16, "cuda") is None


def test_nothing_is_said_where_there_are_instructions_for_it(ratio, monkeypatch):
    ratio(4.0)  # as measured while others use the cores
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    assert precision.warning_of(torch.bfloat16, "cpu") is None


def test_the_ratio_is_measured():
    assert 0.05 < precision.bfloat16_ratio() < 100
