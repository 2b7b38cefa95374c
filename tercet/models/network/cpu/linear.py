"""Linear layers on weights laid out for the kernels of a CPU.

oneDNN multiplies by a weight in its preferred layout about 12 % faster than ``nn.Linear``, and
applies a GELU while the result is still in the cache. The layout costs a second copy of the
weights, so large models run without it. Results differ in the last bits only.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from tercet.models.network.cpu.int8 import Int8Linear, int8_forwards, runs_here
from tercet.models.network.fingerprints import WeightCache

MAX_BYTES: Final = 1 << 30  # of weights that are worth a second copy
# Up to as many rows, products by the weights take less time than comparing them.
FEW_ROWS: Final = {torch.float32: 128, torch.bfloat16: 64}
_TOKENS: Final = 1_024  # rows the layout is chosen for; any number works


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


def packed_layers(model: nn.Module) -> list[PackedLinear | Int8Linear]:
    """Change a model, for good, to run its linear layers on packed weights in inference mode.

    Returns its packed layers: none, and an unchanged model, if it is not on a CPU; only those with
    8-bit weights if it is too large.
    """
    fused = _followed_by_gelu(model)
    activations = dict.fromkeys(fused, "gelu")
    on_cpu = next(model.parameters()).device.type == "cpu"
    forwards: dict[nn.Linear, PackedLinear | Int8Linear] = {}
    if on_cpu and runs_here():
        forwards |= int8_forwards(model, activations)
    if _suits(model):
        for module in model.modules():
            if type(module) is nn.Linear and module not in forwards:
                forwards[module] = PackedLinear(module, activations.get(module, "none"))
    for linear, forward in forwards.items():
        linear.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    for linear, activation in fused.items():
        if linear in forwards:
            activation.forward = lambda x: x
    return list(forwards.values())


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
