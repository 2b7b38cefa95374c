"""What InfoNCE of a large batch costs, against the whole matrix of scores.

Memory at 16,384 x 16,384 and time at 8,192 x 8,192, forward and backward, 768 dimensions,
float32, one thread. The peer is the plain formula: cross-entropy over the rows of the matrix.

Run: python -m benchmarks.loss_memory
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, extra_memory, interleaved, write_results
from tercet.data.batches.relation import relation_of
from tercet.losses.info_nce import info_nce

WIDTH = 768
TEMPERATURE = 0.02
PREFIXES = [64, 128, 256, 512, 768]

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(size: int, dims: list[int] | None = None) -> Loss:
    """The sweep, with a relation of texts that are all different."""
    texts = [str(i) for i in range(size)]
    relation = relation_of([f"query {i}" for i in texts], [[i] for i in texts], [[]] * size)
    return partial(info_nce, relation=relation, temperature=TEMPERATURE, dims=dims)


def plain(size: int, dims: list[int] | None = None) -> Loss:
    """Cross-entropy over all scores, once for each prefix."""
    truth = torch.arange(size)

    def loss(queries: Tensor, docs: Tensor) -> Tensor:
        cut = [(F.normalize(queries[:, :k]), F.normalize(docs[:, :k])) for k in dims or []]
        terms = [F.cross_entropy(q @ d.T / TEMPERATURE, truth) for q, d in cut or [(queries, docs)]]
        return torch.stack(terms).mean()

    return loss


def vectors(size: int) -> tuple[Tensor, Tensor]:
    """Unit vectors, each document near its query."""
    random = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(size, WIDTH, generator=random))
    docs = F.normalize(queries + torch.randn(size, WIDTH, generator=random) / WIDTH**0.5 * 3)
    return queries.requires_grad_(), docs.requires_grad_()


def step(loss: Loss, queries: Tensor, docs: Tensor) -> list[Tensor]:
    """The loss and both gradients."""
    value = loss(queries, docs)
    return [value.detach(), *torch.autograd.grad(value, (queries, docs))]


def prepared(side: Callable[[int], Loss], size: int) -> Callable[[], list[Tensor]]:
    """One step on inputs that are already there."""
    return partial(step, side(size), *vectors(size))


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of the loss and the two gradients."""
    pairs = zip(found, expected, strict=True)
    return max(float((one.double() - other).norm() / other.norm()) for one, other in pairs)


def memory(size: int) -> Row:
    """Peak memory above the inputs, each side in a process of its own."""
    taken = [extra_memory(partial(prepared, side, size)) / 1e9 for side in (ours, plain)]
    return {
        "name": f"extra peak memory, {size} x {size}",
        "ours": taken[0],
        "peer": taken[1],
        "unit": "GB",
        "ratio": taken[1] / taken[0],
        "target": "ours < 0.3 GB",
        "error": None,
    }


def speed(name: str, size: int, dims: list[int] | None = None, repeats: int = 3) -> Row:
    """CPU seconds of a step, best of interleaved repeats; errors are against float64."""
    sides = {
        side.__name__: partial(step, side(size, dims), *vectors(size)) for side in (ours, plain)
    }
    exact = step(plain(size, dims), *(x.detach().double().requires_grad_() for x in vectors(size)))
    spent = {side: min(seconds) for side, seconds in interleaved(sides, repeats).items()}
    return {
        "name": name,
        "ours": spent["ours"],
        "peer": spent["plain"],
        "unit": "CPU seconds",
        "ratio": spent["plain"] / spent["ours"],
        "target": "ratio >= 1",
        "error": error(sides["ours"](), exact),
        "peer error": error(sides["plain"](), exact),
        "gflops": 6 * size * size * WIDTH / spent["ours"] / 1e9,
    }


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    write_results(
        "loss_memory",
        [
            memory(16_384),
            speed("time, 8192 x 8192", 8_192),
            speed(f"time, 2048 x 2048, {len(PREFIXES)} prefixes", 2_048, PREFIXES),
        ],
    )


if __name__ == "__main__":
    main()
