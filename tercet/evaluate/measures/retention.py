"""What small vectors keep of a model's quality: fewer coordinates, in codes of 8, 4 or 1 bits.

Documents are what takes room, so they alone are in codes; queries stay as they are. Ranges that the
model has none of are learned from the documents of the set, as whoever builds an index could do it.
Its queries and judgements are never looked at for that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from tercet.errors import RecipeError
from tercet.evaluate.measures.prompts import warn_unprompted
from tercet.evaluate.report.intervals import Interval, paired_difference
from tercet.evaluate.sets.retrieval_set import (
    RetrievalResult,
    RetrievalSet,
    depth_of,
    evaluate_hits,
    evaluate_retrieval,
)
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings, quantizer_of
from tercet.rank.coded import FACTOR, top_k_coded
from tercet.rank.quantized import (
    STORED,
    Codes,
    Precision,
    Quantizer,
    Stored,
    bytes_of,
    codes_of,
    truncated,
)

Queries: TypeAlias = Float[np.ndarray, "queries dims"]
Documents: TypeAlias = Float[np.ndarray, "docs dims"]


@dataclass(frozen=True, slots=True, eq=False)
class Retained:
    """How well documents are found whose vectors are stored in one way.

    Of ``binary+int8`` the bits are searched, and what they find is scored again by int8 codes,
    which are read from the disk for those documents alone.
    """

    dims: int
    stored: Stored
    bytes: int  # a vector
    result: RetrievalResult
    limit: float | None = None  # of the codes; None: there are none
    learned: bool = False  # from the documents of the set

    @property
    def name(self) -> str:
        """Such as ``256 int4``."""
        return f"{self.dims} {self.stored}"

    def minus(self, other: "Retained", metric: str, seed: int = 0) -> Interval:
        """By how much it is better on the same queries: below zero, it loses."""
        after, before = (each.result.scores[metric] for each in (self, other))
        return paired_difference(after, before, seed=seed)


def retention(  # noqa: PLR0913 (each is a choice of its own, with a default)
    embedder: Embedder,
    data: RetrievalSet,
    *,
    task: str | None = None,
    dims: Sequence[int] = (),
    stored: Sequence[Stored] = STORED,
    names: Sequence[str] | None = None,
    factor: int = FACTOR,
    progress: bool = False,
) -> list[Retained]:
    """Every way to store the documents' vectors, of one encoding: first in full, then others.

    ``dims`` are numbers of coordinates to keep, besides all of them.

    Raises:
        RecipeError: for a task that the model has no prompts for, or ``dims`` out of range.
    """
    for kept in dims:
        if not 0 < kept <= embedder.dim:
            raise RecipeError(
                f"dims is {kept}, but the model's vectors have {embedder.dim} coordinates"
            )
    queries, documents = _encoded(embedder, data, task, progress)
    widths = sorted({embedder.dim, *dims}, reverse=True)
    ways: dict[tuple[int, Stored], None] = {(embedder.dim, "float32"): None}
    ways |= dict.fromkeys((kept, each) for kept in widths for each in stored)
    found = []
    for kept, each in ways:
        sides = _kept(queries, kept), _kept(documents, kept)
        how = Storing(data, *sides, embedder.settings, names or data.metrics, factor)
        found.append(how.measured(each))
    return found


def measure_coded(  # noqa: PLR0913 (each is a choice of its own, with a default)
    embedder: Embedder,
    data: RetrievalSet,
    precision: Precision,
    *,
    task: str | None = None,
    dims: int | None = None,
    factor: int = FACTOR,
    progress: bool = False,
) -> Retained:
    """One way of them, as ``tercet eval --dims 256 --precision int4`` measures it.

    Raises:
        RecipeError: for a task that the model has no prompts for, or ``dims`` out of range.
    """
    queries, documents = _encoded(embedder, data, task, progress, dims)
    how = Storing(data, queries, documents, embedder.settings, data.metrics, factor)
    return how.measured(precision)


def _encoded(
    embedder: Embedder,
    data: RetrievalSet,
    task: str | None,
    progress: bool,
    dims: int | None = None,
) -> tuple[Queries, Documents]:
    warn_unprompted(embedder.settings, "query", task)
    how: Mapping[str, Any] = {"task": task, "dims": dims, "progress": progress}
    queries = embedder.encode(data.queries, "query", **how)
    return queries, embedder.encode(data.documents, "document", **how)


def _kept(vectors: Float[np.ndarray, "texts dims"], kept: int) -> Float[np.ndarray, "texts kept"]:
    """Vectors in full stay what the model makes, of whatever length."""
    return vectors if kept == vectors.shape[1] else truncated(vectors, kept)


@dataclass(frozen=True, slots=True, eq=False)
class Storing:
    """Vectors of both sides, and how they are measured once they are stored."""

    data: RetrievalSet
    queries: Queries
    documents: Documents
    settings: Settings
    names: Sequence[str]
    factor: int

    def measured(self, stored: Stored) -> Retained:
        """How well documents are found that are stored in this way."""
        dims = self.documents.shape[1]
        if stored == "float32":
            found = evaluate_retrieval(self.data, self.queries, self.documents, names=self.names)
            return Retained(dims, stored, bytes_of(stored, dims), found)
        learned = dims not in self.settings.ranges
        codes, *others = map(self._codes, codes_of(stored))
        finer = others[0] if others else None
        depth = max(map(depth_of, self.names))
        hits = top_k_coded(self.queries, codes, depth, factor=self.factor, finer=finer)
        return Retained(
            dims,
            stored,
            bytes_of(stored, dims),
            evaluate_hits(self.data, hits, names=self.names),
            (codes if finer is None else finer).quantizer.limit,
            learned,
        )

    def _codes(self, precision: Precision) -> Codes:
        """The documents in codes, whose ranges are learned here unless the model has them."""
        dims = self.documents.shape[1]
        if dims not in self.settings.ranges:
            return Quantizer.learned(self.documents, precision).codes(self.documents)
        return quantizer_of(self.settings, precision, dims).codes(self.documents)
