"""Linear layers on 8-bit weights and inputs, by the integer products of a CPU (VNNI).

A weight row is ``scale * integers / smooth``, with integers from -127 to 127. An input is
multiplied by ``smooth``, column by column, and rounded to 8 bits: in one range that was measured on
texts, or in a range of its token's own. The loaded network has weights in floating point with
exactly these values, so that it runs where the operators are missing, more slowly, and a reading
copy finds the integers again. Apart from rounding, no text's vector depends on its neighbours.
"""

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor, nn

from tercet.errors import ModelError
from tercet.models.network.fingerprints import version_of

LARGEST: Final = 127  # of a weight's integers
_LEVELS: Final = 255  # of an input
_AT_ONCE: Final = 1 << 16  # numbers of an input
_ATTRIBUTE: Final = "int8"  # of a linear layer: its grid
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)  # that the operators write


@dataclass(frozen=True, eq=False)
class Grid:
    """What says which integers a linear layer's weight and input become."""

    scale: Float32[Tensor, "out"]  # of each row of the weight
    smooth: Float32[Tensor, "inner"] | None  # factors of an input's columns; None: 1
    range: Float32[Tensor, "2"] | None  # smallest and largest input; None: each token's own

    def integers(self, weight: Float[Tensor, "out inner"]) -> Int8[Tensor, "out inner"]:
        """Return the integers of a weight."""
        smoothed = weight.float() if self.smooth is None else weight.float() / self.smooth
        found = smoothed.div(self.scale[:, None]).round_()
        return found.clamp_(-LARGEST, LARGEST).to(torch.int8)

    def weight(self, integers: Int8[Tensor, "out inner"]) -> Float32[Tensor, "out inner"]:
        """Return the weight of integers."""
        found = integers.float().mul_(self.scale[:, None])
        return found if self.smooth is None else found.mul_(self.smooth)

    def smoothed(self, x: Float[Tensor, "*rows inner"]) -> Float32[Tensor, "*rows inner"]:
        """Return an input in float32, its columns multiplied."""
        return x.float() if self.smooth is None else x.float() * self.smooth

    @cached_property
    def step(self) -> tuple[float, int]:
        """Return the distance between two levels of the measured range, and the level of 0."""
        assert self.range is not None, "only layers with a measured range have one step"
        low, high = min(float(self.range[0]), 0.0), max(float(self.range[1]), 0.0)
        step = max((high - low) / _LEVELS, 1e-12)
        return step, min(round(-low / step), _LEVELS)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is there, by name."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def int8_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear, Grid]]:
    """Yield names, linear layers and grids of those that have 8-bit weights."""
    for name, module in model.named_modules():
        grid = grid_of(module)
        if grid is not None and isinstance(module, nn.Linear):
            yield name, module, grid


def grid_of(module: nn.Module) -> Grid | None:
    """Return the grid of a layer with 8-bit weights."""
    return module.__dict__.get(_ATTRIBUTE)


def put_on_grid(linear: nn.Linear, grid: Grid, integers: Int8[Tensor, "out inner"]) -> None:
    """Give a layer the weight of these integers, and mark it."""
    with torch.no_grad():
        linear.weight.copy_(grid.weight(integers))
    linear.__dict__[_ATTRIBUTE] = grid


# ---- running ---------------------------------------------------------------------------------


@cache
def runs_here() -> bool:
    """Whether torch and this CPU multiply integers of 8 bits, and rightly.

    Without VNNI instructions, sums of two large products overflow; so one is computed.
    """
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):  # made for torch's compiler
        return False
    inner, out = 64, 16
    weight = torch.full((out, inner), LARGEST, dtype=torch.int8)
    x = torch.full((2, inner), _LEVELS, dtype=torch.uint8)
    try:
        with torch.inference_mode():
            packed = torch.ops.onednn.qlinear_prepack(weight, None)
            ones, zeros = torch.ones(out), torch.zeros(out, dtype=torch.int64)
            made = _product(x, 1.0, 0, packed, (ones, zeros), None, (torch.float32, "none"))
    # The operators are torch's own, so their signatures may change; a build may lack the kernels.
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):
        return False
    return bool((made == inner * LARGEST * _LEVELS).all())


class Int8Linear:
    """The forward of a linear layer with 8-bit weights, on packed integers."""

    def __init__(
        self, linear: nn.Linear, grid: Grid, activation: str, inputs: "_RoundedInputs"
    ) -> None:
        self._linear, self._grid, self._activation = linear, grid, activation
        self._inputs = inputs
        self._facts: tuple[object, ...] = ()
        self._zeros = torch.zeros(linear.out_features, dtype=torch.int64)
        self.refresh()

    def refresh(self) -> None:
        """Pack the integers again if the weight is at another place, such as after a conversion.

        Its numbers are compared only then, not at each call as for other layers: 8-bit weights are
        not trained. Changes through ``weight.data`` are not noticed.

        Raises:
            ModelError: if the weight was noticed to be another one, which the grid does not fit.
        """
        weight, bias = self._linear.weight, self._linear.bias
        facts = tuple(
            (each.data_ptr(), each.dtype, version_of(each))
            for each in (weight, bias)
            if each is not None
        )
        if facts != self._facts:
            self._facts, self._weight = facts, self._packed()
            self._bias = None if bias is None else bias.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output, after the activation."""
        quantized, step, zero = self._inputs.of(x)
        weight, scales = self._weight, (self._grid.scale, self._zeros)
        if not isinstance(step, Tensor):
            how = (x.dtype, self._activation)
            return _product(quantized, step, zero, weight, scales, self._bias, how)
        made = _product(quantized, 1.0, zero, weight, scales, None, (torch.float32, "none"))
        if self._bias is None:
            made = made.mul_(step)
        else:
            made = torch.addcmul(self._bias, made, step)
        made = made.to(x.dtype)
        return F.gelu(made) if self._activation == "gelu" else made

    def _packed(self) -> Tensor:
        with torch.inference_mode():
            weight = self._linear.weight.detach()
            integers = self._grid.integers(weight)
            if not torch.equal(self._grid.weight(integers).to(weight.dtype), weight):
                raise ModelError(
                    "the weights of a model with 8-bit weights must not change; some did; load the "
                    "model again, or change the one that it was made from and quantize again"
                )
            return torch.ops.onednn.qlinear_prepack(integers, None)


_Levels: TypeAlias = tuple[Tensor, float | Tensor, int]


class _RoundedInputs(threading.local):
    """Inputs in 8 bits of the layers of a module that read the same one, rounded once for all."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._last: list[tuple[weakref.ref[Tensor], int | None, _Levels]] = []  # at most one

    def of(self, x: Tensor) -> _Levels:
        """Return an input's levels, the distance of two levels (of each token), and that of 0.

        They are held until the input is freed, or another one is read.
        """
        version = version_of(x)
        for ref, of_version, found in self._last:
            if ref() is x and of_version == version:
                return found
        last, found = self._last, levels(self._grid, x)
        last[:] = [(weakref.ref(x, lambda _: last.clear()), version, found)]
        return found


def levels(
    grid: Grid, x: Float[Tensor, "*rows inner"]
) -> tuple[UInt8[Tensor, "*rows inner"], float | Float32[Tensor, "*rows 1"], int]:
    """Return an input's levels from 0 to 255, the distance of two, and the level of 0.

    Some rows at a time, so that what is in between stays in the cache.
    """
    rows = x.reshape(-1, x.shape[-1])
    found = torch.empty(rows.shape, dtype=torch.int8)  # conversion to unsigned ones is slow
    steps = None if grid.range is not None else torch.empty(len(rows), 1)
    step, zero = grid.step if steps is None else (1.0, LARGEST + 1)
    middle = torch.tensor(zero + 0.5)
    size = max(1, _AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), size):
        some = grid.smoothed(rows[start : start + size])
        if steps is None:
            exact = torch.add(middle, some, alpha=1 / step).clamp_(0, _LEVELS)
        else:
            largest = some.abs().amax(1, keepdim=True).clamp_(min=1e-12)
            torch.div(largest, LARGEST, out=steps[start : start + size])
            exact = torch.addcmul(middle, some, LARGEST / largest)
        found[start : start + size].copy_(exact)  # fractions are cut off
    levels = found.view(torch.uint8).view(x.shape)
    return levels, step if steps is None else steps.view(*x.shape[:-1], 1), zero


def _product(  # noqa: PLR0913 (those of torch's operator)
    x: Tensor,
    step: float,
    zero: int,
    weight: Tensor,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    how: tuple[torch.dtype, str],
) -> Tensor:
    """Return the product of levels with packed integers, as numbers of a type, after a GELU."""
    dtype, activation = how
    run: Any = torch.ops.onednn.qlinear_pointwise
    exact = "none" if activation == "gelu" else ""  # the form of the GELU
    return run(x, step, zero, weight, *scales, bias, 1.0, 0, dtype, activation, [], exact)


def int8_forwards(
    model: nn.Module, activations: dict[nn.Linear, str]
) -> dict[nn.Linear, Int8Linear]:
    """Return forwards of the layers with 8-bit weights; ``activations`` are fused into them."""
    made: dict[nn.Linear, Int8Linear] = {}
    for parent in model.modules():
        linears = [each for each in parent.children() if isinstance(each, nn.Linear)]
        groups: list[tuple[Grid, list[nn.Linear]]] = []
        for linear in linears:
            grid = grid_of(linear)
            if grid is None or linear.weight.dtype not in _DTYPES:
                continue
            found = next((group for first, group in groups if _same_input(first, grid)), None)
            if found is None:
                groups.append((grid, [linear]))
            else:
                found.append(linear)
        for grid, group in groups:
            inputs = _RoundedInputs(grid)
            for linear in group:
                own = grid_of(linear)
                assert own is not None, "only such layers are in groups"
                made[linear] = Int8Linear(linear, own, activations.get(linear, "none"), inputs)
    return made


def _same_input(a: Grid, b: Grid) -> bool:
    """Whether two layers round inputs alike; those that read the same one do."""
    return _equal(a.smooth, b.smooth) and _equal(a.range, b.range)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
