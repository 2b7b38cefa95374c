"""A server in a thread of the tests or in a process, on a real socket."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2

from tercet.models.embedder import Embedder
from tercet.serve.endpoint import Limits, Service
from tercet.serve.server import ServeOptions, _listening_socket, _Server

_WAIT = 60  # seconds for a server to be ready


@dataclass
class Running:
    """A running server: its address, what its handlers share, and what it logged."""

    url: str
    service: Service
    http: httpx2.Client
    lines: list[Mapping[str, Any]] = field(default_factory=list)  # of the access log

    def embedder(self, name: str) -> Embedder:
        assert self.service.models is not None
        return self.service.models.by_name[name].embedder

    def post(self, path: str, body: object = None, **options: Any) -> httpx2.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.http.get(path, **options)


def load(source: str, precision: str) -> Embedder:
    return Embedder.load(source)


@contextmanager
def serving(
    models: Mapping[str, Path] | None = None,
    *,
    indexes: Mapping[str, Path] | None = None,
    limits: Limits | None = None,
    key: str | None = None,
    load: Callable[[str, str], Embedder] = load,
    wait: bool = True,
) -> Iterator[Running]:
    """Run a server; it has answered what it was asked when this ends."""
    lines: list[Mapping[str, Any]] = []
    options = ServeOptions(
        models={name: str(folder) for name, folder in (models or {}).items()},
        indexes=indexes or {},
        port=0,
        key=key,
        limits=limits or Limits(),
        load=load,
        access_log=lines.append,
    )
    with closing(_listening_socket(options.host, 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = _Server(options, url, lambda line: None)
        thread = Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
        thread.start()
        try:
            with httpx2.Client(base_url=url, timeout=_WAIT, trust_env=False) as http:
                until = time.monotonic() + _WAIT
                while wait and http.get("/health").status_code != 200:
                    assert server.failure is None, server.failure
                    assert time.monotonic() < until, "the server did not become ready"
                    time.sleep(0.02)
                yield Running(url, server._service, http, lines)
        finally:
            server.should_exit = True
            thread.join(_WAIT)
            assert not thread.is_alive(), "the server did not stop"


@dataclass
class Command:
    """A running ``tercet serve``: its address, the process, and the lines it printed so far."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str]


@contextmanager
def command(*words: str, environment: Mapping[str, str] | None = None) -> Iterator[Command]:
    """Run ``tercet serve`` on a free port, and end it by SIGTERM if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tercet", "serve", *words, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), **(environment or {})},
    )
    assert process.stderr is not None
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line.rstrip())
            if line.startswith("ready"):
                break
        assert lines and lines[-1].startswith("ready"), lines
        reader = Thread(target=lambda: lines.extend(map(str.rstrip, process.stderr or ())))
        reader.start()
        yield Command(lines[-1].split()[-1], process, lines)
        process.terminate()
        process.wait(_WAIT)
        reader.join(_WAIT)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
