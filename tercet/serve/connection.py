"""A connection of uvicorn that copes with clients that are slow, or leave in the middle."""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

SECONDS: Final = 20.0  # for the headers of a request to arrive


class Connection(HttpToolsProtocol):
    """A connection with two things that uvicorn lacks.

    Headers have a time limit; without it, clients that connect and send nothing hold a connection
    each for ever. When a client leaves, all of its requests are stopped; uvicorn stops the last of
    those that were sent without waiting for answers, and the others fail when they answer.
    """

    _late: asyncio.TimerHandle | None = None
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

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting, and what was asked for."""
        self._stop()
        for each in self._begun:
            each.disconnected = each.disconnected or not each.response_complete
            each.message_event.set()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop()
        self._late = self.loop.call_later(SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
