"""The interface of search engines.

Engines hold records with the vectors of their texts, and queries are vectors too: an engine needs
no model. ``tests/search/test_conformance.py`` tests what all engines must do.

Dense vectors find every record, terms those that share a token with the query, and token vectors
those that have any. A hit is found by at least one kind that counts; other kinds score it zero.
There are at least as many candidates as wanted hits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias, runtime_checkable

from tercet.errors import RecipeError
from tercet.kinds import Kind, Weights
from tercet.vectors import Vectors

Value: TypeAlias = str | int | float | bool
Where: TypeAlias = Mapping[str, Value | Sequence[Value]]
"""Fields and the value that they must have, or several of which they must have one."""

CANDIDATES: Final = 100  # of each kind, where a fusion asks for some


@dataclass(frozen=True, slots=True)
class Record:
    """A document with its text, title and fields."""

    id: str
    text: str
    title: str = ""
    fields: Mapping[str, Value | Sequence[Value]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hit:
    """A record that was found, with the sum that ranked it and the score by each kind."""

    record: Record
    score: float
    scores: Mapping[Kind, float] = field(default_factory=dict)  # unweighted; of kinds that counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """Rank by the weighted sum of the scores (arXiv 2402.03216, section 3.3).

    With ``candidates``, only that many best documents by dense and by sparse vectors are ranked,
    each with its true score by every kind. None ranks all documents, where the engine can; so does
    any number with token vectors only.
    """

    weights: Weights = field(default_factory=Weights)
    candidates: int | None = CANDIDATES


@dataclass(frozen=True, slots=True, kw_only=True)
class ReciprocalRank:
    """Rank by the sum of 1 / (k + rank) over the lists of each kind (Cormack et al. 2009)."""

    kinds: tuple[Kind, ...] = ("dense", "sparse")
    k: int = 60
    candidates: int = CANDIDATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerank:
    """Find candidates by dense vectors alone, then rank these by the weighted sum."""

    weights: Weights = field(default_factory=Weights)
    candidates: int = 2 * CANDIDATES


Fusion: TypeAlias = Weighted | ReciprocalRank | Rerank


@dataclass(frozen=True, slots=True)
class Stats:
    """What an engine holds."""

    records: int
    kinds: tuple[Kind, ...]
    disk_bytes: int  # 0 where the engine is elsewhere
    pending: int = 0  # records that optimize() would make faster to find


@runtime_checkable
class Engine(Protocol):
    """A store of records and their vectors, open for one process at a time.

    What ``flush`` has returned from survives a kill; what was upserted after it may be lost, whole
    records only. Every search sees what was upserted before it.
    """

    def upsert(self, records: Sequence[Record], vectors: Vectors) -> None:
        """Add records, or replace those of the same ids, with one row of vectors each.

        Raises:
            ModelError: when the vectors have other kinds or widths than the engine's, or NaN.
            DataError: when two of the records share an id, or counts differ.
        """

    def delete(self, ids: Sequence[str]) -> int:
        """Remove records and return how many of them existed."""
        ...

    def search(
        self, queries: Vectors, k: int, *, fusion: Fusion | None = None, where: Where | None = None
    ) -> list[list[Hit]]:
        """Return at most ``k`` best records of each query, best first.

        None fuses by the weights of :class:`Weighted`. Kinds that the engine or the queries lack
        do not count; a query without any terms is found by the other kinds.
        """
        ...

    def fetch(self, ids: Sequence[str]) -> list[Record | None]:
        """Return the records of these ids; None for an unknown id."""
        ...

    def scan(self, where: Where | None = None) -> Iterator[Record]:
        """Yield all records, in no particular order."""
        ...

    def optimize(self) -> None:
        """Build what makes searches fast, and free the disk space of deleted records."""

    def flush(self) -> None:
        """Write everything to disk, so that a kill loses nothing."""

    def stats(self) -> Stats:
        """Return what the engine holds."""
        ...

    def close(self) -> None:
        """Flush, and release it for other processes."""


def counted(fusion: Fusion, present: Sequence[Kind]) -> tuple[Kind, ...]:
    """Return the kinds that count in a fusion, of those that are present.

    Raises:
        RecipeError: when no kind counts.
    """
    if isinstance(fusion, ReciprocalRank):
        kinds: tuple[Kind, ...] = tuple(kind for kind in present if kind in fusion.kinds)
    else:
        kinds = tuple(kind for kind in present if fusion.weights.of(kind))
    if not kinds:
        raise RecipeError(
            f"nothing to rank by: there are {', '.join(present) or 'no'} vectors, and none of "
            "these counts; give one of them a weight"
        )
    return kinds
