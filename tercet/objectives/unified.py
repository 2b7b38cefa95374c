"""Train all kinds of vectors of a model together, and let their sum teach each (BGE-M3)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tercet.data.batches.collate import Batch, Collator
from tercet.data.files.sources import Source
from tercet.distributed import gather_ints, gather_rows
from tercet.errors import RecipeError
from tercet.kinds import KINDS, Kind
from tercet.losses.unified import Mixture, unified_loss
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Losses
from tercet.objectives.contrastive import PairWork, check_dims, require_dims, scores_of_all, unit_of
from tercet.objectives.objective import Traits
from tercet.segments import maximum, offsets_of
from tercet.vectors import Terms, TokenRows, Vectors


@dataclass(frozen=True, kw_only=True)
class Unified:
    """InfoNCE of dense, sparse, multi and their weighted sum, with self-distillation.

    See :func:`tercet.losses.unified.unified_loss` (arXiv 2402.03216, sec. 3.3). Only ``kinds`` are
    trained: the heads of the others do not change. Self-distillation begins after ``distil_after``
    optimizer steps, which include those before an interruption.
    """

    kinds: tuple[Kind, ...] = KINDS
    mixture: Mixture = field(default_factory=Mixture)
    distil_after: int = 0
    dims: tuple[int, ...] = ()  # shorter dense vectors that are trained as well (Matryoshka)

    def __post_init__(self) -> None:
        check_dims(self.dims)
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise RecipeError(f"kinds are {list(self.kinds)}; give one or more, each once")
        if self.distil_after < 0:
            raise RecipeError(f"distil_after is {self.distil_after}; give 0 or more")
        in_loss, in_sum = self.mixture.in_loss, self.mixture.in_sum
        if not any(in_loss.of(kind) for kind in self.kinds) and not self.mixture.of_sum:
            raise RecipeError("every loss has a weight of 0, so nothing would be learned")
        if len(self.kinds) > 1 and not any(in_sum.of(kind) for kind in self.kinds):
            raise RecipeError(
                f"none of {', '.join(self.kinds)} counts in the sum of scores; give one a weight"
            )
        if self.dims and "dense" not in self.kinds:
            raise RecipeError("dims are of dense vectors, which this stage does not train")

    @property
    def traits(self) -> Traits:
        """Vectors of all ``kinds`` are compared."""
        return Traits(
            kinds=self.kinds,
            dims=self.dims,
            contrasts=True,
            needs_scores=self.mixture.distil != "none",
            cacheable=True,
            shardable=True,
        )

    def start(self, embedder: Embedder, sources: Sequence[Source], collate: Collator) -> PairWork:
        """Bind the objective to an embedder and examples.

        Raises:
            RecipeError: if the model does not make one of ``kinds``, or vectors of ``dims``.
        """
        if missing := [kind for kind in self.kinds if kind not in {*embedder.kinds, "dense"}]:
            raise RecipeError(
                f"the model makes no {' and no '.join(missing)} vectors, which this stage trains; "
                f"it makes {', '.join(embedder.kinds)}"
            )
        require_dims(self.dims, embedder)
        unit = f"{unit_of(collate)}, by {' and '.join(self.kinds)} vectors"
        return PairWork(self.loss, embedder, sources, collate, unit, kinds=self.kinds)

    def loss(self, vectors: Vectors, batch: Batch, step: int = 0) -> Losses:
        """Return the losses after ``step`` steps: this process's share, if there are several."""
        queries, docs = vectors.take(slice(batch.queries)), vectors.take(slice(batch.queries, None))
        begun = step >= self.distil_after
        mixture = self.mixture if begun else replace(self.mixture, distilled=0.0)
        ignored = mixture.distil == "none"
        losses = unified_loss(
            queries,
            gathered(docs),
            batch.relation.gathered(),
            mixture,
            queries_of_all=int(gather_ints(torch.tensor([batch.queries])).sum()),
            dims=self.dims,
            teacher=None if ignored else scores_of_all(batch.teacher, len(docs)),
        )
        return {**losses, **_share_of_empty(docs)}


def gathered(vectors: Vectors) -> Vectors:
    """Return the vectors of all processes, in the order of their ranks, with gradient."""
    dense, sparse, multi = vectors.dense, vectors.sparse, vectors.multi
    if sparse is not None:
        weights = gather_rows(sparse.weights[:, None]).squeeze(1)
        sparse = Terms(gather_ints(sparse.ids), weights, _offsets(sparse.offsets))
    if multi is not None:
        multi = TokenRows(gather_rows(multi.vectors), _offsets(multi.offsets))
    return Vectors(None if dense is None else gather_rows(dense), sparse, multi)


def _offsets(own: Tensor) -> Tensor:
    return offsets_of(gather_ints(own.diff()))


def _share_of_empty(docs: Vectors) -> Losses:
    """Return the share of documents with an empty sparse vector, which rises if the head dies."""
    if docs.sparse is None:
        return {}
    with torch.no_grad():
        largest = maximum(docs.sparse.weights[:, None], docs.sparse.offsets)
        empty = (largest <= 0).sum().to(torch.float32)
    every = gather_ints(torch.tensor([len(docs)])).sum()
    return {"empty_sparse": empty / max(1, int(every))}
