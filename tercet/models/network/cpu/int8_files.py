"""The file of a model with 8-bit weights: integers, their grids, and the other weights.

It stands in the place of ``model.safetensors``, so that no program that does not know it takes the
rest of the folder for a whole model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tercet.errors import ModelError
from tercet.models.network.cpu.int8 import Grid, int8_layers, put_on_grid

FILE: Final = "int8.safetensors"
_MARK: Final = ".int8."  # between a layer's name and that of a tensor of its grid
_DAMAGE: Final = (
    *(OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError, RuntimeError),
)


def save_int8(model: nn.Module, folder: Path) -> None:
    """Write the weights of a model with 8-bit layers; bfloat16 where it holds a weight exactly."""
    weights = {name: _compact(weight) for name, weight in model.state_dict().items()}
    for name, linear, grid in int8_layers(model):
        weights[f"{name}.weight"] = grid.integers(linear.weight.detach().cpu())
        weights |= {f"{name}{_MARK}{what}": each for what, each in grid.tensors().items()}
    save_file(
        {name: each.cpu().clone().contiguous() for name, each in weights.items()}, folder / FILE
    )


def _compact(weight: Tensor) -> Tensor:
    if weight.dtype != torch.float32:
        return weight
    short = weight.bfloat16()
    return short if torch.equal(short.float(), weight) else weight


def read_int8(folder: Path) -> tuple[dict[str, Tensor], dict[str, Grid]] | None:
    """Return weights in floating point and grids by layer; None for a model without 8-bit weights.

    Raises:
        ModelError: if the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = load_file(path)
        grids: dict[str, dict[str, Tensor]] = {}
        for name in [name for name in found if _MARK in name]:
            layer, _, what = name.rpartition(_MARK)
            grids.setdefault(layer, {})[what] = found.pop(name)
        made = {
            layer: _grid(layer, tensors, found[f"{layer}.weight"])
            for layer, tensors in grids.items()
        }
        for layer, grid in made.items():
            found[f"{layer}.weight"] = grid.weight(found[f"{layer}.weight"])
        for name, each in found.items():
            if each.dtype == torch.int8:
                raise ValueError(f"{name} has 8-bit weights without a scale")
    except _DAMAGE as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{path}: is damaged ({line}); copy the folder again, or quantize the model again: "
            "tercet quantize"
        ) from error
    return {name: _wide(each) for name, each in found.items()}, made


def _grid(layer: str, tensors: Mapping[str, Tensor], integers: Tensor) -> Grid:
    """Return the grid of a layer's integers; a ValueError says what is wrong with it."""
    if integers.dtype != torch.int8:
        raise ValueError(f"{layer}: the weights are not integers of 8 bits")
    out, inner = integers.shape
    shapes = {"scale": (out,), "smooth": (inner,), "range": (2,)}
    for what, each in tensors.items():
        if each.dtype != torch.float32 or each.shape != shapes[what] or not each.isfinite().all():
            raise ValueError(f"{layer}: {what} is not {shapes[what]} finite numbers in float32")
        if what != "range" and not (each > 0).all():
            raise ValueError(f"{layer}: {what} is not positive")
    made = Grid(tensors["scale"], tensors.get("smooth"), tensors.get("range"))
    if made.range is not None and made.range[0] > made.range[1]:
        raise ValueError(f"{layer}: the range ends below its start")
    return made


def _wide(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype == torch.bfloat16 else weight


def mark_int8(model: nn.Module, grids: Mapping[str, Grid]) -> None:
    """Mark the layers of a loaded network that have 8-bit weights."""
    layers = dict(model.named_modules())
    for name, grid in grids.items():
        linear = layers.get(name)  # missing if only the first layers were loaded
        if isinstance(linear, nn.Linear):
            put_on_grid(linear, grid, grid.integers(linear.weight.detach()))
