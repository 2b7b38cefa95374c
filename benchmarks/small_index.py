"""Indexes of small vectors: their size on the disk, what they find, and how fast, on real texts.

    python -m benchmarks.small_index --work runs/small [--model minilm]

Documents are the full descriptions of 5,000 Debian packages in English, and queries their one-line
descriptions, of every tenth package. All ways keep the same vectors, embedded once and kept under
``--work``; they are cut to 256 coordinates and scaled to unit length again, but for the first row.
The indexes hold ids and vectors, and no texts.

- ``ours`` and ``peer`` are bytes of dense vectors on the disk, ours and those of the whole vectors
  in float32; ``ratio`` is how much smaller ours are. Of Qdrant it is the codes' size, worked out:
  it keeps the vectors too, as ``disk bytes`` show.
- ``error`` is nDCG@10 lost against the first row, on average over the queries.
- ``same@10`` is the share of the first ten of float32 with 256 coordinates that are found.
- CPU milliseconds are a query's, of 50 that are asked one by one, best of the repeats.
"""

import argparse
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks import common
from benchmarks.common import Row
from tercet.models.embedder import Embedder
from tercet.rank.quantized import STORED, Ranges, Stored, bytes_of, truncated
from tercet.search.engine.engine import Engine, Record
from tercet.search.exact.exact_engine import ExactEngine
from tercet.vectors import Vectors

TEXTS = Path(__file__).parents[1] / "examples/data/packages.en.parquet"
COUNT, EVERY, TOP, DIMS = 5_000, 10, 10, 256
TIMED = 50  # queries
BATCH = 1_000


def main() -> None:
    """Embed, build, search, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    packages = pq.read_table(TEXTS).slice(0, COUNT).to_pylist()
    docs = _kept(chosen, "documents", [package["long"] for package in packages])
    queries = _kept(chosen, "queries", [package["short"] for package in packages[::EVERY]])
    records = [Record(str(row), "") for row in range(COUNT)]
    ways: list[tuple[str, Stored, int]] = [("exact", "float32", docs.shape[1])]
    for stored in STORED:
        ways.append(("exact", stored, DIMS))
        if stored != "binary+int8":
            ways.append(("edge", stored, DIMS))
    engines = {
        f"{kind}, {dims} {stored}": _built(chosen.work / f"{kind}-{dims}-{stored}", kind, stored)
        for kind, stored, dims in ways
    }
    seconds = {
        name: _fill(engine, records, truncated(docs, dims))
        for (name, engine), (_, _, dims) in zip(engines.items(), ways, strict=True)
    }
    asked = {
        name: _asking(engine, truncated(queries[:TIMED], dims))
        for (name, engine), (_, _, dims) in zip(engines.items(), ways, strict=True)
    }
    spent = common.interleaved(asked, chosen.repeats)
    found = {
        name: _rows(engine, truncated(queries, dims))
        for (name, engine), (_, _, dims) in zip(engines.items(), ways, strict=True)
    }
    like = found[f"exact, {DIMS} float32"]
    whole = next(iter(engines))
    rows: list[Row] = []
    for name, (kind, stored, dims) in zip(engines, ways, strict=True):
        size = _dense_bytes(chosen.work / f"{kind}-{dims}-{stored}", kind, stored, dims)
        rows.append(
            {
                "name": name,
                "ours": size,
                "peer": COUNT * bytes_of("float32", docs.shape[1]),
                "unit": "bytes of dense vectors",
                "ratio": COUNT * bytes_of("float32", docs.shape[1]) / size,
                "target": None,
                "error": _ndcg(found[whole]) - _ndcg(found[name]),
                "bytes a vector": bytes_of(stored, dims),
                "disk bytes": engines[name].stats().disk_bytes,
                "ndcg@10": _ndcg(found[name]),
                "same@10": _same(found[name], like),
                "cpu ms a query": min(spent[name]) / TIMED * 1000,
                "seconds to build": seconds[name],
            }
        )
        engines[name].close()
    common.write_results("small_index", rows, "qdrant-edge-py", "numpy")


def _kept(chosen: argparse.Namespace, what: str, texts: Sequence[str]) -> np.ndarray:
    """The texts' vectors, embedded in the first run alone."""
    path = chosen.work / f"{what}.npy"
    if not path.exists():
        chosen.work.mkdir(parents=True, exist_ok=True)
        role: Any = {"documents": "document", "queries": "query"}[what]
        np.save(path, Embedder.load(chosen.model).encode(texts, role, progress=True))
    return np.load(path)


def _built(folder: Path, kind: str, stored: Stored) -> Engine:
    """An empty engine."""
    shutil.rmtree(folder, ignore_errors=True)
    if kind == "exact":
        return ExactEngine(folder, stored=stored)
    from tercet.search.qdrant.edge import EdgeStore
    from tercet.search.qdrant.qdrant_engine import QdrantEngine

    return QdrantEngine(EdgeStore(folder, threads=1, stored=stored))


def _fill(engine: Engine, records: Sequence[Record], docs: np.ndarray) -> float:
    begin = time.perf_counter()
    if isinstance(engine, ExactEngine):
        engine.settle(Ranges.learned(docs[::EVERY]))
    for start in range(0, len(records), BATCH):
        some = slice(start, start + BATCH)
        engine.upsert(records[some], Vectors(torch.from_numpy(docs[some])))
        engine.flush()
    engine.optimize()
    return time.perf_counter() - begin


def _asking(engine: Engine, queries: np.ndarray) -> Callable[[], None]:
    """What asks these queries one by one."""
    asked = [Vectors(torch.from_numpy(queries[row : row + 1])) for row in range(len(queries))]

    def ask() -> None:
        for query in asked:
            engine.search(query, TOP)

    return ask


def _rows(engine: Engine, queries: np.ndarray) -> list[list[int]]:
    """The documents that each query finds."""
    found = engine.search(Vectors(torch.from_numpy(queries)), TOP)
    return [[int(hit.record.id) for hit in hits] for hits in found]


def _dense_bytes(folder: Path, kind: str, stored: Stored, dims: int) -> int:
    if kind == "edge":
        return COUNT * bytes_of(stored, dims)
    return sum(path.stat().st_size for path in folder.glob("segment-*/*.npy"))


def _ndcg(found: Sequence[Sequence[int]]) -> float:
    """Of one right document a query: that of the package itself."""
    gains = [
        1 / math.log2(2 + rows.index(query * EVERY)) if query * EVERY in rows else 0.0
        for query, rows in enumerate(found)
    ]
    return sum(gains) / len(gains)


def _same(found: Sequence[Sequence[int]], like: Sequence[Sequence[int]]) -> float:
    shared = [len(set(one) & set(other)) for one, other in zip(found, like, strict=True)]
    return sum(shared) / (TOP * len(shared))


if __name__ == "__main__":
    main()
