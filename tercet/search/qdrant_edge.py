"""Qdrant Edge: an approximate engine inside this process, for more documents than are scanned.

A query holds Python's global lock while it runs, and one process at a time opens a folder: a server
keeps it in one process of its own. What was upserted is scanned until ``optimize()`` has built a
graph of the dense vectors. Token vectors have no graph: they rank candidates. They are stored in
float16, since in ``Uint8`` this version scores them wrong, without a word.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, cast
from uuid import UUID

from tercet.errors import IndexFolderError, MissingExtraError, StorageError
from tercet.files import clear_about, recover_folder, replacing_file, replacing_folder, sole_writer
from tercet.search.checks import Widths, widths_of
from tercet.search.engine import Fusion, Hit, Record, Stats, Where
from tercet.search.qdrant import (
    Part,
    Point,
    TermRow,
    batches_of,
    facts_of,
    points_of,
    record_of,
    uuid_of,
)
from tercet.search.qdrant_search import Ask, Found, Ranks, Stage, search
from tercet.vectors import Kind, Vectors

try:
    import qdrant_edge as edge
except ImportError as error:
    raise MissingExtraError("Qdrant Edge", "qdrant") from error

_BATCH_NUMBERS: Final = 2_000_000  # of vectors in one update: 8 MB
_PAGE: Final = 1_000  # records read together
_POINTS, _SHARD, _WIDTHS, _PENDING = "points", "shard", "widths.json", "pending.json"
_NO_GRAPH: Final = 0  # edges a node


class EdgeEngine:
    """Records in a folder, found by Qdrant Edge inside this process."""

    def __init__(
        self, folder: Path | str, *, threads: int | None = None, ef: int | None = None
    ) -> None:
        """Open a folder, or make a new one; the first upsert decides on kinds and widths.

        ``ef`` is how many dense neighbours the graph search keeps in view: more is slower and
        misses fewer. None is the engine's own choice.

        Raises:
            RecipeError: when another process has it open.
            IndexFolderError: when the folder is damaged.
        """
        self._folder = Path(folder)
        self._threads, self._ef = threads, ef
        self._opened: edge.EdgeShard | None = None  # none before the first upsert
        self._closed = False
        self._widths: dict[Kind, int] = {}
        self._held = ExitStack()
        self._held.enter_context(sole_writer(self._folder))
        try:
            self._open()
        except BaseException:
            self._held.close()
            raise

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of vectors that it holds; none before the first upsert."""
        return tuple(self._widths)

    @property
    def _shard(self) -> edge.EdgeShard | None:
        assert not self._closed, "an engine is not used after it is closed"
        return self._opened

    def _open(self) -> None:
        points = self._folder / _POINTS
        recover_folder(points)
        self._pending = _read_pending(self._folder / _PENDING)
        if not points.exists():
            return
        try:
            widths = json.loads((points / _WIDTHS).read_text(encoding="utf-8"))
            self._opened = edge.EdgeShard.load(str(points / _SHARD))
        except Exception as error:  # it raises nothing more particular
            raise IndexFolderError(
                f"{points}: Qdrant Edge cannot open it ({error}); "
                "delete the folder and build the index again"
            ) from error
        self._widths = widths

    def _create(self, widths: Widths) -> edge.EdgeShard:
        """An empty store for vectors of these kinds and widths; whole or not at all."""
        points = self._folder / _POINTS
        with replacing_folder(points) as fresh:
            shard = edge.EdgeShard.create(str(fresh / _SHARD), _config(widths, self._threads))
            shard.update(
                edge.UpdateOperation.create_field_index("facts", edge.PayloadSchemaType.Keyword)
            )
            shard.flush()
            shard.close()
            (fresh / _WIDTHS).write_text(json.dumps(widths), encoding="utf-8")
        self._open()
        assert self._opened is not None
        return self._opened

    def upsert(self, records: Sequence[Record], vectors: Vectors) -> None:
        """Add records, or replace those of the same ids."""
        points = points_of(records, vectors, self._widths)
        if not points:
            return
        shard = self._shard or self._create(widths_of(vectors))
        self._pending += len(points)
        with self._writing():
            for batch in batches_of(points, _BATCH_NUMBERS):
                shard.update(edge.UpdateOperation.upsert_points([_point(p) for p in batch]))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Name the folder when the disk refuses; the engine's errors are all of the plain kind."""
        try:
            with clear_about(self._folder):
                yield
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise StorageError(self._folder, str(error)) from error

    def delete(self, ids: Sequence[str]) -> int:
        """Remove records; how many there were of these."""
        there: list[Any] = list(self._payloads(ids))
        if there and self._shard is not None:
            with self._writing():
                self._shard.update(edge.UpdateOperation.delete_points(there))
        return len(there)

    def search(
        self, queries: Vectors, k: int, *, fusion: Fusion | None = None, where: Where | None = None
    ) -> list[list[Hit]]:
        """The best records of each query; dense candidates may miss some that are as near."""
        if self._shard is None:
            return [[] for _ in range(len(queries))]
        return search(
            self._ask,
            queries,
            self._widths,
            records=self._count(),
            k=k,
            fusion=fusion,
            where=where,
        )

    def fetch(self, ids: Sequence[str]) -> list[Record | None]:
        """The records of these ids; None for one that is not there."""
        payloads = self._payloads(ids)
        there = (payloads.get(uuid_of(name)) for name in ids)
        return [None if payload is None else record_of(payload) for payload in there]

    def scan(self, where: Where | None = None) -> Iterator[Record]:
        """All records, by the numbers of their points."""
        offset = None
        shard = self._shard
        while shard is not None:
            points, offset = shard.scroll(
                edge.ScrollRequest(
                    offset=offset,
                    limit=_PAGE,
                    filter=_filter(facts_of(where)),
                    with_payload=True,
                    with_vector=False,
                )
            )
            yield from (record_of(point.payload or {}) for point in points)
            if offset is None:
                break

    def optimize(self) -> None:
        """Build the graph of dense vectors, merge what is small, drop what was deleted."""
        if self._shard is None:
            return
        with self._writing():
            self._shard.optimize()
        self._pending = 0
        self.flush()

    def flush(self) -> None:
        """Put everything on the disk; after it a kill loses nothing."""
        if self._shard is None:
            return
        with self._writing():
            self._shard.flush()
        path = self._folder / _PENDING
        if self._pending != _read_pending(path):
            with replacing_file(path) as fresh:
                fresh.write_text(json.dumps(self._pending), encoding="utf-8")

    def stats(self) -> Stats:
        """What is in it."""
        files = (path for path in self._folder.rglob("*") if path.is_file())
        used = sum(path.stat().st_blocks * 512 for path in files)  # its files have holes
        records = self._count()
        return Stats(records, self.kinds, used, min(self._pending, records))

    def close(self) -> None:
        """Flush, and let another process open it."""
        if self._closed:
            return
        self.flush()
        if self._opened is not None:
            self._opened.close()
        self._closed = True
        self._held.close()

    def _count(self) -> int:
        return 0 if self._shard is None else self._shard.count(edge.CountRequest(exact=True))

    def _payloads(self, ids: Sequence[str]) -> dict[UUID, dict[str, Any]]:
        """The payloads of those that are there, by the numbers of their points."""
        wanted: list[Any] = list({uuid_of(name) for name in ids})
        if self._shard is None or not wanted:
            return {}
        found = self._shard.retrieve(wanted, with_payload=True, with_vector=False)
        return {_uuid(point): point.payload or {} for point in found}

    def _ask(self, asks: Sequence[Ask]) -> list[list[Found]]:
        if self._shard is None or not asks:
            return []
        requests = [_request(ask, self._ef) for ask in asks]
        return [
            [Found(_uuid(point), point.score, point.payload or {}) for point in points]
            for points in self._shard.query_batch(edge.QueryBatchRequest(requests))
        ]


def _uuid(point: Any) -> UUID:
    return point.id


def _read_pending(path: Path) -> int:
    try:
        return int(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # never flushed, or damaged: nothing hangs on it
        return 0


def _config(widths: Widths, threads: int | None) -> Any:
    dense: dict[str, Any] = {}
    if "dense" in widths:
        dense["dense"] = edge.EdgeVectorParams(widths["dense"], edge.Distance.Dot)
    if "multi" in widths:
        dense["multi"] = edge.EdgeVectorParams(
            widths["multi"],
            edge.Distance.Dot,
            multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim),
            datatype=edge.VectorStorageDatatype.Float16,
            hnsw_config=edge.HnswIndexConfig(_NO_GRAPH, 100, 10_000),
        )
    sparse = {"sparse": edge.EdgeSparseVectorParams()} if "sparse" in widths else None
    return edge.EdgeConfig(
        vectors=dense or None,
        sparse_vectors=sparse,
        optimizers=edge.EdgeOptimizersConfig(deleted_threshold=0.01, vacuum_min_vector_number=100),
        max_search_threads=threads,
    )


def _point(point: Point) -> Any:
    vectors = {kind: _vector(part) for kind, part in point.parts.items()}
    return edge.Point(point.id, vectors, point.payload)


def _vector(part: Part) -> Any:
    if isinstance(part, TermRow):
        ids, weights = cast("Any", part.ids), cast("Any", part.weights)  # it takes arrays as well
        return edge.SparseVector(ids, weights)
    return part


def _request(ask: Ask, ef: int | None) -> Any:
    if ask.fuse is None:
        (stage,) = ask.stages
        return edge.QueryRequest(
            ask.limit,
            query=_nearest(stage),
            filter=_filter(ask.facts, ask.only),
            params=_params(stage, ef),
            with_payload=ask.with_payload,
        )
    if isinstance(ask.fuse, Ranks):
        query: Any = edge.Fusion.Rrf(ask.fuse.k + 1)  # its ranks begin with 0
    else:
        query = _formula(ask.fuse.weights)
    return edge.QueryRequest(
        ask.limit,
        query=query,
        prefetches=[_prefetch(stage, ask, ef) for stage in ask.stages],
        with_payload=ask.with_payload,
    )


def _prefetch(stage: Stage, ask: Ask, ef: int | None) -> Any:
    """A stage; the filter stands where points are first found."""
    return edge.Prefetch(
        stage.limit,
        query=_nearest(stage),
        prefetches=[_prefetch(source, ask, ef) for source in stage.among] or None,
        filter=None if stage.among else _filter(ask.facts, ask.only),
        params=_params(stage, ef),
    )


def _nearest(stage: Stage) -> Any:
    return edge.Query.Nearest(_vector(stage.query), using=stage.kind)


def _params(stage: Stage, ef: int | None) -> Any:
    return edge.SearchParams(exact=stage.exact, hnsw_ef=ef)


def _formula(weights: Sequence[float]) -> Any:
    names = [f"$score[{number}]" for number in range(len(weights))]
    terms = [
        edge.Expression.Mult([edge.Expression.Constant(weight), edge.Expression.Variable(name)])
        for weight, name in zip(weights, names, strict=True)
    ]
    return edge.Formula(edge.Expression.Sum(terms), defaults=dict.fromkeys(names, 0.0))


def _filter(facts: Sequence[Sequence[str]], only: frozenset[UUID] | None = None) -> Any:
    conditions: list[Any] = [
        edge.FieldCondition("facts", match=edge.MatchAny(list(group))) for group in facts
    ]
    if only is not None:
        conditions.append(edge.HasIdCondition(set(only)))
    return edge.Filter(must=conditions) if conditions else None
