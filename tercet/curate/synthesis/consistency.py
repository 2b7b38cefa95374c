"""Checking that a question finds the document that it was asked about, among others."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Literal

import numpy as np
from jaxtyping import Float32, Int64

from tercet.curate.mining.document_pools import SHARD, StoredVectors
from tercet.errors import RecipeError
from tercet.files.arrays import mapped_array
from tercet.files.progress import bar
from tercet.models.embedder import Embedder

WORK: Final = Path("runs/mining")  # shared with mining: file names depend on model and texts
_QUERIES: Final = 256  # scored at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class Consistency:
    """Settings of the check: a document must rank among the ``top`` for its question.

    Round-trip consistency (arXiv 2209.11755, sec. 3.2), among a shard of documents. A document
    scores as the nearest of its drawn passages, or as its whole text (cut at the model's limit).

    Raises:
        RecipeError: for numbers out of range.
    """

    embedder: Embedder
    top: int = 1
    among: int = 1000  # documents; documents without questions are added up to this number
    against: Literal["passages", "documents"] = "passages"
    work: Path = WORK  # folder of the vectors

    def __post_init__(self) -> None:
        if not 1 <= self.top < self.among:
            raise RecipeError(
                f"top must be at least 1 and below among; got top={self.top}, among={self.among}"
            )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document of the check: its texts, and the questions that should find it."""

    name: str
    texts: Sequence[str]  # one or more
    questions: Sequence[str] = ()


def ranks(
    candidates: Iterable[Candidate], check: Consistency, total: int | None = None
) -> Iterator[tuple[str, list[int]]]:
    """Yield each document's name and its rank, from 1, for each of its questions in its shard.

    The rank is one plus the number of documents with a higher score.
    """
    vectors = StoredVectors(check.embedder, check.work)
    waiting = iter(candidates)
    with bar("check", total) as advance:
        while shard := list(islice(waiting, SHARD)):
            yield from _ranks_in(shard, vectors)
            advance(len(shard))


def _ranks_in(
    shard: Sequence[Candidate], vectors: StoredVectors
) -> Iterator[tuple[str, list[int]]]:
    settings = vectors.teacher.settings
    texts = [text for candidate in shard for text in candidate.texts]
    starts = np.cumsum([0, *(len(candidate.texts) for candidate in shard[:-1])])
    questions = [question for candidate in shard for question in candidate.questions]
    owners = np.repeat(np.arange(len(shard)), [len(each.questions) for each in shard])
    found: list[int] = []
    if questions:
        prompts = [settings.prompt("document")] * len(texts)
        docs = mapped_array(vectors.shard(texts, "document", prompts))
        queries = vectors.queries(questions, [settings.prompt("query")] * len(questions))
        for start in range(0, len(questions), _QUERIES):
            part = slice(start, start + _QUERIES)
            found += _ranks_of_own(queries[part], docs, starts, owners[part]).tolist()
    places = iter(found)
    for candidate in shard:
        yield candidate.name, list(islice(places, len(candidate.questions)))


def _ranks_of_own(
    queries: Float32[np.ndarray, "queries dim"],
    docs: Float32[np.ndarray, "texts dim"],
    starts: Int64[np.ndarray, "docs"],
    owners: Int64[np.ndarray, "queries"],
) -> Int64[np.ndarray, "queries"]:
    """Return the rank of each query's own document; ``starts``: the first text of each document."""
    best = np.maximum.reduceat(queries @ docs.T, starts, axis=1)  # [queries, docs]
    own = best[np.arange(len(best)), owners]
    return 1 + (best > own[:, None]).sum(axis=1)
