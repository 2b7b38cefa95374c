"""What makes encoding on a CPU fast: reused memory, weights laid out for its kernels, bfloat16.

oneDNN multiplies by a weight in its preferred layout about 12 % faster than ``nn.Linear``, and
applies a GELU while the result is still in the cache. The layout costs a second copy of the
weights, so large models run without it. Results differ in the last bits only.
"""

import timeit
from functools import cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from tercet.models.network.fingerprints import WeightCache
from tercet.segments import Packed

MAX_BYTES: Final = 1 << 30  # of weights that are worth a second copy
_KEPT: Final = (32 << 20) - (64 << 10)  # bytes; glibc learns from blocks of up to 32 MiB
_ROWS: Final = 64  # more are rounded up, by an eighth at most; no bit of a result changes
_TOKENS: Final = 1_024  # rows the layout is chosen for; any number works
_CLEARLY_SLOWER: Final = 1.3  # times the time of float32


@cache
def keep_freed_memory() -> None:
    """Let the process keep up to 64 MiB of freed memory for its next tensors.

    Otherwise glibc fetches activations of some megabytes from the system again in every layer,
    which clears their pages: a tenth of the time of encoding. Its limits grow with the largest
    block freed so far: hence one of nearly 32 MiB, the most that it learns from, freed untouched.
    """
    torch.empty(_KEPT, dtype=torch.uint8)


# ---- bfloat16 --------------------------------------------------------------------------------


@cache
def bfloat16_ratio() -> float:
    """Return the time of a bfloat16 matrix product over that of a float32 one, measured once."""
    x, weight = torch.randn(256, 384), torch.randn(768, 384)
    return _seconds(x.bfloat16(), weight.bfloat16()) / _seconds(x, weight)


def warning_of(precision: torch.dtype, device: torch.device | str) -> str | None:
    """Return a warning if this precision costs time on this device instead of saving it."""
    if precision != torch.bfloat16 or torch.device(device).type != "cpu":
        return None
    ratio = bfloat16_ratio()
    if ratio <= _CLEARLY_SLOWER:
        return None
    return (
        f"this CPU has no instructions for bfloat16, which takes {ratio:.1f} times as long as "
        "float32 here; leave out --dtype bfloat16"
    )


def _seconds(x: Tensor, weight: Tensor) -> float:
    """Return the shortest of five runs, since other processes may delay some."""
    return min(timeit.repeat(lambda: F.linear(x, weight), number=1, repeat=5))


# ---- prepacked weights -----------------------------------------------------------------------


class PackedLinear:
    """The forward of a linear layer, on a copy of its weight in the layout of its kernel."""

    def __init__(self, linear: nn.Linear, activation: str) -> None:
        self._linear, self._activation = linear, activation
        self._run: Any = torch.ops.mkldnn._linear_pointwise
        self._kept: WeightCache[Tensor] = WeightCache()
        self.refresh()

    def refresh(self) -> None:
        """Pack the weight again if any number of it changed."""
        self._weight = self._kept.get([self._linear.weight.detach()], self._packed)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output, after the activation."""
        return self._run(x, self._weight, self._linear.bias, self._activation, [], "none")

    def _packed(self) -> Tensor:
        with torch.inference_mode():
            weight = self._linear.weight.detach()
            return torch.ops.mkldnn._reorder_linear_weight(weight, _TOKENS)


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    """Change a model, for good, to run its linear layers on packed weights in inference mode.

    Returns its packed layers: none, and an unchanged model, if it is too large or not on a CPU.
    """
    if not _suits(model):
        return []
    fused = _followed_by_gelu(model)
    found = []
    for module in model.modules():
        if type(module) is nn.Linear:
            packed = PackedLinear(module, "gelu" if module in fused else "none")
            module.forward = packed  # pyright: ignore[reportAttributeAccessIssue]
            found.append(packed)
    for activation in fused.values():
        activation.forward = lambda x: x
    return found


def rounded(texts: Packed) -> Packed:
    """Return the texts, and some texts of one token behind them, so that few row lengths occur.

    oneDNN keeps a kernel of 100 KB and more for each number of rows. Packed batches have as many as
    their tokens: hundreds of megabytes after some ten thousand texts. No bit of a state changes.
    """
    rows = len(texts.ids)
    added = -rows % (1 << max(rows.bit_length() - 5, 3)) if rows > _ROWS else 0
    if not added:
        return texts
    ends = texts.offsets[-1] + torch.arange(1, added + 1)
    return Packed(
        torch.cat([texts.ids, texts.ids[:1].expand(added)]),
        torch.cat([texts.offsets, ends.to(texts.offsets.dtype)]),
        torch.cat([texts.pooled, texts.pooled[:1].expand(added)]),
    )


def _suits(model: nn.Module) -> bool:
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    # These operators are torch's own, made for its compiler, so they may be missing.
    names = ("_linear_pointwise", "_reorder_linear_weight")
    if not torch.backends.mkldnn.is_available() or not all(
        hasattr(torch.ops.mkldnn, name) for name in names
    ):
        return False
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return sum(p.numel() * p.element_size() for p in model.parameters()) <= MAX_BYTES


def _followed_by_gelu(model: nn.Module) -> dict[nn.Linear, nn.Module]:
    """Return layers that only a GELU reads, with it: the feed-forward of BERT-like models."""
    found: dict[nn.Linear, nn.Module] = {}
    for module in model.modules():
        linear = getattr(module, "dense", None)
        activation = getattr(module, "intermediate_act_fn", None)
        if type(linear) is nn.Linear and isinstance(activation, GELUActivation):
            if getattr(activation, "act", None) is nn.functional.gelu:
                found[linear] = activation
    return found
