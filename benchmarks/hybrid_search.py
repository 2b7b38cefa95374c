"""Search by three kinds of vectors together: our exact engine and Qdrant Edge, on real texts.

    python -m benchmarks.hybrid_search --data DEBIAN --model MODEL --work runs/hybrid

Documents are the full descriptions of Debian packages in all languages of the data folder, and
queries one-line descriptions of packages of the test split. What is searched for is the weighted
sum of the scores by all three kinds; the exhaustive one, over all documents, is the oracle.

- ``recall@10`` is the share of the oracle's ten documents that are among the ten found.
- ``found@10`` is the share of queries whose own package is among them, in the query's language.
- CPU milliseconds are a query's, all of the process's threads, asked one by one; the engines'
  own threads are limited to one. The best of the repeats is taken.
- The naive sum adds three lists of the best by each kind, and takes a score that is missing in a
  list for zero. It is worked out of the exact lists of each kind, as are reciprocal ranks of three
  kinds, so these rows have no time.
- Memory is the peak of a process of its own that builds, or that only searches; files that are
  mapped into it count, and so do Python and torch, some 0.4 GB. ``disk bytes`` are blocks in use.

Vectors are kept under ``--work``, so only the first run embeds; a killed one goes on.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks import common, sides
from benchmarks.common import Row
from tercet.files.atomic import replacing_file
from tercet.files.progress import bar
from tercet.kinds import KINDS, Kind, Weights
from tercet.models.embedder import Embedder
from tercet.search.engine.engine import (
    Engine,
    Fusion,
    Hit,
    ReciprocalRank,
    Record,
    Rerank,
    Weighted,
)
from tercet.search.engine.fusion import reciprocal_ranks, weighted_sum
from tercet.search.exact.exact_engine import ExactEngine
from tercet.vectors import Vectors

PART = 2_048  # documents that are embedded, kept and upserted together
TOP = 10
TARGET = 0.97
ENGINES = ("exact", "edge")


@dataclass(frozen=True)
class Query:
    """A line that a package is searched by."""

    text: str
    wanted: str  # the id of its full description


@dataclass(frozen=True)
class Plan:
    """One way to search, with one engine."""

    engine: str
    name: str
    fusion: Fusion
    ef: int | None = None

    @property
    def label(self) -> str:
        """As a row is named."""
        return f"{self.engine}: {self.name}"


def main() -> None:
    """Embed, build, search, print, write."""
    chosen = _arguments()
    torch.set_num_threads(1)
    weights = Weights(*(float(part) for part in chosen.weights.split(",")))
    queries = _embed(chosen)
    wanted = [query.wanted for query in queries]
    rows = [_in_a_process(_build, chosen, engine) for engine in ENGINES]
    oracle = Plan("exact", "exhaustive", Weighted(weights=weights, candidates=None))
    lists = {kind: _list_of(kind) for kind in KINDS}
    exact = _in_a_process(_search, chosen, [oracle, *_exact_plans(chosen, weights)], lists)
    edge = _in_a_process(_search, chosen, _edge_plans(chosen, weights), {})
    true = exact["hits"][oracle.label]
    slowest = exact["cpu"][oracle.label]
    for found in (exact, edge):
        for label, ids in found["hits"].items():
            rows.append(_row(label, found["cpu"][label], slowest, _quality(ids, true, wanted)))
            rows[-1]["peak memory GB"] = found["peak"]
    for size in chosen.candidates:
        for name, ids in _fused_lists(exact["lists"], size, weights).items():
            rows.append(_row(f"{name}, {size} a kind", None, None, _quality(ids, true, wanted)))
    documents = len(_packages(chosen))
    for row in rows:
        row["documents"], row["queries"] = documents, len(queries)
    common.write_results(chosen.name, rows, "qdrant-edge-py", "numpy")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of packages.LANG.parquet")
    parser.add_argument("--model", required=True, help="one that makes all three kinds")
    parser.add_argument("--work", type=Path, default=Path("runs/hybrid_search"))
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--limit", type=int, help="documents a language, for a small run")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", default="1,0.3,1", help="of dense, sparse, multi")
    parser.add_argument(
        "--candidates", type=lambda said: [int(n) for n in said.split(",")], default=[50, 100, 200]
    )
    parser.add_argument("--name", default="hybrid_search", help="of the result file")
    return parser.parse_args()


# ---- texts and their vectors -------------------------------------------------------------------


def _packages(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all languages; each file is in random order, so its head is a sample."""
    rows: list[dict[str, Any]] = []
    for path in sorted(chosen.data.glob("packages.*.parquet")):
        rows += pq.read_table(path).slice(0, chosen.limit).to_pylist()
    if not rows:
        raise SystemExit(f"{chosen.data}: no packages.LANG.parquet there; give another --data")
    return rows


def _name(row: dict[str, Any]) -> str:
    return f"{row['lang']}/{row['id']}"


def _embed(chosen: argparse.Namespace) -> list[Query]:
    """Embed documents and queries, as far as that was not done; the queries' texts."""
    packages = _packages(chosen)
    chosen.work.mkdir(parents=True, exist_ok=True)
    tests = [row for row in packages if row["split"] == "test"]
    every = max(1, len(tests) // chosen.queries)
    queries = [Query(row["short"], _name(row)) for row in tests[::every][: chosen.queries]]
    embedder = Embedder.load(chosen.model, dtype=getattr(torch, chosen.precision))
    made_of = {
        "model": embedder.fingerprint(),
        "precision": chosen.precision,
        "documents": [_name(row) for row in packages],
        "queries": [query.wanted for query in queries],
    }
    about = chosen.work / "about.json"
    if not about.exists() or json.loads(about.read_text(encoding="utf-8")) != made_of:
        for stale in chosen.work.glob("*.pt"):
            stale.unlink()
        _write(about, json.dumps(made_of).encode())
    starts = range(0, len(packages), PART)
    with bar("embed", len(packages)) as advance:
        for number, start in enumerate(starts):
            rows = packages[start : start + PART]
            path = chosen.work / f"documents-{number:04d}.pt"
            if not path.exists():
                records = [
                    Record(_name(row), row["long"], fields={"lang": row["lang"]}) for row in rows
                ]
                vectors = embedder.encode_vectors([record.text for record in records])
                _save(path, (records, vectors))
            advance(len(rows))
    if not (chosen.work / "queries.pt").exists():
        vectors = embedder.encode_vectors([query.text for query in queries], "query")
        _save(chosen.work / "queries.pt", vectors)
    return queries


def _save(path: Path, what: Any) -> None:
    with replacing_file(path) as fresh:
        torch.save(what, fresh)


def _write(path: Path, content: bytes) -> None:
    with replacing_file(path) as fresh:
        fresh.write_bytes(content)


def _parts(chosen: argparse.Namespace) -> Iterator[tuple[list[Record], Vectors]]:
    for path in sorted(chosen.work.glob("documents-*.pt")):
        yield torch.load(path, weights_only=False)  # our own file, of a moment ago


# ---- in a process of its own -------------------------------------------------------------------


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def _opened(chosen: argparse.Namespace, engine: str, ef: int | None = None) -> Engine:
    folder = chosen.work / engine
    if engine == "exact":
        return ExactEngine(folder)
    from tercet.search.qdrant.edge import EdgeStore
    from tercet.search.qdrant.qdrant_engine import QdrantEngine

    return QdrantEngine(EdgeStore(folder, threads=1, ef=ef))


def _build(chosen: argparse.Namespace, name: str) -> Row:
    """Upsert all documents into a new folder, and make them fast to find."""
    torch.set_num_threads(1)
    for path in sorted((chosen.work / name).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    spent = optimizing = 0.0
    with closing(_opened(chosen, name)) as engine:
        for records, vectors in _parts(chosen):
            begin = time.process_time()
            engine.upsert(records, vectors)
            engine.flush()
            spent += time.process_time() - begin
        begin = time.process_time()
        engine.optimize()
        optimizing = time.process_time() - begin
        stats = engine.stats()
    return {
        "name": f"{name}: build",
        "ours": spent + optimizing,
        "peer": None,
        "unit": "CPU seconds",
        "ratio": None,
        "target": None,
        "error": None,
        "of these to optimize": optimizing,
        "disk bytes": stats.disk_bytes,
        "peak memory GB": sides.memory("VmHWM") / 1e9,
    }


def _search(
    chosen: argparse.Namespace, plans: Sequence[Plan], lists: dict[Kind, Fusion]
) -> dict[str, Any]:
    """Ids of the hits and the least CPU milliseconds a query of each plan; and lists of hits."""
    torch.set_num_threads(1)
    queries: Vectors = torch.load(chosen.work / "queries.pt", weights_only=False)
    one_by_one = [queries.take([row]) for row in range(len(queries))]
    hits: dict[str, list[list[str]]] = {}
    spent: dict[str, float] = {}
    found: dict[Kind, list[list[Hit]]] = {}
    for plan in plans:
        with closing(_opened(chosen, plan.engine, plan.ef)) as engine:
            engine.search(one_by_one[0], TOP, fusion=plan.fusion)
            for _ in range(chosen.repeats):
                begin = time.process_time()
                answers = [engine.search(one, TOP, fusion=plan.fusion)[0] for one in one_by_one]
                taken = (time.process_time() - begin) * 1e3 / len(one_by_one)
                spent[plan.label] = min(taken, spent.get(plan.label, taken))
                hits[plan.label] = [[hit.record.id for hit in answer] for answer in answers]
    peak = sides.memory("VmHWM") / 1e9
    if lists:
        with closing(_opened(chosen, plans[0].engine)) as engine:
            for kind, fusion in lists.items():
                size = max(chosen.candidates)
                found[kind] = [engine.search(one, size, fusion=fusion)[0] for one in one_by_one]
    named = {
        kind: [[(hit.record.id, hit.scores[kind]) for hit in answer] for answer in answers]
        for kind, answers in found.items()
    }
    return {"hits": hits, "cpu": spent, "lists": named, "peak": peak}


# ---- what is compared --------------------------------------------------------------------------


def _exact_plans(chosen: argparse.Namespace, weights: Weights) -> list[Plan]:
    plans = [
        Plan("exact", f"{size} candidates a kind", Weighted(weights=weights, candidates=size))
        for size in chosen.candidates
    ]
    for kind in KINDS:
        plans.append(Plan("exact", f"{kind} alone, exhaustive", _list_of(kind)))
    return plans


def _edge_plans(chosen: argparse.Namespace, weights: Weights) -> list[Plan]:
    plans: list[Plan] = []
    for size in chosen.candidates:
        usual = Weighted(weights=weights, candidates=size)
        plans += [
            Plan("edge", f"{size} candidates a kind", usual),
            Plan("edge", f"{size} candidates a kind, ef {4 * size}", usual, ef=4 * size),
            Plan("edge", f"reciprocal ranks of two, {size}", ReciprocalRank(candidates=size)),
            Plan(
                "edge",
                f"{2 * size} dense candidates reranked",
                Rerank(weights=weights, candidates=2 * size),
            ),
        ]
    return plans


def _list_of(kind: Kind) -> Weighted:
    """The best by one kind alone, among all documents."""
    alone = {name: float(name == kind) for name in KINDS}
    return Weighted(weights=Weights(**alone), candidates=None)


def _fused_lists(
    lists: dict[Kind, list[list[tuple[str, float]]]], size: int, weights: Weights
) -> dict[str, list[list[str]]]:
    """The naive sum, and reciprocal ranks, of the best so many by each kind."""
    summed: list[list[str]] = []
    ranked: list[list[str]] = []
    for row in range(len(lists["dense"])):
        best = {kind: dict(lists[kind][row][:size]) for kind in KINDS}
        ids = {name for scores in best.values() for name in scores}
        sums = {
            name: weighted_sum({kind: best[kind].get(name, 0.0) for kind in KINDS}, weights)
            for name in ids
        }
        ranks = reciprocal_ranks([list(scores) for scores in best.values()], 60)
        summed.append(sorted(sums, key=lambda name: -sums[name])[:TOP])
        ranked.append(sorted(ranks, key=lambda name: -ranks[name])[:TOP])
    return {"naive sum of three exact lists": summed, "reciprocal ranks of three": ranked}


def _quality(
    ids: Sequence[Sequence[str]], true: Sequence[Sequence[str]], wanted: Sequence[str]
) -> dict[str, float]:
    shared = [
        len(set(found) & set(best)) / len(best) for found, best in zip(ids, true, strict=True)
    ]
    own = [name in found for name, found in zip(wanted, ids, strict=True)]
    return {"recall@10": sum(shared) / len(shared), "found@10": sum(own) / len(own)}


def _row(label: str, spent: float | None, slowest: float | None, quality: dict[str, float]) -> Row:
    weighted = label.startswith("edge") and "candidates a kind" in label
    return {
        "name": label,
        "ours": spent,
        "peer": slowest,
        "unit": "CPU ms a query",
        "ratio": None if spent is None or slowest is None else slowest / spent,
        "target": f"recall@10 >= {TARGET}" if weighted else None,
        "error": 1 - quality["recall@10"],
        **quality,
    }


if __name__ == "__main__":
    main()
