"""One loss over all kinds of vectors, in which their sum teaches each of them.

As in :mod:`tercet.losses.info_nce`, a block of queries holds its whole rows of scores, of every
kind. So its losses, their targets and all gradients are computed at once, and it is dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from tercet.data.batches.relation import Relation
from tercet.errors import RecipeError
from tercet.kinds import KINDS, Kind, Weights
from tercet.losses.info_nce import (
    PairBlock,
    block_bytes,
    finished,
    ignored_share,
    loss_and_gradient,
)
from tercet.losses.listwise import group_distillation, listwise, margin_mse
from tercet.models.network.chunked import Losses
from tercet.rank.scoring import scores_of
from tercet.segments import moved
from tercet.types import IGNORED, NEGATIVE, POSITIVE, Distillation
from tercet.vectors import Vectors


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Temperature and weights of the parts of the loss; defaults are those of the paper.

    arXiv 2402.03216, sec. 3.3: w of eq. 2 and lambda of eq. 3 and 5.
    """

    temperature: float = 0.02
    in_sum: Weights = field(default_factory=Weights)  # of the scores in their sum
    in_loss: Weights = field(default_factory=lambda: Weights(1.0, 0.1, 1.0))
    of_sum: float = 1.0  # of the loss of the sum; 0: the sum is only a target
    distilled: float = 1.0  # of self-distillation, relative to the other losses
    in_distilled: Weights | None = None  # of self-distillation by kind; None: those of in_loss
    distil: Distillation = "none"  # how the scores of a reranker are learned, if there are any
    distil_weight: float = 1.0  # of that loss, beside InfoNCE
    teacher_temperature: float = 1.0  # the scores of the reranker are divided by it

    def __post_init__(self) -> None:
        if not 0 < self.temperature < inf:
            raise RecipeError(f"temperature is {self.temperature}; give a number above 0")
        if not 0 < self.teacher_temperature < inf:
            raise RecipeError(
                f"teacher_temperature is {self.teacher_temperature}; give a number above 0"
            )
        weights = (self.in_sum, self.in_loss, self.in_distilled or self.in_loss)
        shares = [
            self.of_sum,
            self.distilled,
            self.distil_weight,
            *(w.of(kind) for w in weights for kind in KINDS),
        ]
        if not all(0 <= share < inf for share in shares):
            raise RecipeError(f"every weight must be 0 or more; got {self}")


def unified_loss(  # noqa: PLR0913 (what is not data has a name or a default)
    queries: Vectors,
    docs: Vectors,
    relation: Relation,
    mixture: Mixture,
    *,
    queries_of_all: int,
    dims: Sequence[int] = (),
    teacher: Float[Tensor, "docs"] | None = None,
    block: int | None = None,
) -> Losses:
    """Return the InfoNCE of all kinds of scores and of their weighted sum, with self-distillation.

    With s_x the scores of kind x, t the temperature, n kinds, and weights from ``mixture``:

        s_sum = sum of w_x s_x
        L  = (sum of lambda_x InfoNCE(s_x / t) + lambda_sum InfoNCE(s_sum / t)) / (n + 1)
        T  = softmax(s_sum / t), without gradient
        L' = (sum of lambda_x CE(T, softmax(s_x / t))) / n
        loss = (L + d L') / (1 + d)

    (arXiv 2402.03216, equations 1 to 6, with d = 1). InfoNCE is that of
    :func:`tercet.losses.info_nce.info_nce`; the softmaxes are over all documents that are not
    IGNORED. A single kind has neither sum nor self-distillation.

    Dense vectors of any length are normalised here; with ``dims`` their losses are means over
    prefixes of these lengths and the full one (Matryoshka). Weights of terms and vectors of tokens
    are used unchanged. ``teacher`` has a reranker's score of each document for the query that it
    came with, NaN if it has none. The loss by them (``distil``), a mean over all queries times
    ``distil_weight``, is added to each InfoNCE: "kl" or "margin-mse"; "listwise" replaces InfoNCE
    for queries with a scored document, and "none" ignores the scores. It compares the teacher's
    scores divided by ``teacher_temperature`` with s_x / t and s_sum / t.

    Where the relation ignores negatives for their scores, the dense scores of the full width decide
    for all kinds: the softmaxes of self-distillation must be over the same documents, and only
    cosines are on the scale of the rule. ``"ignored"`` is the share of a query's negatives that is
    ignored, averaged over the positive pairs.

    ``"loss"`` is minimised, the others are parts of it, unweighted. All of them are this process's
    share: means are over ``relation.positives`` and ``queries_of_all``, which count those of all
    processes. Computed in at least float32. ``block`` is the number of queries held at a time.
    """
    kinds: tuple[Kind, ...] = tuple(kind for kind in queries.kinds if kind in docs.kinds)
    wide = torch.promote_types(queries.tensors()[0].dtype, torch.float32)
    with torch.autocast(queries.tensors()[0].device.type, enabled=False):
        left, right = (_Side.of(side.only(kinds), dims, wide) for side in (queries, docs))
        sweep = _UnifiedSweep(
            left.detached(), right.detached(), relation, mixture, kinds, queries_of_all, teacher
        )
        size = block or _block_of(left, len(docs), len(kinds))
        learns = torch.is_grad_enabled()
        for start in range(0, len(queries) if len(docs) else 0, size):
            sweep.add(start, min(start + size, len(queries)), learns=learns)
    inputs = left.tensors() + right.tensors()
    gradients = [leaf.grad for leaf in sweep.left.tensors() + sweep.right.tensors()]
    return {**sweep.parts, "loss": finished(sweep.loss, inputs, gradients)}


def _block_of(queries: "_Side", docs: int, kinds: int) -> int:
    """Return how many queries to hold: scores and gradients by kind, and best rows of tokens."""
    tokens = 0
    if queries.vectors.multi is not None:
        tokens = len(queries.vectors.multi.vectors) // max(len(queries), 1)
    sparse = queries.vectors.sparse
    if sparse is not None and sparse.weights.is_cuda:  # a column for each term, also repeated ones
        tokens += len(sparse.weights) // max(len(queries), 1)
    each = 4 * max(docs, 1) * (4 * (kinds + 2) + 3 * tokens)
    return min(max(2 * block_bytes(queries.tensors()[0].device) // each, 1), 1024)


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """The vectors of all queries, or of all documents; dense ones of unit length."""

    vectors: Vectors
    prefixes: tuple[Float[Tensor, "texts _"], ...]  # of dense vectors, of unit length each

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def of(cls, vectors: Vectors, dims: Sequence[int], wide: torch.dtype) -> "_Side":
        vectors = vectors.with_tensors([tensor.to(wide) for tensor in vectors.tensors()])
        dense = vectors.dense
        if dense is None:
            return cls(vectors, ())
        shorter = sorted({dim for dim in dims if dim < dense.shape[1]})
        unit = Vectors(F.normalize(dense, dim=1), vectors.sparse, vectors.multi)
        return cls(unit, tuple(F.normalize(dense[:, :dim], dim=1) for dim in shorter))

    def tensors(self) -> list[Tensor]:
        return [*self.vectors.tensors(), *self.prefixes]

    def detached(self) -> "_Side":
        """Return the same numbers as new leaves, which collect gradients."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(tensor.requires_grad)

        return _Side(
            self.vectors.with_tensors([leaf(tensor) for tensor in self.vectors.tensors()]),
            tuple(leaf(prefix) for prefix in self.prefixes),
        )

    def scores(
        self, rows: slice, docs: "_Side", kinds: Sequence[Kind]
    ) -> dict[Kind, list[Float[Tensor, "rows docs"]]]:
        """Return scores of these queries with all documents: whole first, then dense prefixes."""
        some = self.vectors.take(rows)
        found: dict[Kind, list[Tensor]] = {
            kind: [scores_of(kind, some, docs.vectors)] for kind in kinds
        }
        for ours, theirs in zip(self.prefixes, docs.prefixes, strict=True):
            found["dense"].append(ours[rows] @ theirs.T)
        return found


@dataclass(eq=False)
class _UnifiedSweep:
    """The running sums of a loss over blocks of queries; the sides' leaves collect gradients."""

    left: _Side
    right: _Side
    relation: Relation
    mixture: Mixture
    kinds: tuple[Kind, ...]
    queries: int  # of all processes
    teacher: Float[Tensor, "docs"] | None
    loss: Tensor = field(init=False)
    parts: Losses = field(init=False)

    def __post_init__(self) -> None:
        several = len(self.kinds) > 1
        soft = self.mixture.distilled if several else 0.0
        self.queries, self.pairs = max(self.queries, 1), max(self.relation.positives, 1)
        self.of_hard = 1 / ((len(self.kinds) + several) * (1 + soft))
        self.of_soft = soft / (len(self.kinds) * (1 + soft))
        names = [*self.kinds, *(["sum"] if several else [])]
        if self.mixture.distil == "none":
            self.teacher = None
        if self.teacher is not None:
            self.teacher = self.teacher / self.mixture.teacher_temperature
        taught = [] if self.teacher is None else [f"{name}_taught" for name in names]
        names += taught
        names += [f"{kind}_distilled" for kind in self.kinds if soft]
        names += [] if self.relation.ignoring is None else ["ignored"]
        self.loss = self.left.tensors()[0].new_zeros(())
        self.parts = {name: self.loss.clone() for name in names}

    def add(self, start: int, stop: int, *, learns: bool) -> None:
        """Add a block's share of the losses and of the gradients."""
        with torch.set_grad_enabled(learns):
            scores = self.left.scores(slice(start, stop), self.right, self.kinds)
        with torch.no_grad():
            slopes = self._slopes(scores, start, stop)
        if not learns:
            return
        flat = [
            (score, slope)
            for kind in self.kinds
            for score, slope in zip(scores[kind], slopes[kind], strict=True)
            if score.requires_grad
        ]
        if flat:
            torch.autograd.backward([score for score, _ in flat], [slope for _, slope in flat])

    def _slopes(
        self, scores: Mapping[Kind, list[Tensor]], start: int, stop: int
    ) -> dict[Kind, list[Tensor]]:
        """Add to the losses and return the gradients by the scores."""
        mixture = self.mixture
        logits: dict[Kind, list[Tensor]] = {
            kind: [x / mixture.temperature for x in each] for kind, each in scores.items()
        }
        block = self._block(start, stop, logits)
        slopes: dict[Kind, list[Tensor]] = {
            kind: [self._hard(kind, x, block, 1 / len(each)) for x in each]
            for kind, each in logits.items()
        }
        if len(self.kinds) > 1:
            together = torch.stack(
                [mixture.in_sum.of(kind) * logits[kind][0] for kind in self.kinds]
            ).sum(0)
            by_sum = self._hard("sum", together, block, 1.0)
            for kind in self.kinds:
                slopes[kind][0] += mixture.in_sum.of(kind) * by_sum
            if self.of_soft:
                target = together.masked_fill(block.masked, -inf).softmax(1) * block.asked
                self._distil(logits, target, block, slopes)
        for each in slopes.values():
            for slope in each:
                slope /= mixture.temperature
        return slopes

    def _hard(
        self, name: Kind | Literal["sum"], logits: Tensor, block: "_ScoreBlock", part: float
    ) -> Tensor:
        """Add the loss by labels or a reranker's scores; return the gradient by the logits."""
        total, by_logits = loss_and_gradient(logits.clone(), block.pairs)
        term, slope = total / self.pairs, by_logits / self.pairs
        self.parts[name] += term * part
        if block.teacher is not None:
            share = self.mixture.distil_weight
            total, by_logits = self._by_teacher(logits, block.teacher, block)
            term = term + total / self.queries * share
            slope = slope + by_logits / self.queries * share
            self.parts[f"{name}_taught"] += total / self.queries * part
        weight = self.mixture.of_sum if name == "sum" else self.mixture.in_loss.of(name)
        self.loss += term * (part * weight * self.of_hard)
        return slope * (part * weight * self.of_hard)

    def _by_teacher(
        self,
        logits: Float[Tensor, "rows docs"],
        scores: Float[Tensor, "rows docs"],
        block: "_ScoreBlock",
    ) -> tuple[Tensor, Tensor]:
        """Return the loss by a reranker's scores, and its gradient by the logits."""
        if self.mixture.distil == "margin-mse":
            return margin_mse(logits, scores, block.positive, block.candidates)
        learn = group_distillation if self.mixture.distil == "kl" else listwise
        return learn(logits, scores, block.candidates)

    def _distil(
        self,
        logits: Mapping[Kind, list[Tensor]],
        target: Float[Tensor, "rows docs"],
        block: "_ScoreBlock",
        slopes: Mapping[Kind, list[Tensor]],
    ) -> None:
        """Add the loss of each kind by the softmax of the sum, which has no gradient (eq. 4)."""
        for kind in self.kinds:
            part = 1 / len(logits[kind])
            weight = (
                (self.mixture.in_distilled or self.mixture.in_loss).of(kind) * part * self.of_soft
            )
            for x, slope in zip(logits[kind], slopes[kind], strict=True):
                known = x.masked_fill(block.masked, -inf).log_softmax(1)
                term = -(target * known.masked_fill(block.masked, 0)).sum() / self.queries
                self.parts[f"{kind}_distilled"] += term * part
                self.loss += term * weight
                slope += (known.exp() * block.asked - target) * (weight / self.queries)

    def _block(self, start: int, stop: int, logits: Mapping[Kind, list[Tensor]]) -> "_ScoreBlock":
        device = self.loss.device
        relation = self.relation.rows(start, stop, device)
        self._ignore(relation, start, stop, logits)
        candidates = relation != IGNORED
        asked = candidates.any(1, keepdim=True)
        pairs, taught = self.relation.positive_pairs(start, stop), None
        if self.teacher is not None:
            row, column = self.relation.group(start, stop)
            scores = self.teacher[column]
            taught = torch.full_like(relation, torch.nan, dtype=self.loss.dtype)
            where = moved(row, device), moved(column, device)
            taught[where] = moved(scores.to(taught.dtype), device)
            if self.mixture.distil == "listwise":  # rows with a scored document have no InfoNCE
                judged = torch.zeros(stop - start, dtype=torch.bool)
                judged[row[~scores.isnan() & (self.relation.own[column] != IGNORED)]] = True
                others = ~judged[pairs[0]]
                pairs = pairs[0][others], pairs[1][others]
        block = PairBlock.of(pairs, relation)
        return _ScoreBlock(
            block, relation == POSITIVE, candidates, ~candidates & asked, asked, taught
        )

    def _ignore(
        self,
        relation: Int8[Tensor, "rows docs"],
        start: int,
        stop: int,
        logits: Mapping[Kind, list[Tensor]],
    ) -> None:
        """Mark negatives that are ignored by dense scores or a guide's, for all kinds alike."""
        if self.relation.ignoring is None:
            return
        kind = "dense" if "dense" in logits else self.kinds[0]  # without dense, a guide decides
        by = logits[kind][0]
        found = self.relation.false_negatives(start, stop, by, self.mixture.temperature)
        assert found is not None, "there is a rule"
        negative = relation == NEGATIVE
        row, _ = self.relation.positive_pairs(start, stop)
        share = ignored_share(negative, found, moved(row, relation.device))
        self.parts["ignored"] += share / self.pairs
        relation.masked_fill_(negative & found, IGNORED)


@dataclass(frozen=True, slots=True, eq=False)
class _ScoreBlock:
    """The relation of a block of queries to the documents."""

    pairs: PairBlock  # that are learned by InfoNCE
    positive: Bool[Tensor, "rows docs"]
    candidates: Bool[Tensor, "rows docs"]  # positives and negatives
    masked: Bool[Tensor, "rows docs"]  # the others; nothing in a row without candidates
    asked: Bool[Tensor, "rows 1"]  # which rows have candidates
    teacher: Float[Tensor, "rows docs"] | None  # NaN: not scored
