"""How much quality small vectors keep: fewer coordinates, stored in codes of 8, 4 or 1 bits.

Documents take the space, so only they are stored in codes; queries stay in full. Missing ranges of
codes are learned from the documents of the set, as someone who builds an index could do; never from
its queries or judgements.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tercet.errors import RecipeError
from tercet.evaluate.measures.retrieval import (
    RetrievalResult,
    depth_of,
    encode_both,
    evaluate_hits,
    evaluate_retrieval,
)
from tercet.evaluate.report.intervals import Interval
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings, quantizer_of
from tercet.rank.coded import FACTOR, top_k_coded
from tercet.rank.quantized import (
    PRECISIONS,
    STORED,
    CodePrecision,
    Codes,
    Quantizer,
    Ranges,
    Stored,
    bytes_of,
    codes_of,
    truncated,
)

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True, eq=False)
class Retained:
    """How well documents are found if their vectors are stored in one way.

    With ``binary+int8`` the bits are searched, and the candidates are scored again by int8 codes,
    which are read from disk for them alone.
    """

    dims: int
    stored: Stored
    bytes: int  # a vector
    result: RetrievalResult
    limit: float | None = None  # of the codes; None: stored without codes
    learned: bool = False  # from the documents of the set

    @property
    def name(self) -> str:
        """Return a name such as ``256 int4``."""
        return f"{self.dims} {self.stored}"

    def minus(self, other: "Retained", metric: str, seed: int = 0) -> Interval:
        """Return the difference on the same queries: below zero, this one is worse."""
        return self.result.minus(other.result, metric, seed=seed)


def retention(  # noqa: PLR0913 (independent choices, each with a default)
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
    """Measure every way to store the documents' vectors, after one encoding: first in full.

    ``dims`` are numbers of coordinates to keep, besides all of them.

    Raises:
        RecipeError: if the model has no prompts for the task, or ``dims`` are out of range.
    """
    for kept in dims:
        if not 0 < kept <= embedder.dim:
            raise RecipeError(f"dims must be between 1 and {embedder.dim}; got {kept}")
    queries, documents = encode_both(embedder, data, task=task, progress=progress)
    widths = sorted({embedder.dim, *dims}, reverse=True)
    ways: dict[tuple[int, Stored], None] = {(embedder.dim, "float32"): None}
    ways |= dict.fromkeys((kept, each) for kept in widths for each in stored)
    found = []
    for kept, each in ways:
        sides = _first(queries, kept), _first(documents, kept)
        storage = StoredDocuments(data, *sides, embedder.settings, names or data.metrics, factor)
        found.append(storage.measured(each))
    return found


def measure_coded(  # noqa: PLR0913 (independent choices, each with a default)
    embedder: Embedder,
    data: RetrievalSet,
    precision: Stored,
    *,
    task: str | None = None,
    dims: int | None = None,
    factor: int = FACTOR,
    progress: bool = False,
) -> Retained:
    """Measure one way to store documents, as ``tercet eval --dims 256 --store-as int4`` does.

    Raises:
        RecipeError: if the model has no prompts for the task, or ``dims`` is out of range.
    """
    sides = encode_both(embedder, data, task=task, dims=dims, progress=progress)
    storage = StoredDocuments(data, *sides, embedder.settings, data.metrics, factor)
    return storage.measured(precision)


def _first(vectors: Float[np.ndarray, "texts dims"], kept: int) -> Float[np.ndarray, "texts kept"]:
    """Keep the first coordinates; whole vectors stay unchanged, whatever their norm."""
    return vectors if kept == vectors.shape[1] else truncated(vectors, kept)


@dataclass(frozen=True, slots=True, eq=False)
class StoredDocuments:
    """Vectors of both sides, to measure search in documents that are stored in some way."""

    data: RetrievalSet
    queries: Float[np.ndarray, "queries dims"]
    documents: Float[np.ndarray, "docs dims"]
    settings: Settings
    names: Sequence[str]
    factor: int

    def measured(self, stored: Stored) -> Retained:
        """Measure how well documents are found that are stored like this."""
        dims = self.documents.shape[1]
        if stored == "float32":
            found = evaluate_retrieval(self.data, self.queries, self.documents, names=self.names)
            return Retained(dims, stored, bytes_of(stored, dims), found)
        codes, *others = map(self._codes, codes_of(stored))
        finer = others[0] if others else None
        depth = self.data.depth(max(map(depth_of, self.names)))
        hits = top_k_coded(self.queries, codes, depth, factor=self.factor, finer=finer)
        return Retained(
            dims,
            stored,
            bytes_of(stored, dims),
            evaluate_hits(self.data, hits, names=self.names),
            (codes if finer is None else finer).quantizer.limit,
            learned=dims not in self.settings.ranges,
        )

    def _codes(self, precision: CodePrecision) -> Codes:
        """Encode the documents; their ranges are learned here if the model has none."""
        dims = self.documents.shape[1]
        if dims not in self.settings.ranges:
            return Quantizer.learned(self.documents, precision).codes(self.documents)
        return quantizer_of(self.settings, precision, dims).codes(self.documents)


def chosen_dims(embedder: Embedder, dims: Sequence[int] | None) -> list[int]:
    """Return ``dims``, or the full dimension and those that the model was trained for, falling.

    Raises:
        RecipeError: if one is out of range.
    """
    trained = {embedder.dim, *embedder.settings.dims}
    wanted = sorted(set(dims or trained), reverse=True)
    if wrong := [kept for kept in wanted if not 0 < kept <= embedder.dim]:
        raise RecipeError(f"--dims must be between 1 and {embedder.dim}; got {wrong[0]}")
    if untrained := set(wanted) - trained:
        numbers = ", ".join(map(str, sorted(untrained)))
        log.warning(
            "the model was not trained to be cut to %s coordinates; that costs more quality",
            numbers,
        )
    return wanted


@dataclass(frozen=True, slots=True)
class CodeError:
    """What is lost when some vectors become codes of one precision."""

    precision: CodePrecision
    limit: float  # codes reach this far on either side of the centre
    beyond: float  # share of coordinates outside, which are cut
    error: float  # root mean squared distance between a vector and its decoded codes


def code_errors(ranges: Ranges, vectors: Float[np.ndarray, "texts dims"]) -> list[CodeError]:
    """Measure the codes of every precision on vectors."""
    distances = vectors - np.array(ranges.centre, dtype=np.float32)
    return [
        CodeError(
            each.precision,
            each.limit,
            float((np.abs(distances) > each.limit).mean()),
            ((each.rounded(distances) - distances) ** 2).sum(axis=1).mean() ** 0.5,
        )
        for each in map(ranges.quantizer, PRECISIONS)
    ]
