"""A collection of a Qdrant server or cluster, reached by its URL.

Points are those of the embedded engine, and any Qdrant client reads them. The server logs points
before it answers, so nothing is left to flush, and optimizes by itself; ``optimize()`` waits.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

from tercet.errors import IndexFolderError, MissingExtraError, RecipeError
from tercet.files.secrets import check_address, hide, redacted, redacted_bytes
from tercet.kinds import KINDS
from tercet.rank.coded import FACTOR
from tercet.rank.quantized import Stored
from tercet.search.engine.checks import Widths, require_same
from tercet.search.qdrant.points import Facts, Point, PointVector, TermRow, check_stored
from tercet.search.qdrant.qdrant_engine import Payload
from tercet.search.qdrant.queries import PointQuery, Prefetch, RequestMaker, ScoredPoint
from tercet.segments import batches_within

try:
    from qdrant_client import QdrantClient
    from qdrant_client import models as api
    from qdrant_client.http.exceptions import ApiException, UnexpectedResponse
except ImportError as error:
    raise MissingExtraError("a Qdrant server", "qdrant") from error

_BATCH_NUMBERS: Final = 500_000  # of vectors in one request: some 10 MB of JSON; a server takes 32
_MARK: Final = "tercet"  # where a collection says whose it is
_CODES_OF: Final[Mapping[Any, Stored]] = {
    api.ScalarQuantization: "int8",
    api.TurboQuantization: "int4",
    api.BinaryQuantization: "binary",
}
_PAUSE_SECONDS: Final = 0.5  # between two looks at a server that optimizes


class ClusterStore:
    """Points in a collection of a Qdrant server."""

    def __init__(  # noqa: PLR0913 (independent options with defaults)
        self,
        server: str | QdrantClient,
        collection: str,
        *,
        mark: str | None = None,
        api_key: str | None = None,
        timeout_seconds: int = 60,
        ef: int | None = None,
        stored: Stored | None = None,
    ) -> None:
        """Look for the collection; if missing, ``create`` makes one.

        ``server`` is a URL, or a client that stays open. A new collection carries the ``mark``;
        one without it is refused. ``ef`` is how many dense neighbours the graph search keeps in
        view; None leaves it to the server. ``stored`` selects the codes of dense vectors; None
        keeps those of the collection, or uses no codes.

        Raises:
            IndexFolderError: when no server answers, or the collection has other vectors or
                another mark.
            RecipeError: when it has other codes.
        """
        check_stored(stored)
        hide(api_key or "")
        if isinstance(server, str):
            check_address(server, "give the key as api_key, or in QDRANT_API_KEY")
        self._owns_client = isinstance(server, str)
        self._name, self._mark = collection, mark
        self.place = f"{server if isinstance(server, str) else 'Qdrant'}, collection {collection}"
        self._timeout, self._ef = timeout_seconds, ef
        self._stored: Stored = stored or "float32"
        self.widths: Widths = {}
        self._make = _request_maker(self._params)
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
        try:
            with self._named():
                if self._client.collection_exists(collection):
                    self.widths = self._widths_there()
                    self._check_mark()
                    require_same(self.place, "dense", self._stored_there(), stored)
        except (IndexFolderError, RecipeError):
            self.close()
            raise

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the server and the remedy when it does not answer or refuses."""
        try:
            yield
        except (ApiException, OSError) as error:
            if isinstance(error, UnexpectedResponse):  # before its message cuts a key in two
                error.content = redacted_bytes(error.content)
            problem = " ".join(redacted(str(error)).split()) or type(error).__name__
            raise IndexFolderError(
                f"{self.place}: the server does not answer, or refuses ({problem}); "
                "see that it runs, and that address and key are right"
            ) from None  # a traceback would show what the server said
        except ValueError as error:  # an invalid URL
            raise IndexFolderError(
                f"{self.place}: {redacted(str(error))}; give an address such as "
                "http://localhost:6333"
            ) from None

    def _widths_there(self) -> Widths:
        """Return the kinds of vectors in the collection, with their widths."""
        params = self._client.get_collection(self._name).config.params
        dense, sparse = params.vectors, params.sparse_vectors or {}
        named = dense if isinstance(dense, Mapping) else {"": dense} if dense else {}
        strange = (set(named) - {"dense", "multi"}) | (set(sparse) - {"sparse"})
        if strange or any(vector.distance != api.Distance.DOT for vector in named.values()):
            raise IndexFolderError(
                f"{self.place}: it is not one of ours, whose vectors are dense, sparse and multi, "
                "compared by dot product; choose another name"
            )
        sizes = {name: vector.size for name, vector in named.items()} | dict.fromkeys(sparse, 0)
        return {kind: sizes[kind] for kind in KINDS if kind in sizes}

    def _stored_there(self) -> Stored:
        """Return which codes its dense vectors have."""
        vectors = self._client.get_collection(self._name).config.params.vectors
        dense = vectors.get("dense") if isinstance(vectors, Mapping) else None
        there = None if dense is None else dense.quantization_config
        return _CODES_OF.get(type(there), "float32")

    def _mark_there(self) -> object:
        return (self._client.get_collection(self._name).config.metadata or {}).get(_MARK)

    def _check_mark(self) -> None:
        if self._mark is None or (found := self._mark_there()) == self._mark:
            return
        made = "no index of tercet" if found is None else "another index"
        raise IndexFolderError(
            f"{self.place}: {made} made this collection, and it is not changed; choose another "
            "name with --collection, or delete it on the server first"
        )

    def create(self, widths: Widths) -> None:
        """Make the collection."""
        about: dict[str, Any] | None = None if self._mark is None else {_MARK: self._mark}
        with self._named():
            try:
                config = _config(widths, self._stored)
                self._client.create_collection(self._name, **config, metadata=about)
            except UnexpectedResponse as error:
                if self._stored == "int4" and error.status_code in (400, 422):
                    raise RecipeError(
                        f"{self.place}: the server refuses codes of 4 bits, which it calls "
                        "TurboQuant; take a newer Qdrant, or int8 or binary"
                    ) from None
                raise
            if not self._is_local:  # which scans anyway, and warns
                self._client.create_payload_index(
                    self._name, "facts", api.PayloadSchemaType.KEYWORD
                )
            if self._mark is not None and self._mark_there() != self._mark:
                self._client.delete_collection(self._name)
                raise IndexFolderError(
                    f"{self.place}: the server does not keep what a collection says of itself, by "
                    "which identifies its index; use Qdrant 1.17 or newer"
                )
        self.widths = widths

    def clear(self) -> None:
        """Delete the collection, if there is one."""
        if self.widths:
            with self._named():
                self._client.delete_collection(self._name)
        self.widths = {}

    def put(self, points: Sequence[Point]) -> None:
        """Add points, or replace those of the same numbers."""
        with self._named():
            for batch in batches_within(points, _BATCH_NUMBERS, lambda point: point.numbers):
                self._client.upsert(self._name, [_point(point) for point in batch], wait=True)

    def drop(self, ids: Sequence[UUID]) -> None:
        """Remove points."""
        selected = api.PointIdsList(points=[str(uuid) for uuid in ids])
        with self._named():
            self._client.delete(self._name, selected, wait=True)

    def look_up(self, ids: Sequence[UUID], *, with_payload: bool) -> dict[UUID, Payload]:
        """Return the existing points, with their payloads if wanted."""
        numbers = [str(uuid) for uuid in ids]
        with self._named():
            found = self._client.retrieve(self._name, numbers, with_payload=with_payload)
        return {_number(point.id): point.payload or {} for point in found}

    def page(self, facts: Facts, start: Any, size: int) -> tuple[list[Payload], Any]:
        """Return at most ``size`` points that match a filter, and the start of the next page."""
        with self._named():
            points, following = self._client.scroll(
                self._name,
                scroll_filter=self._make.filter_of(facts),
                limit=size,
                offset=start,
                with_payload=True,
            )
        return [point.payload or {} for point in points], following

    def ask(self, asks: Sequence[PointQuery]) -> list[list[ScoredPoint]]:
        """Return the points that each search finds."""
        if not asks:
            return []
        requests = [self._make.request_of(ask) for ask in asks]
        with self._named():
            answers = self._client.query_batch_points(self._name, requests)
        return [
            [
                ScoredPoint(_number(point.id), point.score, point.payload or {})
                for point in answer.points
            ]
            for answer in answers
        ]

    def count(self) -> int:
        """Return the number of points."""
        with self._named():
            return self._client.count(self._name, exact=True).count

    def optimize(self) -> None:
        """Wait until the server has optimized the collection.

        Raises:
            IndexFolderError: when it has not done so in time.
        """
        end = time.monotonic() + self._timeout
        while True:
            with self._named():
                status = self._client.get_collection(self._name).status
            if status != api.CollectionStatus.YELLOW:
                break
            if time.monotonic() > end:
                raise IndexFolderError(
                    f"{self.place}: not optimized after {self._timeout} seconds; it can be "
                    "searched meanwhile; wait longer with a larger timeout_seconds"
                )
            time.sleep(_PAUSE_SECONDS)

    def flush(self) -> None:
        """Nothing to do: the server answers when it has written."""

    def usage(self) -> tuple[int, int]:
        """Return zeros: nothing is on this machine's disk."""
        return 0, 0

    def close(self) -> None:
        """Close the connection, unless the caller passed the client."""
        if self._owns_client:
            self._client.close()

    @property
    def _is_local(self) -> bool:
        """Whether the client stands in for a server, inside this process."""
        said = self._client.init_options
        return said.get("location") == ":memory:" or bool(said.get("path"))

    def _params(self, stage: Prefetch) -> api.SearchParams | None:
        if self._is_local:  # it scans, and warns of parameters
            return None
        rescoring = api.QuantizationSearchParams(rescore=True, oversampling=FACTOR)
        return api.SearchParams(exact=stage.exact, hnsw_ef=self._ef, quantization=rescoring)


def _number(identity: Any) -> UUID:
    """Return the id of a point; points of other programs may have plain integers."""
    return UUID(int=identity) if isinstance(identity, int) else UUID(str(identity))


def _config(widths: Widths, stored: Stored) -> dict[str, Any]:
    dense: dict[str, api.VectorParams] = {}
    if "dense" in widths:
        dense["dense"] = api.VectorParams(
            size=widths["dense"],
            distance=api.Distance.DOT,
            quantization_config=_quantization(stored),
            on_disk=None if stored == "float32" else True,
        )
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


def _quantization(stored: Stored) -> Any:
    """Codes in memory, beside vectors on the disk."""
    if stored == "int8":
        scalar = api.ScalarQuantizationConfig(type=api.ScalarType.INT8, always_ram=True)
        return api.ScalarQuantization(scalar=scalar)
    if stored == "int4":
        turbo = api.TurboQuantQuantizationConfig(bits=api.TurboQuantBitSize.BITS4, always_ram=True)
        return api.TurboQuantization(turbo=turbo)
    if stored == "binary":
        query = api.BinaryQuantizationQueryEncoding.SCALAR8BITS
        binary = api.BinaryQuantizationConfig(always_ram=True, query_encoding=query)
        return api.BinaryQuantization(binary=binary)
    return None


def _point(point: Point) -> api.PointStruct:
    vectors = {kind: _vector(part) for kind, part in point.parts.items()}
    return api.PointStruct(id=str(point.id), vector=vectors, payload=point.payload)


def _vector(part: PointVector) -> Any:
    if isinstance(part, TermRow):
        return api.SparseVector(indices=part.ids.tolist(), values=part.weights.tolist())
    return part.tolist()


def _request_maker(params: Callable[[Prefetch], api.SearchParams | None]) -> RequestMaker:
    return RequestMaker(
        request=api.QueryRequest,
        prefetch=api.Prefetch,
        nearest=lambda stage: {
            "query": api.NearestQuery(nearest=_vector(stage.query)),
            "using": stage.kind,
        },
        params=params,
        rank_fusion=lambda k: api.RrfQuery(rrf=api.Rrf(k=k)),
        weighted_sum=_weighted_sum,
        any_fact=lambda facts: api.FieldCondition(key="facts", match=api.MatchAny(any=facts)),
        any_id=lambda ids: api.HasIdCondition(has_id=[str(uuid) for uuid in ids]),
        all_of=lambda conditions: api.Filter(must=conditions),
    )


def _weighted_sum(weights: Mapping[str, float]) -> api.FormulaQuery:
    terms: list[Any] = [api.MultExpression(mult=[weight, name]) for name, weight in weights.items()]
    return api.FormulaQuery(
        formula=api.SumExpression(sum=terms), defaults=dict.fromkeys(weights, 0.0)
    )
