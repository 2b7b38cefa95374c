"""Products of 8-bit weights, against the slow formula."""

from typing import Any

import pytest
import torch
from torch import nn

from tercet.models.network.cpu import int8, linear
from tercet.models.network.cpu.int8 import Grid, int8_forwards, levels, put_on_grid

pytestmark = pytest.mark.filterwarnings("error")
needs_vnni = pytest.mark.skipif(not int8.runs_here(), reason="needs a CPU with VNNI instructions")


def layer_of(inner=48, out=32, *, smooth=False, by_range=True, bias=True):
    """A linear layer on a grid, and inputs for it, one of which has an outlier."""
    draw = torch.Generator().manual_seed(0)
    made = nn.Linear(inner, out, bias=bias)
    x = torch.randn(21, inner, generator=draw)
    x[:, 3] *= 30
    factors = torch.rand(inner, generator=draw) + 0.5 if smooth else None
    read = x if factors is None else x * factors
    extremes = torch.stack([read.min(), read.max()]) if by_range else None
    weight = made.weight.detach() if factors is None else made.weight.detach() / factors
    grid = Grid(weight.abs().amax(1) / 127, factors, extremes)
    put_on_grid(made, grid, grid.integers(made.weight.detach()))
    return made, grid, x


def slow_product(made, grid, x):
    """Quantize, multiply integers, and dequantize, in float64."""
    x, scale = x.double(), grid.scale.double()
    factors = torch.ones(x.shape[1]) if grid.smooth is None else grid.smooth
    weight = (made.weight.double() / factors / scale[:, None]).round()
    read = x * factors
    if grid.range is not None:
        low, high = min(float(grid.range[0]), 0.0), max(float(grid.range[1]), 0.0)
        step, zero = torch.tensor((high - low) / 255).double(), round(-low / ((high - low) / 255))
    else:
        step, zero = read.abs().amax(1, keepdim=True) / 127, 128
    integers = ((read / step).round() + zero).clamp(0, 255) - zero
    found = (integers @ weight.T) * step * scale
    return found if made.bias is None else found + made.bias.double()


@needs_vnni
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by_range", [True, False])
@pytest.mark.parametrize("smooth", [True, False])
def test_products_are_those_of_the_integers(smooth, by_range, bias):
    made, grid, x = layer_of(smooth=smooth, by_range=by_range, bias=bias)
    (forward,) = int8_forwards(nn.Sequential(made), {}).values()
    with torch.inference_mode():
        found, expected = forward(x), slow_product(made, grid, x)
        # a product on the edge of two levels may fall to the other one: a step of one column
        assert (found - expected).abs().max() < 2e-2 * expected.abs().max()
        assert (found - expected).norm() < 2e-3 * expected.norm()
        assert torch.equal(forward(x[None])[0], found)
        assert (found - x @ made.weight.T - (made.bias if bias else 0)).norm() < 0.05 * found.norm()


@needs_vnni
@pytest.mark.parametrize("by_range", [True, False])
def test_a_gelu_is_part_of_the_product(by_range):
    made, _, x = layer_of(by_range=by_range)
    (plain,) = int8_forwards(nn.Sequential(made), {}).values()
    (fused,) = int8_forwards(nn.Sequential(made), {made: "gelu"}).values()
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), nn.functional.gelu(plain(x)), atol=1e-5, rtol=1e-4)


@needs_vnni
def test_bfloat16_comes_in_and_goes_out():
    made, grid, x = layer_of()
    (forward,) = int8_forwards(nn.Sequential(made), {}).values()
    with torch.inference_mode():
        found = forward(x.bfloat16())
        assert found.dtype == torch.bfloat16
        expected = slow_product(made, grid, x)
        assert (found - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("by_range", [True, False])
def test_a_row_is_rounded_alike_with_any_neighbours(by_range, monkeypatch):
    _, grid, x = layer_of(by_range=by_range)
    whole, step, zero = levels(grid, x)
    steps = torch.as_tensor(step).expand(len(x), 1)
    monkeypatch.setattr(int8, "_AT_ONCE", 48 * 4)
    for start in range(0, len(x), 5):
        some, own, _ = levels(grid, x[start : start + 5])
        assert torch.equal(some, whole[start : start + 5])
        assert torch.equal(torch.as_tensor(own).expand(len(some), 1), steps[start : start + 5])
    assert whole.dtype == torch.uint8 and zero < 256


def test_inputs_beyond_the_measured_range_are_cut():
    _, grid, x = layer_of()
    assert levels(grid, 100 * x)[0].float().unique().tolist()[-1] == 255
    assert levels(grid, -100 * x)[0].min() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_are_found_again_in_weights_of_any_type(dtype):
    made, grid, _ = layer_of(smooth=True)
    integers = grid.integers(made.weight.detach())
    assert integers.abs().max() == 127
    assert torch.equal(grid.integers(made.weight.detach().to(dtype)), integers)


@needs_vnni
def test_layers_that_read_the_same_input_round_it_once(monkeypatch):
    made, grid, x = layer_of()
    twin = nn.Linear(48, 32)
    put_on_grid(twin, grid, grid.integers(twin.weight.detach()))
    seen: list[Any] = []
    rounded = int8.levels
    monkeypatch.setattr(int8, "levels", lambda *given: seen.append(1) or rounded(*given))
    first, second = int8_forwards(nn.Sequential(made, twin), {}).values()
    with torch.inference_mode():
        expected = [first(x), second(x)]
        assert len(seen) == 1
        x.mul_(2)  # in place: the same object, another input
        assert not torch.equal(first(x), expected[0]) and not torch.equal(second(x), expected[1])
    assert len(seen) == 2


def test_without_the_operators_layers_run_in_floating_point(monkeypatch):
    made, _, x = layer_of()
    monkeypatch.setattr(linear, "runs_here", lambda: False)
    model = nn.Sequential(made)
    assert not any(isinstance(each, int8.Int8Linear) for each in linear.packed_layers(model))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), nn.functional.linear(x, made.weight, made.bias))


def test_a_cpu_whose_sums_overflow_is_not_trusted(monkeypatch):
    monkeypatch.setattr(int8, "_product", lambda *_: torch.full((2, 16), 32767.0))
    assert not int8.runs_here.__wrapped__()


def test_operators_that_raise_are_not_used(monkeypatch):
    def missing(*_: Any) -> None:
        raise NotImplementedError("Could not run 'onednn::qlinear_pointwise'")

    monkeypatch.setattr(int8, "_product", missing)
    assert not int8.runs_here.__wrapped__()
