"""The rank of each query's own document among all documents of a shard, by counting.

Nothing is sorted and no index is built: a rank is one more than the number of documents that score
higher. So it is exact, costs one matrix product, and takes the memory of a block.
"""

import math
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt64
from torch import Tensor

from tercet.errors import ModelError
from tercet.files.progress import Advance

_PANEL: Final = 1 << 16  # documents that are float32 at the same time
_MANY_THREADS: Final = 2  # from more on torch compares faster than numpy, which has one
_WORD: Final = 8  # truth values that are added as one number


@runtime_checkable
class Rows(Protocol):
    """Vectors that are read some at a time: an array, a mapped one, or files of them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """How many there are, and how wide."""
        ...

    def __getitem__(self, part: slice, /) -> np.ndarray:
        """The vectors of these rows."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """How many queries meet how many documents at once. Their scores should stay in the cache."""

    queries: int = 512
    documents: int = 2048  # a multiple of queries: then each query meets its own in one block

    def __post_init__(self) -> None:
        assert self.documents % self.queries == 0 and self.queries % _WORD == 0


ON_CPU: Final = Block()
ON_GPU: Final = Block(4096, 16_384)


def _ignore(count: int = 1, note: str = "") -> None:
    pass


def paired_ranks(  # noqa: PLR0913 (the last three say how, and change no result)
    queries: Rows,
    documents: Rows,
    keys: UInt64[np.ndarray, "docs"],
    *,
    owners: Int64[np.ndarray, "docs"] | None = None,
    device: torch.device | str = "cpu",
    block: Block | None = None,
    advance: Advance = _ignore,
) -> tuple[Int32[np.ndarray, "docs"], Float32[np.ndarray, "docs"]]:
    """The rank of each document for its query, and its score.

    Of document ``i`` and its query, ``rank_i = 1 + |{j : s_ij > s_ii}|``, over all ``j`` of another
    text (``keys``): a document is not beaten by its equals. Document ``i`` belongs to query ``i``,
    or to ``owners[i]`` (ascending); then documents of one query do not beat each other either.

    ``s_ii`` is taken from the product that gives the other scores. Computed by itself it differs
    in the last bits, and a document would beat itself in almost half of all rows. All products
    have one shape, the last ones filled up with zeros: kernels for odd shapes round otherwise.

    Raises:
        ModelError: when a vector is not finite; it would beat nothing, and be beaten by nothing.
    """
    block = block or (ON_GPU if torch.device(device).type == "cuda" else ON_CPU)
    counting = _Counting(queries, documents, block, _Equals.of(keys, owners), torch.device(device))
    for start in range(0, len(keys), block.documents):
        counting.meet_own(start)
    for start in range(0, len(keys), counting.panel):
        counting.meet_others(start)
        advance(min(counting.panel, len(keys) - start))
    return (counting.above + 1).numpy(), counting.scores.numpy()


@dataclass(frozen=True, slots=True)
class _Equals:
    """Which documents are of one text, or of one query; 8 bytes a document for each."""

    owners: Int64[np.ndarray, "docs"]
    texts: Int64[np.ndarray, "docs"]  # a number for each text that is there twice; -1: once
    queries: Int64[np.ndarray, "docs"]  # the same of queries
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


class _Counting:
    """How many documents beat each one so far."""

    def __init__(
        self,
        queries: Rows,
        documents: Rows,
        block: Block,
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
        """Take the scores of the documents from here on, and count those of the same block."""
        own = self._documents(start, self.block.documents)
        for first in range(start, min(start + len(own), len(self.above)), self.block.queries):
            columns = slice(start, start + len(own))
            product = self._multiply(self._queries(first), own, columns)
            rows = self._rows(first)
            diagonal = torch.arange(rows.stop - rows.start, device=self.device)
            found = product[diagonal, diagonal + (first - start)].cpu()
            if not found.isfinite().all():
                raise ModelError(
                    "a vector holds NaN or infinity; the model is broken, or it was run in a "
                    "precision too low for it"
                )
            self.scores[rows] = found
            self._count(rows, columns)

    def meet_others(self, start: int) -> None:
        """Count the documents of a panel, for the queries whose own ones are in other blocks."""
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
        """How many of the documents that score higher are of the same text or query."""
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
                left, right = np.where(left < 0, -2, left), right  # alone: equal to no other
                columns_of = torch.from_numpy(right).to(self.device)
                same |= torch.from_numpy(left).to(self.device)[:, None] == columns_of
        places = torch.from_numpy(here).to(self.device), torch.from_numpy(there).to(self.device)
        higher = self._higher[places[0]].index_select(1, places[1])
        found[places[0]] = (higher & same).sum(dim=1, dtype=torch.int32)
        return found

    def _rows(self, first: int) -> slice:
        return slice(first, min(first + self.block.queries, len(self.above)))

    def _queries(self, first: int) -> Float[Tensor, "queries dim"]:
        """A block of queries, one for each document."""
        owners = self.equals.owners[self._rows(first)]
        found = self.queries[int(owners[0]) : int(owners[-1]) + 1][owners - owners[0]]
        return self._filled(found, self.block.queries)

    def _documents(self, start: int, wanted: int) -> Float[Tensor, "docs dim"]:
        stop = min(start + wanted, len(self.above))
        width = self.block.documents
        return self._filled(self.documents[start:stop], -(-(stop - start) // width) * width)

    def _filled(self, rows: np.ndarray, count: int) -> Float[Tensor, "rows dim"]:
        """These vectors in float32, and zeros up to a number of rows."""
        found = np.zeros((count, rows.shape[1]), np.float32)
        found[: len(rows)] = rows
        return torch.from_numpy(found).to(self.device)


def _compare(
    scores: Float[Tensor, "queries docs"],
    own: Float[Tensor, "queries 1"],
    higher: Bool[Tensor, "queries docs"],
) -> None:
    """Mark the scores that are higher than a row's own."""
    if scores.device.type != "cpu" or torch.get_num_threads() > _MANY_THREADS:
        torch.gt(scores, own, out=higher)
    else:  # numpy takes less than half of torch's time
        np.greater(scores.numpy(), own.numpy(), out=higher.numpy())


def _true_of_each_row(marks: Bool[Tensor, "queries docs"]) -> Tensor:
    """How many are true in each row. Eight bytes are added as one number, up to 255 times."""
    words = marks.view(torch.int64)  # [queries, docs / 8]
    most = math.gcd(words.shape[1], 128)  # no byte of a sum overflows into the next one
    sums = words.view(len(words), -1, most).sum(dim=2)  # [queries, parts]
    return sums.view(torch.uint8).sum(dim=1, dtype=torch.int32)
