"""Train all kinds of vectors of a model together, and let their sum teach each (BGE-M3)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from tercet.data.batches.collate import Batch, Collator
from tercet.data.files.sources import Source
from tercet.distributed import gather_ints, gather_rows
from tercet.errors import RecipeError
from tercet.kinds import KINDS, Kind, Weights
from tercet.losses.unified import Lesson, Mixture, unified_loss
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Losses
from tercet.objectives.contrastive import Contrastive, PairWork, pairs_of
from tercet.objectives.objective import Traits
from tercet.segments import offsets_of
from tercet.vectors import Terms, TokenRows, Vectors


@dataclass(frozen=True, kw_only=True)
class Unified:
    """InfoNCE of dense, sparse, multi and their weighted sum, with self-distillation.

    The formulas are those of :func:`tercet.losses.unified.unified_loss` (arXiv 2402.03216, section
    3.3). Only ``kinds`` are trained: the layers of the others stay as they are. Self-distillation
    begins after ``distil_after`` optimizer steps; those before an interruption count.

    In several processes each takes its own queries against the documents of all, by every kind.
    """

    kinds: tuple[Kind, ...] = KINDS
    temperature: float = 0.02
    in_sum: Weights = field(default_factory=Weights)
    in_loss: Weights = field(default_factory=lambda: Weights(1.0, 0.1, 1.0))
    of_sum: float = 1.0
    distilled: float = 1.0
    distil_after: int = 0
    in_lesson: Weights | None = None
    lesson: Lesson = "none"  # how a reranker's scores are learned, where examples bring them
    dims: tuple[int, ...] = ()  # shorter dense vectors that are trained as well (Matryoshka)

    def __post_init__(self) -> None:
        Contrastive(temperature=self.temperature, dims=self.dims)  # which looks at both
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise RecipeError(f"kinds are {list(self.kinds)}; give one or more, each once")
        weights = (self.in_sum, self.in_loss, self.in_lesson or self.in_loss)
        shares = [self.of_sum, self.distilled, self.distil_after]
        shares += [each.of(kind) for each in weights for kind in KINDS]
        if not all(0 <= share < inf for share in shares):
            raise RecipeError(f"a weight of {self} is no number from 0; give 0 or more")
        if not any(self.in_loss.of(kind) for kind in self.kinds) and not self.of_sum:
            raise RecipeError("every loss has a weight of 0, so nothing would be learned")
        if len(self.kinds) > 1 and not any(self.in_sum.of(kind) for kind in self.kinds):
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
            needs_scores=self.lesson != "none",
            cacheable=True,
            shardable=True,
        )

    def start(self, embedder: Embedder, sources: Sequence[Source], collate: Collator) -> PairWork:
        """Set to work on examples.

        Raises:
            RecipeError: when the model does not make one of ``kinds``, or vectors of ``dims``.
        """
        if missing := [kind for kind in self.kinds if kind not in {*embedder.kinds, "dense"}]:
            raise RecipeError(
                f"the model makes no {' and no '.join(missing)} vectors, which this stage trains; "
                f"it makes {', '.join(embedder.kinds)}"
            )
        if max(self.dims, default=0) > embedder.dim:
            raise RecipeError(
                f"dims are {list(self.dims)}, but the model's vectors have {embedder.dim} "
                "coordinates; give lengths up to that"
            )
        unit = f"{pairs_of(collate)}, by {' and '.join(self.kinds)} vectors"
        return PairWork(self.loss, embedder, sources, collate, unit, kinds=self.kinds)

    def loss(self, vectors: Vectors, batch: Batch, step: int = 0) -> Losses:
        """The losses after so many steps: this process's share, where there are several."""
        queries, docs = vectors.take(slice(batch.queries)), vectors.take(slice(batch.queries, None))
        relation = batch.relation.gathered()
        mixture = Mixture(
            temperature=self.temperature,
            in_sum=self.in_sum,
            in_loss=self.in_loss,
            of_sum=self.of_sum,
            distilled=self.distilled if step >= self.distil_after else 0.0,
            in_lesson=self.in_lesson,
            lesson=self.lesson,
        )
        losses = unified_loss(
            queries,
            gathered(docs),
            relation,
            mixture,
            queries_of_all=int(gather_ints(torch.tensor([batch.queries])).sum()),
            dims=self.dims,
            teacher=None if self.lesson == "none" else _of_all(batch.teacher, len(docs)),
        )
        return {**losses, **_empty(docs, batch)}


def gathered(vectors: Vectors) -> Vectors:
    """The vectors of all processes, in the order of their ranks, with gradient."""
    dense, sparse, multi = vectors.dense, vectors.sparse, vectors.multi
    if sparse is not None:
        weights = gather_rows(sparse.weights[:, None]).squeeze(1)
        sparse = Terms(gather_ints(sparse.ids), weights, _offsets(sparse.offsets))
    if multi is not None:
        multi = TokenRows(gather_rows(multi.vectors), _offsets(multi.offsets))
    return Vectors(None if dense is None else gather_rows(dense), sparse, multi)


def _of_all(teacher: Tensor | None, docs: int) -> Tensor | None:
    """The scores of all processes' documents; None where no process has any."""
    if not bool(gather_ints(torch.tensor([int(teacher is not None)])).any()):
        return None
    own = torch.full((docs,), torch.nan) if teacher is None else teacher
    return gather_rows(own[:, None]).squeeze(1)


def _offsets(own: Tensor) -> Tensor:
    return offsets_of(gather_ints(own.diff()))


def _empty(docs: Vectors, batch: Batch) -> Losses:
    """The share of documents whose sparse vector holds nothing: a head that dies shows here."""
    if docs.sparse is None:
        return {}
    with torch.no_grad():
        alive = Terms(docs.sparse.ids, docs.sparse.weights.detach(), docs.sparse.offsets).merged()
        empty = (alive.offsets.diff() == 0).sum().to(torch.float32)
    every = gather_ints(torch.tensor([len(docs)])).sum().clamp_min(1)
    return {"empty_sparse": empty / every.to(empty.device)}
