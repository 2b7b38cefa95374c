"""Communication between the processes that train one model.

Only this module and :mod:`tercet.sharding` import ``torch.distributed``.

``torchrun`` starts the processes and describes them in environment variables. Without it there is
one process, and every function here is the identity. All processes must call the same functions
in the same order: each call waits for the others.

The gradient of a batch that is spread over processes is the *sum* of what each of them computes,
as long as each divides its loss by counts of the whole batch (``Relation.positives``). Their mean
is too small by the number of processes, and no constant corrects a mean of per-process means.
"""

import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import groupby
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tercet.segments import batches_within

T = TypeVar("T")

WAIT: Final = timedelta(hours=12)  # for other processes; torch's defaults are 10 and 30 minutes
BUCKET_NUMBERS: Final = 1 << 24  # numbers per message: 64 MiB of float32


def start(wait: timedelta = WAIT) -> None:
    """Join the processes that ``torchrun`` started, by gloo on the CPU and by NCCL on GPUs.

    ``wait`` is how long a process waits for the others before it gives up. It is long, since one
    process tokenizes or measures while the others wait; ``torchrun`` ends them all if one fails.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=wait)
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=wait, device_id=device)


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from zero."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_world_size() -> int:
    """Return the number of processes on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints messages."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has called this."""
    if world() > 1:
        dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """Return the value of process ``source``, which is sent pickled."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_rows(x: Float[Tensor, "rows dim"]) -> Float[Tensor, "all_rows dim"]:
    """Return the rows of all processes in the order of ranks; their numbers may differ.

    A row's gradient, summed over every process, returns to the process that the row came from.
    """
    return x if world() == 1 else _GatherRows.apply(x)


def gather_ints(x: Int[Tensor, "rows *rest"]) -> Int[Tensor, "all_rows *rest"]:
    """Return the rows of all processes in the order of ranks; their numbers may differ."""
    return x if world() == 1 else torch.cat(_gathered(x))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the processes, in at least float32.

    A gradient that only some processes have counts as zero in the others. One that no process has
    stays None.
    """
    trained = [p for p in parameters if p.requires_grad]
    if world() == 1 or not trained:
        return
    present = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32)
    present = present.to(trained[0].device)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    gradients: list[Tensor] = []
    for parameter, anywhere in zip(trained, present.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        _sum_in_place(bucket)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one dtype and device into lists that fit into one message."""

    def kind(tensor: Tensor) -> tuple[str, str]:
        return str(tensor.dtype), str(tensor.device)

    for _, alike in groupby(sorted(tensors, key=kind), key=kind):
        yield from batches_within(alike, BUCKET_NUMBERS, Tensor.numel)


def _sum_in_place(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.flatten() for t in tensors])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _gathered(x: Tensor) -> list[Tensor]:
    """Gather the tensor of each process; messages are padded to one size, then cut."""
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(count) for _ in range(world())]
    dist.all_gather(counts, count)
    lengths = [int(n) for n in torch.cat(counts).tolist()]
    message = x.new_zeros(max(lengths), *x.shape[1:])
    message[: len(x)] = x
    messages = [torch.empty_like(message) for _ in lengths]
    dist.all_gather(messages, message)
    return [received[:length] for received, length in zip(messages, lengths, strict=True)]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = _gathered(x.detach())
        begin = sum(len(part) for part in parts[: rank()])
        ctx.own = slice(begin, begin + len(x))
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # A contiguous copy, since autograd may own the tensor.
        summed = torch.empty_like(
            gradient,
            dtype=torch.promote_types(gradient.dtype, torch.float32),
            memory_format=torch.contiguous_format,
        ).copy_(gradient)
        dist.all_reduce(summed)
        return summed[ctx.own].to(gradient.dtype)
