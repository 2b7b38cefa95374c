"""The documents of files of examples, and which of them answer which queries."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt64

from tercet.curate.mining.document_pools import SHARD, Pool, TextStore
from tercet.data.files.sources import Source
from tercet.data.files.texts import text_key
from tercet.files.atomic import clear_about
from tercet.files.progress import Bars, bar
from tercet.segments import ragged_places, row_of
from tercet.types import Example


class RelevantDocuments:
    """The documents that answer each query in any row; 16 bytes per pair of keys."""

    def __init__(self) -> None:
        self._queries, self._documents = array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._queries)

    def add(self, query: int, document: int) -> None:
        """Add an answer; all of them before the first look-up."""
        self._queries.append(query)
        self._documents.append(document)

    def of(self, query: int) -> UInt64[np.ndarray, "known"]:
        """Return the keys of all texts that answer this query in some row."""
        queries, documents = self._by_query
        wanted = np.uint64(query)
        start = np.searchsorted(queries, wanted, side="left")
        return documents[start : np.searchsorted(queries, wanted, side="right")]

    def among(
        self, queries: UInt64[np.ndarray, "queries"]
    ) -> tuple[Int64[np.ndarray, "pairs"], UInt64[np.ndarray, "pairs"]]:
        """Return all answers of these queries, as places of queries and keys of texts."""
        known, documents = self._by_query
        starts = np.searchsorted(known, queries, side="left")
        ends = np.searchsorted(known, queries, side="right")
        places, offsets = ragged_places(torch.from_numpy(starts), torch.from_numpy(ends))
        return row_of(offsets).numpy(), documents[places.numpy()]

    @cached_property
    def _by_query(self) -> tuple[np.ndarray, np.ndarray]:
        queries = np.frombuffer(self._queries, np.uint64)
        documents = np.frombuffer(self._documents, np.uint64)
        order = np.argsort(queries, kind="stable")
        return queries[order], documents[order]


@dataclass(slots=True, eq=False)
class Collection:
    """All documents, by the prompt before them, and which of them answer which queries."""

    pools: dict[str, Pool] = field(default_factory=dict)
    relevant: RelevantDocuments = field(default_factory=RelevantDocuments)
    prompted_rows: int = 0  # rows with a prompt before the query or the documents

    def close(self) -> None:
        """Free the disk space of the texts."""
        for pool in self.pools.values():
            pool.texts.close()


def read_collection(
    sources: Sequence[Source],
    documents: Iterable[str],
    prompt_of: Callable[[Example], str],
    folder: Path,
    *,
    bars: Bars = bar,
) -> Collection:
    """Read the documents of all examples, and further ``documents``.

    A document is a candidate for the examples whose documents have the same prompt
    (``prompt_of``); a further document, for all examples.

    Raises:
        StorageError: if there is no room for the texts in ``folder``.
        DataError: if a source has changed since it was opened.
    """
    collection = Collection()
    with clear_about(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with clear_about(folder), bars("read", sum(map(len, sources))) as advance:
            for source in sources:
                for examples in blocks(source):
                    for example in examples:
                        _add(collection, example, prompt_of(example), folder)
                    advance(len(examples))
            for text in documents:
                for pool in collection.pools.values():
                    pool.add(text)
    except BaseException:
        collection.close()
        raise
    return collection


def blocks(source: Source) -> Iterator[list[Example]]:
    """Yield the examples of a source in blocks of ``SHARD`` rows."""
    for start in range(0, len(source), SHARD):
        yield source.examples(range(start, min(start + SHARD, len(source))))


def _add(collection: Collection, example: Example, prompt: str, folder: Path) -> None:
    pool = collection.pools.get(prompt)
    if pool is None:
        pool = collection.pools[prompt] = Pool(prompt, TextStore(folder))
    collection.prompted_rows += bool(example.query_prompt or example.document_prompt)
    query = text_key(example.query)
    for text in example.positives:
        pool.add(text)
        collection.relevant.add(query, text_key(text))
    for text in example.negatives:
        pool.add(text)
