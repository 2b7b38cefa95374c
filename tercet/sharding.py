"""Weights spread over the processes, a part of each in each (torch's ``fully_shard``, FSDP2).

A block's weights are gathered when the block is computed, and dropped after it. Gradients are
summed over the processes, as :mod:`tercet.distributed` does, and not averaged; each process gets
the sums for its own parts, and its optimizer knows no others. With as many processes, weights,
gradients and optimizer take that much less memory in each.

Every run through such a model, forwards or backwards, is a conversation of all processes: they
have to make the same number of them in the same order.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tercet import distributed


class Sharded:
    """A model whose weights are spread over the processes, and the way back.

    ``blocks`` are parts of it whose weights are gathered together; what is in none of them is
    gathered with the model itself. The weights move to ``device`` block by block, so that a device
    never holds more than its parts and one block.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.model, self._frame = model, _without_weights(model)
        mesh = init_device_mesh(device.type, (distributed.world(),))
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh)
            assert isinstance(part, FSDPModule), "which it was just made"
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot divide while it sums

    def whole(self, device: torch.device, *, main_alone: bool = False) -> nn.Module | None:
        """A plain model with all weights on a device, for every process or the first alone.

        All processes have to ask for it. It shares no memory with the sharded one.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        kept = distributed.is_main() or not main_alone
        model = deepcopy(self._frame)
        filled: dict[int, nn.Parameter] = {}
        with torch.no_grad():
            for place, part in zip(model.parameters(), self.model.parameters(), strict=True):
                weight = whole_of(part)
                if kept:
                    own = weight.to(device)
                    filled[id(place)] = nn.Parameter(own, requires_grad=part.requires_grad)
        if not kept:
            return None
        for module in model.modules():
            for name, place in module._parameters.items():
                if place is not None:
                    module._parameters[name] = filled[id(place)]
        return model.to(device).train(self.model.training)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def whole_of(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is spread over the processes; any other as it is.

    All processes have to ask for it.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def kept_by_main(tensor: Tensor) -> Tensor:
    """The whole of a spread tensor on the CPU of the first process; in the others it is empty.

    Any other tensor comes back as it is. All processes have to ask for it.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    whole = whole_of(tensor)
    return whole.cpu() if distributed.is_main() else torch.empty(0)


@torch.no_grad()
def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, spread as ``like`` is; says nothing to the others."""
    if not isinstance(like, DTensor):
        return whole
    there = whole.to(like.device, like.dtype)
    part = distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()  # which would be a view, and hold the whole in memory


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale gradients down to a norm of ``limit`` where theirs is larger; return what it was.

    Parts of a gradient count with those that the other processes hold.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    parts = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    squares = [_square(parts, gradients), _square(whole, gradients)]
    dist.all_reduce(squares[0])
    norm = (squares[0] + squares[1]).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*parts, *whole):
        gradient.mul_(scale.to(gradient.dtype))
    return float(norm)


def _square(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all numbers, in at least float32, on the gradients' device."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=gradients[0].device)
    for tensor in tensors:
        total += tensor.to(dtype).square().sum()
    return total


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy with the same parts, whose weights have shapes and no numbers."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return deepcopy(model, memo=dict(empty))
