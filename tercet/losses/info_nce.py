"""InfoNCE in one sweep over blocks of queries, never as a matrix of all queries and documents.

A block of queries holds its whole rows of scores, hence its whole softmax. So its loss and all its
gradients are finished at once, with three matrix products, and the block is dropped.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any, Final, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor
from torch.autograd.function import once_differentiable

from tercet.errors import RecipeError
from tercet.models.network.chunked import Losses
from tercet.segments import moved
from tercet.types import NEGATIVE

BLOCK_BYTES: Final[Mapping[str, int]] = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Of the scores of one block, at most: in a CPU's caches, or enough to keep a GPU busy."""


@runtime_checkable
class BlockwiseRelation(Protocol):
    """A relation read block by block, such as ``tercet.data.batches.relation.Relation``."""

    @property
    def positives(self) -> int:
        """Number of POSITIVE pairs in the whole batch, over all processes."""
        ...

    def rows(
        self, start: int, stop: int, device: torch.device | None = None
    ) -> Int8[Tensor, "rows docs"]:
        """Return the relation of these queries to all documents."""
        ...

    def positive_pairs(
        self, start: int, stop: int
    ) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
        """Return rows, counted from ``start``, and columns of the POSITIVE pairs, on the host."""
        ...

    def false_negatives(
        self, start: int, stop: int, logits: Float[Tensor, "rows docs"], temperature: float
    ) -> Bool[Tensor, "rows docs"] | None:
        """Return which NEGATIVE documents are ignored for their scores; None: no rule."""
        ...


def info_nce(
    queries: Float[Tensor, "queries dim"],
    docs: Float[Tensor, "docs dim"],
    relation: BlockwiseRelation,
    temperature: float,
    *,
    dims: Sequence[int] | Mapping[int, float] | None = None,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Return the InfoNCE of dot products, averaged over the positive pairs.

    arXiv 1807.03748, eq. 4; with temperature as in arXiv 2402.03216, eq. 1.

    For a query q, its document p and its negatives N, with s the scores and t the temperature:

        loss = -log( e^(s[q,p]/t) / (e^(s[q,p]/t) + sum over n in N of e^(s[q,n]/t)) )

    Each positive pair is a separate term: a query's positives never compete with each other.
    A query without negatives contributes zero. The mean is over ``relation.positives``, which
    counts those of all processes, so that the *sum* of this value, and of its gradients, over the
    processes is that of the whole batch.

    ``dims`` makes it a Matryoshka loss (arXiv 2205.13147, eq. 1): the mean over prefixes of these
    lengths, or their sum with the weights of a mapping. Scores are then cosines of the prefixes:
    the vectors need not have unit length, and a prefix of zeros scores zero. All prefixes together
    cost the matrix products of the longest one.

    Computed in float32 for any dtype, under autocast too; float64 stays float64. There are no
    second derivatives: the first ones are computed here, and ``backward`` only scales them.
    ``block`` is the number of queries held at a time; it changes memory, not the result.

    Raises:
        RecipeError: for a temperature or dims that are impossible.
    """
    return info_nce_losses(queries, docs, relation, temperature, dims=dims, block=block)["loss"]


def info_nce_losses(
    queries: Float[Tensor, "queries dim"],
    docs: Float[Tensor, "docs dim"],
    relation: BlockwiseRelation,
    temperature: float,
    *,
    dims: Sequence[int] | Mapping[int, float] | None = None,
    block: int | None = None,
) -> Losses:
    """Return the InfoNCE of :func:`info_nce` as ``"loss"``, and what its relation ignored.

    A relation may ignore negatives for their scores (``false_negatives``). The scores of the full
    width decide for all prefixes, those of the longest one if ``dims`` leaves the full width out.
    ``"ignored"`` is the share of a query's negatives that is ignored, averaged as the loss is.

    Raises:
        RecipeError: for a temperature or dims that are impossible.
    """
    if temperature <= 0:
        raise RecipeError(f"temperature is {temperature}; it must be above zero")
    if relation.positives == 0:
        warnings.warn("no query of this batch has a positive: its loss is zero", stacklevel=2)
    weights = _weights_of(dims, queries.shape[1])
    learns = torch.is_grad_enabled()
    wide = torch.promote_types(queries.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        wide_queries, wide_docs = queries.to(wide), docs.to(wide)
        sweep = _InfoNceSweep(
            wide_queries,
            wide_docs,
            relation,
            block or block_of(len(docs), len(weights), device=queries.device),
            torch.zeros_like(wide_queries) if learns and queries.requires_grad else None,
            torch.zeros_like(wide_docs) if learns and docs.requires_grad else None,
            wide_queries.new_zeros(()),
        )
        loss = sweep.prefixes(weights, temperature) if weights else sweep.whole(temperature)
    return {
        "loss": finished(loss, [queries, docs], [sweep.by_queries, sweep.by_docs]),
        "ignored": sweep.ignored / max(relation.positives, 1),
    }


def block_of(docs: int, prefixes: int = 0, *, device: torch.device) -> int:
    """Return how many queries to hold at a time; a pair has a score and one number a prefix."""
    held = prefixes + 3 if prefixes else 1
    most = 1024 if device.type == "cpu" else 8192
    return min(max(block_bytes(device) // (4 * held * max(docs, 1)), 16), most)


def block_bytes(device: torch.device) -> int:
    """Return how many bytes the scores of one block may take on a device."""
    return BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])


def _weights_of(dims: Sequence[int] | Mapping[int, float] | None, width: int) -> dict[int, float]:
    """Return the weight of each prefix, shortest first."""
    if dims is None:
        return {}
    given = dims if isinstance(dims, Mapping) else {dim: 1 / len(dims) for dim in dims}
    if len(given) < len(dims):
        raise RecipeError(f"prefixes of {list(dims)} dimensions; give each length once")
    for dim in given:
        if not 1 <= dim <= width:
            raise RecipeError(
                f"prefix of {dim} dimensions asked of vectors with {width}; "
                f"give lengths from 1 to {width}"
            )
    return dict(sorted(given.items()))


@dataclass(frozen=True, slots=True, eq=False)
class PairBlock:
    """A block of the relation in the form that the loss needs."""

    row: Int[Tensor, "positives"]
    column: Int[Tensor, "positives"]
    masked: Bool[Tensor, "rows docs"]  # whatever is not a negative

    @classmethod
    def of(
        cls,
        pairs: tuple[Int[Tensor, "positives"], Int[Tensor, "positives"]],
        relation: Int8[Tensor, "rows docs"],
    ) -> "PairBlock":
        """Return a block of the relation, with the rows and columns of its positives."""
        row, column = (moved(each, relation.device) for each in pairs)
        return cls(row, column, relation != NEGATIVE)


def ignored_share(
    negative: Bool[Tensor, "rows docs"],
    ignored: Bool[Tensor, "rows docs"],
    row: Int[Tensor, "positives"],
) -> Float[Tensor, ""]:
    """Return the share of negatives that is ignored, summed over the rows of positive pairs."""
    every, found = (  # twice as fast as in 64 bits
        mask.sum(1, dtype=torch.int32) for mask in (negative, negative & ignored)
    )
    return (found / every.clamp_min(1))[row].sum()


def loss_and_gradient(logits: Tensor, pairs: PairBlock) -> tuple[Tensor, Tensor]:
    """Return the sum of the terms of a block, and its gradient, written over ``logits``.

    With n the log-sum-exp of a row's negatives, the term of a positive p is

        -log( e^p / (e^p + e^n) ) = log(1 + e^(n - p)),

    so one softmax over the negatives serves all positives of its row.
    """
    positive = logits[pairs.row, pairs.column]
    logits.masked_fill_(pairs.masked, -inf)
    # A row without negatives is all minus infinity, and so is its log-sum: its terms are zero.
    highest = logits.amax(1).clamp_min(torch.finfo(logits.dtype).min)
    total = logits.sub_(highest[:, None]).exp_().sum(1)
    gap = (total.log() + highest)[pairs.row] - positive
    pull = gap.sigmoid()  # how far this positive is from being solved
    push = torch.zeros_like(total).index_add_(0, pairs.row, pull)
    logits.mul_((push / total.clamp_min(1))[:, None])  # a row's largest term is one
    logits[pairs.row, pairs.column] = -pull
    return -F.logsigmoid(-gap).sum(), logits


@dataclass(frozen=True, slots=True, eq=False)
class _InfoNceSweep:
    """One pass over blocks of queries that fills in the gradients; unwanted ones are None."""

    queries: Float[Tensor, "queries dim"]
    docs: Float[Tensor, "docs dim"]
    relation: BlockwiseRelation
    block: int
    by_queries: Float[Tensor, "queries dim"] | None
    by_docs: Float[Tensor, "docs dim"] | None
    ignored: Float[Tensor, ""]  # shares of negatives, summed over positive pairs

    def whole(self, temperature: float) -> Tensor:
        """Return the loss of plain dot products."""
        loss = self.queries.new_zeros(())
        for rows in self.blocks():
            logits = (self.queries[rows] / temperature) @ self.docs.T
            term, gradient = loss_and_gradient(logits, self.pairs(rows, logits, temperature))
            loss += term
            self.add(gradient, rows, slice(None))
        return self.averaged(loss, by_logits=1 / temperature)

    def prefixes(self, weights: dict[int, float], temperature: float) -> Tensor:
        """Return the loss of the cosines of prefixes.

        The dot product of a longer prefix is that of the shorter one plus that of the slice between
        them. Gradients are summed the other way round.
        """
        slices = [slice(low, high) for low, high in pairwise([0, *weights])]
        of_queries, of_docs = _Prefixes(self.queries, weights), _Prefixes(self.docs, weights)
        loss = self.queries.new_zeros(())
        for rows in self.blocks():
            dots = self.queries.new_zeros(rows.stop - rows.start, len(self.docs))
            scores: list[Tensor] = []  # by all prefixes; the last ones decide what is ignored
            for i, part in enumerate(slices):
                dots.addmm_(self.queries[rows, part], self.docs[:, part].T)
                inverse = of_queries.inverse[i, rows, None] / temperature
                scores.append((dots * inverse).mul_(of_docs.inverse[i]))
            pairs = self.pairs(rows, scores[-1], temperature)
            gradients: list[Tensor] = []
            for i, weight in enumerate(weights.values()):
                logits, inverse = scores.pop(0), of_queries.inverse[i, rows, None] / temperature
                term, gradient = loss_and_gradient(logits.clone(), pairs)
                loss += term * weight
                gradient.mul_(weight)
                along = logits.mul_(gradient)
                of_queries.along[i, rows] = along.sum(1)
                of_docs.along[i] += along.sum(0)
                gradients.append(gradient.mul_(inverse).mul_(of_docs.inverse[i]))
            total = torch.zeros_like(dots)
            for part, gradient in zip(reversed(slices), reversed(gradients), strict=True):
                self.add(total.add_(gradient), rows, part)
        of_queries.remove_along(self.by_queries)
        of_docs.remove_along(self.by_docs)
        return self.averaged(loss)

    def blocks(self) -> Iterator[slice]:
        """Yield the queries of each block."""
        for start in range(0, len(self.queries) if len(self.docs) else 0, self.block):
            yield slice(start, min(start + self.block, len(self.queries)))

    def pairs(self, rows: slice, logits: Tensor, temperature: float) -> PairBlock:
        """Return the relation of a block of queries to the documents, which have these scores."""
        start, stop = rows.start, rows.stop
        relation = self.relation.rows(start, stop, self.docs.device)
        pairs = PairBlock.of(self.relation.positive_pairs(start, stop), relation)
        ignored = self.relation.false_negatives(start, stop, logits, temperature)
        if ignored is not None:
            self.ignored.add_(ignored_share(~pairs.masked, ignored, pairs.row))
            pairs.masked.logical_or_(ignored)
        return pairs

    def add(self, gradient: Tensor, rows: slice, part: slice) -> None:
        """Add the gradient by dot products of these rows to that by this part of the vectors."""
        if self.by_queries is not None:
            self.by_queries[rows, part] = gradient @ self.docs[:, part]
        if self.by_docs is not None:
            self.by_docs[:, part].addmm_(gradient.T, self.queries[rows, part])

    def averaged(self, loss: Tensor, *, by_logits: float = 1.0) -> Tensor:
        """Return the mean of the terms, and scale the gradients to match."""
        scale = 1 / max(self.relation.positives, 1)
        for gradient in (self.by_queries, self.by_docs):
            if gradient is not None:
                gradient.mul_(scale * by_logits)
        return loss * scale


class _Prefixes:
    """Lengths of prefixes, and the gradients along them, which cosines do not have."""

    def __init__(self, vectors: Float[Tensor, "texts dim"], dims: Iterable[int]) -> None:
        self.vectors, self.dims = vectors, list(dims)
        lengths = torch.stack([vectors[:, :dim].norm(dim=1) for dim in self.dims])
        self.inverse = lengths.reciprocal().masked_fill_(lengths == 0, 0)  # [prefixes, texts]
        self.along = torch.zeros_like(lengths)  # sum over the pairs of gradient times cosine

    def remove_along(self, gradient: Float[Tensor, "texts dim"] | None) -> None:
        """Turn the gradient by dot products over lengths into one by cosines."""
        if gradient is None:
            return
        for dim, along, inverse in zip(self.dims, self.along, self.inverse, strict=True):
            shrink = (along * inverse.square())[:, None]
            gradient[:, :dim].sub_(shrink * self.vectors[:, :dim])


def finished(loss: Tensor, inputs: list[Tensor], gradients: list[Tensor | None]) -> Tensor:
    """Return ``loss`` as a function of ``inputs`` whose gradients are known already.

    A gradient of None is not wanted. There are no second derivatives.
    """
    return _Finished.apply(loss, len(inputs), *inputs, *gradients)


class _Finished(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *given: Tensor | None) -> Tensor:
        inputs, gradients = given[:count], given[count:]
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in inputs if x is not None]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, by_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        # The product before the rounding: a float16 gradient may exist only once it is scaled up.
        wanted = [
            None if gradient is None else (by_loss * gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (None, None, *wanted, *(None for _ in wanted))
