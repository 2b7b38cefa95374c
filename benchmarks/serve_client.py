"""The callers of ``serve_speed``: a process that sends prepared requests and times the answers.

It is driven by lines (``benchmarks/sides.py``) and imports nothing heavy. Each caller has one
connection, kept alive, and sends its next request when its answer has arrived; the requests of all
callers come from one list, in order. Nothing but status and length of an answer is read.

    {"do": "load", "port": P, "pid": process of the server, "path": "/v1/embeddings",
     "bodies": file with a JSON list of [body, texts in it], "callers": 64}
        -> {"seconds", "latencies": [ms, ...], "texts", "bytes": of all answers,
            "server_cpu": user and system seconds of the server and its children meanwhile,
            "client_cpu", "resident": bytes of the server at the end}, or {"failed": why}
"""

import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.sides import Answer, serve

LIMIT = 600.0  # seconds of one load at most

Request = tuple[bytes, int]  # a whole request, and how many texts are in it


class Caller(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, requests: Iterator[Request], latencies: list[float], done: Any) -> None:
        self._requests, self._latencies, self._done = requests, latencies, done
        self._transport: Any = None
        self._got = bytearray()
        self._length = 0  # of the answer that is arriving; 0 while its head is not complete
        self._begin = 0.0
        self.texts = self.bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Send the first request."""
        self._transport = transport
        self._next()

    def _next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._transport.close()
            if not self._done.done():
                self._done.set_result(None)
            return
        self.texts += request[1]
        self._begin = time.perf_counter()
        self._transport.write(request[0])

    def data_received(self, data: bytes) -> None:
        """Note an answer that is complete and send the next request."""
        self._got += data
        if not self._length:
            end = self._got.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._got[:end]).lower()
            at = head.find(b"content-length:")
            if not head.startswith(b"http/1.1 200") or at < 0:
                self._fail(bytes(self._got[:2000]).decode(errors="replace"))
                return
            self._length = end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(self._got) >= self._length:
            self._latencies.append(1000 * (time.perf_counter() - self._begin))
            self.bytes += self._length
            self._got.clear()
            self._length = 0
            self._next()

    def _fail(self, why: str) -> None:
        if not self._done.done():
            self._done.set_exception(RuntimeError(f"the answer must be 200; got {why}"))
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """A server must not close a connection that is kept alive."""
        if not self._done.done():
            self._done.set_exception(RuntimeError(f"the server closed the connection: {exc}"))


def cpu(process: psutil.Process) -> float:
    """User and system seconds of a process and all its children."""
    spent = [process.cpu_times()]
    spent += [child.cpu_times() for child in process.children(recursive=True)]
    ended = process.cpu_times()
    return sum(each.user + each.system for each in spent) + (
        ended.children_user + ended.children_system
    )


async def run(
    port: int, requests: Iterable[Request], callers: int, limit: float = LIMIT
) -> tuple[list[float], int, int]:
    """Send all requests, from that number of callers; return milliseconds, texts and bytes."""
    loop = asyncio.get_running_loop()
    shared, latencies = iter(requests), []
    futures = [loop.create_future() for _ in range(callers)]
    made = []
    for future in futures:
        caller = Caller(shared, latencies, future)
        made.append(caller)
        await loop.create_connection(lambda caller=caller: caller, "127.0.0.1", port)
    async with asyncio.timeout(limit):
        await asyncio.gather(*futures)
    return latencies, sum(each.texts for each in made), sum(each.bytes for each in made)


def whole(path: str, body: bytes) -> bytes:
    """The bytes of a request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def load(port: int, pid: int, path: str, bodies: str, callers: int) -> Answer:
    """Run a load and measure it."""
    given = json.loads(Path(bodies).read_text(encoding="utf-8"))
    requests = [(whole(path, body.encode()), texts) for body, texts in given]
    server = psutil.Process(pid)
    before, own, begin = cpu(server), time.process_time(), time.perf_counter()
    latencies, texts, size = uvloop.run(run(port, requests, callers))
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "latencies": latencies,
        "texts": texts,
        "bytes": size,
        "server_cpu": cpu(server) - before,
        "client_cpu": time.process_time() - own,
        "resident": server.memory_info().rss,
    }


def main() -> None:
    """Read commands, answer them, until the input ends."""

    def answer(do: str, **numbers: Any) -> Answer:
        assert do == "load"
        try:
            return load(**numbers)
        except (OSError, RuntimeError, psutil.Error) as error:
            return {"failed": repr(error)}

    serve(answer)


if __name__ == "__main__":
    main()
