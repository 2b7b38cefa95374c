"""Documents as weighted words, so that BM25 mines them like sparse vectors.

The score of a document is a sum over the query's words, each as often as the query has it, of

    idf(t) * f / (f + k1 * (1 - b + b * length / mean length))
    idf(t) = log(1 + (n - n_t + 0.5) / (n_t + 0.5))

with ``f`` the times that word ``t`` stands in the document, and ``n_t`` of the ``n`` documents have
it: Lucene's BM25, with the words and the constants of ``tercet.evaluate.measures.bm25``. Only
counts are kept, 8 bytes for each word of a document, in files without a name; memory grows with the
number of different words, not with that of documents (but for 16 bytes of each).
"""

import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

import numpy as np
import torch
from jaxtyping import Int

from tercet.curate.mining.document_pools import SHARD, Pool
from tercet.curate.mining.finders import Queries
from tercet.evaluate.measures.bm25 import K1, B, WordsOf, by_words
from tercet.files.atomic import clear_about
from tercet.files.progress import Advance
from tercet.kinds import Kind
from tercet.segments import offsets_of
from tercet.vectors import Terms, Vectors

_WORD: Final = np.dtype([("id", np.int32), ("times", np.int32)])


@dataclass(slots=True, eq=False)
class CountedShelf:
    """The words of documents and how often each has them; nothing is kept after ``close``."""

    folder: Path
    split: WordsOf = by_words
    _counts: dict[str, "_Counts"] = field(default_factory=dict)  # by the pool's prompt

    @property
    def settings(self) -> None:
        """Prompts are no words of a text."""
        return None

    def fill(self, pool: Pool, advance: Advance) -> None:
        """Count the words of all documents of a pool.

        Raises:
            StorageError: when the disk refuses.
        """
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
        """Words are counted where they are needed, and not kept for others."""

    def read(self, pool: Pool, rows: Int[np.ndarray, "texts"], kinds: Sequence[Kind]) -> Vectors:
        """The weights of the words of these documents."""
        return Vectors(sparse=self._counts[pool.prompt].weights(rows))

    def queries(self, texts: Sequence[str], prompts: Sequence[str]) -> Queries:
        """Queries as words; those that no document of a pool has are left out there."""
        words = self.split(texts, "query")

        def read(pool: Pool, rows: np.ndarray) -> Vectors:
            counts = self._counts[pool.prompt]
            return Vectors(sparse=counts.asked([words[row] for row in rows.tolist()]))

        return Queries(len(texts), read)

    def close(self) -> None:
        """Give the disk space back."""
        for counts in self._counts.values():
            counts.file.close()


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Counts:
    """The words of the documents of one pool."""

    file: IO[bytes]  # of _WORD, the documents' words end to end
    ids: dict[str, int] = field(default_factory=dict)
    documents: array = field(default_factory=lambda: array("q"))  # that have a word, by its id
    ends: array = field(default_factory=lambda: array("q", [0]))
    lengths: array = field(default_factory=lambda: array("q"))  # words of a document, repeated ones

    def add(self, words: Sequence[str]) -> None:
        """Put a document behind the others."""
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
        """BM25's weights of the words of these documents."""
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
        """The words of queries, each weighing as much as it is repeated."""
        known = [Counter(self.ids[word] for word in words if word in self.ids) for words in texts]
        return Terms(
            torch.tensor([number for times in known for number in times], dtype=torch.int64),
            torch.tensor([float(n) for times in known for n in times.values()]),
            offsets_of(torch.tensor([len(times) for times in known], dtype=torch.int64)),
        )
