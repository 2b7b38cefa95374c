"""A connection of uvicorn that copes with clients that are slow, or leave in the middle."""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

SECONDS: Final = 20.0
"""For the headers of a request to arrive, for the rest of a body after its request was refused, and
for a client to read any part of an answer."""


class Connection(HttpToolsProtocol):
    """A connection with three things that uvicorn lacks.

    Headers have a time limit; without it, clients that connect and send nothing hold a connection
    each for ever, and so do those that send a body slowly after they were refused. Answers that
    nobody reads are dropped. When a client leaves, all of its requests are stopped; uvicorn stops
    the last of those that were sent without waiting for answers, and the others fail when they
    answer.
    """

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _begun: tuple[RequestResponseCycle, ...] = ()  # requests that are not answered yet

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        """Begin to wait for the headers of a request."""
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        """Stop waiting: the body has a time limit of its endpoint."""
        self._stop()
        super().on_headers_complete()
        self._begun = tuple(each for each in self._begun if not each.response_complete)
        if self.cycle is not None:
            self._begun += (self.cycle,)

    def on_response_complete(self) -> None:
        """Begin to wait for the client to read, and for what is left of a refused body."""
        super().on_response_complete()
        if self.cycle is not None and self.cycle.more_body:
            self._wait()
        if self._unread is None:
            self._wait_for_reading(self._waits_to_be_read())

    def on_message_complete(self) -> None:
        """Stop waiting for the body."""
        self._stop()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting, and what was asked for."""
        self._stop()
        if self._unread is not None:
            self._unread.cancel()
        for each in self._begun:
            each.disconnected = each.disconnected or not each.response_complete
            each.message_event.set()
        super().connection_lost(exc)

    def _waits_to_be_read(self) -> int:
        """Return the bytes of answers that the client has not read."""
        return self.transport.get_write_buffer_size()

    def _wait_for_reading(self, before: int) -> None:
        """Look again later, if there is something to read."""
        self._unread = None
        if before:
            self._unread = self.loop.call_later(SECONDS, self._look, before)

    def _look(self, before: int) -> None:
        """Drop the connection if nothing was read since the last look."""
        left = self._waits_to_be_read()
        if left >= before:
            self.transport.abort()
        else:
            self._wait_for_reading(left)

    def _wait(self) -> None:
        self._stop()
        self._late = self.loop.call_later(SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
