"""The server: its routes, how models are loaded while it listens, and how it stops."""

import asyncio
import logging
import socket
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from threading import Thread
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tercet.errors import RecipeError, TercetError
from tercet.files.signals import Listener, waiting
from tercet.models.embedder import Embedder
from tercet.search.opening import about_index, weights_of_index
from tercet.serve import cohere, openai, openapi, tei, vectors
from tercet.serve.connection import Connection
from tercet.serve.endpoint import LOCAL, Call, Limits, Service, json_response, plain_error, route
from tercet.serve.metrics import CONTENT_TYPE
from tercet.serve.names import name_of
from tercet.serve.requests import NAMES, RequestError
from tercet.serve.search import endpoints as search
from tercet.serve.search import page
from tercet.serve.search.indexes import open_indexes
from tercet.serve.served import Models, ServedModel

_ENDS_WITHIN: Final = 30  # seconds that requests have to be answered when the server stops
_KEEPS_ALIVE: Final = 75  # seconds that an idle connection stays open
_BACKLOG: Final = 2_048

log = logging.getLogger("tercet")

Load = Callable[[str, str], Embedder]  # a model's source and the type of its weights


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Options of :func:`serve`.

    Attributes:
        models: names and sources of models.
        indexes: names and folders of indexes, whose models are offered too.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        key: that requests must carry; None: no key.
        origins: that pages of other sites may have to send requests (CORS).
        limits: of requests.
        precision: returns the type of weights of one of the ``models``, given its source and the
            type that an index of it was made with, or None.
        load: loads a model by its source and the type of its weights.
        access_log: is given a line about each request.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    indexes: Mapping[str, Path] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    origins: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    precision: Callable[[str, str | None], str] = lambda source, of_index: of_index or "float32"
    load: Load
    access_log: Callable[[Mapping[str, Any]], None] | None = None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOCAL or self.host == "::1"


def serve(options: ServeOptions, say: Callable[[str], None] = lambda line: None) -> None:
    """Answer requests until a signal comes; those that have begun are answered before it ends.

    Args:
        options: see :class:`ServeOptions`.
        say: receives lines about the state of the server.

    Raises:
        RecipeError: if the address is in use.
        ModelError: if a model cannot be loaded.
        IndexFolderError: if an index cannot be opened.
    """
    with closing(_listening_socket(options.host, options.port)) as listener:
        port = listener.getsockname()[1]
        shown = f"[{options.host}]" if ":" in options.host else options.host
        say(f"loading {', '.join([*options.models, *options.indexes])}")
        server = _Server(options, f"http://{shown}:{port}", say)
        server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure
    say(
        f"stopped; requests that needed more than {_ENDS_WITHIN} seconds were dropped"
        if server.dropped
        else "stopped; all requests were answered"
    )


def _listening_socket(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(_BACKLOG)
        except OSError:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        problem = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"cannot listen on {host}, port {port} ({problem}); choose others: --host, --port"
        ) from error
    return found


class _Server(uvicorn.Server):
    """A uvicorn server that loads what it offers while it listens already."""

    def __init__(self, options: ServeOptions, address: str, say: Callable[[str], None]) -> None:
        self.failure: Exception | None = None
        self.dropped = False  # whether a request was not answered when the server stopped
        self._options, self._address, self._say = options, address, say
        self._service = Service(
            limits=options.limits,
            key=options.key,
            is_local=options.key is None and options.is_local,
            access_log=options.access_log,
        )
        self._signals: Listener | None = None
        app = application(self._service, origins=options.origins, lifespan=self._lifespan)
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_keep_alive=_KEEPS_ALIVE,
                timeout_graceful_shutdown=_ENDS_WITHIN,
                ws="none",
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Note the first signal, which ``on_tick`` looks for."""
        with waiting() as self._signals:
            yield

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server should end."""
        signalled = self._signals is not None and self._signals.number != 0
        return await super().on_tick(counter) or signalled

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what has begun, and note whether there was time for all of it."""
        began = time.monotonic()
        await super().shutdown(sockets)
        self.dropped = time.monotonic() - began >= _ENDS_WITHIN

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        Thread(target=self._load, name="load", daemon=True).start()
        yield
        await asyncio.to_thread(close, self._service)

    def _load(self) -> None:
        """Load everything, in a thread that does not hold up the end of the process."""
        began = time.monotonic()
        try:
            load(self._service, self._options)
        except Exception as error:  # noqa: BLE001 (is raised where the server was started)
            self.failure, self.should_exit = error, True
            return
        models = ", ".join(self._service.models.by_name if self._service.models else ())
        self._say(f"ready after {time.monotonic() - began:.1f} s: {models} at {self._address}")


def load(service: Service, options: ServeOptions) -> None:
    """Load all models, each once though it may have several names, and open all indexes.

    An index takes a model that is loaded already if their fingerprints are equal, wherever
    that was when the index was made.

    Raises:
        ModelError: if a model cannot be loaded.
        IndexFolderError: if an index cannot be opened.
    """
    by_name: dict[str, ServedModel] = {}
    by_place: dict[str, ServedModel] = {}

    def loaded(name: str, source: str, precision: str) -> ServedModel:
        return ServedModel(
            name,
            options.load(source, precision),
            most=options.limits.queue_tokens,
            on_batch=service.metrics.of_model(name),
        )

    def of_index(source: str, precision: str, fingerprint: str) -> ServedModel:
        for model in by_name.values():
            if model.embedder.fingerprint() == fingerprint:
                return model
        name = _free_name(name_of(source), by_name)
        by_name[name] = loaded(name, source, precision)
        return by_name[name]

    of_indexes = _types_of_indexes(options.indexes.values())
    kinds = {*of_indexes.values()}
    usual = kinds.pop() if len(kinds) == 1 else None  # a model may have moved since
    for name, source in options.models.items():
        place = _place(source)
        if place not in by_place:
            kind = options.precision(source, of_indexes.get(place, usual))
            by_place[place] = loaded(name, source, kind)
        by_name[name] = by_place[place]
    indexes = open_indexes(options.indexes, of_index)
    models = Models(by_name)
    for model in models:
        service.metrics.watch_queue(model.name, lambda queue=model.queue: queue.tokens)
    service.models, service.indexes = models, indexes


def _place(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def _types_of_indexes(folders: Iterable[Path]) -> dict[str, str]:
    """Return the type of weights that indexes need of a model, so that one serves both."""
    found: dict[str, str] = {}
    for folder in folders:
        with suppress(TercetError):  # opened, and refused, later
            model, kind = about_index(folder).settings.get("model"), weights_of_index(folder)
            if isinstance(model, str) and kind is not None:
                found[_place(model)] = kind
    return found


def _free_name(name: str, taken: Container[str]) -> str:
    """Return a name that no other model has."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(each for each in names if each not in taken)


def close(service: Service) -> None:
    """Answer what waits, and close models and indexes."""
    for model in service.models or ():
        model.close()
    if service.indexes is not None:
        service.indexes.close()


def application(
    service: Service, *, origins: Sequence[str] = (), lifespan: Any = None
) -> Starlette:
    """Return the application of a service, whose models may be loaded later."""
    routes = [
        *_state_routes(service),
        *vectors.routes(service),
        *openai.routes(service),
        *cohere.routes(service),
        *search.routes(service),
        *page.routes(service),
        *tei.routes(service),
    ]
    routes += openapi.routes(service, routes)
    cross = Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["authorization", "content-type", "x-api-key"],
    )
    return Starlette(
        routes=routes,
        middleware=[cross] if origins else [],
        exception_handlers={HTTPException: _unknown(service)},
        lifespan=lifespan,
    )


def _state_routes(service: Service) -> list[Route]:
    """Return the routes that say how the server is."""

    async def live(call: Call) -> Response:
        """Say that the process answers."""
        return json_response({"status": "ok"})

    async def ready(call: Call) -> Response:
        """Say whether models and indexes are loaded, with status 200 or 503."""
        if not service.is_ready():
            raise RequestError(503, "models are being loaded; try again soon", retry_after=2)
        return json_response({"status": "ok"})

    async def metrics(call: Call) -> Response:
        """Return counters in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return [
        route(service, "/health/live", live, method="GET", is_open=True),
        route(service, "/health/ready", ready, method="GET", is_open=True),
        route(service, "/health", ready, method="GET", is_open=True),
        route(service, "/metrics", metrics, method="GET"),
    ]


def _unknown(service: Service) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Return what answers requests for a path or a method that does not exist."""

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "the only kind that is registered"
        status = error.status_code if error.status_code in NAMES else 400
        what = {
            404: f"there is no {request.url.path}; see /openapi.json for what there is",
            405: f"{request.url.path} does not take {request.method}; see /openapi.json",
        }
        refused = RequestError(status, what.get(status, str(error.detail)))
        service.note(request.method, "unknown", status, 0.0, {})
        return json_response(plain_error(refused), status, error.headers)

    return answer
