"""Frozen weights in bfloat16 while others are trained, as under LoRA.

Under autocast a product casts its weight. Casts of trained weights are kept for the step; those of
frozen ones are not, so the graph of each chunk would hold a copy of the whole network.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class _Held:
    half: nn.Parameter
    exact: Tensor | None  # on the CPU; None: the same numbers


class FrozenInHalf:
    """The frozen float32 weights of a model's linear layers, held in bfloat16 or as they were.

    Only linear layers: autocast casts their weights and biases to the same bits. Norms and token
    tables take part in float32, and stay. A weight that bfloat16 cannot express is kept on the CPU
    too, so that merging, saving and measuring see the exact one.
    """

    def __init__(self, model: nn.Module) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self._places = [
            (module, name)
            for module in model.modules()
            if isinstance(module, nn.Linear)
            for name, p in module.named_parameters(recurse=False)
            if p.dtype == torch.float32 and not p.requires_grad and id(p) not in tables
        ]
        self._held: list[_Held] = []  # of each place; empty: the weights are whole

    def shrink(self) -> None:
        """Hold the weights in bfloat16 from now on."""
        if self._held:
            return
        made: dict[int, _Held] = {}
        for module, name in self._places:
            weight = module.get_parameter(name)
            if id(weight) not in made:
                made[id(weight)] = _held(weight)
            self._held.append(made[id(weight)])
        for (module, name), held in zip(self._places, self._held, strict=True):
            module.register_parameter(name, held.half)

    def restore(self) -> None:
        """Give the weights back their numbers in float32, to the bit."""
        made: dict[int, nn.Parameter] = {}
        for (module, name), held in zip(self._places, self._held, strict=bool(self._held)):
            half = held.half.detach()
            if id(held.half) not in made:
                exact = half.float() if held.exact is None else held.exact.to(half.device)
                made[id(held.half)] = nn.Parameter(exact, requires_grad=False)
            module.register_parameter(name, made[id(held.half)])
        self._held = []


def linear_numbers(model: nn.Module, *, frozen: bool) -> int:
    """Return how many numbers the linear layers have; only ``frozen`` ones, or all."""
    found = {
        id(p): p.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for p in module.parameters(recurse=False)
        if not (frozen and p.requires_grad)
    }
    return sum(found.values())


def _held(weight: nn.Parameter) -> _Held:
    exact = weight.detach()
    half = exact.bfloat16()
    same = torch.equal(half.float(), exact)
    return _Held(nn.Parameter(half, requires_grad=False), None if same else exact.cpu())
