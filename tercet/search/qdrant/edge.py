"""Qdrant Edge: an approximate engine inside this process, for large indexes.

A query holds Python's global lock while it runs, and one process at a time opens a folder. New
points are scanned until ``optimize()`` has built a graph of the dense vectors. Qdrant's codes of 8,
4 or 1 bits find candidates, which the vectors on the disk score again: codes save memory and time,
not disk space. Token vectors have no graph and only rank candidates. They are stored in float16,
since this version silently scores ``Uint8`` wrong.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, cast
from uuid import UUID

from tercet.errors import IndexFolderError, MissingExtraError, StorageError
from tercet.files.artifacts import read_json, write_json
from tercet.files.atomic import (
    clear_about,
    recover_folder,
    replacing_folder,
    sole_writer,
)
from tercet.files.checksums import sealed, unsealed
from tercet.kinds import KINDS, Kind
from tercet.rank.coded import FACTOR
from tercet.rank.quantized import STORED, Stored
from tercet.search.engine.checks import Widths, require_same
from tercet.search.qdrant.points import Facts, Point, PointVector, TermRow, check_stored
from tercet.search.qdrant.qdrant_engine import Payload
from tercet.search.qdrant.queries import PointQuery, RequestMaker, ScoredPoint
from tercet.segments import batches_within

try:
    import qdrant_edge as edge
except ImportError as error:
    raise MissingExtraError("Qdrant Edge", "qdrant") from error

_BATCH_NUMBERS: Final = 2_000_000  # of vectors in one update: 8 MB
_POINTS, _SHARD, _PENDING = "points", "shard", "pending.json"
_WIDTHS, _STORED = "widths.json", "stored.json"
_NO_GRAPH: Final = 0  # edges a node


class EdgeStore:
    """Points in a folder, found by Qdrant Edge inside this process."""

    def __init__(
        self,
        folder: Path | str,
        *,
        threads: int | None = None,
        ef: int | None = None,
        stored: Stored | None = None,
    ) -> None:
        """Open a folder, or make a new one.

        ``ef`` is how many dense neighbours the graph search keeps in view: more is slower and
        misses fewer; None leaves it to the engine. ``stored`` selects the codes of dense vectors;
        None keeps those of the folder, or uses no codes.

        Raises:
            RecipeError: when another process has it open, or it has other codes.
            IndexFolderError: when the folder is damaged.
        """
        check_stored(stored)
        self._folder = Path(folder)
        self._stored: Stored = stored or "float32"
        self._threads = threads
        self._make = _request_maker(ef)
        self._opened: edge.EdgeShard | None = None  # None before ``create``
        self._closed = False
        self.place = str(folder)
        self.widths: Widths = {}
        self._held = ExitStack()
        self._held.enter_context(sole_writer(self._folder))
        try:
            self._open()
            if self._opened is not None:
                require_same(self._folder, "dense", self._stored, stored)
        except BaseException:
            if self._opened is not None:
                self._opened.close()
            self._held.close()
            raise

    @property
    def _shard(self) -> edge.EdgeShard:
        assert not self._closed, "an engine is not used after it is closed"
        assert self._opened is not None, "it has been created"
        return self._opened

    def _open(self) -> None:
        points = self._folder / _POINTS
        recover_folder(points)
        self._pending = _read_pending(self._folder / _PENDING)
        if not points.exists():
            return
        with self._reading():
            self.widths = _read_widths(points / _WIDTHS)
            self._stored = _read_stored(points / _STORED)
            self._opened = edge.EdgeShard.load(str(points / _SHARD))

    def create(self, widths: Widths) -> None:
        """Make an empty store for vectors of these kinds and widths; whole or not at all."""
        points = self._folder / _POINTS
        with replacing_folder(points) as fresh:
            shard = edge.EdgeShard.create(
                str(fresh / _SHARD), _config(widths, self._threads, self._stored)
            )
            shard.update(
                edge.UpdateOperation.create_field_index("facts", edge.PayloadSchemaType.Keyword)
            )
            shard.flush()
            shard.close()
            write_json(fresh / _WIDTHS, sealed({**widths}), indent=None)
            write_json(fresh / _STORED, sealed({"stored": self._stored}), indent=None)
        self._open()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn errors of writing into a StorageError."""
        try:
            with clear_about(self._folder):
                yield
        except BaseException as error:
            if not _is_from_edge(error):
                raise
            raise StorageError(self._folder, str(error)) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn errors of reading into an IndexFolderError."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise self._damaged(str(error)) from error
        except BaseException as error:
            if not _is_from_edge(error):
                raise
            raise self._damaged(str(error)) from error

    def _damaged(self, problem: str) -> IndexFolderError:
        return IndexFolderError(
            f"{self._folder}: Qdrant Edge cannot read it ({' '.join(problem.split())}); the index "
            "is damaged; build it again with: tercet index --fresh"
        )

    def put(self, points: Sequence[Point]) -> None:
        """Add points, or replace those of the same numbers."""
        shard = self._shard
        self._pending += len(points)
        with self._writing():
            for batch in batches_within(points, _BATCH_NUMBERS, lambda point: point.numbers):
                shard.update(edge.UpdateOperation.upsert_points([_point(p) for p in batch]))

    def drop(self, ids: Sequence[UUID]) -> None:
        """Remove points."""
        numbers: list[Any] = list(ids)
        with self._writing():
            self._shard.update(edge.UpdateOperation.delete_points(numbers))

    def look_up(self, ids: Sequence[UUID], *, with_payload: bool) -> dict[UUID, Payload]:
        """Return the existing points, with their payloads if wanted."""
        numbers: list[Any] = list(ids)
        with self._reading():
            found = self._shard.retrieve(numbers, with_payload=with_payload, with_vector=False)
        return {cast("UUID", point.id): point.payload or {} for point in found}

    def page(self, facts: Facts, start: Any, size: int) -> tuple[list[Payload], Any]:
        """Return at most ``size`` points that match a filter, and the start of the next page."""
        request = edge.ScrollRequest(
            offset=start,
            limit=size,
            filter=self._make.filter_of(facts),
            with_payload=True,
            with_vector=False,
        )
        with self._reading():
            points, following = self._shard.scroll(request)
        return [point.payload or {} for point in points], following

    def ask(self, asks: Sequence[PointQuery]) -> list[list[ScoredPoint]]:
        """Return the points that each search finds."""
        if not asks:
            return []
        requests = [self._make.request_of(ask) for ask in asks]
        with self._reading():
            answers = self._shard.query_batch(edge.QueryBatchRequest(requests))
        return [
            [
                ScoredPoint(cast("UUID", point.id), point.score, point.payload or {})
                for point in points
            ]
            for points in answers
        ]

    def count(self) -> int:
        """Return the number of points."""
        with self._reading():
            return self._shard.count(edge.CountRequest(exact=True))

    def optimize(self) -> None:
        """Build the graph of dense vectors, merge what is small, drop what was deleted."""
        with self._writing():
            self._shard.optimize()
        self._pending = 0
        self.flush()

    def flush(self) -> None:
        """Write everything to disk, so that a kill loses nothing."""
        if self._opened is None:
            return
        with self._writing():
            self._shard.flush()
        path = self._folder / _PENDING
        if self._pending != _read_pending(path):
            write_json(path, self._pending, indent=None)

    def usage(self) -> tuple[int, int]:
        """Return the bytes on the disk, and how many points wait to be optimized."""
        files = (path for path in self._folder.rglob("*") if path.is_file())
        used = sum(path.stat().st_blocks * 512 for path in files)  # its files have holes
        return used, self._pending

    def close(self) -> None:
        """Flush, and let another process open it."""
        if self._closed:
            return
        try:
            self.flush()
            if self._opened is not None:
                with self._writing():
                    self._opened.close()
        finally:
            self._closed = True
            self._held.close()


def _is_from_edge(error: BaseException) -> bool:
    """Return whether Qdrant Edge raised it: it raises plain exceptions, or panics."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _read_widths(path: Path) -> dict[Kind, int]:
    """Read the kinds of vectors with their widths; ValueError for other content."""
    found = unsealed(read_json(path))
    numbers = found.values() if isinstance(found, dict) and set(found) <= set(KINDS) else [None]
    if not found or not all(type(number) is int for number in numbers):
        raise ValueError(f"{path.name} has invalid content")
    return {kind: found[kind] for kind in KINDS if kind in found}


def _read_stored(path: Path) -> Stored:
    """Read how dense vectors are stored; older folders lack the file, and have no codes."""
    found = unsealed(read_json(path)) if path.exists() else "float32"
    found = found.get("stored") if isinstance(found, dict) else found  # older ones are a text
    if found not in STORED:
        raise ValueError(f"{path.name} has invalid content")
    return found


def _read_pending(path: Path) -> int:
    try:
        return int(read_json(path))
    except (OSError, ValueError, TypeError):  # never flushed, or damaged: nothing depends on it
        return 0


def _config(widths: Widths, threads: int | None, stored: Stored) -> Any:
    dense: dict[str, Any] = {}
    if "dense" in widths:
        dense["dense"] = edge.EdgeVectorParams(
            widths["dense"],
            edge.Distance.Dot,
            quantization_config=_quantization(stored),
            memory=None if stored == "float32" else edge.Memory.Cold,
        )
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


def _quantization(stored: Stored) -> Any:
    if stored == "int8":
        return edge.ScalarQuantizationConfig(edge.ScalarType.Int8, memory=edge.Memory.Cached)
    if stored == "int4":
        bits = edge.TurboQuantBitSize.Bits4
        return edge.TurboQuantQuantizationConfig(bits=bits, memory=edge.Memory.Cached)
    if stored == "binary":
        query = edge.BinaryQuantizationQueryEncoding.Scalar8Bits
        return edge.BinaryQuantizationConfig(query_encoding=query, memory=edge.Memory.Cached)
    return None


def _point(point: Point) -> Any:
    vectors = {kind: _vector(part) for kind, part in point.parts.items()}
    return edge.Point(point.id, vectors, point.payload)


def _vector(part: PointVector) -> Any:
    if isinstance(part, TermRow):
        ids, weights = cast("Any", part.ids), cast("Any", part.weights)  # it takes arrays as well
        return edge.SparseVector(ids, weights)
    return part


def _request_maker(ef: int | None) -> RequestMaker:
    rescoring = edge.QuantizationSearchParams(rescore=True, oversampling=float(FACTOR))
    return RequestMaker(
        request=partial(_with_prefetches, edge.QueryRequest),
        prefetch=partial(_with_prefetches, edge.Prefetch),
        nearest=lambda stage: {"query": edge.Query.Nearest(_vector(stage.query), using=stage.kind)},
        params=lambda stage: edge.SearchParams(
            exact=stage.exact, hnsw_ef=ef, quantization=rescoring
        ),
        rank_fusion=edge.Fusion.Rrf,
        weighted_sum=_weighted_sum,
        any_fact=lambda facts: edge.FieldCondition("facts", match=edge.MatchAny(facts)),
        any_id=lambda ids: edge.HasIdCondition(set(ids)),
        all_of=lambda conditions: edge.Filter(must=conditions),
    )


def _with_prefetches(made: Any, *, prefetch: Any = None, **parts: Any) -> Any:
    return made(prefetches=prefetch, **parts)


def _weighted_sum(weights: Mapping[str, float]) -> Any:
    terms = [
        edge.Expression.Mult([edge.Expression.Constant(weight), edge.Expression.Variable(name)])
        for name, weight in weights.items()
    ]
    return edge.Formula(edge.Expression.Sum(terms), defaults=dict.fromkeys(weights, 0.0))
