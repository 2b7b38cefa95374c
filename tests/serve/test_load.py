"""Many callers for a long time: every request is answered, and memory stays flat."""

import asyncio
import json
import random
import socket
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from itertools import cycle, takewhile
from threading import Event, Thread

import psutil
import pytest

from benchmarks.serve_client import run, whole
from tests.serving import Command, command
from tests.toy import SENTENCES

CALLERS = 64
MEGABYTES = 8  # that memory may grow by, of about 400


def requests() -> list[tuple[bytes, int]]:
    """Requests of all kinds and of very different lengths."""
    draw, made = random.Random(0), []
    for _ in range(500):
        words = " ".join(SENTENCES).split() * 2
        texts = [
            " ".join(draw.choices(words, k=draw.choice((1, 3, 10, 60, 200))))
            for _ in range(draw.choice((1, 1, 1, 1, 2, 40)))
        ]
        bodies = {
            "/v1/vectors": {"texts": texts, "format": draw.choice(("json", "safetensors"))},
            "/v1/embeddings": {"model": "hybrid", "input": texts, "truncate": "end"},
            "/v2/embed": {"texts": texts, "input_type": "search_query"},
            "/embed_sparse": {"inputs": texts[:32]},
        }
        path = draw.choice(list(bodies))
        made.append((whole(path, json.dumps(bodies[path]).encode()), len(texts)))
    return made


def disturb(port: int, ended: Event) -> None:
    """Send what is wrong, and leave before the answer, again and again."""
    good = requests()
    draw = random.Random(1)
    while not ended.wait(0.01):
        with socket.create_connection(("127.0.0.1", port), 20) as opened:
            content, _ = draw.choice(good)
            opened.sendall(draw.choice((content, content[:-5], b"\x16\x03\x01", content * 2)))
            if draw.random() < 0.5:  # a reset
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def measured(running: Command, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of all requests of that time, and megabytes of the server as it went on."""
    port = int(running.url.rpartition(":")[2])
    server, ended = psutil.Process(running.process.pid), Event()
    resident: list[float] = []

    def watch() -> None:
        while not ended.wait(seconds / 200):
            resident.append(server.memory_info().rss / 1e6)

    others = [Thread(target=watch), Thread(target=disturb, args=(port, ended))]
    for each in others:
        each.start()
    end = time.monotonic() + seconds
    endless: Iterator[tuple[bytes, int]] = takewhile(
        lambda _: time.monotonic() < end, cycle(requests())
    )
    try:
        latencies, _, _ = asyncio.run(run(port, endless, CALLERS, seconds + 60))
    finally:
        ended.set()
        for each in others:
            each.join(30)
    return latencies, resident


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(20, marks=pytest.mark.slow),
        pytest.param(600, marks=[pytest.mark.long, pytest.mark.slow]),
    ],
)
def test_memory_is_flat_while_64_callers_ask_and_others_misbehave(hybrid_folder, seconds):
    words = f"hybrid={hybrid_folder}", "--threads", "1", "--no-access-log"
    with command(*words) as running:
        measured(running, 5)  # buffers and caches grow to what they need
        latencies, resident = measured(running, seconds)
    quarter = len(resident) // 4
    begin, end = statistics.median(resident[:quarter]), statistics.median(resident[-quarter:])
    p99 = statistics.quantiles(latencies, n=100)[98]
    numbers = f"{len(latencies)} requests, p99 {p99:.0f} ms, {begin:.1f} MB to {end:.1f} MB"
    sys.stdout.write(f"{numbers}\n")
    assert len(latencies) > 10 * seconds
    assert end - begin < MEGABYTES, f"from {begin:.1f} to {end:.1f} MB"
    assert p99 < 10_000
    assert not any("Traceback" in line for line in running.lines), running.lines[-30:]
    assert running.lines[-1] == "stopped; all requests were answered"
