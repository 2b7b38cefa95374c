"""Quantization of a model's linear layers to 8 bits, calibrated on texts.

Each layer gets the cheapest way of rounding its input whose error is near the smallest: one range
measured on the texts, or each token's own; columns smoothed as in SmoothQuant (arXiv 2211.10438,
equation 4), or not. A layer that loses too much in every way stays in floating point.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from tercet.errors import ModelError, RecipeError
from tercet.files.progress import bar
from tercet.models.embedder import Embedder
from tercet.models.network.cpu.int8 import LARGEST, Grid, int8_layers, levels, put_on_grid
from tercet.segments import batches_by_length

FEWEST: Final = 16  # texts, with those that are held out
_HELD_OUT: Final = 5  # every fifth text is measured, not calibrated on
_ROWS: Final = 1_024  # inputs of a layer that its ways of rounding are compared on
_MOST_ROWS: Final = 2 * _ROWS  # that are held of a layer's inputs
_ROWS_A_BATCH: Final = 64
_BATCH_TOKENS: Final = 1_024
_SMOOTHING: Final = 0.5  # the exponent: an outlier's size is halved between input and weight
_NEAR: Final = 1.5  # times the smallest error
_TOO_MUCH: Final = 0.05  # of a layer's output, in norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A quantized model, and how near its vectors are to those of the model before."""

    embedder: Embedder
    by_range: int  # layers whose inputs have one measured range
    by_token: int  # layers whose inputs have ranges by token
    left: tuple[str, ...]  # layers in floating point
    cosines: np.ndarray  # of held-out texts, before and after

    @property
    def mean(self) -> float:
        """The mean cosine."""
        return float(self.cosines.mean())

    @property
    def smallest(self) -> float:
        """The smallest cosine."""
        return float(self.cosines.min())


def quantized(embedder: Embedder, texts: Sequence[str], *, progress: bool = False) -> Quantized:
    """Return a copy of a model whose linear layers have 8-bit weights.

    Every fifth text is held out, to measure dense vectors before and after.

    Args:
        embedder: a model in float32 on a CPU.
        texts: some hundreds, like those to be encoded.
        progress: show a progress bar.

    Raises:
        RecipeError: for fewer than 16 texts.
        ModelError: if the model has 8-bit weights already, or LoRA that is not merged, or is not in
            float32 on a CPU.

    Examples:
        >>> made = quantized(Embedder.load("minilm"), texts)
        >>> made.embedder.save("minilm-int8")
    """
    texts = [text for text in texts if text.strip()]
    if len(texts) < FEWEST:
        raise RecipeError(
            f"quantization must have at least {FEWEST} texts, of which every fifth is held out; "
            f"got {len(texts)}; give some hundreds that are like those to be encoded"
        )
    _refuse_unfit(embedder)
    held_out = texts[::_HELD_OUT]
    seen = [text for number, text in enumerate(texts) if number % _HELD_OUT]
    before = embedder.encode(held_out, "document")
    made = copy.deepcopy(embedder).eval()
    for table in made.backbone.modules():
        if isinstance(table, nn.Embedding):
            table.weight.data = table.weight.data.bfloat16().to(table.weight.dtype)
    by_range = by_token = 0
    left: list[str] = []
    for names, linears, inputs in _inputs_of_layers(made, seen, progress):
        grids = _chosen(linears, inputs)
        if grids is None:
            left += names
            continue
        for linear, grid in zip(linears, grids, strict=True):
            put_on_grid(linear, grid, grid.integers(linear.weight.detach()))
            by_range += grid.range is not None
            by_token += grid.range is None
    if not by_range + by_token:
        raise ModelError("no linear layer can have 8-bit weights without losing too much")
    after = made.encode(held_out, "document")
    if embedder.fingerprint() in embedder.settings.distilled_as:
        made.settings = replace(made.settings, distilled_as=made.fingerprints())
    cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1)
    return Quantized(
        embedder=made,
        by_range=by_range,
        by_token=by_token,
        left=tuple(left),
        cosines=cosines / np.linalg.norm(after, axis=1),
    )


def _refuse_unfit(embedder: Embedder) -> None:
    """Raise if a model cannot be quantized."""
    if next(int8_layers(embedder.backbone), None) is not None:
        raise ModelError("the model has 8-bit weights already; quantize the one it was made from")
    if embedder.backbone.has_lora:
        raise ModelError("the model has LoRA that is not merged; save it first, which merges")
    weight = next(embedder.backbone.parameters())
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ModelError(
            "a model to be quantized must have float32 weights on a CPU; got "
            f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}; "
            "load it with dtype=torch.float32 and leave it there"
        )


# ---- inputs ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _ReadRows:
    """What a layer read: extremes of each column, and some rows."""

    low: Tensor  # [inner]
    high: Tensor  # [inner]
    rows: list[Tensor] = field(default_factory=list)
    step: int = 1  # times the distance between rows of a batch

    def add(self, x: Tensor) -> None:
        """Take in the inputs of one batch."""
        x = x.detach().float().reshape(-1, x.shape[-1])
        self.low, self.high = self.low.minimum(x.amin(0)), self.high.maximum(x.amax(0))
        self.rows.append(x[:: max(1, len(x) // _ROWS_A_BATCH) * self.step].clone())
        if sum(map(len, self.rows)) > _MOST_ROWS:
            self.rows = [torch.cat(self.rows)[::2].clone()]
            self.step *= 2

    @property
    def some(self) -> Tensor:
        """At most 1,024 rows, at equal distances."""
        rows = torch.cat(self.rows)
        return rows[:: -(-len(rows) // _ROWS)]


def _inputs_of_layers(
    embedder: Embedder, texts: Sequence[str], progress: bool
) -> Iterator[tuple[list[str], list[nn.Linear], _ReadRows]]:
    """Yield names of layers that read the same input, the layers, and the unquantized input."""
    backbone = embedder.backbone
    named = {
        each: name
        for name, each in backbone.named_modules()
        if type(each) is nn.Linear and "pooler" not in name  # runs, but no vector uses it
    }
    found: dict[nn.Linear, _ReadRows] = {}

    def saw(linear: nn.Linear, _module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if linear not in found:
            found[linear] = _ReadRows(*x.new_zeros(2, x.shape[-1], dtype=torch.float32))
        found[linear].add(x)

    tokens = embedder.tokenize(texts, "document")
    with (
        torch.inference_mode(),
        _hooked(named, saw),
        bar("calibrate", len(texts), shown=progress) as advance,
    ):
        for batch in batches_by_length(tokens.lengths, _BATCH_TOKENS):
            backbone(tokens.pack(batch).to(embedder.device))
            advance(len(batch))
    for parent in list(backbone.modules()):
        rest = [each for each in parent.children() if each in found and type(each) is nn.Linear]
        while rest:
            first = found[rest[0]]
            group = [each for each in rest if _are_same(found[each], first)]
            rest = [each for each in rest if each not in group]
            yield [named[each] for each in group], group, first


@contextmanager
def _hooked(layers: dict[nn.Linear, str], saw: Any) -> Iterator[None]:
    hooks = [each.register_forward_pre_hook(partial(saw, each)) for each in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _are_same(a: _ReadRows, b: _ReadRows) -> bool:
    return a.low.equal(b.low) and a.high.equal(b.high)


# ---- the choice --------------------------------------------------------------------------------


def _chosen(linears: list[nn.Linear], inputs: _ReadRows) -> list[Grid] | None:
    """Return grids of layers that read the same input; None if all of them lose too much."""
    ways = []
    for by_range in (True, False):
        for smoothing in (None, _SMOOTHING):
            grids = _grids(linears, inputs, by_range=by_range, smoothing=smoothing)
            ways.append((_error(linears, grids, inputs.some), grids))
    smallest = min(error for error, _ in ways)
    if not smallest < _TOO_MUCH:
        return None
    return next(grids for error, grids in ways if error <= _NEAR * smallest)


def _grids(
    linears: list[nn.Linear], inputs: _ReadRows, *, by_range: bool, smoothing: float | None
) -> list[Grid]:
    """Return the grids of layers that read the same input, rounded in one way."""
    weights = [each.weight.detach().float() for each in linears]
    smooth = None
    low, high = inputs.low, inputs.high
    if smoothing is not None:
        columns = torch.cat(weights).abs().amax(0).clamp(min=1e-5)
        largest = low.abs().maximum(high.abs()).clamp(min=1e-5)
        smooth = columns ** (1 - smoothing) / largest**smoothing
        smooth = smooth / smooth.log().mean().exp()
        low, high = low * smooth, high * smooth
    measured = torch.stack([low.min(), high.max()]) if by_range else None
    found = []
    for weight in weights:
        rows = weight if smooth is None else weight / smooth
        scale = rows.abs().amax(1).clamp(min=1e-12) / LARGEST
        found.append(Grid(scale, smooth, measured))
    return found


def _error(linears: list[nn.Linear], grids: list[Grid], x: Tensor) -> float:
    """Return the largest error of the layers' outputs, relative to their norm."""
    quantized_x, step, zero = levels(grids[0], x)
    read = (quantized_x.float() - zero) * step
    if grids[0].smooth is not None:
        read = read / grids[0].smooth
    found = 0.0
    for linear, grid in zip(linears, grids, strict=True):
        weight = linear.weight.detach().float()
        exact = x @ weight.T
        made = read @ grid.weight(grid.integers(weight)).T
        found = max(found, float((made - exact).norm() / exact.norm().clamp(min=1e-12)))
    return found
