"""The documents that are mined: distinct texts on disk, and a teacher's vectors of them.

Memory never holds all texts or all vectors. A document costs about 120 bytes of memory.
"""

import os
import tempfile
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int64, UInt64

from tercet import distributed
from tercet.data.files.texts import text_key
from tercet.files.arrays import mapped_array
from tercet.files.artifacts import fingerprint
from tercet.files.atomic import replacing_file
from tercet.files.checksums import damage, note_damage, seal
from tercet.files.limits import ARRAY_ERRORS, unreadable
from tercet.files.progress import Advance
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings
from tercet.rank.topk import Hits, TopK, check_queries
from tercet.types import Role
from tercet.vectors import Vectors

SHARD: Final = 4096  # texts per file of vectors; a run that was killed loses at most one
_VERSION: Final = 1  # of the names of shards
_TOGETHER: Final = 1024  # queries that are compared with a shard of documents at the same time
_PAIRS: Final = 8192  # pairs of a query and a document that are scored at the same time


class TextStore:
    """Texts in an unnamed file, which ends with the process; 8 bytes of memory per text."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        weakref.finalize(self, self._file.close)  # workers of a job do not call close
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, text: str) -> None:
        """Append a text."""
        content = text.encode()
        self._file.write(content)
        self._ends.append(self._ends[-1] + len(content))

    def read(self, rows: Iterable[int]) -> list[str]:
        """Return the texts of these rows."""
        self._file.flush()
        number, ends = self._file.fileno(), self._ends
        return [os.pread(number, ends[row + 1] - ends[row], ends[row]).decode() for row in rows]

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()


@dataclass(eq=False)
class Pool:
    """Distinct documents with the same prompt. Of equal documents the first is kept."""

    prompt: str
    texts: TextStore
    rows: dict[int, int] = field(default_factory=dict)  # row by key of the text
    shards: list[Path] = field(default_factory=list)  # files with the vectors of SHARD rows each

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, text: str) -> None:
        """Add a document; blank and known ones are ignored."""
        if not text or text.isspace():
            return
        row = len(self.rows)
        if self.rows.setdefault(text_key(text), row) == row:
            self.texts.add(text)

    @cached_property
    def keys(self) -> UInt64[np.ndarray, "docs"]:
        """The keys of all documents, by row; valid after the last one is added."""
        return np.fromiter(self.rows, np.uint64, len(self.rows))

    def search(self, queries: Float32[np.ndarray, "queries dim"], k: int) -> Hits:
        """Return the ``k`` best documents of each query; each shard is read once."""
        k = min(k, len(self))
        if k < 1 or not len(queries):
            shape = (len(queries), max(k, 0))
            return Hits(np.zeros(shape, np.float32), np.zeros(shape, np.int64))
        check_queries(queries, mapped_array(self.shards[0]).shape[1])
        parts = torch.from_numpy(np.ascontiguousarray(queries)).split(_TOGETHER)
        best = [TopK(len(part), k) for part in parts]
        product = torch.empty(_TOGETHER * SHARD)
        for number, path in enumerate(self.shards):
            docs = torch.from_numpy(np.array(mapped_array(path)))
            for part, found in zip(parts, best, strict=True):
                # Torch's product is at least 10 % faster than numpy's. It is written into the same
                # memory: new 16 MB for each product would cost half as much again.
                scores = product[: len(part) * len(docs)].view(len(part), len(docs))
                torch.mm(part, docs.T, out=scores)
                found.add(scores.numpy(), number * SHARD)
        hits = [found.hits() for found in best]
        return Hits(*(np.concatenate(some) for some in zip(*hits, strict=True)))

    def in_shards(
        self, rows: Int[np.ndarray, "wanted"]
    ) -> Iterator[tuple[Path, Int[np.ndarray, "there"], Bool[np.ndarray, "wanted"]]]:
        """Yield each shard that has some of these rows, their rows in it, and which they are."""
        shards = rows // SHARD
        for number in np.unique(shards).tolist():
            here = shards == number
            yield self.shards[number], rows[here] - number * SHARD, here

    def vectors(self, rows: Int[np.ndarray, "wanted"]) -> Float32[np.ndarray, "wanted dim"]:
        """Return the vectors of these rows; each shard is opened at most once."""
        found = np.empty((len(rows), mapped_array(self.shards[0]).shape[1]), np.float32)
        for shard, some, here in self.in_shards(rows):
            found[here] = mapped_array(shard)[some]
        return found


@dataclass(frozen=True, slots=True, eq=False)
class StoredVectors:
    """A teacher's vectors, kept in a folder so that texts are encoded once.

    A shard is named by all that its vectors depend on, so those of a changed teacher or file are
    never read. They are float32: float16 would be converted again for each block of queries.
    """

    teacher: Embedder
    folder: Path

    def shard(self, texts: Sequence[str], role: Role, prompts: Sequence[str]) -> Path:
        """Return the file with the vectors of these texts, each after its prompt.

        Raises:
            ModelError: if a vector contains NaN or infinity.
            StorageError: if the disk refuses.
        """

        def encode(some: Sequence[str]) -> Vectors:
            return Vectors(torch.from_numpy(self.teacher.encode(some, role)))

        path = self.folder / f"{shard_name(self.teacher, texts, role, prompts)}.npy"
        if not _is_whole(path, (len(texts), self.teacher.dim)):
            with replacing_file(path) as fresh:
                vectors = encode_prompted(self.teacher, texts, role, prompts, encode)
                assert vectors.dense is not None
                with fresh.open("wb") as opened:
                    np.save(opened, vectors.dense.numpy())
            seal(path)
        return path

    def queries(
        self, texts: Sequence[str], prompts: Sequence[str]
    ) -> Float32[np.ndarray, "queries dim"]:
        """Return the vectors of queries."""
        return np.array(mapped_array(self.shard(texts, "query", prompts)))

    def fill(self, pool: Pool, advance: Advance) -> None:
        """Encode the documents of a pool; several processes, which all call this, share them."""
        encode_pool(pool, self.shard, advance)

    def prepare(self, pool: Pool, start: int) -> None:
        """Encode the shard of a pool that starts at this row."""
        encode_shard(pool, self.shard, start)

    @property
    def settings(self) -> Settings:
        """Settings of the teacher model."""
        return self.teacher.settings

    def nearest(self, queries: Float32[np.ndarray, "queries dim"], pool: Pool, k: int) -> Hits:
        """Return the ``k`` best documents of each query."""
        return pool.search(queries, k)

    def scores(
        self,
        queries: Float32[np.ndarray, "queries dim"],
        owners: Int64[np.ndarray, "pairs"],
        pool: Pool,
        rows: Int64[np.ndarray, "pairs"],
    ) -> Float32[np.ndarray, "pairs"]:
        """Return the score of query ``owners[i]`` with document ``rows[i]``, for each ``i``."""
        found = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _PAIRS):
            part = slice(start, start + _PAIRS)
            found[part] = (queries[owners[part]] * pool.vectors(rows[part])).sum(axis=1)
        return found

    def close(self) -> None:
        """Do nothing: vectors are kept for the next mining."""


def encode_pool(
    pool: Pool, shard: Callable[[Sequence[str], Role, Sequence[str]], Path], advance: Advance
) -> None:
    """Make the shards of a pool; several processes, which all call this, share the work."""
    starts = range(0, len(pool), SHARD)
    found: dict[int, Path] = {}
    own = starts[distributed.rank() :: distributed.world()]
    for part in (own, starts):
        for start in part:
            if start not in found:
                found[start] = encode_shard(pool, shard, start)
                advance(min(SHARD, len(pool) - start))
        distributed.barrier()  # after it, the shards of other processes are found
    pool.shards += [found[start] for start in starts]


def encode_shard(
    pool: Pool, shard: Callable[[Sequence[str], Role, Sequence[str]], Path], start: int
) -> Path:
    """Return the shard of the documents from ``start`` on; encode it if it is missing."""
    rows = range(start, min(start + SHARD, len(pool)))
    return shard(pool.texts.read(rows), "document", [pool.prompt] * len(rows))


def shard_name(teacher: Embedder, texts: Sequence[str], role: Role, prompts: Sequence[str]) -> str:
    """Return a fingerprint of all that a teacher's vectors of these texts depend on."""
    parts = [repr((_VERSION, teacher.fingerprint(), role, len(texts))).encode()]
    for text in (*prompts, *texts):
        content = text.encode()
        parts += [len(content).to_bytes(8, "little"), content]
    return fingerprint(b"".join(parts))


def encode_prompted(
    teacher: Embedder,
    texts: Sequence[str],
    role: Role,
    prompts: Sequence[str],
    encode: Callable[[Sequence[str]], Vectors],
) -> Vectors:
    """Return the teacher's vectors of texts, in order, each after its prompt.

    Raises:
        ModelError: for the first text whose vector contains NaN or infinity.
    """
    settings = teacher.settings
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        rows_of[prompt].append(row)
    parts: list[Vectors] = []
    try:
        for prompt, rows in rows_of.items():
            teacher.settings = replace(settings, prompts={**settings.prompts, role: prompt})
            parts.append(encode([texts[row] for row in rows]))
    finally:
        teacher.settings = settings
    order = [row for rows in rows_of.values() for row in rows]
    return Vectors.join(parts).take(np.argsort(order).tolist())


def _is_whole(path: Path, shape: tuple[int, int]) -> bool:
    if unreadable(path) or not path.exists():
        return False
    with suppress(*ARRAY_ERRORS):  # cut off by a copy
        if damage(path) is None:
            found: Any = np.load(path, mmap_mode="r", allow_pickle=False)
            if found.shape == shape and found.dtype == np.float32:
                return True
    note_damage(path)
    return False
