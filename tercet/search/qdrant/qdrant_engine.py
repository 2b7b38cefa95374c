"""The engine on both Qdrants, which keeps records as points in a store.

The store is a folder that Qdrant Edge writes inside this process
(:class:`tercet.search.qdrant.edge.EdgeStore`), or a collection on a server
(:class:`tercet.search.qdrant.server.ClusterStore`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable
from uuid import UUID

from tercet.errors import IndexFolderError
from tercet.kinds import KINDS, Kind
from tercet.search.engine.checks import Widths, widths_of
from tercet.search.engine.engine import Fusion, Hit, Record, Stats, Where
from tercet.search.qdrant.points import Facts, Point, facts_of, points_of, record_of, uuid_of
from tercet.search.qdrant.queries import PointQuery, ScoredPoint, batched, search
from tercet.vectors import Vectors

POINTS_AT_ONCE: Final = 1_000  # looked up, deleted or scanned by one call into the store

Payload: TypeAlias = Mapping[str, Any]


@runtime_checkable
class Store(Protocol):
    """A place where points are kept; a call names at most ``POINTS_AT_ONCE`` of them."""

    place: str  # its name in messages
    widths: Widths  # of its vectors; empty before ``create``

    def create(self, widths: Widths) -> None:
        """Make it for vectors of these kinds and widths."""

    def put(self, points: Sequence[Point]) -> None:
        """Add points, or replace those of the same numbers; any number of them."""

    def drop(self, ids: Sequence[UUID]) -> None:
        """Remove points, all of which are there."""

    def look_up(self, ids: Sequence[UUID], *, with_payload: bool) -> dict[UUID, Payload]:
        """Return the existing points, with their payloads if wanted."""
        ...

    def page(self, facts: Facts, start: Any, size: int) -> tuple[list[Payload], Any]:
        """Return at most ``size`` points that match a filter, and the start of the next page."""
        ...

    def ask(self, asks: Sequence[PointQuery]) -> list[list[ScoredPoint]]:
        """Return the points that each search finds."""
        ...

    def count(self) -> int:
        """Return the number of points."""
        ...

    def optimize(self) -> None:
        """Build what makes searches fast."""

    def flush(self) -> None:
        """Write everything to disk."""

    def usage(self) -> tuple[int, int]:
        """Return the bytes on the local disk, and the number of points not yet optimized."""
        ...

    def close(self) -> None:
        """Flush, and release it."""


class QdrantEngine:
    """Records in a store of points; see :class:`tercet.search.engine.engine.Engine`."""

    def __init__(self, store: Store) -> None:
        """Use an open store, which ``close`` closes."""
        self.store = store

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of vectors that it holds; empty before the first upsert."""
        return tuple(kind for kind in KINDS if kind in self.store.widths)

    def upsert(self, records: Sequence[Record], vectors: Vectors) -> None:
        """Add records, or replace those of the same ids; see :class:`Engine`."""
        points = points_of(records, vectors, self.store.widths)
        if not points:
            return
        if not self.store.widths:
            self.store.create(widths_of(vectors))
        self.store.put(points)

    def delete(self, ids: Sequence[str]) -> int:
        """Remove records and return how many of them existed."""
        gone = 0
        for some in self._numbers(ids):
            there = list(self.store.look_up(some, with_payload=False))
            if there:
                self.store.drop(there)
            gone += len(there)
        return gone

    def search(
        self, queries: Vectors, k: int, *, fusion: Fusion | None = None, where: Where | None = None
    ) -> list[list[Hit]]:
        """Return the best records of each query; dense candidates are approximate."""
        if not self.store.widths:
            return [[] for _ in range(len(queries))]
        return search(
            self.store.ask,
            queries,
            self.store.widths,
            records=self.store.count(),
            k=k,
            fusion=fusion,
            where=where,
            record_of=self._record,
        )

    def fetch(self, ids: Sequence[str]) -> list[Record | None]:
        """Return the records of these ids; None for an unknown id."""
        there: dict[UUID, Record] = {}
        for some in self._numbers(ids):
            found = self.store.look_up(some, with_payload=True)
            there.update((number, self._record(payload)) for number, payload in found.items())
        return [there.get(uuid_of(name)) for name in ids]

    def scan(self, where: Where | None = None) -> Iterator[Record]:
        """Yield all records, by the ids of their points."""
        facts, start = facts_of(where), None
        while self.store.widths:
            payloads, start = self.store.page(facts, start, POINTS_AT_ONCE)
            yield from map(self._record, payloads)
            if start is None:
                break

    def optimize(self) -> None:
        """Build what makes searches fast, and free the space of deleted points."""
        if self.store.widths:
            self.store.optimize()

    def flush(self) -> None:
        """Write everything to disk, so that a kill loses nothing."""
        self.store.flush()

    def stats(self) -> Stats:
        """Return what the engine holds."""
        records = self.store.count() if self.store.widths else 0
        used, pending = self.store.usage()
        return Stats(records, self.kinds, used, min(pending, records))

    def close(self) -> None:
        """Flush, and let another process open it."""
        self.store.close()

    def _numbers(self, ids: Sequence[str]) -> Iterator[Sequence[UUID]]:
        """Yield batches of the ids of their points, each once."""
        numbers = list(dict.fromkeys(map(uuid_of, ids))) if self.store.widths else []
        return batched(numbers, POINTS_AT_ONCE)

    def _record(self, payload: Payload) -> Record:
        try:
            return record_of(payload)
        except (KeyError, TypeError, ValueError) as error:
            raise IndexFolderError(
                f"{self.store.place}: a point holds no record of ours ({error!r}): something else "
                "wrote it, or it is damaged; build the index again with: tercet index --fresh"
            ) from error
