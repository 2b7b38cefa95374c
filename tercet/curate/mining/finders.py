"""Mining by sparse vectors, by token vectors, by the weighted sum of several kinds, or by words.

A shelf holds the documents of pools as vectors, in files that are read block by block. A hybrid
search takes the best documents by dense and by sparse vectors, gives each its true score by every
kind that counts, and ranks them by the weighted sum (arXiv 2402.03216, section 3.3): a document
that one list lacks does not score zero there.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from tercet.curate.mining import document_pools as mining_documents
from tercet.curate.mining.document_pools import (
    Pool,
    check_finite,
    encode_pool,
    encode_shard,
    prompted,
    shard_name,
)
from tercet.files.arrays import VectorWriter, is_whole, read_vectors
from tercet.files.atomic import clear_about, replacing_folder
from tercet.files.progress import Advance
from tercet.kinds import Kind, Weights
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings
from tercet.rank.hybrid import VectorBlocks, hybrid_ranking
from tercet.rank.scoring import paired_scores
from tercet.rank.topk import Hits
from tercet.search.indexing import document_batches
from tercet.types import Role
from tercet.vectors import Vectors

QUERIES: Final = 512  # that are compared with a block of documents
DOCS: Final = 1024  # of a block, or pairs that are scored together
QUERIES_OF_TOKENS: Final = 128  # where token vectors count, which are large
DOCS_OF_TOKENS: Final = 32

Texts: TypeAlias = Callable[[np.ndarray], Vectors]
"""Vectors of some texts by their rows, read when they are asked for."""


@runtime_checkable
class Shelf(Protocol):
    """The documents of pools as vectors."""

    @property
    def settings(self) -> Settings | None:
        """What says which prompts are put before texts; None where none are."""
        ...

    def fill(self, pool: Pool, advance: Advance) -> None:
        """Get the documents of a pool ready."""
        ...

    def prepare(self, pool: Pool, start: int) -> None:
        """Get the shard of a pool that begins at this row ready for all who fill it later."""
        ...

    def read(self, pool: Pool, rows: Int[np.ndarray, "texts"], kinds: Sequence[Kind]) -> Vectors:
        """The vectors of these documents; the rows rise."""
        ...

    def queries(self, texts: Sequence[str], prompts: Sequence[str]) -> "Queries":
        """Queries, ready to be read."""
        ...

    def close(self) -> None:
        """Give back what is held for this mining alone."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """Some queries, whose vectors are read in the course of a search of a pool."""

    count: int
    read: Callable[[Pool, np.ndarray], Vectors]


@dataclass(frozen=True, slots=True, eq=False)
class ByVectors:
    """Finds documents by the kinds of vectors that have a weight: by one of them, or by their sum.

    Candidates of a sum are the best by dense and by sparse vectors, where these count. By token
    vectors alone every document is compared, which is slow: the cost grows with the tokens of
    queries times those of documents.
    """

    shelf: Shelf
    weights: Weights
    kinds: tuple[Kind, ...]

    @property
    def settings(self) -> Settings | None:
        """What says which prompts are put before texts."""
        return self.shelf.settings

    def fill(self, pool: Pool, advance: Advance) -> None:
        """Get the documents of a pool ready."""
        self.shelf.fill(pool, advance)

    def prepare(self, pool: Pool, start: int) -> None:
        """Get one shard of a pool ready, whose rows are from ``start`` on."""
        self.shelf.prepare(pool, start)

    def queries(self, texts: Sequence[str], prompts: Sequence[str]) -> Queries:
        """Queries, each after its prompt."""
        return self.shelf.queries(texts, prompts)

    def close(self) -> None:
        """Give back what is held for this mining alone."""
        self.shelf.close()

    def nearest(self, queries: Queries, pool: Pool, k: int) -> Hits:
        """The nearest documents, each query with all of them, a block of both at a time."""
        k = min(k, len(pool))
        scores = np.zeros((queries.count, k), np.float32)
        rows = np.full((queries.count, k), -1, np.int64)
        step = QUERIES_OF_TOKENS if "multi" in self.kinds else QUERIES
        for start in range(0, queries.count, step):
            some = np.arange(start, min(start + step, queries.count))
            of_queries = queries.read(pool, some)
            docs = _PoolVectors(self.shelf, pool)
            found = hybrid_ranking(of_queries, docs, self.weights, k)
            width = found.rows.shape[1]
            sums = found.sums(self.weights)
            rows[some, :width] = found.rows.numpy()
            scores[some, :width] = sums.masked_fill(found.rows < 0, 0).float().numpy()
        return Hits(scores, rows)

    def scores(
        self,
        queries: Queries,
        owners: Int64[np.ndarray, "pairs"],
        pool: Pool,
        rows: Int64[np.ndarray, "pairs"],
    ) -> Float32[np.ndarray, "pairs"]:
        """The score of each pair."""
        found = np.empty(len(rows), np.float32)
        step = _docs_together(self.kinds)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            of_queries = queries.read(pool, owners[part])
            distinct, place = np.unique(rows[part], return_inverse=True)
            of_docs = self.shelf.read(pool, distinct, self.kinds).take(torch.from_numpy(place))
            total = torch.zeros(len(of_docs))
            for kind in self.kinds:
                total += self.weights.of(kind) * paired_scores(kind, of_queries, of_docs)
            found[part] = total.numpy()
        return found


@dataclass(frozen=True, slots=True)
class _PoolVectors:
    """The documents of a pool for a hybrid ranking; no block of vectors is kept."""

    shelf: Shelf
    pool: Pool

    def blocks(self, kinds: Sequence[Kind], rows: Tensor | None = None) -> VectorBlocks:
        """Yield the vectors of these kinds of these documents, or of all."""
        chosen = torch.arange(len(self.pool)) if rows is None else rows
        for part in chosen.split(_docs_together(kinds)):
            if len(part):
                yield part, self.shelf.read(self.pool, part.numpy(), kinds)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedShelf:
    """A teacher's vectors of several kinds, kept in a folder: the same texts are encoded once.

    A shard of texts is a folder for each kind, named as in
    ``tercet.curate.mining.document_pools``. A text is read once for all missing kinds, and no shard
    of token vectors is held in memory.
    """

    teacher: Embedder
    folder: Path
    kinds: tuple[Kind, ...]

    @property
    def settings(self) -> Settings:
        """The teacher's."""
        return self.teacher.settings

    def fill(self, pool: Pool, advance: Advance) -> None:
        """Encode the documents of a pool; of several processes, which all call this, each some.

        Raises:
            ModelError: when a vector is not finite.
            StorageError: when the disk refuses.
        """
        encode_pool(pool, self._shard, advance)

    def prepare(self, pool: Pool, start: int) -> None:
        """Encode one shard of a pool, whose rows are from ``start`` on."""
        encode_shard(pool, self._shard, start)

    def read(self, pool: Pool, rows: Int[np.ndarray, "texts"], kinds: Sequence[Kind]) -> Vectors:
        """The vectors of these documents; the rows rise."""
        shards = rows // mining_documents.SHARD
        parts = [
            _read(
                pool.shards[number], rows[shards == number] - number * mining_documents.SHARD, kinds
            )
            for number in np.unique(shards).tolist()
        ]
        return Vectors.join(parts)

    def queries(self, texts: Sequence[str], prompts: Sequence[str]) -> Queries:
        """Queries, encoded and kept like documents."""
        shard = self._shard(texts, "query", prompts)
        return Queries(len(texts), lambda pool, rows: _read(shard, rows, self.kinds))

    def close(self) -> None:
        """What was encoded stays for the next mining."""

    def _shard(self, texts: Sequence[str], role: Role, prompts: Sequence[str]) -> Path:
        """The name that the folders of these texts begin with; those that are missing are made."""
        shard = self.folder / shard_name(self.teacher, texts, role, prompts)
        missing: list[Kind] = [
            kind for kind in self.kinds if not is_whole(_folder(shard, kind), len(texts), kind)
        ]
        if not missing:
            return shard
        with ExitStack() as stack:
            writers: dict[Kind, VectorWriter] = {}
            for kind in missing:
                fresh = stack.enter_context(replacing_folder(_folder(shard, kind)))
                writers[kind] = stack.enter_context(VectorWriter.open(fresh))
            done = 0
            for batch in document_batches(texts, len):
                vectors = self._encode(batch, role, prompts[done : done + len(batch)], missing)
                done += len(batch)
                with clear_about(shard):
                    for kind, writer in writers.items():
                        writer.add(vectors.only((kind,)))
        return shard

    def _encode(
        self, texts: Sequence[str], role: Role, prompts: Sequence[str], kinds: Sequence[Kind]
    ) -> Vectors:
        rows_of: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(prompt, []).append(row)
        parts: list[Vectors] = []
        for prompt, rows in rows_of.items():
            with prompted(self.teacher, role, prompt):
                some = [texts[row] for row in rows]
                parts.append(self.teacher.encode_vectors(some, role, kinds=kinds))
        order = [row for rows in rows_of.values() for row in rows]
        vectors = Vectors.join(parts).take(torch.tensor(order).argsort())
        check_finite(vectors, texts)
        return vectors


def _docs_together(kinds: Sequence[Kind]) -> int:
    return DOCS_OF_TOKENS if "multi" in kinds else DOCS


def _folder(shard: Path, kind: Kind) -> Path:
    return shard.with_name(f"{shard.name}-{kind}")


def _read(shard: Path, rows: Int[np.ndarray, "texts"], kinds: Sequence[Kind]) -> Vectors:
    found = {kind: getattr(read_vectors(_folder(shard, kind), rows, kind), kind) for kind in kinds}
    return Vectors(**found)
