"""What the server counts, for Prometheus."""

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from tercet.serve.queue import Batch

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_SECONDS: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS: Final = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


class Metrics:
    """Counters, histograms and gauges of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "tercet_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "tercet_request_seconds",
            "Seconds from the first byte of a request to its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._texts = Counter("tercet_texts", "Texts read.", ["model"], registry=registry)
        self._tokens = Counter("tercet_tokens", "Tokens read.", ["model"], registry=registry)
        self._cut = Counter(
            "tercet_texts_cut", "Texts cut to the model's limit.", ["model"], registry=registry
        )
        self._waited = Histogram(
            "tercet_queue_seconds",
            "Seconds that a request waited until its first text was read.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch_tokens = Histogram(
            "tercet_batch_tokens",
            "Tokens of a batch.",
            ["model"],
            buckets=_TOKENS,
            registry=registry,
        )
        self._forward = Counter(
            "tercet_forward_seconds", "Seconds spent reading batches.", ["model"], registry=registry
        )
        self._queued = Gauge(
            "tercet_queue_tokens", "Tokens that wait.", ["model"], registry=registry
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def read(self, model: str, cut: int, waited: float) -> None:
        """Count a request whose texts were read, of which ``cut`` were cut."""
        if cut:
            self._cut.labels(model).inc(cut)
        self._waited.labels(model).observe(waited)

    def of_model(self, model: str) -> Callable[[Batch], None]:
        """Return a function that counts the batches of a model."""
        texts, tokens = self._texts.labels(model), self._tokens.labels(model)
        sizes, seconds = self._batch_tokens.labels(model), self._forward.labels(model)

        def count(batch: Batch) -> None:
            texts.inc(batch.texts)
            tokens.inc(batch.tokens)
            sizes.observe(batch.tokens)
            seconds.inc(batch.seconds)

        return count

    def watch_queue(self, model: str, tokens: Callable[[], float]) -> None:
        """Report the tokens that wait for a model whenever metrics are read."""
        self._queued.labels(model).set_function(tokens)

    def text(self) -> bytes:
        """Return all of it in the text format of Prometheus."""
        return generate_latest(self.registry)
