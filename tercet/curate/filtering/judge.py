"""The work on one shard of pairs: embed them, rank them, and write those that are kept."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float32, Int32, Int64, Shaped

from tercet.curate.filtering.pair_rules import KEPT, RANK
from tercet.curate.filtering.pair_scores import paired_ranks
from tercet.curate.filtering.passing import LEVELS, Filtering, Shard, save_arrays
from tercet.curate.filtering.screen import Key
from tercet.curate.jobs.job import DoUnit, UnitReport, WorkUnit
from tercet.curate.mining.documents import SHARD, StoredVectors
from tercet.data.files.examples import example_record
from tercet.data.files.sources import Source, write_records
from tercet.files.atomic import replacing_file
from tercet.files.progress import bar
from tercet.files.records import readable
from tercet.models.embedder import Embedder

WORK: Final = Path("runs/filter")
MORE_COLUMNS: Final = {"rank": pa.list_(pa.int32()), "score": pa.list_(pa.float32())}
_VERSION: Final = 1  # of what a folder of ranks says
_VERDICT: Final = pa.schema(
    {
        "row": pa.int64(),  # of the source, from 0
        "positive": pa.int32(),  # which of the row's, from 0
        "keep": pa.bool_(),
        "rank": pa.int32(),  # null: dropped by a rule, before the model
        "score": pa.float32(),
        "reason": pa.string(),  # the rule that dropped it, "rank", or "" for one that is kept
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """The model that ranks, by name, so that each process loads its own."""

    model: str
    precision: str = "float32"
    query_tokens: int | None = None  # a longer text is cut; None: the model's own
    document_tokens: int | None = None

    def load(self) -> Embedder:
        """The embedder.

        Raises:
            ModelError: when there is no such model.
        """
        limits = {"query_tokens": self.query_tokens, "document_tokens": self.document_tokens}
        changes: dict[str, Any] = {name: n for name, n in limits.items() if n is not None}
        embedder = Embedder.load(self.model, dtype=getattr(torch, self.precision), **changes)
        return embedder.to("cuda") if torch.cuda.is_available() else embedder


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the filter reads and writes."""

    out: Path
    work: Path = WORK
    keep_vectors: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """The job of ranking the pairs of each shard, and writing those that are kept.

    Ranks stay in the work folder, named by all that they hang on: another ``k`` embeds nothing.
    """

    judge: Judge
    fingerprint: str  # of the judge's model
    sources: Mapping[str, Source]  # by name
    filtering: Filtering
    places: Places
    name: str = "filter"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the kept pairs hang on, besides the texts."""
        k, share = self.filtering.k, self.filtering.top_share
        return {**self._of_ranks, "k": k if share is None else None, "top_share": share}

    @property
    def _of_ranks(self) -> Mapping[str, Any]:
        return {"version": _VERSION, "model": self.fingerprint, "in": self.judge.precision}

    def open(self) -> DoUnit:
        """The model is loaded when a shard is met that has no ranks yet."""
        return _Worker(self).do

    def unit(self, key: Key, number: int, shard: Shard) -> WorkUnit:
        """A unit for a shard, whose pairs are written for the process that does it."""
        source = self.sources[key.source]
        reads = {
            "source": source.fingerprint,
            "of": key.source,
            "to": f"{key.folder}/{number:04}.parquet",
            "pairs": shard.digest,
        }
        unit = WorkUnit(f"{key.folder}/{number:04}", reads, size=len(shard.rows))
        if not (path := self.folder(unit) / "pairs.npz").exists():
            shard.write(path)
        return unit

    def folder(self, unit: WorkUnit) -> Path:
        """Where the pairs of a shard, its vectors for a while, and its ranks are."""
        told = json.dumps([self._of_ranks, unit.reads["source"], unit.reads["pairs"]])
        name = hashlib.blake2b(told.encode(), digest_size=12).hexdigest()
        return self.places.work / "shards" / name


class _Worker:
    """Does shards, in one process."""

    def __init__(self, job: Judging) -> None:
        self.job = job

    @cached_property
    def embedder(self) -> Embedder:
        """The model, loaded when it is first needed."""
        return self.job.judge.load()

    def do(self, unit: WorkUnit) -> UnitReport:
        """Rank a shard, and write its verdicts and the pairs that are kept."""
        job, to = self.job, unit.reads["to"]
        shard = Shard.read(job.folder(unit) / "pairs.npz")
        ranks, scores = self._ranks(unit, shard)
        level = job.filtering.level(len(ranks))
        keep = ranks <= level
        reasons = np.where(keep, KEPT, RANK)
        write_verdicts(job.places.out / "verdicts" / to, shard, ranks, scores, reasons)
        pairs = job.places.out / "pairs" / to
        pairs.unlink(missing_ok=True)  # of a run that was killed; without rows there is no file
        source = job.sources[unit.reads["of"]]
        if keep.any():
            write_records(pairs, _kept(source, shard, ranks, scores, keep), MORE_COLUMNS)
        return {
            "pairs": len(ranks),
            "k": level,
            "kept": int(keep.sum()),
            "rows": len(np.unique(shard.rows[keep])),
            "levels": {str(k): int((ranks <= k).sum()) for k in LEVELS},
            "score_total": float(scores.astype(np.float64).sum()),
        }

    def _ranks(
        self, unit: WorkUnit, shard: Shard
    ) -> tuple[Int32[np.ndarray, "pairs"], Float32[np.ndarray, "pairs"]]:
        folder, keep = self.job.folder(unit), self.job.places.keep_vectors
        path = folder / "ranks.npz"
        if path.exists():
            with readable(path), np.load(path) as found:
                return found["rank"], found["score"]
        source = self.job.sources[unit.reads["of"]]
        rows, owners = np.unique(shard.rows, return_inverse=True)
        queries, documents = self._embed(source, shard, rows, folder / "vectors", unit.name)
        with bar(f"rank {unit.name}", len(owners)) as advance:
            ranks, scores = paired_ranks(
                queries,
                documents,
                shard.texts,
                owners=owners,
                device=self.embedder.device,
                advance=advance,
            )
        save_arrays(path, rank=ranks, score=scores)
        if not keep:
            shutil.rmtree(folder / "vectors", ignore_errors=True)
        return ranks, scores

    def _embed(
        self,
        source: Source,
        shard: Shard,
        rows: Int64[np.ndarray, "rows"],
        folder: Path,
        name: str,
    ) -> tuple["_Files", "_Files"]:
        """Vectors of the queries and of the documents, in files of 4,096 rows: a kill loses one."""
        vectors, settings = StoredVectors(self.embedder, folder), self.embedder.settings
        prompts = settings.prompt("query"), settings.prompt("document")
        files: tuple[list[Path], list[Path]] = [], []
        with bar(f"embed {name}", len(rows)) as advance:
            for block in _blocks(rows):
                examples = source.examples(block.tolist())
                first, last = np.searchsorted(shard.rows, [block[0], block[-1] + 1])
                owners = np.searchsorted(block, shard.rows[first:last])
                pairs = zip(owners.tolist(), shard.positives[first:last].tolist(), strict=True)
                documents = [examples[owner].positives[positive] for owner, positive in pairs]
                queries = [example.query for example in examples]
                files[0].append(vectors.shard(queries, "query", prompts[:1] * len(queries)))
                files[1].append(vectors.shard(documents, "document", prompts[1:] * len(documents)))
                advance(len(block))
        return _Files(files[0]), _Files(files[1])


class _Files:
    """Vectors in several files, as if they were one array."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        shapes = [_mapped(path).shape for path in paths]
        self._ends = np.cumsum([0, *(rows for rows, _ in shapes)])
        self.shape = int(self._ends[-1]), shapes[0][1]

    def __getitem__(self, part: slice, /) -> np.ndarray:
        start, stop, _ = part.indices(self.shape[0])
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        found = []
        for path, begin in zip(self._paths[first:], self._ends[first:].tolist(), strict=False):
            if begin >= stop:
                break
            found.append(_mapped(path)[max(start - begin, 0) : stop - begin])
        return np.concatenate(found)


def write_verdicts(
    path: Path,
    shard: Shard,
    ranks: Int32[np.ndarray, "pairs"] | None,
    scores: Float32[np.ndarray, "pairs"] | None,
    reasons: Shaped[np.ndarray, "pairs"],
) -> None:
    """Write a row for each pair: where it stands, whether it is kept, and why not.

    Raises:
        StorageError: when the disk refuses.
    """
    absent = [None] * len(reasons)
    columns = {
        "row": shard.rows,
        "positive": shard.positives,
        "keep": reasons == KEPT,
        "rank": absent if ranks is None else ranks,
        "score": absent if scores is None else scores,
        "reason": reasons.tolist(),
    }
    with replacing_file(path) as fresh:
        pq.write_table(pa.table(columns, _VERDICT), fresh)


def _kept(
    source: Source,
    shard: Shard,
    ranks: Int32[np.ndarray, "pairs"],
    scores: Float32[np.ndarray, "pairs"],
    keep: Bool[np.ndarray, "pairs"],
) -> Iterator[dict[str, Any]]:
    """The records of rows that keep a positive: those that they keep, with ranks and scores."""
    places = np.flatnonzero(keep)
    rows = shard.rows[places]
    for block in _blocks(np.unique(rows)):
        for row, example in zip(block.tolist(), source.examples(block.tolist()), strict=True):
            first, last = np.searchsorted(rows, [row, row + 1])
            own = places[first:last]
            kept = shard.positives[own].tolist()
            record = example_record(example)
            for name in ("positives", "positive_scores"):
                if name in record:
                    record[name] = [record[name][positive] for positive in kept]
            yield {**record, "rank": ranks[own].tolist(), "score": scores[own].tolist()}


def _blocks(rows: Int64[np.ndarray, "rows"]) -> Iterator[Int64[np.ndarray, "some"]]:
    for start in range(0, len(rows), SHARD):
        yield rows[start : start + SHARD]


def _mapped(path: Path) -> np.ndarray:
    with readable(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)
