"""Batches larger than memory: embed chunk by chunk, and keep the graphs of as many as fit.

A contrastive loss needs all vectors of a batch at once. So the texts are embedded in chunks, the
loss gives the gradient by each vector, and each chunk propagates its part into the backbone
(GradCache, arXiv 2101.06983). Chunks whose graphs were not kept are embedded a second time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from tercet.distributed import gather_ints
from tercet.segments import Packed, batches_by_length
from tercet.vectors import Vectors

Made = TypeVar("Made", Tensor, Vectors)  # one vector per text, or vectors of several kinds
Losses: TypeAlias = dict[str, Tensor]  # "loss" is minimized, the others are logged


@dataclass(frozen=True, slots=True)
class Chunks:
    """How much of a batch may be in memory at the same time."""

    max_tokens: int  # of one chunk
    graph_tokens: int | None = None  # whose graphs are kept until the loss is known; None: all
    seed: int = 0  # of the dropout masks; give another one to each step and each process
    in_step: bool = False  # all processes run equally many chunks, as sharded weights require


def backward_in_chunks(
    embed: Callable[[Packed], Made],
    texts: Packed,
    loss_of: Callable[[Made], Losses],
    *,
    chunks: Chunks,
) -> Losses:
    """Add the gradient of ``loss_of(embed(texts))["loss"]`` to the parameters; return the losses.

    Chunks are summed in a fixed order, and each has its own seed for dropout, so the gradient is
    the same to the last bit for any number of kept graphs. The caller's random state is restored.

    The losses are returned detached, and not looked at: that would make the host wait for a GPU. So
    a loss that is not finite gives gradients that are not finite. With ``in_step`` the processes
    agree on the number of chunks and of graphs to keep.
    """
    lengths = texts.lengths
    members = batches_by_length(lengths, chunks.max_tokens)
    sizes = [sum(lengths[text] for text in chunk) for chunk in members]
    first_kept = _first_kept(sizes, chunks.graph_tokens)
    if chunks.in_step:
        most, first_kept = _largest(len(members), first_kept)
        members += [[] for _ in range(most - len(members))]

    plain = False

    def embedded(chunk: int, *, with_graph: bool) -> Vectors:
        nonlocal plain
        taken = texts.take(members[chunk]) if members[chunk] else one_token(texts)
        with torch.set_grad_enabled(with_graph), own_random_state(texts, chunks.seed, chunk):
            made = embed(taken)
        plain = isinstance(made, Tensor)
        vectors = Vectors(dense=made) if isinstance(made, Tensor) else made
        return vectors if members[chunk] else vectors.take(slice(0))

    def losses_of(vectors: Vectors) -> Losses:
        given: Any = vectors.dense if plain else vectors
        return loss_of(given)

    without = [embedded(chunk, with_graph=False) for chunk in range(first_kept)]
    kept = [embedded(chunk, with_graph=True) for chunk in range(first_kept, len(members))]
    detached = [part.with_tensors([x.detach() for x in part.tensors()]) for part in kept]
    losses, gradients = _loss_and_gradients(losses_of, [*without, *detached], members)
    for chunk in reversed(range(len(members))):
        part = kept.pop() if kept else embedded(chunk, with_graph=True)
        pairs = zip(part.tensors(), gradients[chunk], strict=True)
        if chunks.in_step:  # a vector that the loss of this process alone does not use
            pairs = [(x, torch.zeros_like(x) if by is None else by) for x, by in pairs]
        learned = [(tensor, by) for tensor, by in pairs if by is not None and tensor.requires_grad]
        if learned:
            torch.autograd.backward([tensor for tensor, _ in learned], [by for _, by in learned])
    return losses


def _first_kept(sizes: list[int], graph_tokens: int | None) -> int:
    """Return the first chunk of the longest tail that fits into the budget."""
    if graph_tokens is None:
        return 0
    first, room = len(sizes), graph_tokens
    while first > 0 and sizes[first - 1] <= room:
        first -= 1
        room -= sizes[first]
    return first


def _largest(*numbers: int) -> list[int]:
    """Return the maximum of each number over all processes."""
    return gather_ints(torch.tensor([numbers])).amax(0).tolist()


def as_many_as_others(members: list[list[int]]) -> list[list[int]]:
    """Return these chunks and empty ones, up to the number of the process that has most."""
    (most,) = _largest(len(members))
    return members + [[] for _ in range(most - len(members))]


def one_token(texts: Packed) -> Packed:
    """Return a text of one token, for a process whose chunk is empty; its vector is dropped."""
    id, start = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    one = Packed(id, torch.cat([start, start + 1]), torch.ones(1, dtype=torch.bool))
    return one.to(texts.device)


@contextmanager
def own_random_state(texts: Packed, seed: int, chunk: int) -> Iterator[None]:
    """Give a chunk the same random numbers each time, and restore the caller's random state."""
    device = texts.device
    # Neighbouring seeds must not share the numbers of neighbouring chunks: hence the odd factor.
    mixed = (seed * 0x9E3779B97F4A7C15 + chunk) % 2**63
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(mixed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(mixed)
        yield


def _loss_and_gradients(
    loss_of: Callable[[Vectors], Losses], parts: list[Vectors], members: list[list[int]]
) -> tuple[Losses, list[list[Tensor | None]]]:
    """Return losses and each chunk's gradients by its tensors, None if unused."""
    together = Vectors.join(parts)
    leaves = [tensor.requires_grad_() for tensor in together.tensors()]
    order = torch.tensor([text for chunk in members for text in chunk], dtype=torch.int64)
    losses = loss_of(together.with_tensors(leaves).take(order.argsort()))
    loss = losses["loss"]
    if loss.requires_grad:
        loss.backward()
    detached = {name: value.detach() for name, value in losses.items()}
    lengths = [[len(tensor) for tensor in part.tensors()] for part in parts]
    split = [
        [None] * len(parts) if leaf.grad is None else leaf.grad.split(list(sizes))
        for leaf, sizes in zip(leaves, zip(*lengths, strict=True), strict=True)
    ]
    return detached, [list(of_chunk) for of_chunk in zip(*split, strict=True)]
