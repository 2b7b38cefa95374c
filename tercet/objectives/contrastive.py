"""Pull a query towards the documents that answer it, away from those that do not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tercet.data.batches.collate import Batch, Collator, ScoredPairs
from tercet.data.batches.relation import Relation
from tercet.data.batches.sampler import BatchRows
from tercet.data.files.sources import Source
from tercet.distributed import gather_ints, gather_rows, world
from tercet.errors import RecipeError
from tercet.kinds import Kind, Weights
from tercet.losses.cosent import cosent
from tercet.losses.info_nce import info_nce_losses
from tercet.losses.unified import Mixture, unified_loss
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks, Losses, backward_in_chunks
from tercet.objectives.objective import Traits
from tercet.segments import Packed
from tercet.types import Distillation, Policy
from tercet.vectors import Vectors

_AGAINST: Final[Mapping[Policy, str]] = {
    "all": "the others' documents",
    "positives": "the others' positives and its own negatives",
    "none": "its own negatives alone",
    "per_row": "the others' documents, unless its task forbids",
}


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """InfoNCE of cosines, equally over the full width and each of ``dims`` (Matryoshka).

    arXiv 1807.03748, eq. 4; arXiv 2205.13147, eq. 1. Each process takes its queries against the
    documents of all, so that summed gradients are those of the whole batch.

    Pairs of a batch that have a similarity score learn its order by
    :func:`tercet.losses.cosent.cosent`, over the same widths; they are neither queries nor
    documents of InfoNCE. The loss is the sum of both.

    With ``distil``, the examples' scores of documents are learned as well, see
    :func:`tercet.losses.unified.unified_loss`; examples without scores learn by InfoNCE alone.
    """

    temperature: float = 0.05
    dims: tuple[int, ...] = ()
    similarity_temperature: float = 0.05
    distil: Distillation = "none"
    distil_weight: float = 1.0
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < inf:
            raise RecipeError(f"temperature is {self.temperature}; give a number above 0")
        if not 0 < self.similarity_temperature < inf:
            raise RecipeError(
                f"similarity_temperature is {self.similarity_temperature}; give a number above 0"
            )
        check_dims(self.dims)
        _ = self._mixture  # checks its numbers

    @property
    def _mixture(self) -> Mixture:
        return Mixture(
            temperature=self.temperature,
            in_loss=Weights(1.0, 0.0, 0.0),
            distil=self.distil,
            distil_weight=self.distil_weight,
            teacher_temperature=self.teacher_temperature,
        )

    @property
    def traits(self) -> Traits:
        """Dense vectors of queries and documents are compared."""
        return Traits(
            kinds=("dense",),
            dims=self.dims,
            contrasts=True,
            ranks_pairs=True,
            needs_scores=self.distil != "none",
            cacheable=True,
            shardable=True,
        )

    def loss(self, vectors: Vectors, batch: Batch, step: int = 0) -> Losses:
        """Return the loss of the dense vectors: this process's share, if there are several."""
        dense = vectors.dense
        assert dense is not None, "embedded as dense vectors"
        first = len(dense) - 2 * len(batch.pairs)
        queries, documents = dense[: batch.queries], dense[batch.queries : first]
        relation = batch.relation.gathered()
        ranked = self._ranked(dense[first:], batch.pairs)
        if ranked is not None and not relation.positives:  # pairs alone
            return {"loss": ranked, "similarity": ranked}
        if self.distil == "none":
            found = self._contrasted(queries, documents, relation)
        else:
            found = self._taught(queries, documents, relation, batch)
        if ranked is None:
            return found
        return {**found, "loss": found["loss"] + ranked, "similarity": ranked}

    def _contrasted(self, queries: Tensor, documents: Tensor, relation: Relation) -> Losses:
        """Return the InfoNCE of these queries with the documents of all processes."""
        width = queries.shape[1]
        shorter = [dim for dim in self.dims if dim < width]
        if not shorter:  # scaled once, instead of every block of scores
            queries, documents = F.normalize(queries, dim=1), F.normalize(documents, dim=1)
        losses = info_nce_losses(
            queries,
            gather_rows(documents),
            relation,
            self.temperature,
            dims=(*sorted(shorter), width) if shorter else None,
        )
        if relation.ignoring is None:
            del losses["ignored"]
        return losses

    def _taught(
        self, queries: Tensor, documents: Tensor, relation: Relation, batch: Batch
    ) -> Losses:
        """Return the loss with that by the scores of a reranker, and both parts of it."""
        found = unified_loss(
            Vectors(queries),
            Vectors(gather_rows(documents)),
            relation,
            self._mixture,
            queries_of_all=int(gather_ints(torch.tensor([batch.queries])).sum()),
            dims=self.dims,
            teacher=scores_of_all(batch.teacher, len(documents)),
        )
        names = {"dense": "contrast", "dense_taught": "taught"}
        return {names.get(name, name): value for name, value in found.items()}

    def _ranked(self, texts: Float[Tensor, "texts dim"], pairs: ScoredPairs) -> Tensor | None:
        """Return a process's share of the loss of all pairs with a score; None without such pairs.

        ``texts`` are the first texts of the pairs of this process, then the second ones. Every
        process compares the pairs of all, and takes an equal part of the loss.
        """
        if not int(gather_ints(torch.tensor([len(pairs)])).sum()):
            return None
        scores, scales = gather_rows(pairs.scores[:, None]).squeeze(1), gather_ints(pairs.scales)
        width = texts.shape[1]
        widths = sorted({width, *(dim for dim in self.dims if dim < width)})
        wide = texts.to(torch.promote_types(texts.dtype, torch.float32))
        first, second = wide[: len(pairs)], wide[len(pairs) :]
        with torch.autocast(texts.device.type, enabled=False):
            own = [F.cosine_similarity(first[:, :dim], second[:, :dim]) for dim in widths]
        cosines = gather_rows(torch.stack(own, dim=1))
        losses = [cosent(x, scores, scales, self.similarity_temperature) for x in cosines.T]
        return torch.stack(losses).mean() / world()

    def start(self, embedder: Embedder, sources: Sequence[Source], collate: Collator) -> "PairWork":
        """Bind the objective to an embedder and examples.

        Raises:
            RecipeError: if the model's vectors are shorter than one of ``dims``.
        """
        require_dims(self.dims, embedder)
        return PairWork(self.loss, embedder, sources, collate, unit_of(collate))


def scores_of_all(
    teacher: Float[Tensor, "docs"] | None, docs: int
) -> Float[Tensor, "docs_of_all"] | None:
    """Return the scores of all processes' documents, NaN where unknown; None without any."""
    if not bool(gather_ints(torch.tensor([int(teacher is not None)])).any()):
        return None
    own = torch.full((docs,), torch.nan) if teacher is None else teacher
    return gather_rows(own[:, None]).squeeze(1)


def check_dims(dims: Sequence[int]) -> None:
    """Raise unless ``dims`` are widths of vectors, each once."""
    if len(set(dims)) < len(dims) or min(dims, default=1) < 1:
        raise RecipeError(f"dims are {tuple(dims)}; give lengths of 1 or more, each once")


def require_dims(dims: Sequence[int], embedder: Embedder, stage: str = "") -> None:
    """Raise if one of ``dims`` is longer than the embedder's vectors."""
    if max(dims, default=0) > embedder.dim:
        raise RecipeError(
            f"dims are {list(dims)}, but the model's vectors have {embedder.dim} coordinates; give "
            f"lengths up to that{f' (stage {stage})' if stage else ''}"
        )


def unit_of(collate: Collator) -> str:
    """Return what a batch of a contrastive objective is counted in, for people."""
    return f"examples, each query against {_AGAINST[collate.in_batch]}"


VectorLoss = Callable[[Vectors, Batch, int], Losses]
"""Returns the losses of a batch's vectors, queries first, after a number of optimizer steps."""


@dataclass(frozen=True, slots=True, eq=False)
class PairWork:
    """The work of any objective that is a loss over the vectors of queries and documents."""

    loss: VectorLoss
    embedder: Embedder
    drawn: Sequence[Source]
    collate: Collator
    unit: str
    finish: Callable[[], None] = lambda: None  # undoes what only training needs
    kinds: tuple[Kind, ...] = ("dense",)

    def batch(self, rows: BatchRows, seed: Sequence[int]) -> Batch:
        """Return the examples of these rows, with their documents chosen, tokenized and related."""
        return self.collate(rows.examples(self.drawn), seed)

    def backward(self, batch: Batch, chunks: Chunks, step: int = 0) -> Losses:
        """Embed in chunks, compute the loss over all vectors, and propagate its gradient."""

        def loss(vectors: Vectors) -> Losses:
            return self.loss(vectors, batch, step)

        return backward_of_vectors(self.embedder, self.kinds, batch.texts, loss, chunks)


def backward_of_vectors(
    embedder: Embedder,
    kinds: Sequence[Kind],
    texts: Packed,
    loss: Callable[[Vectors], Losses],
    chunks: Chunks,
) -> Losses:
    """Embed texts in chunks, compute a loss over all their vectors, and propagate its gradient."""
    # A small batch is shared by others; they wait for this one.
    if not len(texts) and not chunks.in_step:
        return _of_no_texts(embedder, kinds, loss)
    return backward_in_chunks(
        lambda some: embedder.vectors(some, kinds),
        texts.to(embedder.device),
        loss,
        chunks=chunks,
    )


def _of_no_texts(
    embedder: Embedder, kinds: Sequence[Kind], loss: Callable[[Vectors], Losses]
) -> Losses:
    """Return the loss of an empty share: its backward answers the other processes."""
    nothing = Vectors.of_nothing(kinds, embedder.dim, embedder.heads.width)
    dtype = torch.promote_types(next(embedder.parameters()).dtype, torch.float32)
    leaves = [t.to(embedder.device, dtype).requires_grad_() for t in nothing.tensors()]
    losses = loss(nothing.to(embedder.device).with_tensors(leaves))
    losses["loss"].backward()
    return {name: value.detach() for name, value in losses.items()}
