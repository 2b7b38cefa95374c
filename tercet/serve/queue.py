"""The queue of a model: texts of all requests, packed into common batches without a waiting window.

A batch is what arrived while the last one ran, up to ``batch_tokens`` tokens. Texts come in by fair
queueing (Demers, Keshav and Shenker 1989): the next one is of the request that had the fewest
tokens read since it came, so a request of thousands of texts does not hold up a short one. Vectors
do not depend on the other texts of a batch, so requests for different kinds share it.
"""

import asyncio
import heapq
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from threading import Condition, Thread
from typing import Final, Literal, TypeAlias

import numpy as np
import torch

from tercet.errors import BROKEN_MODEL
from tercet.kinds import KINDS, Kind
from tercet.models.embedder import Embedder
from tercet.models.tokens import Tokens
from tercet.serve.requests import RequestError
from tercet.vectors import Terms, TokenRows, Vectors

Need: TypeAlias = Literal["dense", "sparse", "multi", "states"]
"""What a request wants of its texts: a kind of vectors, or the states of all tokens."""

_SMOOTHING: Final = 0.2  # weight of the last batch in the measured speed
_LONGEST_WAIT: Final = 600  # seconds that Retry-After says at most

log = logging.getLogger("tercet")


@dataclass(slots=True)
class Answer:
    """Vectors of the texts of a request, in their order; what was not asked for is empty.

    Dense vectors are as pooled: :meth:`ServedModel.dense` shortens and scales them.
    """

    dense: list[np.ndarray] = field(default_factory=list)  # float32 [texts, dim], in parts
    sparse: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # ids, weights
    multi: list[np.ndarray] = field(default_factory=list)  # float32 [tokens, width]
    states: list[np.ndarray] = field(default_factory=list)  # float32 [tokens, hidden]
    waited: float = 0.0  # seconds until the first text was read
    seconds: float = 0.0  # until the last one was done

    def vectors(self) -> Vectors:
        """Return the vectors as other parts of the package take them."""
        dense = torch.from_numpy(np.concatenate(self.dense)) if self.dense else None
        sparse = multi = None
        if self.sparse:
            ids, weights = (np.concatenate(each) for each in zip(*self.sparse, strict=True))
            offsets = _offsets([len(ids) for ids, _ in self.sparse])
            sparse = Terms(torch.from_numpy(ids), torch.from_numpy(weights), offsets)
        if self.multi:
            offsets = _offsets([len(rows) for rows in self.multi])
            multi = TokenRows(torch.from_numpy(np.concatenate(self.multi)), offsets)
        return Vectors(dense, sparse, multi)


@dataclass(slots=True, eq=False)
class _Request:
    """The texts of one request that wait or are being read."""

    tokens: Tokens
    needs: frozenset[Need]
    answer: asyncio.Future[Answer]
    came: float
    found: Answer = field(default_factory=Answer)
    next: int = 0  # of its texts
    done: int = 0
    gone: bool = False

    def length(self, text: int) -> int:
        return len(self.tokens.ids[text])


@dataclass(frozen=True, slots=True)
class Batch:
    """Numbers about a batch that was read."""

    requests: int
    texts: int
    tokens: int
    seconds: float


class PackedQueue:
    """Texts that wait for a model, and the thread that reads them.

    Args:
        embedder: the model.
        most: tokens that may wait; more are refused.
        on_batch: is called in the queue's thread after each batch.
    """

    def __init__(
        self, embedder: Embedder, *, most: int, on_batch: Callable[[Batch], None] = lambda _: None
    ) -> None:
        self.most = most
        self.tokens = 0  # that wait
        self._embedder, self._on_batch = embedder, on_batch
        with embedder.freeze().reading():  # makes the copy that encodes before the first request
            pass
        self._waiting: list[tuple[float, int, _Request]] = []  # a heap, by tokens read so far
        self._arrived = 0
        self._turn = 0.0  # tokens that a request which comes now counts as having read
        self._speed = 0.0  # tokens a second, measured
        self._closing = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="queue", daemon=True)
        self._thread.start()

    async def read(self, tokens: Tokens, needs: Sequence[Need]) -> Answer:
        """Return the vectors of texts when the last one is done; texts that have begun stay begun.

        Raises:
            RequestError: 413 for more tokens than may ever wait, 429 if others wait already, 503
                while the server stops, 500 if the model fails.
        """
        count = sum(tokens.lengths)
        request = _Request(
            tokens, frozenset(needs), asyncio.get_running_loop().create_future(), time.monotonic()
        )
        with self._changed:
            self._require_room(count)
            self.tokens += count
            self._arrived += 1
            heapq.heappush(self._waiting, (self._turn, self._arrived, request))
            self._changed.notify()
        try:
            return await request.answer
        except asyncio.CancelledError:
            self._drop(request)
            raise

    def _require_room(self, count: int) -> None:
        if self._closing:
            raise RequestError(503, "the server is stopping; ask another one", retry_after=1)
        if count > self.most:
            raise RequestError(
                413,
                f"a request must have at most {self.most:,} tokens; got {count:,}; send several",
            )
        if self.tokens + count > self.most:
            wait = self.tokens / self._speed if self._speed else 1
            raise RequestError(
                429,
                f"{self.tokens:,} tokens wait for the model, and at most {self.most:,} may; this "
                f"request has {count:,}; send it again later",
                retry_after=min(max(1, ceil(wait)), _LONGEST_WAIT),
            )

    def _drop(self, request: _Request) -> None:
        """Let the rest of a request leave the queue."""
        with self._changed:
            if not request.gone:
                request.gone = True
                self.tokens -= sum(map(request.length, range(request.next, len(request.tokens))))

    def close(self) -> None:
        """Read what waits, refuse what comes, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # ---- in the queue's thread -------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                batch = self._next_batch()
            if batch:
                self._read(batch)

    def _next_batch(self) -> list[tuple[_Request, int]]:
        """Take texts in fair order until the next one does not fit; a longer one runs alone."""
        batch: list[tuple[_Request, int]] = []
        room = self._embedder.batch_tokens
        while self._waiting:
            turn, number, request = self._waiting[0]
            if request.gone:
                heapq.heappop(self._waiting)
                continue
            length = request.length(request.next)
            if batch and length > room:
                break
            batch.append((request, request.next))
            room -= length
            self.tokens -= length
            self._turn = max(self._turn, turn)
            request.next += 1
            if request.next < len(request.tokens):
                heapq.heapreplace(self._waiting, (turn + length, number, request))
            else:
                heapq.heappop(self._waiting)
        # What each request got on average. Without it, requests of one text that keep coming would
        # all begin at the same turn, and never let a second text of an earlier request through.
        requests = {request for request, _ in batch} | {each for _, _, each in self._waiting}
        if requests:
            self._turn += sum(request.length(text) for request, text in batch) / len(requests)
        return batch

    def _read(self, batch: list[tuple[_Request, int]]) -> None:
        """Read one batch, and answer the requests whose last text was in it."""
        began = time.monotonic()
        for request, text in batch:
            if text == 0:
                request.found.waited = began - request.came
        rows: dict[_Request, list[int]] = {}
        for request, text in batch:
            rows.setdefault(request, []).append(text)
        try:
            self._forward(rows)
        except Exception:  # such as memory: its requests are answered, and the next ones read
            log.exception("a batch of %d texts failed", len(batch))
            error = RequestError(500, "the model failed on this batch; see the server's log")
            for request in rows:
                self._drop(request)
                _finish(request, error)
        for request, texts in rows.items():
            request.done += len(texts)
            if request.done == len(request.tokens) and not request.gone:
                request.found.seconds = time.monotonic() - request.came
                _finish(request, None)
        seconds = time.monotonic() - began
        count = sum(request.length(text) for request, text in batch)
        rate = count / max(seconds, 1e-9)
        self._speed += (rate - self._speed) * (_SMOOTHING if self._speed else 1)
        self._on_batch(Batch(len(rows), len(batch), count, seconds))

    def _forward(self, rows: dict[_Request, list[int]]) -> None:
        """Read texts in one forward, and add their vectors to what their requests have."""
        tokens = Tokens.join([request.tokens.take(texts) for request, texts in rows.items()])
        lengths = tokens.lengths
        order = sorted(range(len(tokens)), key=lambda row: -lengths[row])  # equal ones side by side
        places = {row: place for place, row in enumerate(order)}
        needs = frozenset[Need]().union(*(request.needs for request in rows))
        kinds: list[Kind] = [kind for kind in KINDS if kind in needs]
        found, states = self._embedder.encode_packed(tokens.pack(order), kinds)
        parts = _on_host(found.to("cpu"))
        if "states" in needs:
            parts.states = [
                part.numpy() for part in states.float().cpu().split([lengths[i] for i in order])
            ]
        bad = ~np.array([np.isfinite(each).all() for each in parts.states], dtype=bool)
        if kinds:
            bad = found.not_finite().cpu().numpy()
        row = 0
        for request, texts in rows.items():
            where = [places[each] for each in range(row, row + len(texts))]
            row += len(texts)
            if bad[where].any():
                text = texts[int(np.flatnonzero(bad[where])[0])]
                self._drop(request)
                problem = f"the vector of text {text} holds NaN or infinity; {BROKEN_MODEL}"
                _finish(request, RequestError(500, problem))
                continue
            if "dense" in request.needs:
                request.found.dense.append(parts.dense[0][where])
            if "sparse" in request.needs:
                request.found.sparse += [parts.sparse[each] for each in where]
            if "multi" in request.needs:
                request.found.multi += [parts.multi[each] for each in where]
            if "states" in request.needs:
                request.found.states += [parts.states[each] for each in where]


def _on_host(vectors: Vectors) -> Answer:
    """Return vectors on the CPU as arrays, one for each text."""
    found = Answer()
    if vectors.dense is not None:
        found.dense = [vectors.dense.float().numpy()]
    if vectors.sparse is not None:
        terms = vectors.sparse.merged()
        bounds = terms.offsets.tolist()
        ids, weights = terms.ids.numpy(), terms.weights.float().numpy()
        found.sparse = [(ids[a:b], weights[a:b]) for a, b in pairwise(bounds)]
    if vectors.multi is not None:
        bounds = vectors.multi.offsets.tolist()
        rows = vectors.multi.vectors.float().numpy()
        found.multi = [rows[a:b] for a, b in pairwise(bounds)]
    return found


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths).tolist()])


def _finish(request: _Request, error: RequestError | None) -> None:
    """Answer a request in the loop that waits for it, unless it has gone."""

    def finish() -> None:
        if request.answer.done():
            return
        if error is None:
            request.answer.set_result(request.found)
        else:
            request.answer.set_exception(error)

    request.answer.get_loop().call_soon_threadsafe(finish)
