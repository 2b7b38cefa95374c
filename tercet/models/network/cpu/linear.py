"""Linear layers on weights laid out for the kernels of a CPU.

oneDNN multiplies by a weight in its preferred layout about 12 % faster than ``nn.Linear``, and
applies a GELU while the result is still in the cache. The layout costs a second copy of the
weights, so large models run without it. Results differ in the last bits only.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from tercet.models.network.fingerprints import WeightCache

MAX_BYTES: Final = 1 << 30  # of weights that are worth a second copy
FEW_ROWS: Final = 40  # of as many, products by the weights take less time than comparing them
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
