"""The access log: a line of JSON about each request, written without holding up others."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from queue import Full, Queue
from threading import Thread
from typing import Any, Final

_WAITING: Final = 10_000  # lines; more are dropped while nobody reads the stream
_LAST: Final = 1.0  # seconds for the last lines to be written


@contextmanager
def access_log(stream: Any) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Offer a function that writes lines to a text stream, with the time first, in a thread."""
    lines: Queue[str | None] = Queue(_WAITING)

    def write() -> None:
        for line in iter(lines.get, None):
            with suppress(OSError, ValueError):  # of a stream that is closed
                stream.write(line)
                stream.flush()

    def note(line: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with suppress(Full):
            lines.put_nowait(f"{json.dumps({'time': now, **line})}\n")

    writer = Thread(target=write, name="access log", daemon=True)
    writer.start()
    try:
        yield note
    finally:
        with suppress(Full):
            lines.put(None, timeout=_LAST)
            writer.join(_LAST)
