"""A client of the server that ``tercet serve`` starts: vectors and search over HTTP.

Both classes ask the same: what is sent, and what the answers mean, are generators of
:class:`_Calls`, which yield requests and seconds to wait; a client only carries them out.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar
from urllib.parse import urlencode

import numpy as np
from jaxtyping import Float32

from tercet.errors import MissingExtraError, ServerError
from tercet.kinds import KINDS, Kind, Weights
from tercet.models.texts import checked_texts
from tercet.types import RoleName, Texts

if TYPE_CHECKING:
    from tercet.data.files.documents import Document
    from tercet.search.engine.engine import Hit, Record, Where
    from tercet.vectors import Vectors

Result = TypeVar("Result")
Steps: TypeAlias = Generator[Any, Any, Result]
"""Yields requests, and is sent their answers; or seconds to wait."""

_TEXTS: Final = 256  # of a request: the server makes batches of several requests
_CHARACTERS: Final = 4_000_000
_LATER: Final = (429, 503)  # statuses of requests that may succeed later
_LONGEST_WAIT: Final = 30.0  # seconds before such a request is sent again

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request to a server."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None


class _Calls:
    """What both clients ask, and what they make of the answers."""

    def __init__(self, retries: int) -> None:
        self._retries = retries
        self._cuts_reported: set[object] = set()

    def encode(self, texts: Texts, role: RoleName, options: Mapping[str, Any]) -> Steps[np.ndarray]:
        parts = yield from self._arrays(texts, role, {**options, "kinds": ["dense"]})
        return np.concatenate([part["dense"] for part in parts])

    def encode_vectors(
        self, texts: Texts, role: RoleName, options: Mapping[str, Any]
    ) -> Steps["Vectors"]:
        from tercet.vectors import Vectors  # which imports torch

        parts = yield from self._arrays(texts, role, options)
        return Vectors.join([_vectors(part) for part in parts])

    def _arrays(
        self, texts: Texts, role: RoleName, options: Mapping[str, Any]
    ) -> Steps[list[dict[str, np.ndarray]]]:
        from safetensors.numpy import load

        given = checked_texts(texts)
        named = None if role == "default" else role  # None: the model's name may say the role

        def request(some: list[str]) -> _Ask:
            body = {"texts": some, "role": named, **options, "format": "safetensors"}
            return _Ask("POST", "/v1/vectors", body)

        answers = yield from self._in_parts(given or ["a"], len, request)
        found = [load(answer.content) for answer in answers]
        if not given:  # of no text, vectors have the right widths too
            return [_of_nothing(found[0])]
        cut = sum(int(part["truncated"].sum()) for part in found)
        if cut and role not in self._cuts_reported:
            self._cuts_reported.add(role)
            log.warning("%d of %d %s texts were cut to the model's limit", cut, len(given), role)
        return found

    def search(
        self, queries: Texts, weights: Weights | Mapping[Kind, float] | None, rest: dict[str, Any]
    ) -> Steps[list[list["Hit"]]]:
        from tercet.search.engine.engine import Hit

        if isinstance(weights, Weights):
            weights = {kind: weights.of(kind) for kind in KINDS}

        def request(some: list[str]) -> _Ask:
            return _Ask("POST", "/v1/search", {"queries": some, "weights": weights, **rest})

        answers = yield from self._in_parts(checked_texts(queries, "query"), len, request)
        results = [result for answer in answers for result in answer.json()["results"]]
        return [
            [Hit(_record(hit), hit["score"], hit["scores"]) for hit in result["hits"]]
            for result in results
        ]

    def upsert(self, documents: Iterable["Document | Record"], index: str | None) -> Steps[int]:
        records = [
            {"id": each.id, "text": each.text, "title": each.title, "fields": dict(each.fields)}
            for each in documents
        ]

        def request(some: list[dict[str, Any]]) -> _Ask:
            return _Ask("POST", "/v1/documents", {"index": index, "documents": some})

        answers = yield from self._in_parts(records, lambda record: len(record["text"]), request)
        return sum(answer.json()["upserted"] for answer in answers)

    def delete(self, ids: Sequence[str], index: str | None) -> Steps[int]:
        def request(some: list[str]) -> _Ask:
            return _Ask("POST", "/v1/documents/delete", {"index": index, "ids": some})

        answers = yield from self._in_parts(checked_texts(ids, "id"), len, request)
        return sum(answer.json()["deleted"] for answer in answers)

    def fetch(self, ids: Sequence[str], index: str | None) -> Steps[list["Record | None"]]:
        found: list[Record | None] = []
        of_index = {} if index is None else {"index": index}
        for each in checked_texts(ids, "id"):
            path = f"/v1/documents?{urlencode({'id': each, **of_index})}"
            try:
                answer = yield from self._ask(_Ask("GET", path))
            except ServerError as error:
                if error.code != "no_document":
                    raise
                found.append(None)
            else:
                found.append(_record(answer.json()))
        return found

    def listed(self, path: str, key: str) -> Steps[list[dict[str, Any]]]:
        answer = yield from self._ask(_Ask("GET", path))
        return answer.json()[key]

    def _in_parts(
        self, items: list[Any], size: Callable[[Any], int], request: Callable[[list[Any]], _Ask]
    ) -> Steps[list[Any]]:
        """Ask about some items at a time, and about fewer where the server says they are many."""
        waiting = _parts(items, size)[::-1]
        answers = []
        while waiting:
            part = waiting.pop()
            try:
                answers.append((yield from self._ask(request(part))))
            except ServerError as error:
                if error.status != 413 or len(part) == 1:
                    raise
                half = len(part) // 2
                waiting += [part[half:], part[:half]]
        return answers

    def _ask(self, request: _Ask) -> Steps[Any]:
        """Return the answer to a request, which is sent again where that may help."""
        attempt = 0
        while (answer := (yield request)).status_code >= 400:
            error = _refusal(answer)
            if error.status not in _LATER or attempt == self._retries:
                raise error
            wait = 2**attempt if error.retry_after is None else error.retry_after
            yield float(min(wait, _LONGEST_WAIT))
            attempt += 1
        return answer


class Client:
    """A client of a server; any number of threads may use one.

    Methods have the names of :class:`Embedder` and of a search index, and return the same. Long
    lists are sent in parts. A request that the server refuses because too much waits there is sent
    again, at most ``retries`` times, after the time that the server says.

    Args:
        url: of the server, such as ``http://127.0.0.1:8080``.
        api_key: that the server asks for.
        timeout: seconds that an answer may take.
        retries: how often a request is sent again that may succeed later (status 429 or 503).

    Raises:
        ServerError: by each method, if the server refuses a request or cannot be reached.

    Examples:
        >>> with Client("http://127.0.0.1:8080") as client:
        ...     vectors = client.encode(["a small editor", "a web server"])
        ...     hits = client.search(["edit text in a terminal"], k=3)
    """

    def __init__(
        self, url: str, api_key: str | None = None, *, timeout: float = 300.0, retries: int = 5
    ) -> None:
        self._url, self._calls = url, _Calls(retries)
        self._http = _library().Client(**_options(url, api_key, timeout))

    def encode(
        self,
        texts: Texts,
        role: RoleName = "default",
        *,
        task: str | None = None,
        dims: int | None = None,
        model: str | None = None,
    ) -> Float32[np.ndarray, "texts dim"]:
        """Return dense vectors of texts, as :meth:`Embedder.encode` does.

        ``model`` is a name that the server knows; None takes its first model.
        """
        options = {"task": task, "dims": dims, "model": model}
        return self._run(self._calls.encode(texts, role, options))

    def encode_vectors(
        self,
        texts: Texts,
        role: RoleName = "default",
        *,
        kinds: Sequence[Kind] | None = None,
        task: str | None = None,
        dims: int | None = None,
        model: str | None = None,
    ) -> "Vectors":
        """Return vectors of several kinds, as :meth:`Embedder.encode_vectors` does.

        Token vectors come as float16, the others as float32.
        """
        options = {"kinds": _listed(kinds), "task": task, "dims": dims, "model": model}
        return self._run(self._calls.encode_vectors(texts, role, options))

    def search(  # noqa: PLR0913 (independent choices, each with a default)
        self,
        queries: Texts,
        k: int = 5,
        *,
        weights: Weights | Mapping[Kind, float] | None = None,
        where: "Where | None" = None,
        fusion: str | None = None,
        index: str | None = None,
        model: str | None = None,
    ) -> "list[list[Hit]]":
        """Return the ``k`` best documents of each query, best first.

        Args:
            queries: questions, none of them blank.
            k: number of hits for each query.
            weights: of the scores of each kind; None takes those of the model.
            where: conditions by field: a document has one of the values of each.
            fusion: how scores of several kinds are combined: "weighted", "rrf" or "rerank".
            index: name of an index; None takes the first.
            model: reads the queries: one that was distilled from the index's model. None takes the
                index's model.
        """
        rest = {"k": k, "where": where, "fusion": fusion, "index": index, "model": model}
        return self._run(self._calls.search(queries, weights, rest))

    def upsert(self, documents: "Iterable[Document | Record]", *, index: str | None = None) -> int:
        """Add documents, or replace those of the same ids; return how many are new or changed."""
        return self._run(self._calls.upsert(documents, index))

    def delete(self, ids: Sequence[str], *, index: str | None = None) -> int:
        """Remove documents and return how many of them existed."""
        return self._run(self._calls.delete(ids, index))

    def fetch(self, ids: Sequence[str], *, index: str | None = None) -> "list[Record | None]":
        """Return the documents of these ids; None for an unknown id."""
        return self._run(self._calls.fetch(ids, index))

    def models(self) -> list[dict[str, Any]]:
        """Return the server's names of models, with their kinds, widths and limits."""
        return self._run(self._calls.listed("/v1/models", "data"))

    def indexes(self) -> list[dict[str, Any]]:
        """Return the server's indexes."""
        return self._run(self._calls.listed("/v1/indexes", "indexes"))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, steps: Steps[Result]) -> Result:
        """Send the requests of a call, one after the other."""
        answer = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as done:
                return done.value
            if isinstance(step, float):
                answer = time.sleep(step)
                continue
            try:
                answer = self._http.request(step.method, step.path, json=step.body)
            except _library().TransportError as error:
                raise _unreachable(self._url, error) from error


class AsyncClient:
    """A client like :class:`Client`, with the same methods, to be awaited.

    Examples:
        >>> async with AsyncClient("http://127.0.0.1:8080") as client:
        ...     vectors = await client.encode(["a small editor"])
    """

    def __init__(
        self, url: str, api_key: str | None = None, *, timeout: float = 300.0, retries: int = 5
    ) -> None:
        self._url, self._calls = url, _Calls(retries)
        self._http = _library().AsyncClient(**_options(url, api_key, timeout))

    async def encode(
        self,
        texts: Texts,
        role: RoleName = "default",
        *,
        task: str | None = None,
        dims: int | None = None,
        model: str | None = None,
    ) -> Float32[np.ndarray, "texts dim"]:
        """Return dense vectors of texts; see :meth:`Client.encode`."""
        options = {"task": task, "dims": dims, "model": model}
        return await self._run(self._calls.encode(texts, role, options))

    async def encode_vectors(
        self,
        texts: Texts,
        role: RoleName = "default",
        *,
        kinds: Sequence[Kind] | None = None,
        task: str | None = None,
        dims: int | None = None,
        model: str | None = None,
    ) -> "Vectors":
        """Return vectors of several kinds; see :meth:`Client.encode_vectors`."""
        options = {"kinds": _listed(kinds), "task": task, "dims": dims, "model": model}
        return await self._run(self._calls.encode_vectors(texts, role, options))

    async def search(  # noqa: PLR0913 (independent choices, each with a default)
        self,
        queries: Texts,
        k: int = 5,
        *,
        weights: Weights | Mapping[Kind, float] | None = None,
        where: "Where | None" = None,
        fusion: str | None = None,
        index: str | None = None,
        model: str | None = None,
    ) -> "list[list[Hit]]":
        """Return the ``k`` best documents of each query; see :meth:`Client.search`."""
        rest = {"k": k, "where": where, "fusion": fusion, "index": index, "model": model}
        return await self._run(self._calls.search(queries, weights, rest))

    async def upsert(
        self, documents: "Iterable[Document | Record]", *, index: str | None = None
    ) -> int:
        """Add or replace documents; see :meth:`Client.upsert`."""
        return await self._run(self._calls.upsert(documents, index))

    async def delete(self, ids: Sequence[str], *, index: str | None = None) -> int:
        """Remove documents and return how many of them existed."""
        return await self._run(self._calls.delete(ids, index))

    async def fetch(self, ids: Sequence[str], *, index: str | None = None) -> "list[Record | None]":
        """Return the documents of these ids; None for an unknown id."""
        return await self._run(self._calls.fetch(ids, index))

    async def models(self) -> list[dict[str, Any]]:
        """Return the server's names of models; see :meth:`Client.models`."""
        return await self._run(self._calls.listed("/v1/models", "data"))

    async def indexes(self) -> list[dict[str, Any]]:
        """Return the server's indexes."""
        return await self._run(self._calls.listed("/v1/indexes", "indexes"))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, steps: Steps[Result]) -> Result:
        """Send the requests of a call, one after the other."""
        answer = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as done:
                return done.value
            if isinstance(step, float):
                answer = await asyncio.sleep(step)
                continue
            try:
                answer = await self._http.request(step.method, step.path, json=step.body)
            except _library().TransportError as error:
                raise _unreachable(self._url, error) from error


def _library() -> Any:
    """Return the HTTP library."""
    try:
        import httpx2
    except ImportError as error:
        raise MissingExtraError("tercet.Client", "client") from error
    return httpx2


def _options(url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"base_url": url, "headers": headers, "timeout": timeout}


def _unreachable(url: str, error: Exception) -> ServerError:
    what = str(error) or type(error).__name__
    return ServerError(f"{url}: no answer ({what}); is the server running there?")


def _refusal(answer: Any) -> ServerError:
    """Return the error that an answer is."""
    try:
        error = answer.json()["error"]
        message, code, field = error["message"], error["code"], error.get("field")
    except (ValueError, KeyError, TypeError, AttributeError):  # not of a tercet server
        message, code, field = answer.text[:200] or "the body is empty", None, None
    after = answer.headers.get("retry-after", "")
    return ServerError(
        message,
        status=answer.status_code,
        code=code,
        field=field,
        retry_after=int(after) if after.isdigit() else None,
    )


def _parts(items: list[Any], size: Callable[[Any], int]) -> list[list[Any]]:
    """Return runs of items that are few and short enough for a request."""
    found: list[list[Any]] = []
    room = 0
    for item in items:
        if not found or len(found[-1]) == _TEXTS or size(item) > room:
            found.append([])
            room = _CHARACTERS
        found[-1].append(item)
        room -= size(item)
    return found


def _listed(kinds: Sequence[Kind] | None) -> list[Kind] | None:
    return None if kinds is None else list(kinds)


def _vectors(arrays: Mapping[str, np.ndarray]) -> "Vectors":
    """Return vectors on the CPU in float32."""
    import torch

    from tercet.vectors import Terms, TokenRows, Vectors

    found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    sparse = multi = None
    if "sparse.ids" in found:
        ids = found["sparse.ids"].long()
        sparse = Terms(ids, found["sparse.weights"], found["sparse.offsets"])
    if "multi.vectors" in found:
        multi = TokenRows(found["multi.vectors"].float(), found["multi.offsets"])
    return Vectors(found.get("dense"), sparse, multi)


def _of_nothing(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the same arrays for no text."""
    return {name: array[: name.endswith(".offsets")] for name, array in arrays.items()}


def _record(found: Mapping[str, Any]) -> "Record":
    from tercet.search.engine.engine import Record

    return Record(found["id"], found["text"], found["title"], found["fields"])
