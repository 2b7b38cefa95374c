"""Ranking pairs: cut them into shards, embed and rank each shard, write the pairs that are kept."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float32, Int32, Int64, Shaped, UInt64

from tercet.curate.filtering.pair_rules import KEPT, RANK, PairRules
from tercet.curate.filtering.pair_scores import paired_ranks
from tercet.curate.filtering.screen import ScreenedPairs, SourceLanguage
from tercet.curate.jobs.job import DoUnit, UnitReport, WorkUnit
from tercet.curate.mining.document_pools import SHARD, StoredVectors
from tercet.data.files.examples import example_record
from tercet.data.files.sources import Source, write_records
from tercet.errors import RecipeError
from tercet.files.arrays import mapped_array
from tercet.files.artifacts import fingerprint, write_arrays
from tercet.files.atomic import replacing_file
from tercet.files.checksums import is_whole_archive, note_damage
from tercet.files.progress import bar
from tercet.files.records import readable
from tercet.models.devices import find_device
from tercet.models.embedder import Embedder

WORK: Final = Path("runs/filter")
LEVELS: Final = (1, 2, 3, 5, 10, 20, 30)  # values of k for which reports count the kept pairs
MORE_COLUMNS: Final = {"rank": pa.list_(pa.int32()), "score": pa.list_(pa.float32())}
_VERSION: Final = 1  # of the content of a shard's folder
_VERDICT: Final = pa.schema(
    {
        "row": pa.int64(),  # of the source, from 0
        "positive": pa.int32(),  # of the row, from 0
        "keep": pa.bool_(),
        "rank": pa.int32(),  # null: dropped by a rule before the model
        "score": pa.float32(),
        "reason": pa.string(),  # the rule that dropped it, "rank", or "" for kept pairs
    }
)


# ---- shards of pairs -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtering:
    """Which pairs are kept.

    Raises:
        RecipeError: for numbers that keep nothing or everything.
    """

    k: int = 20  # the worst rank that is kept
    top_share: float | None = None  # instead of k: this share of the shard, at least one pair
    shard: int = 3_000_000  # pairs that are compared with each other
    seed: int = 0  # of the shuffle
    rules: PairRules = field(default_factory=PairRules)

    def __post_init__(self) -> None:
        if self.k < 1 or self.shard < 1:
            raise RecipeError(f"k and shard must be at least 1; got k={self.k}, shard={self.shard}")
        if self.k >= self.shard and self.top_share is None:
            raise RecipeError(
                f"k must be below shard, or all pairs are kept; got k={self.k}, shard={self.shard}"
            )
        if self.top_share is not None and not 0 < self.top_share < 1:
            raise RecipeError(f"top_share must be between 0 and 1; got {self.top_share:g}")

    def level(self, size: int) -> int:
        """Return the worst rank that is kept in a shard of ``size`` pairs."""
        return self.k if self.top_share is None else max(1, round(self.top_share * size))


PRESETS: Final = {
    "arctic": Filtering(k=20, shard=3_000_000),  # arXiv 2412.04506
    "e5": Filtering(k=2, shard=1_000_000),  # arXiv 2212.03533
    "nomic": Filtering(k=2, shard=1_000_000),  # arXiv 2402.01613
}


@dataclass(frozen=True, slots=True, eq=False)
class PairShard:
    """Pairs that are compared with each other, by row and positive."""

    rows: Int64[np.ndarray, "pairs"]
    positives: Int32[np.ndarray, "pairs"]
    texts: UInt64[np.ndarray, "pairs"]

    @property
    def digest(self) -> str:
        """A fingerprint of the pairs."""
        arrays = (self.rows, self.positives, self.texts)
        return fingerprint(b"".join(array.tobytes() for array in arrays), size=12)


def shards_of(found: ScreenedPairs, filtering: Filtering) -> list[PairShard]:
    """Shuffle the remaining pairs and cut them into shards of equal size, each in file order.

    There are max(1, round(pairs / shard)) shards: a short last one would be an easier test. The
    positives of a row stay together.
    """
    left = np.flatnonzero(found.left)
    rows = np.unique(found.rows[left])
    count = min(max(1, round(len(left) / filtering.shard)), max(len(rows), 1))
    seed = [filtering.seed, crc32(found.key.folder.encode())]
    shard_of_row = np.empty(len(rows), np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    for number, part in enumerate(np.array_split(shuffled, count)):
        shard_of_row[part] = number
    shard_of = shard_of_row[np.searchsorted(rows, found.rows[left])]
    parts = [left[shard_of == number] for number in range(count)]
    return [
        PairShard(found.rows[part], found.positives[part], found.texts[part])
        for part in parts
        if len(part)
    ]


# ---- ranking a shard -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """The model that ranks, by name: each process loads it itself."""

    model: str
    precision: str = "float32"
    device: str | None = None  # None: a GPU, if there is one
    batch_tokens: int | None = None  # tokens that are encoded together; None: as usual
    query_tokens: int | None = None  # longer queries are cut; None: the model's own limit
    document_tokens: int | None = None

    def load(self) -> Embedder:
        """Load the model."""
        limits = {"query_tokens": self.query_tokens, "document_tokens": self.document_tokens}
        changes: dict[str, Any] = {name: n for name, n in limits.items() if n is not None}
        embedder = Embedder.load(self.model, dtype=getattr(torch, self.precision), **changes)
        embedder.to(find_device(self.device))
        if self.batch_tokens is not None:
            embedder.batch_tokens = self.batch_tokens
        return embedder


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterFolders:
    """Where the filter writes."""

    out: Path
    work: Path = WORK
    keep_vectors: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeJob:
    """The job of ranking the pairs of each shard and writing those that are kept.

    Ranks stay in the work folder: with another ``k``, nothing is encoded.
    """

    judge: Judge
    fingerprint: str  # of the judge's model
    sources: Mapping[str, Source]  # by name
    filtering: Filtering
    folders: FilterFolders
    name: str = "filter"

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the kept pairs depend on, besides the texts."""
        k, share = self.filtering.k, self.filtering.top_share
        return {**self._rank_settings, "k": k if share is None else None, "top_share": share}

    @property
    def _rank_settings(self) -> Mapping[str, Any]:
        return {"version": _VERSION, "model": self.fingerprint, "in": self.judge.precision}

    def open(self) -> DoUnit:
        """Return a function that ranks a shard; it loads the model when it first needs it."""
        return _ShardRanker(self).do

    def files(self, unit: WorkUnit) -> Sequence[Path]:
        """Return the files with the verdicts and the kept pairs of a shard."""
        return [self.folders.out / name / unit.reads["to"] for name in ("verdicts", "pairs")]

    def unit(self, key: SourceLanguage, number: int, shard: PairShard) -> WorkUnit:
        """Make the unit of a shard, and write its pairs for the process that ranks it."""
        name = f"{key.folder}/{number:04}"
        reads = {
            "source": self.sources[key.source].fingerprint,
            "of": key.source,
            "to": f"{name}.parquet",
            "pairs": shard.digest,
        }
        unit = WorkUnit(name, reads, size=len(shard.rows))
        path = self.folder(unit) / "pairs.npz"
        if not is_whole_archive(path):
            arrays = {"rows": shard.rows, "positives": shard.positives, "texts": shard.texts}
            write_arrays(path, arrays)
        return unit

    def folder(self, unit: WorkUnit) -> Path:
        """Return the folder with the pairs, ranks and, for a while, vectors of a shard."""
        about = json.dumps([self._rank_settings, unit.reads["source"], unit.reads["pairs"]])
        return self.folders.work / "shards" / fingerprint(about, size=12)


class _ShardRanker:
    """Ranks shards in one process."""

    def __init__(self, job: JudgeJob) -> None:
        self.job = job

    @cached_property
    def embedder(self) -> Embedder:
        """The model, loaded when it is first needed."""
        return self.job.judge.load()

    def do(self, unit: WorkUnit) -> UnitReport:
        """Rank a shard; write its verdicts and the pairs that are kept."""
        job, to = self.job, unit.reads["to"]
        path = job.folder(unit) / "pairs.npz"
        with readable(path), np.load(path) as found:
            shard = PairShard(found["rows"], found["positives"], found["texts"])
        if shard.digest != unit.reads["pairs"]:
            raise RecipeError(f"{path}: holds other pairs; delete it, and call the filter again")
        ranks, scores = self._ranks(unit, shard)
        level = job.filtering.level(len(ranks))
        keep = ranks <= level
        path = job.folders.out / "verdicts" / to
        write_verdicts(path, shard, ranks, scores, np.where(keep, KEPT, RANK))
        pairs = job.folders.out / "pairs" / to
        pairs.unlink(missing_ok=True)  # left by a killed run; without rows no file is written
        source = job.sources[unit.reads["of"]]
        if keep.any():
            write_records(pairs, _kept_records(source, shard, ranks, scores, keep), MORE_COLUMNS)
        return {
            "pairs": len(ranks),
            "k": level,
            "kept": int(keep.sum()),
            "rows": len(np.unique(shard.rows[keep])),
            "levels": {str(k): int((ranks <= k).sum()) for k in LEVELS},
            "score_total": float(scores.astype(np.float64).sum()),
        }

    def _ranks(
        self, unit: WorkUnit, shard: PairShard
    ) -> tuple[Int32[np.ndarray, "pairs"], Float32[np.ndarray, "pairs"]]:
        folder = self.job.folder(unit)
        path = folder / "ranks.npz"
        if is_whole_archive(path):
            with readable(path), np.load(path) as found:
                if "of" not in found.files or str(found["of"]) == folder.name:
                    return found["rank"], found["score"]
        if path.exists():
            note_damage(path)
        source = self.job.sources[unit.reads["of"]]
        rows, owners = np.unique(shard.rows, return_inverse=True)
        queries, documents = self._encode(source, shard, rows, folder / "vectors", unit.name)
        with bar(f"rank {unit.name}", len(owners)) as advance:
            ranks, scores = paired_ranks(
                queries,
                documents,
                shard.texts,
                owners=owners,
                device=self.embedder.device,
                advance=advance,
            )
        write_arrays(path, {"rank": ranks, "score": scores, "of": np.array(folder.name)})
        if not self.job.folders.keep_vectors:
            shutil.rmtree(folder / "vectors", ignore_errors=True)
        return ranks, scores

    def _encode(
        self,
        source: Source,
        shard: PairShard,
        rows: Int64[np.ndarray, "rows"],
        folder: Path,
        name: str,
    ) -> tuple["_StackedFiles", "_StackedFiles"]:
        """Encode queries and documents into files of 4,096 rows: a kill loses at most one."""
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
        return _StackedFiles(files[0]), _StackedFiles(files[1])


class _StackedFiles:
    """Vectors in several files, read as one array."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        shapes = [mapped_array(path).shape for path in paths]
        self._ends = np.cumsum([0, *(rows for rows, _ in shapes)])
        self.shape = int(self._ends[-1]), shapes[0][1]

    def __getitem__(self, part: slice, /) -> np.ndarray:
        start, stop, _ = part.indices(self.shape[0])
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        found = []
        for path, begin in zip(self._paths[first:], self._ends[first:].tolist(), strict=False):
            if begin >= stop:
                break
            found.append(mapped_array(path)[max(start - begin, 0) : stop - begin])
        return np.concatenate(found)


def write_verdicts(
    path: Path,
    shard: PairShard,
    ranks: Int32[np.ndarray, "pairs"] | None,
    scores: Float32[np.ndarray, "pairs"] | None,
    reasons: Shaped[np.ndarray, "pairs"],
) -> None:
    """Write a row per pair: its place, rank and score, whether it is kept, and why not."""
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


def _kept_records(
    source: Source,
    shard: PairShard,
    ranks: Int32[np.ndarray, "pairs"],
    scores: Float32[np.ndarray, "pairs"],
    keep: Bool[np.ndarray, "pairs"],
) -> Iterator[dict[str, Any]]:
    """Yield the rows that keep a positive, with their kept positives, ranks and scores."""
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
