"""Mining by several processes, on one machine or on many, which share a folder.

Two jobs, one after the other: shards of documents are encoded, into the folder where all mining
finds them; then blocks of examples are mined, each into a part file. At the end the parts are
joined. Each process reads the documents of all sources once, as mining by one process does.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tercet.curate.jobs.job import DoUnit, UnitReport, WorkUnit, run_units
from tercet.curate.jobs.runners import Runner
from tercet.curate.mining.documents import SHARD
from tercet.curate.mining.mine import WORK, Miner, Mining, MiningReport, outputs_of
from tercet.curate.mining.rules import MiningRule
from tercet.data.files.examples import example_record
from tercet.data.files.sources import Source, write_records
from tercet.files.atomic import replacing_file
from tercet.files.progress import bar
from tercet.files.records import readable
from tercet.models.embedder import Embedder

_VERSION: Final = 1  # of what is in a part


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all processes mine with. It can be pickled."""

    load: Callable[[], Embedder] | None  # the teacher; BM25 does without
    sources: Sequence[Source]
    mining: Mining
    corpus: Iterable[str] = ()  # read anew by each process
    work: Path = WORK

    def miner(self) -> Miner:
        """A miner of this process, without bars of its own."""
        teacher = None if self.load is None else self.load()
        hidden = partial(bar, shown=False)
        return Miner(teacher, self.sources, self.mining, self.corpus, self.work, bars=hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingDocuments:
    """The job of encoding the documents of all sources, a shard at a time."""

    shared: Shared
    settings: Mapping[str, Any]
    name: str = "documents"

    def open(self) -> DoUnit:
        """The documents are read."""
        return partial(self._do, self.shared.miner())

    def _do(self, miner: Miner, unit: WorkUnit) -> UnitReport:
        miner.finder.prepare(miner.collection.pools[unit.reads["prompt"]], unit.reads["start"])
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class MiningBlocks:
    """The job of mining the examples of all sources, a block at a time."""

    shared: Shared
    rules: Sequence[MiningRule]  # of each source: a quantile has become a score
    settings: Mapping[str, Any]
    parts: Path
    name: str = "mine"

    def open(self) -> DoUnit:
        """The documents are read, and their vectors found."""
        return partial(self._do, self.shared.miner())

    def units(self) -> list[WorkUnit]:
        """The blocks of all sources, in order."""
        return [
            WorkUnit(
                f"{number}/{start:012}",
                {"source": number, "rows": [start, min(start + SHARD, len(source))]},
                size=min(SHARD, len(source) - start),
            )
            for number, source in enumerate(self.shared.sources)
            for start in range(0, len(source), SHARD)
        ]

    def part(self, unit: WorkUnit) -> Path:
        """Where the mined rows of a block are."""
        return self.parts / f"{unit.name}.jsonl"

    def _do(self, miner: Miner, unit: WorkUnit) -> UnitReport:
        number = unit.reads["source"]
        source = self.shared.sources[number]
        report = MiningReport(source=source.name, rule=self.rules[number])
        mined = miner.mined(source.examples(range(*unit.reads["rows"])), report)
        with replacing_file(self.part(unit)) as fresh, fresh.open("w", encoding="utf-8") as file:
            for example in mined:
                file.write(json.dumps(example_record(example), ensure_ascii=False) + "\n")
        return {key: value for key, value in asdict(report).items() if key not in _OF_SOURCE}


_OF_SOURCE: Final = ("source", "rule")


def mine_together(shared: Shared, out: Path, runner: Runner) -> list[MiningReport]:
    """Do what :func:`tercet.curate.mining.mine.mine` does, in the processes of a runner.

    A killed run goes on with the shards and the blocks that are missing.

    Raises:
        RecipeError: as there, or when another process is at the same mining.
        DataError: when a source has changed since it was opened.
        ModelError: when the teacher gives vectors that are no numbers.
        StorageError: when the disk refuses; a file that was there before is still there.
    """
    sources = shared.sources
    outputs = outputs_of(out, sources)
    with closing(shared.miner()) as miner:
        settings = _settings(shared, miner)
        told = json.dumps(settings, sort_keys=True, ensure_ascii=False)
        parts = shared.work / f"parts-{hashlib.blake2b(told.encode(), digest_size=12).hexdigest()}"
        encoding = EncodingDocuments(shared=shared, settings=settings)
        if shared.mining.by != "bm25":  # words are counted where they are needed
            _all(run_units(encoding, _shards(miner), parts / "documents", runner=runner))
        reports = [miner.report(source) for source in sources]
    rules = [report.rule for report in reports]
    job = MiningBlocks(
        shared=shared,
        rules=rules,
        settings={**settings, "rules": [asdict(rule) for rule in rules]},
        parts=parts / "rows",
    )
    paths: list[list[Path]] = [[] for _ in sources]
    for unit, found in run_units(job, job.units(), parts / "blocks", runner=runner):
        number = unit.reads["source"]
        paths[number].append(job.part(unit))
        _add(reports[number], found)
    for path, group in outputs:
        of_group = [part for source in group for part in paths[sources.index(source)]]
        write_records(path, _joined(of_group), {})
    shutil.rmtree(parts, ignore_errors=True)
    return reports


def _shards(miner: Miner) -> list[WorkUnit]:
    """All shards of documents; their texts hang on the sources, which the settings name."""
    return [
        WorkUnit(
            f"{number}/{start:012}",
            {"prompt": prompt, "start": start},
            size=min(SHARD, len(pool) - start),
        )
        for number, (prompt, pool) in enumerate(miner.collection.pools.items())
        for start in range(0, len(pool), SHARD)
    ]


def _settings(shared: Shared, miner: Miner) -> dict[str, Any]:
    """What the mined rows hang on; the collection stands for the texts of the corpus too."""
    digest = hashlib.blake2b(digest_size=16)
    for pool in miner.collection.pools.values():
        digest.update(pool.keys.tobytes())
    teacher, about = miner.teacher, None
    if teacher is not None:
        backbone = teacher.backbone
        how = backbone.attention, backbone.window, next(backbone.parameters()).dtype
        about = [teacher.fingerprint(), *map(str, how)]
    return {
        "version": _VERSION,
        "teacher": about,
        "sources": [source.fingerprint for source in shared.sources],
        "documents": digest.hexdigest(),
        "mining": asdict(shared.mining),
    }


def _all(units: Iterator[tuple[WorkUnit, UnitReport]]) -> None:
    for _ in units:
        pass


def _add(report: MiningReport, found: UnitReport) -> None:
    for name, value in found.items():
        if name == "dropped":
            for reason, count in value.items():
                report.dropped[reason] += count
        else:
            setattr(report, name, getattr(report, name) + value)


def _joined(parts: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for part in parts:
        with readable(part), part.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
