"""Mining in several processes, on one machine or many, which share a folder.

Two jobs, one after the other: encode shards of documents into the work folder, then mine blocks of
examples into one file each. At the end these files are joined. Each process reads the documents of
all sources once.
"""

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
from tercet.curate.mining.document_pools import SHARD
from tercet.curate.mining.miner import MINED, WORK, Miner, Mining, MiningReport, outputs_of
from tercet.curate.mining.rules import MiningRule
from tercet.data.files.examples import example_record
from tercet.data.files.sources import Source, write_records
from tercet.files.artifacts import fingerprint, json_text
from tercet.files.atomic import replacing_file
from tercet.files.outputs import mark
from tercet.files.progress import bar
from tercet.files.records import readable
from tercet.models.embedder import Embedder

_VERSION: Final = 1  # of the content of a part


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMining:
    """The arguments of mining for all processes. They can be pickled."""

    load: Callable[[], Embedder] | None  # loads the teacher; BM25 needs none
    sources: Sequence[Source]
    mining: Mining
    documents: Iterable[str] = ()  # read by each process
    work: Path = WORK

    def miner(self) -> Miner:
        """Make a miner of this process, without progress bars."""
        teacher = None if self.load is None else self.load()
        no_bars = partial(bar, shown=False)
        return Miner(teacher, self.sources, self.mining, self.documents, self.work, bars=no_bars)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeDocumentsJob:
    """The job of encoding the documents of all sources, a shard at a time."""

    shared: SharedMining
    settings: Mapping[str, Any]
    name: str = "documents"

    def open(self) -> DoUnit:
        """Load the teacher; the first unit reads the documents."""
        return partial(self._do, self.shared.miner())

    def files(self, unit: WorkUnit) -> Sequence[Path]:
        """Return nothing: shards have their checksums beside them."""
        return []

    def _do(self, miner: Miner, unit: WorkUnit) -> UnitReport:
        miner.finder.prepare(miner.read().pools[unit.reads["prompt"]], unit.reads["start"])
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class MineBlocksJob:
    """The job of mining the examples of all sources, a block at a time."""

    shared: SharedMining
    rules: Sequence[MiningRule]  # of each source: a quantile is replaced by its score
    settings: Mapping[str, Any]
    parts: Path
    name: str = "mine"

    def open(self) -> DoUnit:
        """Load the teacher; the first unit reads the documents and finds their vectors."""
        return partial(self._do, self.shared.miner())

    def units(self) -> list[WorkUnit]:
        """Return the blocks of all sources, in order."""
        return [
            WorkUnit(
                f"{number}/{start:012}",
                {"source": number, "rows": [start, min(start + SHARD, len(source))]},
                size=min(SHARD, len(source) - start),
            )
            for number, source in enumerate(self.shared.sources)
            for start in range(0, len(source), SHARD)
        ]

    def files(self, unit: WorkUnit) -> Sequence[Path]:
        """Return the file with the mined rows of a block."""
        return [self.part(unit)]

    def part(self, unit: WorkUnit) -> Path:
        """Return the file with the mined rows of a block."""
        return self.parts / f"{unit.name}.jsonl"

    def _do(self, miner: Miner, unit: WorkUnit) -> UnitReport:
        number = unit.reads["source"]
        source = self.shared.sources[number]
        report = MiningReport(source=source.name, rule=self.rules[number])
        mined = miner.mined(source.examples(range(*unit.reads["rows"])), report)
        with replacing_file(self.part(unit)) as fresh, fresh.open("w", encoding="utf-8") as file:
            for example in mined:
                file.write(json_text(example_record(example), indent=None))
        return {key: value for key, value in asdict(report).items() if key not in _OF_SOURCE}


_OF_SOURCE: Final = ("source", "rule")


def mine_together(shared: SharedMining, out: Path, runner: Runner) -> list[MiningReport]:
    """Do what :func:`tercet.curate.mining.miner.mine` does, in the processes of a runner.

    A run that was killed continues with the missing shards and blocks. Errors are as there, and a
    RecipeError if another process does the same mining.
    """
    sources = shared.sources
    outputs = outputs_of(out, sources)
    with closing(shared.miner()) as miner:
        settings = _settings(shared, miner)
        about = json.dumps(settings, sort_keys=True, ensure_ascii=False)
        parts = shared.work / f"parts-{fingerprint(about, size=12)}"
        encoding = EncodeDocumentsJob(shared=shared, settings=settings)
        if shared.mining.by != "bm25":  # whose words are counted by each process
            for _ in run_units(encoding, _shards(miner), parts / "documents", runner=runner):
                pass
        reports = [miner.report(source) for source in sources]
    rules = [report.rule for report in reports]
    job = MineBlocksJob(
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
        if path != out:
            mark(out, MINED)
        of_group = [part for source in group for part in paths[sources.index(source)]]
        write_records(path, _joined(of_group), {})
    shutil.rmtree(parts, ignore_errors=True)
    return reports


def _shards(miner: Miner) -> list[WorkUnit]:
    """Return all shards of documents; their texts depend on the sources in the settings."""
    return [
        WorkUnit(
            f"{number}/{start:012}",
            {"prompt": prompt, "start": start},
            size=min(SHARD, len(pool) - start),
        )
        for number, (prompt, pool) in enumerate(miner.read().pools.items())
        for start in range(0, len(pool), SHARD)
    ]


def _settings(shared: SharedMining, miner: Miner) -> dict[str, Any]:
    """Return all that the mined rows depend on; keys of documents stand for their texts."""
    keys = b"".join(pool.keys.tobytes() for pool in miner.read().pools.values())
    teacher, about = miner.teacher, None
    if teacher is not None:
        backbone = teacher.backbone
        how = backbone.attention, backbone.window, next(backbone.parameters()).dtype
        about = [teacher.fingerprint(), *map(str, how)]
    return {
        "version": _VERSION,
        "teacher": about,
        "sources": [source.fingerprint for source in shared.sources],
        "documents": fingerprint(keys),
        "mining": asdict(shared.mining),
    }


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
            yield from map(json.loads, lines)
