"""Frozen weights in bfloat16 while others are trained, as under LoRA.

Under autocast a product casts its weight. Casts of trained weights are kept for the step; those of
frozen ones are not, so the graph of each chunk would hold a copy of the whole network.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

Places: TypeAlias = list[tuple[nn.Module, str]]
"""Where one weight is: modules and names."""


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
        places: dict[int, Places] = {}
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                fits = p.dtype == torch.float32 and not p.requires_grad and id(p) not in tables
                if fits and isinstance(module, nn.Linear):
                    places.setdefault(id(p), []).append((module, name))
        self._places = list(places.values())  # of each weight
        self._held: list[_Held] = []  # of each weight; empty: the weights are whole

    def shrink(self) -> None:
        """Hold the weights in bfloat16 from now on; each is freed before the next is made."""
        if self._held:
            return
        for places in self._places:
            module, name = places[0]
            held = _held(module.get_parameter(name))
            _put(held.half, places)
            self._held.append(held)

    def restore(self) -> None:
        """Give the weights back their numbers in float32, to the bit."""
        for places in reversed(self._places if self._held else []):
            held = self._held.pop()
            half = held.half.detach()
            exact = half.float() if held.exact is None else held.exact.to(half.device)
            _put(nn.Parameter(exact, requires_grad=False), places)


def _put(weight: nn.Parameter, places: Places) -> None:
    for module, name in places:
        module.register_parameter(name, weight)


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
