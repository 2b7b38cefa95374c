"""The rank of each query's own document among all documents of a shard, by counting.

Nothing is sorted and no index is built: the rank is one plus the number of documents with a higher
score. This is exact, costs one matrix product and needs the memory of one block.
"""

import math
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt64
from torch import Tensor

from tercet.errors import BROKEN_MODEL, ModelError
from tercet.files.progress import Advance

_PANEL: Final = 1 << 16  # documents that are float32 at the same time
_MANY_THREADS: Final = 2  # with more, torch compares faster than numpy, which uses one
_WORD: Final = 8  # booleans that are added as one number


@runtime_checkable
class VectorRows(Protocol):
    """Vectors that are read in slices: an array, a mapped array, or several files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of vectors and their dimension."""
        ...

    def __getitem__(self, part: slice, /) -> np.ndarray:
        """Return the vectors of these rows."""
        ...


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Queries and documents per matrix product. The scores should fit in the CPU cache."""

    queries: int = 512
    documents: int = 2048  # a multiple of queries: each query meets its own document in one block

    def __post_init__(self) -> None:
        assert self.documents % self.queries == 0 and self.queries % _WORD == 0


ON_CPU: Final = BlockSize()
ON_GPU: Final = BlockSize(4096, 16_384)


def _ignore(count: int = 1, note: str = "") -> None:
    pass


def paired_ranks(  # noqa: PLR0913 (the last three change no result)
    queries: VectorRows,
    documents: VectorRows,
    keys: UInt64[np.ndarray, "docs"],
    *,
    owners: Int64[np.ndarray, "docs"] | None = None,
    device: torch.device | str = "cpu",
    block: BlockSize | None = None,
    advance: Advance = _ignore,
) -> tuple[Int32[np.ndarray, "docs"], Float32[np.ndarray, "docs"]]:
    """Return the rank of each document for its query, and its score (arXiv 2412.04506, sec. 3.2).

    ``rank_i = 1 + |{j : s_ij > s_ii}|`` over all ``j`` with another text (``keys``). Document
    ``i`` belongs to query ``i``, or to ``owners[i]`` (ascending); documents of the same query do
    not count against each other either.

    ``s_ii`` is taken from the same matrix product as the other scores: computed separately it
    differs in the last bits, and a document would beat itself in almost half of all rows. All
    products have the same shape, padded with zeros, because kernels round odd shapes differently.

    Raises:
        ModelError: if a vector contains NaN or infinity.
    """
    block = block or (ON_GPU if torch.device(device).type == "cuda" else ON_CPU)
    counting = _RankCounter(
        queries, documents, block, _Equals.of(keys, owners), torch.device(device)
    )
    for start in range(0, len(keys), block.documents):
        counting.meet_own(start)
    for start in range(0, len(keys), counting.panel):
        counting.meet_others(start)
        advance(min(counting.panel, len(keys) - start))
    return (counting.above + 1).numpy(), counting.scores.numpy()


@dataclass(frozen=True, slots=True)
class _Equals:
    """Which documents share a text or a query."""

    owners: Int64[np.ndarray, "docs"]
    texts: Int64[np.ndarray, "docs"]  # a number for each text that occurs twice; else -1
    queries: Int64[np.ndarray, "docs"]  # the same for queries
    repeated: Bool[np.ndarray, "docs"]

    @classmethod
    def of(
        cls, keys: UInt64[np.ndarray, "docs"], owners: Int64[np.ndarray, "docs"] | None
    ) -> "_Equals":
        if owners is None:
            owners = np.arange(len(keys))
        assert not (np.diff(owners) < 0).any()
        texts, queries = _repeated(keys), _repeated(owners)
        return cls(owners, texts, queries, (texts >= 0) | (queries >= 0))


def _repeated(keys: np.ndarray) -> Int64[np.ndarray, "docs"]:
    _, places, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.where(counts[places] > 1, places, -1)


class _RankCounter:
    """Counts the documents that score higher than each query's own."""

    def __init__(
        self,
        queries: VectorRows,
        documents: VectorRows,
        block: BlockSize,
        equals: _Equals,
        device: torch.device,
    ) -> None:
        count = len(equals.owners)
        self.queries, self.documents, self.block, self.equals = queries, documents, block, equals
        self.device = device
        self.panel = max(_PANEL // block.documents, 1) * block.documents
        self.above = torch.zeros(count, dtype=torch.int32)
        self.scores = torch.zeros(count)
        shape = block.queries, block.documents
        self._product = torch.empty(shape, device=device)
        self._higher = torch.empty(shape, dtype=torch.bool, device=device)
        self._own = torch.empty(block.queries, 1, device=device)

    def meet_own(self, start: int) -> None:
        """Read the own scores of the documents from ``start`` on, and count within their block."""
        own = self._documents(start, self.block.documents)
        for first in range(start, min(start + len(own), len(self.above)), self.block.queries):
            columns = slice(start, start + len(own))
            product = self._multiply(self._queries(first), own, columns)
            rows = self._rows(first)
            diagonal = torch.arange(rows.stop - rows.start, device=self.device)
            found = product[diagonal, diagonal + (first - start)].cpu()
            if not found.isfinite().all():
                raise ModelError(f"a vector contains NaN or infinity; {BROKEN_MODEL}")
            self.scores[rows] = found
            self._count(rows, columns)

    def meet_others(self, start: int) -> None:
        """Count the documents of a panel for queries whose own documents are in other blocks."""
        width = self.block.documents
        panel = self._documents(start, self.panel)
        for first in range(0, len(self.above), self.block.queries):
            queries = self._queries(first)
            for offset in range(0, len(panel), width):
                columns = slice(start + offset, start + offset + width)
                if not columns.start <= first < columns.stop:
                    self._multiply(queries, panel[offset : offset + width], columns)
                    self._count(self._rows(first), columns)

    def _multiply(self, queries: Tensor, documents: Tensor, columns: slice) -> Tensor:
        product = torch.mm(queries, documents.T, out=self._product)
        if columns.stop > len(self.above):
            product[:, len(self.above) - columns.start :] = -math.inf
        return product

    def _count(self, rows: slice, columns: slice) -> None:
        count = rows.stop - rows.start
        self._own.fill_(math.inf)[:count, 0] = self.scores[rows].to(self.device)
        _compare(self._product, self._own, self._higher)
        found = _true_of_each_row(self._higher)[:count]
        found -= self._among_equals(rows, columns)
        self.above[rows] += found.cpu()

    def _among_equals(self, rows: slice, columns: slice) -> Tensor:
        """Count those among the higher-scoring documents that share the text or the query."""
        equals = self.equals
        found = torch.zeros(rows.stop - rows.start, dtype=torch.int32, device=self.device)
        here = np.flatnonzero(equals.repeated[rows])
        there = np.flatnonzero(equals.repeated[columns])
        if not len(here) or not len(there):
            return found
        same = torch.zeros(len(here), len(there), dtype=torch.bool, device=self.device)
        for numbers in (equals.texts, equals.queries):
            left, right = numbers[rows][here], numbers[columns][there]
            if (left >= 0).any() and (right >= 0).any():
                left = np.where(left < 0, -2, left)  # -1 must not equal -1
                columns_of = torch.from_numpy(right).to(self.device)
                same |= torch.from_numpy(left).to(self.device)[:, None] == columns_of
        places = torch.from_numpy(here).to(self.device), torch.from_numpy(there).to(self.device)
        higher = self._higher[places[0]].index_select(1, places[1])
        found[places[0]] = (higher & same).sum(dim=1, dtype=torch.int32)
        return found

    def _rows(self, first: int) -> slice:
        return slice(first, min(first + self.block.queries, len(self.above)))

    def _queries(self, first: int) -> Float[Tensor, "queries dim"]:
        """Return a block of queries, one for each document."""
        owners = self.equals.owners[self._rows(first)]
        found = self.queries[int(owners[0]) : int(owners[-1]) + 1][owners - owners[0]]
        return self._filled(found, self.block.queries)

    def _documents(self, start: int, wanted: int) -> Float[Tensor, "docs dim"]:
        stop = min(start + wanted, len(self.above))
        width = self.block.documents
        return self._filled(self.documents[start:stop], -(-(stop - start) // width) * width)

    def _filled(self, rows: np.ndarray, count: int) -> Float[Tensor, "rows dim"]:
        """Return the vectors in float32, padded with zeros to ``count`` rows."""
        found = np.zeros((count, rows.shape[1]), np.float32)
        found[: len(rows)] = rows
        return torch.from_numpy(found).to(self.device)


def _compare(
    scores: Float[Tensor, "queries docs"],
    own: Float[Tensor, "queries 1"],
    higher: Bool[Tensor, "queries docs"],
) -> None:
    """Mark the scores that are higher than the row's own score."""
    if scores.device.type != "cpu" or torch.get_num_threads() > _MANY_THREADS:
        torch.gt(scores, own, out=higher)
    else:  # numpy needs less than half of torch's time
        np.greater(scores.numpy(), own.numpy(), out=higher.numpy())


def _true_of_each_row(marks: Bool[Tensor, "queries docs"]) -> Tensor:
    """Count the true values in each row. Eight bytes are added as one number, up to 255 times."""
    words = marks.view(torch.int64)  # [queries, docs / 8]
    most = math.gcd(words.shape[1], 128)  # no byte of a sum overflows into the next one
    sums = words.view(len(words), -1, most).sum(dim=2)  # [queries, parts]
    return sums.view(torch.uint8).sum(dim=1, dtype=torch.int32)
