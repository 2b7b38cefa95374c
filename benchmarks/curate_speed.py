"""How fast hard negatives are mined and pairs are filtered, and in how much memory.

    python -m benchmarks.curate_speed                 # 50,000 queries, 200,000 documents, 384 dims
    python -m benchmarks.curate_speed --scale small --repeats 3

The peer is ``mine_hard_negatives`` of sentence-transformers, with faiss and without. The filter
keeps a pair whose document is among the 20 best of as many documents as queries; its peers are a
full search by faiss, and ``semantic_search``. Both sides are
processes of their own with one thread that take turns. Both read the same pairs and documents from
parquet files, are given the same vectors by a stand-in for a teacher, and write parquet files: what
is compared is all but the model. Documents lie in clusters, and each query near its own document,
so that the rules have something to drop; one query in ten has two answers.

- CPU seconds are of the whole process, the best of the repeats.
- Memory is the highest that the process holds in the call, less what it held before it, after the
  imports. Files that are mapped count.
- ``error`` is the share of queries whose negatives are not the same texts. Ours are strictly below
  the threshold, the peer's may be equal to it, and scores differ in their last bits.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.common import Row, write_results
from benchmarks.sides import Answer, Side, memory, serve, spent

DIM: Final = 384
NEGATIVES: Final = 10
TOP: Final = 20  # of the filter
DEPTH: Final = 104  # what the peer looks at: 10 times the negatives, and twice the most positives
SCALES: Final = {"small": (5_000, 20_000), "full": (50_000, 200_000)}
RULES: Final = {  # ours, and what the peer calls it
    "percent": (0.95, {"relative_margin": 0.05}),
    "margin": (0.05, {"absolute_margin": 0.05}),
    "absolute": (0.7, {"max_score": 0.7}),
}
PEER_BLOCK: Final = 1_024  # queries; with its usual 16,384 the scores alone are 13 GB


@dataclass(frozen=True)
class Job:
    """What both sides read."""

    folder: Path

    @property
    def pairs(self) -> Path:
        """A row a query and an answer."""
        return self.folder / "pairs.parquet"

    @property
    def corpus(self) -> Path:
        """A row a document."""
        return self.folder / "corpus.parquet"

    def vectors(self, role: str) -> Path:
        """A row a text, by its number."""
        return self.folder / f"{role}.npy"


# ---- what is mined -------------------------------------------------------------------------------


def prepare(folder: Path, queries: int, documents: int) -> Job:
    """Write texts and vectors: documents around centres, queries around their documents."""
    job, random = Job(folder), np.random.default_rng(0)
    centres = _unit(random.standard_normal((documents // 20, DIM)))
    found = np.lib.format.open_memmap(
        job.vectors("document"), mode="w+", dtype=np.float32, shape=(documents, DIM)
    )
    for start in range(0, documents, 10_000):
        some = centres[np.arange(start, min(start + 10_000, documents)) % len(centres)]
        found[start : start + len(some)] = _unit(some + 0.7 * _noise(random, len(some)))
    answers = [[query] for query in range(queries)]
    near = random.uniform(0.4, 1.2, (queries, 1)) * _noise(random, queries) + found[:queries]
    for query in range(0, queries, 10):
        answers[query].append(query + 10 * len(centres))  # of the same cluster
        near[query] += found[answers[query][1]]
    np.save(job.vectors("query"), _unit(near).astype(np.float32))
    words = [f"word{number}" for number in range(5_000)]
    text = partial(_text, words)
    answered = {
        "query": [text("query", query) for query in range(queries)],
        "positives": [[text("document", number) for number in some] for some in answers],
    }
    pq.write_table(pa.table(answered), job.pairs, row_group_size=4_096)
    texts = [text("document", number) for number in range(documents)]
    pq.write_table(pa.table({"text": texts}), job.corpus, row_group_size=4_096)
    return job


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _noise(random: np.random.Generator, rows: int) -> np.ndarray:
    return _unit(random.standard_normal((rows, DIM)))


def _text(words: Sequence[str], role: str, number: int) -> str:
    """A text that says its number, and some words more."""
    random = np.random.default_rng((number, len(role)))
    some = random.integers(0, len(words), 12 if role == "query" else 40)
    return " ".join((role, str(number), *(words[int(i)] for i in some)))


def _number(text: str) -> int:
    return int(text.split(" ", 2)[1])


# ---- our side ------------------------------------------------------------------------------------


class Given:
    """Stands for a teacher: gives each text its vector out of a file."""

    def __init__(self, job: Job) -> None:
        from tercet.models.settings import Settings

        self._job = job
        self.dim, self.settings = DIM, Settings()
        self.backbone = torch.nn.Linear(1, 1)
        self.backbone.attention, self.backbone.window = "causal", None  # pyright: ignore

    def fingerprint(self) -> str:
        """What names kept vectors."""
        return str(self._job.folder)

    def encode(self, texts: Sequence[str], role: str = "document") -> np.ndarray:
        """A row a text."""
        stored = np.load(self._job.vectors(role), mmap_mode="r")
        return stored[[_number(text) for text in texts]]


def mine_here(job: Job, rule: str, out: str) -> Answer:
    """Mine by ``tercet.curate.mining.miner``."""
    from tercet.curate.mining.miner import Mining, mine
    from tercet.curate.mining.rules import MiningRule
    from tercet.data.files.documents import read_documents
    from tercet.data.files.sources import open_source
    from tercet.models.embedder import Embedder

    mining = Mining(
        rule=MiningRule(kind=cast(Any, rule), value=RULES[rule][0]),
        negatives=NEGATIVES,
        depth=DEPTH,
        at_least=NEGATIVES,
    )

    def corpus() -> Iterator[str]:
        for document in read_documents(job.corpus):
            yield document.text

    with tempfile.TemporaryDirectory(dir=job.folder) as work:
        mine(
            cast(Embedder, Given(job)),
            [open_source(job.pairs)],
            Path(out),
            mining=mining,
            documents=corpus(),
            work=Path(work),
        )
    return {}


# ---- the peer's ----------------------------------------------------------------------------------


class PeerModel:
    """As much of a SentenceTransformer as mining asks for."""

    device = torch.device("cpu")

    def __init__(self, job: Job) -> None:
        from sentence_transformers.util import dot_score, pairwise_dot_score

        self._job = job
        self.similarity, self.similarity_pairwise = dot_score, pairwise_dot_score

    def get_embedding_dimension(self) -> int:
        """Of a vector."""
        return DIM

    def encode_document(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        """All documents, which are asked for in their order."""
        return self._all(texts, "document")

    def encode_query(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        """All queries, which are asked for in their order."""
        return self._all(texts, "query")

    def _all(self, texts: Sequence[str], role: str) -> np.ndarray:
        assert [_number(text) for text in texts] == list(range(len(texts)))
        return np.load(self._job.vectors(role))


def mine_there(job: Job, rule: str, out: str, *, faiss: bool) -> Answer:
    """Mine by ``mine_hard_negatives``."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    answered = pq.read_table(job.pairs)
    each = answered["positives"].combine_chunks()
    queries = answered["query"].take(each.value_parent_indices())
    pairs = Dataset(pa.table({"query": queries, "positive": each.flatten()}))
    found = mine_hard_negatives(
        pairs,
        cast(Any, PeerModel(job)),
        corpus=pq.read_table(job.corpus)["text"].to_pylist(),
        num_negatives=NEGATIVES,
        output_format="n-tuple",
        output_scores=True,
        use_faiss=faiss,
        faiss_batch_size=16_384 if faiss else PEER_BLOCK,
        verbose=False,
        **cast(Any, RULES[rule][1]),
    )
    found.to_parquet(out)
    return {}


# ---- the filter: is a query's own document among the best it finds? ----


def _pairs(job: Job, mode: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of queries, and of as many documents, each the answer of its query."""
    queries = np.load(job.vectors("query"), mmap_mode=mode)
    return queries, np.load(job.vectors("document"), mmap_mode=mode)[: len(queries)]


def filter_here(job: Job, out: str) -> Answer:
    """Ranks by counting, of vectors that stay on the disk."""
    from tercet.curate.filtering.pair_scores import paired_ranks

    queries, documents = _pairs(job, "r")
    ranks, _ = paired_ranks(queries, documents, np.arange(len(queries), dtype=np.uint64))
    np.save(out, ranks <= TOP)
    return {}


def filter_by_faiss(job: Job, out: str) -> Answer:
    """The best of all documents by faiss, and whether the own one is among them."""
    import faiss  # pyright: ignore[reportMissingImports]  # pip install faiss-cpu

    queries, documents = _pairs(job)
    index = faiss.IndexFlatIP(DIM)
    index.add(documents)
    _, rows = index.search(queries, TOP)
    np.save(out, (rows == np.arange(len(queries))[:, None]).any(axis=1))
    return {}


def filter_by_search(job: Job, out: str) -> Answer:
    """The same by ``semantic_search`` of sentence-transformers."""
    from sentence_transformers.util import dot_score, semantic_search

    queries, documents = map(torch.from_numpy, _pairs(job))
    hits = semantic_search(queries, documents, top_k=TOP, score_function=dot_score)
    keep = [any(hit["corpus_id"] == row for hit in some) for row, some in enumerate(hits)]
    np.save(out, np.array(keep))
    return {}


# ---- both sides in turn --------------------------------------------------------------------------

DOES: Final[dict[str, Callable[..., Answer]]] = {
    "ours": mine_here,
    "peer, faiss": partial(mine_there, faiss=True),
    "peer, torch": partial(mine_there, faiss=False),
    "ours, filter": filter_here,
    "peer, filter by faiss": filter_by_faiss,
    "peer, filter by semantic_search": filter_by_search,
}


def worker(side: str) -> None:
    """Answer commands until the input ends."""
    torch.set_num_threads(1)
    if side.startswith("peer"):
        import datasets
        import faiss  # pyright: ignore[reportMissingImports]
        import sentence_transformers  # noqa: F401

        faiss.omp_set_num_threads(1)
        datasets.disable_progress_bars()
    else:
        import tercet.curate.filtering.pair_scores
        import tercet.curate.mining.miner
        import tercet.models.embedder  # noqa: F401

    def answer(do: str, folder: str, **how: Any) -> Answer:
        before = memory("VmRSS")
        return {**spent(lambda: DOES[do](Job(Path(folder)), **how)), "before": before}

    serve(answer)


def compared(job: Job, repeats: int, sides: Sequence[str], rule: str | None = None) -> list[Row]:
    """Two rows for each peer; our side is the first. Without a rule it is the filter."""
    found: dict[str, list[Answer]] = {side: [] for side in sides}
    out = {side: str(job.folder / f"{side}.{'parquet' if rule else 'npy'}") for side in sides}
    how = {"rule": rule} if rule else {}
    for _ in range(repeats):
        for side, answers in found.items():  # a fresh process: nothing is left of the last call
            process = Side(sys.executable, "-m", "benchmarks.curate_speed", "--worker", side)
            answers.append(process(side, folder=str(job.folder), out=out[side], **how))
            process.end()
    sizes = [len(np.load(job.vectors(role), mmap_mode="r")) for role in ("query", "document")]
    facts = {"queries": sizes[0], "documents": sizes[bool(rule)], "repeats": repeats}
    what, (ours, *peers) = f"mining, {rule}" if rule else f"filter, top {TOP}", sides
    rows: list[Row] = []
    for peer in peers:
        seconds = {side: min(a["seconds"] for a in found[side]) for side in (ours, peer)}
        extra = {side: min(a["peak"] - a["before"] for a in found[side]) for side in seconds}
        same, fewer = (agreement if rule else same_kept)(Path(out[ours]), Path(out[peer]))
        rows.append(
            {
                "name": f"{what}: ours / {peer}",
                "ours": seconds[ours],
                "peer": seconds[peer],
                "unit": "CPU seconds",
                "ratio": seconds[peer] / seconds[ours],
                "target": "ratio >= 1",
                "error": 1 - same,
                "queries of one side only": fewer,
                **facts,
            }
        )
        rows.append(
            {
                "name": f"memory of {what}: ours / {peer}",
                "ours": extra[ours] / 1e6,
                "peer": extra[peer] / 1e6,
                "unit": "MB above what the imports hold",
                "ratio": extra[peer] / extra[ours],
                "target": "ratio >= 3",
                "error": None,
                "whole process MB": [max(a["peak"] for a in found[s]) / 1e6 for s in seconds],
                **facts,
            }
        )
    return rows


def agreement(ours: Path, peer: Path) -> tuple[float, int]:
    """The share of queries with the same negatives; and queries that only one side has."""
    here: dict[int, frozenset[int]] = {}
    for row in pq.read_table(ours, columns=["query", "negatives"]).to_pylist():
        here[_number(row["query"])] = frozenset(map(_number, row["negatives"]))
    there: dict[int, frozenset[int]] = {}
    for row in pq.read_table(peer).to_pylist():
        some = (_number(row[f"negative_{i + 1}"]) for i in range(NEGATIVES))
        there[_number(row["query"])] = frozenset(some)
    both = here.keys() & there.keys()
    same = sum(here[query] == there[query] for query in both)
    return same / max(len(both), 1), len(here.keys() ^ there.keys())


def same_kept(ours: Path, peer: Path) -> tuple[float, int]:
    """The share of pairs of which both say the same; every pair is on both sides."""
    return float((np.load(ours) == np.load(peer)).mean()), 0


def main() -> None:
    """Prepare, compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", help="be this side")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where texts and vectors stay; None: nowhere")
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.worker)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = (chosen.work or Path(scratch)) / chosen.scale
        folder.mkdir(parents=True, exist_ok=True)
        job = Job(folder)
        if not job.corpus.exists():
            prepare(folder, *SCALES[chosen.scale])
        filters = tuple(side for side in DOES if "filter" in side)
        miners = tuple(side for side in DOES if side not in filters)
        rows = [
            row
            for rule in (RULES if chosen.scale == "small" else ("percent",))
            for row in compared(job, chosen.repeats, miners, rule)
        ]
        rows += compared(job, chosen.repeats, filters)
    name = "curate_speed" if chosen.scale == "full" else f"curate_speed_{chosen.scale}"
    write_results(name, rows, "faiss-cpu", "datasets", "numpy")


if __name__ == "__main__":
    main()
