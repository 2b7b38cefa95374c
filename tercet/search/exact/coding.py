"""Dense vectors of a segment in codes: what is kept of each, and what a query scores with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8

from tercet.rank.coded import FACTOR, scores_of, top_k_coded
from tercet.rank.quantized import Codes, Quantizer, Ranges, Stored, bytes_of, codes_of
from tercet.rank.topk import Hits

_CANDIDATES: Final = 100  # at least, since these few cost nothing


@dataclass(frozen=True, slots=True, eq=False)
class Coding:
    """How vectors of one width become codes: those that are searched, and finer ones of some."""

    dims: int
    quantizers: tuple[Quantizer, ...]

    @classmethod
    def by(cls, stored: Stored, ranges: Ranges) -> "Coding":
        """What these ranges make of ``stored``, which is not float32."""
        return cls(len(ranges.centre), tuple(map(ranges.quantizer, codes_of(stored))))

    @property
    def bytes(self) -> tuple[int, ...]:
        """Of a vector, in each sort of its codes."""
        return tuple(bytes_of(each.precision, self.dims) for each in self.quantizers)

    def coded(self, vectors: Float32[np.ndarray, "docs dims"]) -> "Coded":
        """These vectors in codes."""
        return Coded(self, tuple(each.codes(vectors).packed for each in self.quantizers))


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """Vectors in codes, in memory or mapped from a file each; in place of an array of them."""

    coding: Coding
    arrays: tuple[UInt8[np.ndarray, "docs _"], ...]

    def __len__(self) -> int:
        return len(self.arrays[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Of the array that they stand for."""
        return len(self), self.coding.dims

    @property
    def nbytes(self) -> int:
        """The size of the codes."""
        return sum(array.nbytes for array in self.arrays)

    def nearest(
        self,
        queries: Float32[np.ndarray, "queries dims"],
        k: int,
        allowed: Bool[np.ndarray, "docs"] | None,
    ) -> Hits:
        """The ``k`` best of those that are allowed; see :func:`top_k_coded`."""
        coarse, *others = map(self._codes, range(len(self.arrays)))
        finer = others[0] if others else None
        factor = max(FACTOR, -(-_CANDIDATES // max(k, 1)))
        return top_k_coded(queries, coarse, k, factor=factor, finer=finer, allowed=allowed)

    def scores(
        self, queries: Float32[np.ndarray, "queries dims"], rows: slice | Int64[np.ndarray, "rows"]
    ) -> Float32[np.ndarray, "queries rows"]:
        """What queries score with these rows, by the finest codes."""
        return scores_of(queries, self._codes(-1).take(rows))

    def _codes(self, sort: int) -> Codes:
        return Codes(self.coding.quantizers[sort], self.coding.dims, self.arrays[sort])


Dense: TypeAlias = Float32[np.ndarray, "_ _"] | Coded
"""The dense vectors of a segment, as they are or in codes."""


def arrays_of(dense: Dense) -> tuple[Shaped[np.ndarray, "docs _"], ...]:
    """What is kept of them, a row a document."""
    return dense.arrays if isinstance(dense, Coded) else (dense,)


def dense_of(arrays: Sequence[Shaped[np.ndarray, "docs _"]], coding: Coding | None) -> Dense:
    """The vectors that were kept so."""
    return arrays[0] if coding is None else Coded(coding, tuple(arrays))


def coding_of(dense: Dense | None) -> Coding | None:
    """How they became codes; None of float32."""
    return dense.coding if isinstance(dense, Coded) else None
