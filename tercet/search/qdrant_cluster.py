"""A collection of a Qdrant server or cluster, reached by its URL.

The data model is that of the embedded engine, so any Qdrant client reads what is here. The server
writes what it was given to its log before it answers: nothing is left to flush. It optimizes by
itself; ``optimize()`` waits until it has done so.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias
from uuid import UUID

from tercet.errors import IndexFolderError, MissingExtraError
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
from tercet.vectors import KINDS, Kind, Vectors

try:
    from qdrant_client import QdrantClient
    from qdrant_client import models as api
    from qdrant_client.http.exceptions import ApiException
except ImportError as error:
    raise MissingExtraError("a Qdrant server", "qdrant") from error

Params: TypeAlias = Callable[[Stage], api.SearchParams | None]
_BATCH_NUMBERS: Final = 500_000  # of vectors in one request: some 10 MB of JSON; a server takes 32
_PAGE: Final = 1_000  # records read together
_PAUSE_SECONDS: Final = 0.5  # between two looks at a server that optimizes


class ClusterEngine:
    """Records in a collection of a Qdrant server."""

    def __init__(
        self,
        server: str | QdrantClient,
        collection: str,
        *,
        api_key: str | None = None,
        timeout_seconds: int = 60,
        ef: int | None = None,
    ) -> None:
        """Look for the collection; if there is none, the first upsert makes one.

        ``server`` is a URL, or a client that stays open. ``ef`` is how many dense neighbours the
        graph search keeps in view; None is the server's own choice.

        Raises:
            IndexFolderError: when no server answers, or the collection is not one of ours.
        """
        self._ours = isinstance(server, str)
        self._name = collection
        self._where = f"{server if isinstance(server, str) else 'Qdrant'}, collection {collection}"
        self._timeout, self._ef = timeout_seconds, ef
        self._widths: Widths = {}
        if isinstance(server, str):
            with self._named():
                self._client = QdrantClient(
                    url=server,
                    api_key=api_key,
                    timeout=timeout_seconds,
                    check_compatibility=False,  # it would warn of a server that does not answer
                )
        else:
            self._client = server
        with self._named():
            if self._client.collection_exists(collection):
                self._widths = self._widths_there()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of vectors that it holds; none before the first upsert."""
        return tuple(self._widths)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the server and the remedy when it does not answer or refuses."""
        try:
            yield
        except (ApiException, OSError) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            raise IndexFolderError(
                f"{self._where}: the server does not answer, or refuses ({problem}); "
                "see that it runs, and that address and key are right"
            ) from error
        except ValueError as error:  # a URL that is none
            raise IndexFolderError(
                f"{self._where}: {error}; give an address such as http://localhost:6333"
            ) from error

    def _widths_there(self) -> Widths:
        """The kinds that the collection holds."""
        params = self._client.get_collection(self._name).config.params
        dense, sparse = params.vectors, params.sparse_vectors or {}
        named = dense if isinstance(dense, Mapping) else {"": dense} if dense else {}
        strange = (set(named) - {"dense", "multi"}) | (set(sparse) - {"sparse"})
        if strange or any(vector.distance != api.Distance.DOT for vector in named.values()):
            raise IndexFolderError(
                f"{self._where}: it is not one of ours, whose vectors are dense, sparse and multi, "
                "compared by dot product; choose another name"
            )
        sizes = {name: vector.size for name, vector in named.items()} | dict.fromkeys(sparse, 0)
        return {kind: sizes[kind] for kind in KINDS if kind in sizes}

    def upsert(self, records: Sequence[Record], vectors: Vectors) -> None:
        """Add records, or replace those of the same ids; an emptied collection takes any kinds."""
        if self._widths and widths_of(vectors) != self._widths and not self._count():
            with self._named():
                self._client.delete_collection(self._name)
            self._widths = {}
        points = points_of(records, vectors, self._widths)
        if not points:
            return
        with self._named():
            if not self._widths:
                self._create(widths_of(vectors))
            for batch in batches_of(points, _BATCH_NUMBERS):
                self._client.upsert(self._name, [_point(point) for point in batch], wait=True)

    def _create(self, widths: Widths) -> None:
        self._client.create_collection(self._name, **_config(widths))
        if not self._is_local:  # which scans anyway, and warns
            self._client.create_payload_index(self._name, "facts", api.PayloadSchemaType.KEYWORD)
        self._widths = widths

    def delete(self, ids: Sequence[str]) -> int:
        """Remove records; how many there were of these."""
        there = list(self._payloads(ids))
        if there:
            with self._named():
                selected = api.PointIdsList(points=[str(uuid) for uuid in there])
                self._client.delete(self._name, selected, wait=True)
        return len(there)

    def search(
        self, queries: Vectors, k: int, *, fusion: Fusion | None = None, where: Where | None = None
    ) -> list[list[Hit]]:
        """The best records of each query; dense candidates may miss some that are as near."""
        if not self._widths:
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
        while self._widths:
            with self._named():
                points, offset = self._client.scroll(
                    self._name,
                    scroll_filter=_filter(facts_of(where)),
                    limit=_PAGE,
                    offset=offset,
                    with_payload=True,
                )
            yield from (record_of(point.payload or {}) for point in points)
            if offset is None:
                break

    def optimize(self) -> None:
        """Wait until the server has built what it builds.

        Raises:
            IndexFolderError: when it has not done so in time.
        """
        end = time.monotonic() + self._timeout
        while self._widths:
            with self._named():
                status = self._client.get_collection(self._name).status
            if status != api.CollectionStatus.YELLOW:
                break
            if time.monotonic() > end:
                raise IndexFolderError(
                    f"{self._where}: not optimized after {self._timeout} seconds; it can be "
                    "searched meanwhile; wait longer with a larger timeout_seconds"
                )
            time.sleep(_PAUSE_SECONDS)

    def flush(self) -> None:
        """Nothing to do: the server answers when it has written."""

    def stats(self) -> Stats:
        """What is in it."""
        return Stats(self._count() if self._widths else 0, self.kinds, 0)

    def close(self) -> None:
        """Close the connection, unless the client is another's."""
        if self._ours:
            self._client.close()

    def _count(self) -> int:
        with self._named():
            return self._client.count(self._name, exact=True).count

    def _payloads(self, ids: Sequence[str]) -> dict[UUID, dict[str, Any]]:
        """The payloads of those that are there, by the numbers of their points."""
        wanted = list({str(uuid_of(name)) for name in ids})
        if not self._widths or not wanted:
            return {}
        with self._named():
            found = self._client.retrieve(self._name, wanted, with_payload=True)
        return {UUID(str(point.id)): point.payload or {} for point in found}

    @property
    def _is_local(self) -> bool:
        """Whether the client stands in for a server, inside this process."""
        said = self._client.init_options
        return said.get("location") == ":memory:" or bool(said.get("path"))

    def _params(self, stage: Stage) -> api.SearchParams | None:
        if self._is_local:  # it scans, and warns of parameters
            return None
        return api.SearchParams(exact=stage.exact, hnsw_ef=self._ef)

    def _ask(self, asks: Sequence[Ask]) -> list[list[Found]]:
        if not asks:
            return []
        requests = [_request(ask, self._params) for ask in asks]
        with self._named():
            answers = self._client.query_batch_points(self._name, requests)
        return [
            [
                Found(UUID(str(point.id)), point.score, point.payload or {})
                for point in answer.points
            ]
            for answer in answers
        ]


def _config(widths: Widths) -> dict[str, Any]:
    dense: dict[str, api.VectorParams] = {}
    if "dense" in widths:
        dense["dense"] = api.VectorParams(size=widths["dense"], distance=api.Distance.DOT)
    if "multi" in widths:
        dense["multi"] = api.VectorParams(
            size=widths["multi"],
            distance=api.Distance.DOT,
            datatype=api.Datatype.FLOAT16,
            multivector_config=api.MultiVectorConfig(comparator=api.MultiVectorComparator.MAX_SIM),
            hnsw_config=api.HnswConfigDiff(m=0),  # no graph: they rank candidates
        )
    sparse = {"sparse": api.SparseVectorParams()} if "sparse" in widths else None
    return {"vectors_config": dense, "sparse_vectors_config": sparse}


def _point(point: Point) -> api.PointStruct:
    vectors = {kind: _vector(part) for kind, part in point.parts.items()}
    return api.PointStruct(id=str(point.id), vector=vectors, payload=point.payload)


def _vector(part: Part) -> Any:
    if isinstance(part, TermRow):
        return api.SparseVector(indices=part.ids.tolist(), values=part.weights.tolist())
    return part.tolist()


def _request(ask: Ask, params: Params) -> api.QueryRequest:
    if ask.fuse is None:
        (stage,) = ask.stages
        return api.QueryRequest(
            query=api.NearestQuery(nearest=_vector(stage.query)),
            using=stage.kind,
            filter=_filter(ask.facts, ask.only),
            params=params(stage),
            limit=ask.limit,
            with_payload=ask.with_payload,
        )
    if isinstance(ask.fuse, Ranks):
        query = api.RrfQuery(rrf=api.Rrf(k=ask.fuse.k + 1))  # its ranks begin with 0
    else:
        query = _formula(ask.fuse.weights)
    return api.QueryRequest(
        query=query,
        prefetch=[_prefetch(stage, ask, params) for stage in ask.stages],
        limit=ask.limit,
        with_payload=ask.with_payload,
    )


def _prefetch(stage: Stage, ask: Ask, params: Params) -> api.Prefetch:
    """A stage; the filter stands where points are first found."""
    return api.Prefetch(
        query=api.NearestQuery(nearest=_vector(stage.query)),
        using=stage.kind,
        prefetch=[_prefetch(source, ask, params) for source in stage.among] or None,
        filter=None if stage.among else _filter(ask.facts, ask.only),
        params=params(stage),
        limit=stage.limit,
    )


def _formula(weights: Sequence[float]) -> api.FormulaQuery:
    names = [f"$score[{number}]" for number in range(len(weights))]
    terms: list[Any] = [
        api.MultExpression(mult=[weight, name]) for weight, name in zip(weights, names, strict=True)
    ]
    return api.FormulaQuery(
        formula=api.SumExpression(sum=terms), defaults=dict.fromkeys(names, 0.0)
    )


def _filter(
    facts: Sequence[Sequence[str]], only: frozenset[UUID] | None = None
) -> api.Filter | None:
    conditions: list[Any] = [
        api.FieldCondition(key="facts", match=api.MatchAny(any=list(group))) for group in facts
    ]
    if only is not None:
        conditions.append(api.HasIdCondition(has_id=[str(uuid) for uuid in only]))
    return api.Filter(must=conditions) if conditions else None
