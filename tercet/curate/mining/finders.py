"""Finders of documents for mining: by each kind of vectors, by their weighted sum, or by BM25.

A shelf holds the documents of pools as vectors, in files that are read block by block. Hybrid
rankings are those of ``tercet.rank.hybrid``.
"""

import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from tercet.curate.mining.document_pools import (
    SHARD,
    Pool,
    encode_pool,
    encode_prompted,
    encode_shard,
    shard_name,
)
from tercet.evaluate.measures.bm25 import K1, B, WordsOf, by_words
from tercet.files.arrays import VectorWriter, is_whole, read_vectors
from tercet.files.atomic import clear_about, replacing_folder
from tercet.files.checksums import seal
from tercet.files.progress import Advance
from tercet.kinds import Kind, Weights
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings
from tercet.rank.hybrid import VectorBlocks, hybrid_ranking
from tercet.rank.scoring import paired_scores
from tercet.rank.topk import Hits
from tercet.search.indexing import document_batches
from tercet.segments import offsets_of
from tercet.types import Role
from tercet.vectors import Terms, Vectors

_WORD: Final = np.dtype([("id", np.int32), ("times", np.int32)])
QUERIES: Final = 512  # that are compared with a block of documents
DOCS: Final = 1024  # of a block, or pairs that are scored together
QUERIES_OF_TOKENS: Final = 128  # where token vectors count, which are large
DOCS_OF_TOKENS: Final = 32


By: TypeAlias = Literal["dense", "sparse", "multi", "hybrid", "bm25"]
"""Which scores decide: those of one kind of vectors, a weighted sum of several, or BM25's."""

COSINES: Final = ("dense", "multi")
"""Scores that are cosines, or means of cosines. The default margin is for these, and they can be a
teacher's scores in a row. The scale of other scores depends on the model, or on the query."""


class PreparedDocuments(Protocol):
    """Documents of pools and queries, in a form of this object's choice."""

    @property
    def settings(self) -> Settings | None:
        """Settings with the prompts that are put before texts; None without prompts."""
        ...

    def fill(self, pool: Pool, advance: Advance) -> None:
        """Prepare the documents of a pool; all processes call this."""
        ...

    def prepare(self, pool: Pool, start: int) -> None:
        """Prepare the shard of a pool that begins at this row, for all who fill it later."""
        ...

    def queries(self, texts: Sequence[str], prompts: Sequence[str]) -> Any:
        """Return queries, each after its prompt."""
        ...

    def close(self) -> None:
        """Free what is held for this mining only."""
        ...


@runtime_checkable
class Finder(PreparedDocuments, Protocol):
    """Finds the documents of a pool near to queries."""

    def nearest(self, queries: Any, pool: Pool, k: int) -> Hits:
        """Return each query's ``k`` nearest documents, best first; -1 where there are no more."""
        ...

    def scores(
        self,
        queries: Any,
        owners: Int64[np.ndarray, "pairs"],
        pool: Pool,
        rows: Int64[np.ndarray, "pairs"],
    ) -> Float32[np.ndarray, "pairs"]:
        """Return the score of query ``owners[i]`` with document ``rows[i]``, for each ``i``."""
        ...


@runtime_checkable
class Shelf(PreparedDocuments, Protocol):
    """The documents of pools as vectors."""

    def read(self, pool: Pool, rows: Int[np.ndarray, "texts"], kinds: Sequence[Kind]) -> Vectors:
        """Return the vectors of these documents; the rows are ascending."""
        ...

    def queries(self, texts: Sequence[str], prompts: Sequence[str]) -> "Queries":
        """Return queries whose vectors can be read."""
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
        """Settings with the prompts that are put before texts."""
        return self.shelf.settings

    def fill(self, pool: Pool, advance: Advance) -> None:
        """Prepare the documents of a pool."""
        self.shelf.fill(pool, advance)

    def prepare(self, pool: Pool, start: int) -> None:
        """Prepare one shard of a pool, whose rows begin at ``start``."""
        self.shelf.prepare(pool, start)

    def queries(self, texts: Sequence[str], prompts: Sequence[str]) -> Queries:
        """Return queries, each after its prompt."""
        return self.shelf.queries(texts, prompts)

    def close(self) -> None:
        """Free what is held for this mining only."""
        self.shelf.close()

    def nearest(self, queries: Queries, pool: Pool, k: int) -> Hits:
        """Return the ``k`` nearest documents of each query, by blocks of queries and documents."""
        k = min(k, len(pool))
        scores = np.zeros((queries.count, k), np.float32)
        rows = np.full((queries.count, k), -1, np.int64)
        step = QUERIES_OF_TOKENS if "multi" in self.kinds else QUERIES
        docs = _PoolVectors(self.shelf, pool)
        for start in range(0, queries.count, step):
            some = np.arange(start, min(start + step, queries.count))
            found = hybrid_ranking(queries.read(pool, some), docs, self.weights, k)
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
        """Return the score of each pair."""
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

    A shard of texts is a folder for each kind. A text is read once for all missing kinds, and no
    shard of token vectors is held in memory.
    """

    teacher: Embedder
    folder: Path
    kinds: tuple[Kind, ...]

    @property
    def settings(self) -> Settings:
        """Settings of the teacher model."""
        return self.teacher.settings

    def fill(self, pool: Pool, advance: Advance) -> None:
        """Encode the documents of a pool; several processes, which all call this, share them."""
        encode_pool(pool, self._shard, advance)

    def prepare(self, pool: Pool, start: int) -> None:
        """Encode one shard of a pool, whose rows begin at ``start``."""
        encode_shard(pool, self._shard, start)

    def read(self, pool: Pool, rows: Int[np.ndarray, "texts"], kinds: Sequence[Kind]) -> Vectors:
        """Return the vectors of these documents; the rows are ascending."""
        return Vectors.join([_read(shard, some, kinds) for shard, some, _ in pool.in_shards(rows)])

    def queries(self, texts: Sequence[str], prompts: Sequence[str]) -> Queries:
        """Encode queries and keep them like documents."""
        shard = self._shard(texts, "query", prompts)
        return Queries(len(texts), lambda pool, rows: _read(shard, rows, self.kinds))

    def close(self) -> None:
        """Do nothing: what was encoded stays for the next mining."""

    def _shard(self, texts: Sequence[str], role: Role, prompts: Sequence[str]) -> Path:
        """Return the common start of the folders of these texts; encode those that are missing."""
        shard = self.folder / shard_name(self.teacher, texts, role, prompts)
        missing: list[Kind] = [
            kind for kind in self.kinds if not is_whole(_folder(shard, kind), len(texts), kind)
        ]
        if not missing:
            return shard
        with ExitStack() as folders, ExitStack() as files:
            fresh: dict[Kind, Path] = {
                kind: folders.enter_context(replacing_folder(_folder(shard, kind)))
                for kind in missing
            }
            writers: dict[Kind, VectorWriter] = {
                k: files.enter_context(VectorWriter.open(f)) for k, f in fresh.items()
            }
            done = 0
            for batch in document_batches(texts, len):
                some = prompts[done : done + len(batch)]
                encode = partial(self.teacher.encode_vectors, role=role, kinds=missing)
                vectors = encode_prompted(self.teacher, batch, role, some, encode)
                done += len(batch)
                with clear_about(shard):
                    for kind, writer in writers.items():
                        writer.add(vectors.only((kind,)))
            with clear_about(shard):
                files.close()
                for kind, folder in fresh.items():
                    seal(folder, _folder(shard, kind).name)
        return shard


def _docs_together(kinds: Sequence[Kind]) -> int:
    return DOCS_OF_TOKENS if "multi" in kinds else DOCS


def _folder(shard: Path, kind: Kind) -> Path:
    return shard.with_name(f"{shard.name}-{kind}")


def _read(shard: Path, rows: Int[np.ndarray, "texts"], kinds: Sequence[Kind]) -> Vectors:
    found = {kind: getattr(read_vectors(_folder(shard, kind), rows, kind), kind) for kind in kinds}
    return Vectors(**found)


@dataclass(slots=True, eq=False)
class CountedShelf:
    """Documents as weighted words, so that BM25 mines them like sparse vectors.

    The score of a document sums over the query's words, with repeats, Lucene's BM25

        idf(t) * f / (f + k1 * (1 - b + b * length / mean length))
        idf(t) = log(1 + (n - n_t + 0.5) / (n_t + 0.5))

    where word ``t`` occurs ``f`` times in the document, and in ``n_t`` of the ``n`` documents.
    Counts are kept in unnamed files until ``close``, 8 bytes for each word of a document; memory
    grows with the number of different words, and by 16 bytes a document.
    """

    folder: Path
    split: WordsOf = by_words
    _counts: dict[str, "_Counts"] = field(default_factory=dict)  # by the pool's prompt

    @property
    def settings(self) -> None:
        """None: prompts are not words of a text."""
        return None

    def fill(self, pool: Pool, advance: Advance) -> None:
        """Count the words of all documents of a pool."""
        with clear_about(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            counts = self._counts[pool.prompt] = _Counts(tempfile.TemporaryFile(dir=self.folder))
            weakref.finalize(counts, counts.file.close)  # as for the texts
            for start in range(0, len(pool), SHARD):
                rows = range(start, min(start + SHARD, len(pool)))
                for words in self.split(pool.texts.read(rows), "document"):
                    counts.add(words)
                advance(len(rows))

    def prepare(self, pool: Pool, start: int) -> None:
        """Do nothing: words are counted where they are needed, and not kept."""

    def read(self, pool: Pool, rows: Int[np.ndarray, "texts"], kinds: Sequence[Kind]) -> Vectors:
        """Return the weights of the words of these documents."""
        return Vectors(sparse=self._counts[pool.prompt].weights(rows))

    def queries(self, texts: Sequence[str], prompts: Sequence[str]) -> Queries:
        """Return queries as words, without those that no document of a pool has."""
        words = self.split(texts, "query")

        def read(pool: Pool, rows: np.ndarray) -> Vectors:
            counts = self._counts[pool.prompt]
            return Vectors(sparse=counts.asked([words[row] for row in rows.tolist()]))

        return Queries(len(texts), read)

    def close(self) -> None:
        """Free the disk space."""
        for counts in self._counts.values():
            counts.file.close()


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Counts:
    """Words of the documents of one pool."""

    file: IO[bytes]  # of _WORD, the documents' words end to end
    ids: dict[str, int] = field(default_factory=dict)
    documents: array = field(default_factory=lambda: array("q"))  # that have a word, by its id
    ends: array = field(default_factory=lambda: array("q", [0]))
    lengths: array = field(default_factory=lambda: array("q"))  # words of a document, repeated ones

    def add(self, words: Sequence[str]) -> None:
        """Append a document."""
        found = np.empty(len(times := Counter(words)), _WORD)
        for place, (word, count) in enumerate(times.items()):
            number = self.ids.setdefault(word, len(self.ids))
            if number == len(self.documents):
                self.documents.append(0)
            self.documents[number] += 1
            found[place] = number, count
        self.file.write(found.tobytes())
        self.ends.append(self.ends[-1] + len(found))
        self.lengths.append(len(words))

    def weights(self, rows: Int[np.ndarray, "texts"]) -> Terms:
        """Return the BM25 weights of the words of these documents."""
        self.file.flush()
        ends, lengths = np.frombuffer(self.ends, np.int64), np.frombuffer(self.lengths, np.int64)
        sizes = ends[rows + 1] - ends[rows]
        bounds = offsets_of(torch.from_numpy(sizes))
        if not int(bounds[-1]):
            return Terms(torch.zeros(0, dtype=torch.int64), torch.zeros(0), bounds)
        stored = np.memmap(self.file, _WORD, mode="r")
        words = np.concatenate([stored[ends[row] : ends[row + 1]] for row in rows.tolist()])
        having = np.frombuffer(self.documents, np.int64)[words["id"]].astype(np.float64)
        idf = np.log1p((len(lengths) - having + 0.5) / (having + 0.5))
        long = 1 - B + B * lengths[rows] / lengths.mean()
        times = words["times"].astype(np.float64)
        weights = idf * times / (times + K1 * np.repeat(long, sizes))
        ids = torch.from_numpy(words["id"].astype(np.int64))
        return Terms(ids, torch.from_numpy(weights.astype(np.float32)), bounds)

    def asked(self, texts: Sequence[Sequence[str]]) -> Terms:
        """Return the words of queries, each with its number of occurrences as weight."""
        known = [Counter(self.ids[word] for word in words if word in self.ids) for words in texts]
        return Terms(
            torch.tensor([number for times in known for number in times], dtype=torch.int64),
            torch.tensor([float(n) for times in known for n in times.values()]),
            offsets_of(torch.tensor([len(times) for times in known], dtype=torch.int64)),
        )
