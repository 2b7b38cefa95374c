"""The consistency filter: keep pairs whose document ranks near the top of a shard for its query.

arXiv 2412.04506, sec. 3.2: the pairs of each source and language are shuffled and cut into shards,
a small model embeds them, and a pair is kept if its document is one of the ``k`` best of its shard
for its query. Rules that need no model come first (``tercet.curate.filtering.pair_rules``).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from tercet.curate.filtering.judge import (
    LEVELS,
    FilterFolders,
    Filtering,
    Judge,
    JudgeJob,
    PairShard,
    shards_of,
    write_verdicts,
)
from tercet.curate.filtering.pair_rules import RANK, RULES
from tercet.curate.filtering.screen import ScreenedPairs, ScreenJob, screen_sources
from tercet.curate.jobs.job import UnitReport, WorkUnit, run_units
from tercet.curate.jobs.runners import LOOP, Runner
from tercet.data.files.examples import ExampleFields
from tercet.data.files.sources import Source, refuse_scored
from tercet.errors import RecipeError
from tercet.files.artifacts import json_text, write_json
from tercet.files.checksums import (
    altered,
    checksums,
    note_absence,
    note_damage,
    sealed,
    unsealed,
)
from tercet.files.outputs import FolderKind, holds_only, json_object, mark
from tercet.models.zoo import zoo

SETTINGS: Final = "filter.json"
REPORT: Final = "report.json"
_SPEED_ONLY: Final = ("device", "batch_tokens")  # settings of a judge that change no verdict
DRAWING: Final = "report.png"
_RESULTS: Final = ("pairs", "verdicts")
_OURS: Final = (*(f"{name}/*" for name in (*_RESULTS, "manifest")), REPORT, SETTINGS, DRAWING)


def _is_older(folder: Path) -> bool:
    known = {"sources", "judge", "filtering"} <= json_object(folder / SETTINGS).keys()
    return known and holds_only(folder, _OURS)


FILTERED: Final = FolderKind(
    "a folder of filtered pairs", shared=True, is_data=True, is_older=_is_older
)


def filter_sources(
    sources: Sequence[Source],
    judge: Judge,
    filtering: Filtering,
    folders: FilterFolders,
    *,
    runner: Runner = LOOP,
) -> list[dict[str, Any]]:
    """Write the pairs that pass and a verdict on each; return a report per source and language.

    A run that was killed continues with the missing shards and, inside a shard, the missing
    vectors.

    Raises:
        RecipeError: if no pair is left, or two sources have the same name.
        DataError: if a source has changed since it was opened.
        ModelError: if the model's vectors contain NaN or infinity.
        StorageError: if the disk refuses.
    """
    refuse_scored(sources, "the filter")
    named = {source.name: source for source in sources}
    if len(named) < len(sources):
        raise RecipeError("two sources have the same name, so the same folder; rename one")
    screening = ScreenJob(sources=named, rules=filtering.rules, work=folders.work)
    job = JudgeJob(
        judge=judge,
        fingerprint=judge.load().fingerprint(),
        sources=named,
        filtering=filtering,
        folders=folders,
    )
    reports: dict[str, dict[str, Any]] = {}
    units: list[tuple[str, WorkUnit]] = []
    for found in screen_sources(screening, folders.work / "manifest", runner):
        _write_dropped(found, folders.out)
        shards, folder = shards_of(found, filtering), found.key.folder
        units += [(folder, job.unit(found.key, n, shard)) for n, shard in enumerate(shards)]
        reports[folder] = _new_report(found, len(shards))
    if not units:
        totals = [(rule, sum(r["dropped"][rule] for r in reports.values())) for rule in RULES]
        dropped = ", ".join(f"{rule} {count:,}" for rule, count in totals if count)
        raise RecipeError(
            f"no pair is left by the rules: {dropped or 'there are no pairs'}; leave some out "
            "(--without), or change their numbers"
        )
    done = run_units(job, [unit for _, unit in units], folders.out / "manifest", runner=runner)
    for (folder, _), (_, of_shard) in zip(units, done, strict=True):
        _add(reports[folder], of_shard)
    return list(reports.values())


def _write_dropped(found: ScreenedPairs, out: Path) -> None:
    """Write the verdicts on pairs that a rule dropped; they are in no shard."""
    dropped = ~found.left
    if dropped.any():
        shard = PairShard(found.rows[dropped], found.positives[dropped], found.texts[dropped])
        reasons = np.array(RULES)[found.reasons[dropped] - 1]
        path = out / "verdicts" / found.key.folder / "rules.parquet"
        write_verdicts(path, shard, None, None, reasons)


def _new_report(found: ScreenedPairs, shards: int) -> dict[str, Any]:
    """Return the report on a source and language before its shards are ranked."""
    left = int(found.left.sum())
    return {
        "source": found.key.base,
        "lang": found.key.lang,
        "pairs": len(found.rows),
        "dropped": {**found.dropped, RANK: 0},
        "ranked": left,
        "shards": shards,
        "shard": -(-left // max(shards, 1)),
        "k": 0,
        "kept": 0,
        "rows": 0,
        "levels": {str(k): 0 for k in LEVELS},
        "score": 0.0,  # mean over the ranked pairs
    }


def _add(report: dict[str, Any], of_shard: UnitReport) -> None:
    report["k"] = max(report["k"], of_shard["k"])
    report["dropped"][RANK] += of_shard["pairs"] - of_shard["kept"]
    report["score"] += of_shard["score_total"] / report["ranked"]
    for name in ("kept", "rows"):
        report[name] += of_shard[name]
    for k, count in of_shard["levels"].items():
        report["levels"][k] += count


# ---- the output folder ---------------------------------------------------------------------------


def settings_of(
    paths: Sequence[Path], judge: Judge, filtering: Filtering, fields: ExampleFields | None = None
) -> dict[str, Any]:
    """Return all that the output depends on; files by name, size and time, which is quick."""
    is_name = zoo.find(judge.model) is not None or not Path(judge.model).exists()
    kept = {name: it for name, it in asdict(judge).items() if name not in _SPEED_ONLY}
    settings = {
        "sources": {str(path): _file_stamps(path) for path in paths},
        "judge": {**kept, "files": [] if is_name else _file_stamps(Path(judge.model))},
        "filtering": asdict(filtering),
    }
    if fields is not None:
        settings["fields"] = asdict(fields)
    return json.loads(json_text(settings))  # as it will be read: tuples have become lists


def finished(out: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the reports if the same command has finished; else write the settings and None.

    Raises:
        RecipeError: if the folder holds the output of another command.
        StorageError: if the disk refuses.
    """
    before, ranked = json_object(out / SETTINGS) or None, (out / "manifest").exists()
    if before is not None and ranked and before != settings:
        raise RecipeError(
            f"{out}: was made with different {_differences(before, settings)}; choose another "
            "--out (vectors are reused), or delete the folder"
        )
    report = _report(out) if before == settings else None
    if report is None:
        if not ranked:  # verdicts by other rules, with which nothing was ranked
            shutil.rmtree(out / "verdicts", ignore_errors=True)
        mark(out, FILTERED)
        write_json(out / SETTINGS, settings, indent=1)
    return report


def write_report(out: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Write the reports as JSON; this marks the folder as finished."""
    files = checksums(out, *(name for name in _RESULTS if (out / name).exists()))
    write_json(out / REPORT, sealed({"sources": list(reports), "files": files}), indent=1)


def _report(out: Path) -> list[dict[str, Any]] | None:
    """Return the reports of a finished folder, if it still holds what was written."""
    try:
        found = unsealed(json_object(out / REPORT))
    except ValueError:
        note_damage(out / REPORT)
        return None
    if "sources" not in found:
        return None
    if "files" not in found:
        note_absence(out)
    elif (path := altered(out, found["files"])) is not None:
        note_damage(path)
        return None
    return found["sources"]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the names of the settings that differ, with their old values."""
    found = ["files"] if before.get("sources") != now["sources"] else []
    for part in ("judge", "filtering"):
        old = before.get(part, {})
        found += [
            f"{name} ({old.get(name)})" for name in now[part] if old.get(name) != now[part][name]
        ]
    return ", ".join(found).replace("_", " ") or "settings"


def _file_stamps(path: Path) -> list[Any]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(str(file), file.stat()) for file in files if file.is_file()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]
