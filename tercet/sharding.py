"""Weights sharded over the processes (torch's ``fully_shard``, FSDP2).

The weights of a block are gathered when the block is computed, and dropped afterwards. Gradients
are summed over the processes, as in :mod:`tercet.distributed`, and not averaged; each process gets
the sums of its own parts, which are all that its optimizer updates. With N processes, weights,
gradients and optimizer states take 1/N of the memory in each.

Every forward and backward pass through such a model involves all processes: they must make the
same passes in the same order.
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
    """A model whose weights are sharded over the processes, and how to get the whole back.

    ``blocks`` are parts of it whose weights are gathered together; other weights are gathered with
    the model itself. The weights move to ``device`` block by block, so that a device never holds
    more than its parts and one block.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.model, self._frame = model, _without_weights(model)
        mesh = init_device_mesh(device.type, (distributed.world(),))
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh)
            assert isinstance(part, FSDPModule), "fully_shard made it one"
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot divide while it sums

    def whole(self, device: torch.device, *, main_alone: bool = False) -> nn.Module | None:
        """Return a plain model with all weights on a device, in every process or the first only.

        All processes must call this. The model shares no memory with the sharded one.
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
    """Whether this process holds only a part of a tensor."""
    return isinstance(tensor, DTensor)


def numbers_here(tensor: Tensor) -> int:
    """Return how many numbers of a tensor this process holds."""
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


@torch.no_grad()
def whole_of(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, others unchanged; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def kept_by_main(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor on the CPU in the first process, empty in the others.

    Any other tensor is returned unchanged. All processes must call this.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    whole = whole_of(tensor)
    return whole.cpu() if distributed.is_main() else torch.empty(0)


@torch.no_grad()
def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every process has whole like ``like``, without communication."""
    if not isinstance(like, DTensor):
        return whole
    there = whole.to(like.device, like.dtype)
    part = distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()  # a view would hold the whole in memory


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to a norm of at most ``limit``; return their norm before.

    The norm includes the parts of gradients that other processes hold.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    parts = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    squares = [_square(parts, gradients), _square(whole, gradients)]
    dist.all_reduce(squares[0])
    norm = (squares[0] + squares[1]).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*parts, *whole):
        gradient.mul_(scale.to(gradient.dtype))
    return norm


def _square(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares, in at least float32, on the device of the gradients."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=gradients[0].device)
    for tensor in tensors:
        total += tensor.to(dtype).square().sum()
    return total


def _without_weights(model: nn.Module) -> nn.Module:
    """Return a copy with the same parts, whose weights have shapes but no values."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return deepcopy(model, memo=dict(empty))
