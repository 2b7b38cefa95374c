"""A student's vectors pulled to a teacher's: text by text, and by similarities within a batch.

Both losses are sums over a process's own texts, divided by the texts of all processes, so that the
sum of their values, and of their gradients, over the processes is that of the whole batch.
"""

from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tercet.losses.info_nce import block_bytes, finished

_HELD = 4  # numbers a pair: both similarities, and what is made of them


@dataclass(frozen=True, slots=True, eq=False)
class Matched:
    """Vectors of a process's own texts, and of the texts of all processes, these included."""

    own: Float[Tensor, "own dim"]
    every: Float[Tensor, "texts dim"]

    def prefix(self, width: int) -> "Matched":
        """Return the first coordinates, scaled to unit length."""
        own = _unit(self.own[:, :width])
        return Matched(own, own if self.every is self.own else _unit(self.every[:, :width]))


def cosine_distance(student: Matched, teacher: Matched) -> Float[Tensor, ""]:
    """Return 1 - the cosine of a text's two vectors, averaged over the texts of all processes.

    Half the square of their distance, which LEAF minimises (arXiv 2509.12539, sec. 3.1).
    """
    return (1 - (student.own * teacher.own).sum(1)).sum() / max(len(teacher.every), 1)


def relational(
    student: Matched,
    teacher: Matched,
    temperature: float,
    *,
    first: int = 0,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Return how far the student's neighbours of each text are from the teacher's.

    SEED (arXiv 2101.04731, eq. 2 to 4) within a batch. With the cosines of a text to the others,
    ``t`` of the teacher and ``s`` of the student, it is the Kullback-Leibler divergence

        sum over j of p[j] (log p[j] - log q[j]),
        p = softmax(t / temperature), q = softmax(s / temperature),

    averaged over the texts of all processes. A text is not compared with itself. There are no
    second derivatives: the first ones are computed here, and ``backward`` only scales them.

    Args:
        student: vectors that learn.
        teacher: vectors of the same texts, of any width.
        temperature: of both distributions; the smaller, the more the nearest texts count.
        first: the place of this process's first text among those of all.
        block: texts whose similarities are held at a time; it changes memory, not the result.
    """
    count = len(teacher.every)
    if count < 2:
        return student.own.sum() * 0
    device = student.own.device
    block = block or max(1, block_bytes(device) // (4 * _HELD * count))
    own, every = student.own.detach(), student.every.detach()
    by_own, by_every = torch.zeros_like(own), torch.zeros_like(every)
    loss = own.new_zeros(())
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(own), block):
            rows = slice(start, start + block)
            wanted = _log_shares(teacher.own[rows], teacher.every, temperature, first + start)
            found = _log_shares(own[rows], every, temperature, first + start)
            shares = wanted.exp()
            loss += (shares * (wanted - found).nan_to_num_(0.0)).sum() / count
            gradient = found.exp_().sub_(shares).div_(temperature * count)
            by_own[rows] += gradient @ every
            by_every += gradient.T @ own[rows]
    return finished(loss, [student.own, student.every], [by_own, by_every])


def _log_shares(
    rows: Float[Tensor, "rows dim"],
    every: Float[Tensor, "texts dim"],
    temperature: float,
    first: int,
) -> Float[Tensor, "rows texts"]:
    """Return the logarithms of softmax(cosines / temperature); minus infinity for a text itself."""
    logits = (rows / temperature) @ every.T
    places = torch.arange(len(rows), device=rows.device)
    logits[places, places + first] = -inf
    return F.log_softmax(logits, dim=1)


def _unit(vectors: Float[Tensor, "texts dim"]) -> Float[Tensor, "texts dim"]:
    """Return vectors of unit length in at least float32."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)
