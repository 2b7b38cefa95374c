"""What happens around the handler of every endpoint: key, body, errors, time, metrics, log."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from tercet.errors import DataError, RecipeError, TercetError, TextError
from tercet.serve.metrics import Metrics
from tercet.serve.queue import Answer, Need
from tercet.serve.requests import Fields, RequestError
from tercet.serve.served import Models, Prepared, ServedModel

if TYPE_CHECKING:
    from tercet.serve.search.indexes import Indexes

LOCAL: Final = ("localhost", "127.0.0.1", "[::1]")
"""Names of this machine in addresses."""

_GONE: Final = 499  # in log and metrics: the client closed the connection
_PIECE: Final = 1 << 18  # bytes of an answer, which take a millisecond
_NUMBERS: Final = orjson.OPT_SERIALIZE_NUMPY

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may ask of the server.

    Attributes:
        body_bytes: of a request.
        texts: of a request.
        queue_tokens: that wait for a model.
        body_seconds: for the body of a request to arrive.
        seconds: for an answer.
    """

    body_bytes: int = 32 << 20
    texts: int = 2_048
    queue_tokens: int = 1_000_000
    body_seconds: float = 30.0
    seconds: float = 300.0


@dataclass(slots=True)
class Service:
    """All that handlers share."""

    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    key: str | None = None
    is_local: bool = False  # answers this machine only, and asks for no key
    access_log: Callable[[Mapping[str, Any]], None] | None = None
    models: Models | None = None  # None while they are loaded
    indexes: "Indexes | None" = None

    def note(
        self, method: str, path: str, status: int, seconds: float, more: Mapping[str, Any]
    ) -> None:
        """Count a request that was answered, and log it."""
        self.metrics.request(path, status, seconds)
        if self.access_log is not None:
            milliseconds = round(1000 * seconds, 2)
            known = {"method": method, "path": path, "status": status, "ms": milliseconds}
            self.access_log({**known, **more})

    def is_ready(self) -> bool:
        """Whether models and indexes are loaded."""
        return self.models is not None and self.indexes is not None


@dataclass(frozen=True, slots=True)
class Protocol:
    """How errors look to the clients of an API: their body, and their status where it differs."""

    error: Callable[[RequestError], Mapping[str, Any]]
    status: Callable[[RequestError], int] = lambda error: error.status


def plain_error(error: RequestError) -> Mapping[str, Any]:
    """Return the body of an error of our own endpoints."""
    found: dict[str, Any] = {"code": error.name, "message": str(error)}
    if error.field is not None:
        found["field"] = error.field
    return {"error": found}


PLAIN: Final = Protocol(plain_error)


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a handler."""

    service: Service
    request: Request
    body: Any = None  # parsed JSON; None without a body
    notes: dict[str, Any] = field(default_factory=dict)  # for the access log

    def fields(self, known: Collection[str] | None = None) -> Fields:
        """Return the fields of the body; with ``known`` others are refused."""
        return Fields(self.body, known)

    @property
    def limits(self) -> Limits:
        """The limits of the server."""
        return self.service.limits

    @property
    def models(self) -> Models:
        """The models, which are loaded when a handler runs."""
        assert self.service.models is not None, "handlers run when all is loaded"
        return self.service.models

    @property
    def indexes(self) -> "Indexes":
        """The indexes."""
        assert self.service.indexes is not None, "handlers run when all is loaded"
        return self.service.indexes

    async def read(self, model: ServedModel, prepared: Prepared, needs: Sequence[Need]) -> Answer:
        """Return what is needed of texts, and count it."""
        cut = sum(prepared.cut)
        self.notes.update(model=model.name, texts=len(prepared.tokens), tokens=prepared.total)
        if cut:
            self.notes["cut"] = cut
        answer = await model.read(prepared, needs)
        self.service.metrics.read(model.name, cut, answer.waited)
        return answer


Handler: TypeAlias = Callable[[Call], Awaitable[Response]]
Described: TypeAlias = Mapping[str, tuple[str, str]]
"""Fields of a body, each with its type, such as "string | [string]", and what it means."""


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer in JSON; arrays of numpy become lists."""
    try:
        content = orjson.dumps(value, option=_NUMBERS)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits, or half a character, in a document
        content = json.dumps(value, default=_plain).encode()
    return Response(content, status, headers, media_type="application/json")


def _plain(value: object) -> object:
    """Return the numbers of an array; others cannot be in an answer."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"an answer must be of values of JSON; got {type(value).__name__}")


async def rows_in_json(rows: Iterable[object]) -> orjson.Fragment:
    """Return a long list for an answer, made in pieces: others are served between them."""
    parts: list[bytes] = []
    size = 0
    for row in rows:
        parts.append(orjson.dumps(row, option=_NUMBERS))
        size += len(parts[-1])
        if size > _PIECE:
            size = 0
            await asyncio.sleep(0)
    return orjson.Fragment(b"[%b]" % b",".join(parts))


def route(  # noqa: PLR0913 (independent choices, each with a default)
    service: Service,
    path: str,
    handler: Handler,
    *,
    method: str = "POST",
    protocol: Protocol = PLAIN,
    fields: Described | None = None,
    is_open: bool = False,
) -> Route:
    """Return a route to a handler; an ``is_open`` one needs no key and runs while models load.

    ``fields`` of its body are for the description of the endpoint.
    """
    endpoint = Endpoint(
        path=path,
        method=method,
        handler=handler,
        service=service,
        protocol=protocol,
        fields=fields or {},
        is_open=is_open,
    )
    return Route(path, endpoint, methods=[method])


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An ASGI application around one handler."""

    path: str
    method: str
    handler: Handler
    service: Service
    protocol: Protocol
    fields: Described
    is_open: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began = time.perf_counter()
        call = Call(self.service, Request(scope, receive))
        status = _GONE
        try:
            response = await self._answer(call, receive)
            if response is not None:
                status = response.status_code
                await response(scope, receive, send)
        finally:
            seconds = time.perf_counter() - began
            self.service.note(scope["method"], self.path, status, seconds, call.notes)

    async def _answer(self, call: Call, receive: Receive) -> Response | None:
        """Return the handler's answer or an error in the protocol's form; None if nobody waits."""
        try:
            return await self._handled(call, receive)
        except RequestError as error:
            return self._refusal(error)
        except (RecipeError, DataError, TextError) as error:
            return self._refusal(RequestError(400, str(error)))
        except TercetError as error:
            log.error("%s: %s", self.path, error)
            return self._refusal(RequestError(500, str(error)))
        except Exception:  # a bug: it is logged, and the client is answered
            log.exception("%s failed", self.path)
            return self._refusal(RequestError(500, "an error of the server; see its log"))

    async def _handled(self, call: Call, receive: Receive) -> Response | None:
        service, request = self.service, call.request
        if service.is_local:
            _require_local(request)
        if not self.is_open:
            _require_key(request, service.key)
        body = None
        if request.method in ("POST", "PUT"):
            raw = await _body(request, receive, service.limits)
            if raw is None:
                return None
            body = _parsed(raw)
        if not self.is_open and not service.is_ready():
            raise RequestError(503, "models are being loaded; try again soon", retry_after=2)
        handled = self.handler(Call(service, request, body, call.notes))
        return await _while_connected(handled, receive, service.limits.seconds)

    def _refusal(self, error: RequestError) -> Response:
        headers = {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.protocol.error(error), self.protocol.status(error), headers)


def _require_local(request: Request) -> None:
    """Refuse a foreign name for this machine: a page of that name could read all answers.

    A page may be served under a name whose address is changed to 127.0.0.1 afterwards (DNS
    rebinding); its requests are of one origin for the browser, and carry that name.
    """
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if host[-1:].isdigit() and ":" in host else host
    if name not in LOCAL:
        raise RequestError(
            403,
            f"Host must be {', '.join(LOCAL)} while requests need no key; got {host!r}; start the "
            "server with --api-key-env",
        )


def _require_key(request: Request, key: str | None) -> None:
    """Compare the key of a request in constant time."""
    if key is None:
        return
    given = request.headers.get("authorization", "")
    scheme, _, token = given.partition(" ")
    if scheme.lower() != "bearer":
        token = request.headers.get("x-api-key", "")
    # Headers are read as Latin-1; clients send a key that is not ASCII as UTF-8.
    if not hmac.compare_digest(token.strip().encode("latin-1"), key.encode()):
        what = "is wrong" if token else "is missing"
        raise RequestError(401, f"the API key {what}; send it as: Authorization: Bearer KEY")


async def _body(request: Request, receive: Receive, limits: Limits) -> bytes | None:
    """Return the body of a request; None if the client left."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        got = f'; got "{kind}"' if kind else ""
        raise RequestError(415, f"Content-Type must be application/json{got}")
    most = limits.body_bytes
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise RequestError(413, f"a body must have at most {most:,} bytes; got {int(length):,}")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise RequestError(413, f"a body must have at most {most:,} bytes; got more")
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise RequestError(
            408, f"the body must arrive within {limits.body_seconds:g} seconds"
        ) from error


def _parsed(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise RequestError(400, f"the body must be JSON: {error}") from error


async def _while_connected(
    handled: Awaitable[Response], receive: Receive, seconds: float
) -> Response | None:
    """Return an answer; stop the work, and return None, if the client leaves before it is done."""
    work = asyncio.ensure_future(handled)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((work, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            return None
        raise RequestError(
            504, f"the answer took longer than {seconds:g} seconds; send fewer texts at once"
        )
    finally:
        for task in (work, gone):
            task.cancel()


async def _disconnected(receive: Receive) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()
