"""A student learns the vectors that a teacher gives plain texts; no labels, no negatives.

The loss has two parts, each averaged over the full width and the shorter ones: the distance of a
text's two vectors (LEAF, arXiv 2509.12539, sec. 3.1), and how different its neighbours in the batch
are (SEED, arXiv 2101.04731, eq. 2 to 4). The student's vectors come to lie in the teacher's space,
so that it can search the teacher's index.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tercet import distributed
from tercet.data.batches.collate import Collator, example_prompt
from tercet.data.batches.sampler import BatchRows
from tercet.data.batches.teacher_vectors import (
    TeacherVectors,
    role_of_row,
    teacher_vectors,
)
from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.files.progress import Bars, bar
from tercet.losses.matching import Matched, cosine_distance, relational
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks, Losses
from tercet.models.tokens import Tokens
from tercet.objectives.contrastive import backward_of_vectors, check_dims
from tercet.objectives.objective import Traits
from tercet.segments import Packed
from tercet.types import ReadAs, Role
from tercet.vectors import Vectors

log = logging.getLogger("tercet")


@dataclass(frozen=True, kw_only=True)
class Distil:
    """The cosine distance to a teacher's vectors, and how different the neighbours are.

    The loss is ``distance + relational * temperature * neighbours``: the gradient of the neighbours
    grows as the temperature falls, and would otherwise leave the distance unlearned. Both parts are
    averaged over the full width, ``dims``, and the shorter widths that the teacher was trained for
    (Matryoshka).
    """

    teacher: str  # zoo name, folder or hub id
    dims: tuple[int, ...] = ()
    relational: float = 1.0  # weight of the neighbours; 0: the distance alone
    temperature: float = 0.02  # of the distribution over the other texts of a batch
    read_as: ReadAs = "document"

    def __post_init__(self) -> None:
        check_dims(self.dims)
        if not 0 < self.temperature < inf:
            raise RecipeError(f"temperature is {self.temperature}; give a number above 0")
        if not 0 <= self.relational < inf:
            raise RecipeError(f"relational is {self.relational}; give a weight of 0 or more")

    @property
    def traits(self) -> Traits:
        """Dense vectors are compared with stored ones."""
        return Traits(kinds=("dense",), dims=self.dims, cacheable=True, shardable=True)

    def start(
        self, embedder: Embedder, sources: Sequence[Source], collate: Collator
    ) -> "DistilWork":
        """Bind the objective to a student and texts; the teacher is loaded to look at its width.

        Raises:
            ModelError: if the teacher cannot be loaded.
            RecipeError: if the student's vectors are not as wide as the teacher's.
        """
        return DistilWork(self, embedder, sources, collate)


@dataclass(frozen=True, slots=True, eq=False)
class DistilBatch:
    """Texts, and the rows that they are of, in the same order."""

    texts: Packed
    rows: BatchRows
    truncated: int


class DistilWork:
    """Makes batches of texts, and compares their vectors with the teacher's."""

    unit = "texts"

    def __init__(
        self, objective: Distil, student: Embedder, sources: Sequence[Source], collate: Collator
    ) -> None:
        self.objective, self.student, self.drawn = objective, student, sources
        self._collate = collate
        self._stored: TeacherVectors | None = None  # once prepared
        self._teacher: Embedder | None = Embedder.load(objective.teacher)  # until then
        if self._teacher.dim != student.dim:
            raise RecipeError(
                f"the student's vectors must be as wide as the teacher's; got {student.dim} and "
                f"{self._teacher.dim} coordinates; set Model.as_wide_as to the teacher"
            )
        self.reads = {"teacher": self._teacher.fingerprint()}
        self._space, self._its = self._teacher.fingerprints(), self._teacher.settings
        if student.fingerprint() == self.reads["teacher"]:
            raise RecipeError(
                f"student and teacher are the same model, {objective.teacher}; give fewer layers "
                "(keep_layers), or another model or teacher"
            )
        self.widths = tuple(sorted({*objective.dims, *self._its.dims, student.dim}))

    def prepare(self, bars: Bars = bar) -> None:
        """Encode the texts that the teacher has not encoded yet.

        The teacher cuts texts where the student does.
        """
        teacher, student = self._teacher, self.student
        if teacher is None:
            return
        own, its = student.settings, self._its
        if any(its.prompts.values()) and not any(own.prompts.values()):
            log.warning(
                "the teacher reads texts after prompts and the student has none; it learns to tell "
                "queries from documents only with prompts: set query_prompt and document_prompt"
            )
        teacher.settings = replace(
            its,
            query_tokens=min(its.query_tokens, own.query_tokens),
            document_tokens=min(its.document_tokens, own.document_tokens),
        )
        teacher.to(student.device)
        self._stored = teacher_vectors(teacher, self.drawn, self.objective.read_as, bars=bars)
        self._teacher = None

    def settle(self) -> None:
        """Note whose space the student learns, and take over the teacher's ranges of codes."""
        student = self.student
        shorter = tuple(width for width in self.widths if width < student.dim)
        student.settings = replace(
            student.settings, dims=shorter, ranges=self._its.ranges, shares_space_with=self._space
        )

    def batch(self, rows: BatchRows, seed: Sequence[int]) -> DistilBatch:
        """Return the texts of these rows, those that are read as queries first."""
        roles = [role_of_row(row, self.objective.read_as) for row in rows.row.tolist()]
        places = {
            role: [place for place, its in enumerate(roles) if its == role]
            for role in get_args(Role)
        }
        examples, parts = rows.examples(self.drawn), list[Tokens]()
        for role, some in places.items():
            chosen = [examples[place] for place in some]
            prompts = [example_prompt(each, role, self._collate.prompt_of) for each in chosen]
            parts.append(self._collate.tokenize([each.query for each in chosen], role, prompts))
        order = [place for some in places.values() for place in some]
        tokens = Tokens.join(parts)
        ordered = BatchRows(rows.source[order], rows.row[order])
        return DistilBatch(tokens.pack(), ordered, tokens.truncated)

    def backward(self, batch: DistilBatch, chunks: Chunks, step: int = 0) -> Losses:
        """Embed the texts in chunks, and compare all of the batch with the teacher's."""
        assert self._stored is not None, "prepared before the first step"
        student = self.student
        wanted = self._stored.of(batch.rows).to(student.device)
        every = distributed.gather_rows(wanted)
        counts = distributed.gather_ints(torch.tensor([len(wanted)]))
        first = int(counts[: distributed.rank()].sum())

        def loss(vectors: Vectors) -> Losses:
            assert vectors.dense is not None, "embedded as dense vectors"
            return self._loss(vectors.dense, Matched(wanted, every), first)

        return backward_of_vectors(student, ("dense",), batch.texts, loss, chunks)

    def _loss(self, dense: Float[Tensor, "own dim"], teacher: Matched, first: int) -> Losses:
        student, share = Matched(dense, distributed.gather_rows(dense)), 1 / len(self.widths)
        distance = neighbours = dense.new_zeros(())
        for width in self.widths:
            its, own = teacher.prefix(width), student.prefix(width)
            distance = distance + share * cosine_distance(own, its)
            if self.objective.relational:
                part = relational(own, its, self.objective.temperature, first=first)
                neighbours = neighbours + share * part
        weight = self.objective.relational * self.objective.temperature
        losses = {"loss": distance + weight * neighbours, "distance": distance}
        return losses | ({"neighbours": neighbours} if self.objective.relational else {})

    def finish(self) -> None:
        """Drop the teacher."""
        self._teacher = None
