"""Batches larger than memory: embed chunk by chunk, and keep the graphs of as many as fit.

A contrastive loss wants all embeddings of a batch at once, but the backbone does not. So the
texts are embedded in chunks, the loss gives the gradient by each embedding, and each chunk carries
its own on into the backbone (GradCache, arXiv 2101.06983). A chunk whose graph was kept does so at
once; the others are embedded a second time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tercet.types import Packed

Embed: TypeAlias = Callable[[Packed], Tensor]  # one vector a text
Losses: TypeAlias = dict[str, Tensor]  # "loss" is minimised, the others are there to be logged


@dataclass(frozen=True, slots=True)
class Chunks:
    """How much of a batch may be in memory at a time."""

    max_tokens: int  # of one chunk
    graph_tokens: int | None = None  # whose graphs may wait for the loss; None: all of them
    seed: int = 0  # of the dropout masks; give another one to each step and each process


def chunks_of(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Texts in chunks of at most ``max_tokens`` tokens, longest first; a longer text is alone."""
    chunks: list[list[int]] = []
    room = 0
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        if not chunks or lengths[text] > room:
            chunks.append([])
            room = max_tokens
        chunks[-1].append(text)
        room -= lengths[text]
    return chunks


def backward_in_chunks(
    embed: Embed,
    texts: Packed,
    loss_of: Callable[[Float[Tensor, "texts dim"]], Losses],
    *,
    chunks: Chunks,
) -> Losses:
    """Add the gradient of ``loss_of(embed(texts))["loss"]`` to the parameters; return the losses.

    The sum runs over the chunks in one fixed order, so the gradient does not depend, to the last
    bit, on how many graphs were kept. Dropout masks repeat when a chunk is embedded again, since
    each chunk has a seed of its own; the caller's random state stays as it was.

    The losses come back detached. Where ``loss`` is not finite, ``embed`` is not differentiated:
    look at it before a step. The backward of ``loss_of`` itself runs in any case, because other
    processes may be waiting in it for their share of the gradient.
    """
    lengths = texts.lengths
    members = chunks_of(lengths, chunks.max_tokens)
    sizes = [sum(lengths[text] for text in chunk) for chunk in members]
    first_kept = _first_kept(sizes, chunks.graph_tokens)

    def embedded(chunk: int, *, with_graph: bool) -> Tensor:
        with torch.set_grad_enabled(with_graph), own_random_state(texts, chunks.seed, chunk):
            return embed(texts.take(members[chunk]))

    without = [embedded(chunk, with_graph=False) for chunk in range(first_kept)]
    kept = [embedded(chunk, with_graph=True) for chunk in range(first_kept, len(members))]
    losses, gradient = _loss_and_gradient(loss_of, [*without, *(x.detach() for x in kept)], members)
    if gradient is None:
        return losses
    for chunk in reversed(range(len(members))):
        part = kept.pop() if kept else embedded(chunk, with_graph=True)
        part.backward(gradient[members[chunk]])
    return losses


def _first_kept(sizes: list[int], graph_tokens: int | None) -> int:
    """The first of the last chunks that together fit into the budget."""
    if graph_tokens is None:
        return 0
    first, room = len(sizes), graph_tokens
    while first > 0 and sizes[first - 1] <= room:
        first -= 1
        room -= sizes[first]
    return first


@contextmanager
def own_random_state(texts: Packed, seed: int, chunk: int) -> Iterator[None]:
    """The same random numbers for this chunk each time, and the caller's left untouched."""
    device = texts.ids.device
    # Neighbouring seeds must not share the numbers of neighbouring chunks: hence the odd factor.
    mixed = (seed * 0x9E3779B97F4A7C15 + chunk) % 2**63
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(mixed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(mixed)
        yield


def _loss_and_gradient(
    loss_of: Callable[[Tensor], Losses], parts: list[Tensor], members: list[list[int]]
) -> tuple[Losses, Tensor | None]:
    """The losses, and the gradient by each embedding unless there is nothing to learn from it."""
    order = torch.tensor([text for chunk in members for text in chunk])
    embeddings = torch.cat(parts)[order.argsort().to(parts[0].device)].requires_grad_()
    losses = loss_of(embeddings)
    loss = losses["loss"]
    if loss.requires_grad:
        loss.backward()
    detached = {name: value.detach() for name, value in losses.items()}
    return detached, embeddings.grad if loss.isfinite() else None
