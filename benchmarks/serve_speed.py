"""What does serving cost, against sentence-transformers behind FastAPI, infinity and m3serve.

Real sockets on loopback. Servers, callers and this process are different processes; CPU seconds are
those of the server and all its children, user and system. Texts are Debian descriptions, short and
long ones mixed in random order. Each caller has one connection, kept alive, and sends its next
request when its answer has arrived. All sides get the same requests in the same order, in turn.

- ``ours`` and ``peer`` are texts per CPU second over all repeats, ``range`` the smallest and the
  largest of a repeat. p50 and p99 are milliseconds over the requests of all repeats.
- ``mixed`` has 16 texts in one of eight requests, else one.
- ``padding_factor``: token slots that the peer's model read, over tokens.
- ``error``: the largest distance (1 - cosine) of a vector of either side from ``Embedder.encode``.
- ``client``: CPU seconds of the callers over seconds; far below 1, or they would be measured too.
- sentence-transformers runs batches of 32, its default, and for 64 callers also of 8, which pads
  less.
- ``control``: texts of one length, where nobody pads.
- Three kinds, as binary, come from MiniLM with two random heads, in a folder of BGE-M3's layout;
  ``cost``: CPU seconds for them over those for dense vectors alone, of the same server.

Each peer needs a separate environment: ``benchmarks/serve_peers.py`` says how to make them.

    python -m benchmarks.serve_speed --st st/bin/python --infinity infinity/bin/python \
        --m3 m3/bin/python
"""

import argparse
import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from transformers.utils import logging

from benchmarks.common import Row, write_results
from benchmarks.encode_speed import SEED, equal_texts, mixed_texts
from benchmarks.sides import Answer, Side
from tercet.kinds import KINDS
from tercet.models.embedder import Embedder
from tercet.models.zoo import zoo

TITLE = "What does serving cost, against sentence-transformers behind FastAPI, infinity, m3serve."
REPEATS = 3
READY = 180.0  # seconds a server may take to start
MANY = 16  # texts of a large request of the mixed case
CHECKED = 32  # texts whose vectors are compared
OURS = "tercet"
SMALL = ", batches of 8"
DENSE = "tercet, dense alone"  # the same server, asked for less

Texts = list[str]
Body = Callable[[Texts], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A load."""

    name: str
    callers: int
    texts: int  # in all requests together
    kind: str = "float"  # of the answer: float, base64, or three: all kinds, in binary
    mixed: bool = False
    equal: bool = False  # texts of one length

    def requests(self, embedder: Embedder) -> list[Texts]:
        """Texts of each request, the same for all sides."""
        texts, made = (equal_texts(embedder) if self.equal else mixed_texts())[: self.texts], []
        random = np.random.default_rng(SEED)
        while texts:
            take = MANY if self.mixed and random.random() < 1 / 8 else 1
            made.append(texts[:take])
            texts = texts[take:]
        return made


CASES = (
    Case("1 caller", 1, 150),
    Case("8 callers", 8, 320),
    Case("64 callers", 64, 640),
    Case("64 callers, mixed", 64, 640, mixed=True),
    Case("64 callers, control: all of 32 tokens", 64, 400, equal=True),
    Case("1 caller, base64", 1, 150, kind="base64"),
    Case("64 callers, base64", 64, 480, kind="base64"),
    Case("64 callers, three kinds, binary", 64, 640, kind="three"),
)


def is_measured(server: str, case: Case) -> bool:
    """Whether a side is asked in a case; others would add nothing."""
    if server == OURS:
        return True
    if case.kind == "base64" and case.callers == 1:
        return False
    return not server.endswith(SMALL) or case.callers == 64


@dataclass
class Server:
    """A server that runs."""

    name: str
    pid: int
    port: int
    model: str

    def get(self, path: str) -> Any:
        """The JSON that it answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.load(answer)

    def path(self, kind: str) -> str:
        """Where vectors are asked for."""
        return "/v1/vectors" if kind == "three" else "/v1/embeddings"

    def body(self, texts: Texts, kind: str) -> str:
        """The request."""
        if kind != "three":
            given: Any = {"model": self.model, "input": texts, "encoding_format": kind}
            if self.name == OURS:
                given["truncate"] = "end"  # peers cut without a word
        elif self.name == "m3serve":
            given = {"texts": texts}
        else:
            kinds = ("dense",) if self.name == DENSE else KINDS
            given = {"model": self.model, "texts": texts, "role": "document", "kinds": kinds}
            given["format"] = "safetensors"
        return json.dumps(given)

    def vectors(self, texts: Texts, kind: str) -> np.ndarray:
        """Dense vectors of texts, for comparison."""
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{self.path(kind)}",
            self.body(texts, kind).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            said = answer.read()
        if kind == "three" and self.name != "m3serve":
            from safetensors.numpy import load

            return load(said)["dense"]
        found = json.loads(said)
        if kind == "three":
            return np.array(found["dense"], dtype=np.float32)
        rows = [each["embedding"] for each in found["data"]]
        if kind == "base64":
            rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows]
        return np.array(rows, dtype=np.float32)


@contextmanager
def serving(
    name: str, command: Sequence[str], *, port: int, model: str, ready: str, threads: int
) -> Iterator[Server]:
    """Start a server in a new process group, wait until it answers, stop it at the end."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".log") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--threads", str(threads)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + READY
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.2)
                if process.poll() is not None or time.monotonic() > end:
                    said = Path(log.name).read_text(errors="replace")[-3000:]
                    raise SystemExit(f"{name} must start and answer; it said: {said}")
            yield Server(name, process.pid, port, model)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def three_headed(folder: Path) -> Path:
    """MiniLM with two random heads, laid out as BGE-M3; dense is the first state."""
    torch.manual_seed(SEED)
    embedder = Embedder.load("minilm", kinds=KINDS, multi_dim=384, pooling="first")
    assert embedder.heads.sparse is not None
    torch.nn.init.normal_(embedder.heads.sparse.weight, std=384**-0.5)
    embedder.save(folder)
    return folder


@dataclass
class Measured:
    """All repeats of a case by a side."""

    runs: list[Answer] = field(default_factory=list)
    padding: float | None = None
    error: float = 0.0

    def rates(self) -> list[float]:
        """Texts per CPU second of each repeat."""
        return [run["texts"] / run["server_cpu"] for run in self.runs]

    def total(self, name: str) -> float:
        """Of all repeats."""
        return sum(run[name] for run in self.runs)

    def percentile(self, share: float) -> float:
        """Milliseconds of the requests of all repeats."""
        return float(np.percentile([ms for run in self.runs for ms in run["latencies"]], share))

    def facts(self, side: str) -> Row:
        """Numbers for a row, each with the side's name before it."""
        rates = self.rates()
        more = {
            "range": [round(min(rates), 1), round(max(rates), 1)],
            "texts_per_second": self.total("texts") / self.total("seconds"),
            "p99_ms_of_each": [float(np.percentile(run["latencies"], 99)) for run in self.runs],
            "client": self.total("client_cpu") / self.total("seconds"),
            "resident_mb": max(run["resident"] for run in self.runs) / 1e6,
            "bytes_per_text": self.total("bytes") / self.total("texts"),
            "error": self.error,
            "padding_factor": self.padding,
        }
        return {
            side: self.total("texts") / self.total("server_cpu"),
            f"{side}_p50_ms": self.percentile(50),
            f"{side}_p99_ms": self.percentile(99),
            f"{side}_more": more,
        }


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """1 - the smallest cosine of two vectors of a text."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(1 - ((found * expected).sum(1) / lengths).min())


class Bench:
    """Servers of one number of threads, measured in turn."""

    def __init__(self, client: Side, threads: int, repeats: int, shrink: int) -> None:
        self.client, self.threads, self.repeats, self.shrink = client, threads, repeats, shrink

    def case(
        self, case: Case, servers: list[Server], embedder: Embedder, alone: bool
    ) -> tuple[dict[str, Measured], list[float]]:
        """Each server's runs; with ``alone`` also ms of ``encode`` of each text in this process."""
        asked, texts = case.requests(embedder)[:: self.shrink], mixed_texts()
        expected = embedder.encode(texts[:CHECKED], "document")
        found: dict[str, Measured] = defaultdict(Measured)
        spent: list[float] = []
        for server in servers:
            vectors = server.vectors(texts[:CHECKED], case.kind)
            found[server.name].error = distance(vectors, expected)
            self._load(server, case, [[text] for text in texts[-2 * case.callers :]])
        peers = [each for each in servers if each.name not in (OURS, DENSE)]
        before = {each.name: each.get("/counts") for each in peers}
        for _ in range(self.repeats):
            for server in servers:
                run = self._load(server, case, asked)
                found[server.name].runs.append(run)
                rate = run["texts"] / run["server_cpu"]
                print(f"{self.threads} threads, {case.name}, {server.name}: {rate:.1f}", flush=True)
            spent += [milliseconds(embedder, text) for text, *_ in asked] if alone else []
        for server in peers:
            after, start = server.get("/counts"), before[server.name]
            slots, tokens = (after[k] - start.get(k, 0) for k in ("slots", "tokens"))
            found[server.name].padding = slots / tokens
        return found, spent

    def _load(self, server: Server, case: Case, asked: list[Texts]) -> Answer:
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump([[server.body(texts, case.kind), len(texts)] for texts in asked], file)
            file.flush()
            run = self.client(
                "load",
                port=server.port,
                pid=server.pid,
                path=server.path(case.kind),
                bodies=file.name,
                callers=case.callers,
            )
        if "failed" in run:
            raise SystemExit(f"{server.name}, {case.name}: {run['failed']}")
        return run


def milliseconds(embedder: Embedder, text: str) -> float:
    """Of ``encode`` of a text."""
    begin = time.perf_counter()
    embedder.encode([text], "document")
    return 1000 * (time.perf_counter() - begin)


def rows_of(case: Case, threads: int, found: dict[str, Measured]) -> Iterator[Row]:
    """A row against each peer, or the only side beside itself."""
    ours = found.get(OURS)
    peers = {name: measured for name, measured in found.items() if name != OURS}
    best = max(
        peers.keys() - {DENSE}, key=lambda name: peers[name].facts("peer")["peer"], default=None
    )
    for name, peer in peers.items():
        row: Row = {"name": f"{case.name}, {threads} torch threads: {OURS} / {name}"}
        row |= {"unit": "texts per CPU second", **peer.facts("peer")}
        row["padding_factor"] = peer.padding
        row["error"] = max(side.error for side in (peer, ours) if side)
        if ours:
            row |= ours.facts("ours")
            row["ratio"] = row["ours"] / row["peer"]
        if name == DENSE:
            row |= {"cost": row["peer"] / row["ours"], "target": "cost <= 1.15"}
        elif case.equal:
            row["target"] = "the part beyond padding"
        elif name == best and case.callers == 64:
            row["target"] = "ratio >= 2, p99 no worse (the best peer)"
        yield row


def one_caller(threads: int, case: Case, ours: Measured, spent: list[float]) -> Row:
    """What HTTP adds for one caller."""
    served, alone = ours.percentile(50), float(np.percentile(spent, 50))
    pairs = np.array([ms for run in ours.runs for ms in run["latencies"]]) - np.array(spent)
    return {
        "name": f"{case.name}, {threads} torch threads: p50 of the server / p50 of encode",
        "ours": served,
        "peer": alone,
        "unit": "ms",
        "ratio": alone / served,
        "target": "difference <= 1.5 ms",
        "difference_ms": served - alone,
        "median_difference_of_a_text_ms": float(np.median(pairs)),
        "error": ours.error,
    }


def commands(given: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[str]]]:
    """Of each group of servers, by name: those with one kind and those with three."""
    minilm = str(zoo.resolve("minilm"))
    tercet = [sys.executable, "-m", "tercet", "serve", "--dtype", "float32"]
    peers = "-m", "benchmarks.serve_peers"
    one, three = {OURS: [*tercet, "minilm"]}, {OURS: [*tercet, f"m3={folder}"]}
    if given.no_tercet:
        one, three = {}, {}
    if given.st:
        st = [given.st, *peers, "st", minilm]
        one |= {"sentence-transformers": st, f"sentence-transformers{SMALL}": [*st, "--batch", "8"]}
    if given.infinity:
        one["infinity"] = [given.infinity, *peers, "infinity", minilm]
    if given.m3:
        three["m3serve"] = [given.m3, *peers, "m3", str(folder), "--window", "5"]
    return {"minilm": one, "m3": three}


def measure(given: argparse.Namespace, client: Side, folder: Path) -> tuple[list[Row], Row]:
    """All cases with all numbers of threads; versions of the peers beside them."""
    rows: list[Row] = []
    versions: Row = {}
    embedders = {"minilm": Embedder.load("minilm"), "m3": Embedder.load(folder)}
    port = given.port
    for threads in given.threads:
        torch.set_num_threads(threads)
        bench = Bench(client, threads, given.repeats, given.shrink)
        for model, group in commands(given, folder).items():
            with ExitStack() as stack:
                servers = []
                for name, command in group.items():
                    port += 1
                    ready = "/health/ready" if name == OURS else "/versions"
                    started = serving(
                        name, command, port=port, model=model, ready=ready, threads=threads
                    )
                    servers.append(stack.enter_context(started))
                versions |= {s.name: s.get("/versions") for s in servers if s.name != OURS}
                if model == "m3" and servers[0].name == OURS:
                    servers.append(replace(servers[0], name=DENSE))
                for case in CASES:
                    if (case.kind == "three") != (model == "m3"):
                        continue
                    if given.only and case.name not in given.only:
                        continue
                    fit = [each for each in servers if is_measured(each.name, case)]
                    alone = case.callers == 1 and bool(fit) and fit[0].name == OURS
                    found, spent = bench.case(case, fit, embedders[model], alone)
                    rows += rows_of(case, threads, found)
                    if alone:
                        rows.append(one_caller(threads, case, found[OURS], spent))
    return rows, versions


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=TITLE)
    for name in ("st", "infinity", "m3"):
        parser.add_argument(f"--{name}", help="the Python of this peer; without it, left out")
    parser.add_argument("--no-tercet", action="store_true", help="peers alone")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shrink", type=int, default=1, help="keep one request of this many")
    parser.add_argument("--only", nargs="+", help="names of cases; default: all")
    parser.add_argument("--port", type=int, default=18100)
    parser.add_argument("--out", type=Path, help="another file to write")
    given = parser.parse_args()
    logging.disable_progress_bar()
    client = Side(sys.executable, "-m", "benchmarks.serve_client")
    with tempfile.TemporaryDirectory() as folder:
        rows, versions = measure(given, client, three_headed(Path(folder) / "m3"))
    client.end()
    load = [round(each, 2) for each in os.getloadavg()]
    more = [
        {name: row.pop(name) for name in ("ours_more", "peer_more") if name in row} for row in rows
    ]
    path = write_results(
        "serve_speed", rows, "starlette", "uvicorn", "uvloop", "httptools", out=given.out
    )
    results = json.loads(path.read_text(encoding="utf-8"))
    results |= {"seed": SEED, "repeats": given.repeats, "load_average_at_end": load}
    results["peers"] = versions
    for row, each in zip(results["rows"], more, strict=True):
        row |= each
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print(f"wrote {path}")


if __name__ == "__main__":
    main()
