"""The consistency filter: a pair stays when its document is near the top of a shard for its query.

arXiv 2412.04506, section 3.2: the pairs of each source and language are shuffled and cut into
shards, a small model embeds them, and a pair is kept when its document is one of the ``k`` best of
its shard for its query. Before that come rules that need no model
(``tercet.curate.filtering.pair_rules``).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tercet.curate.filtering.judge import Judge, Judging, Places, write_verdicts
from tercet.curate.filtering.pair_rules import RANK
from tercet.curate.filtering.passing import LEVELS, Filtering, Shard, shards_of
from tercet.curate.filtering.screen import Screened, Screening, screened
from tercet.curate.jobs.job import UnitReport, WorkUnit, run_units
from tercet.curate.jobs.runners import LOOP, Runner
from tercet.data.files.sources import Source
from tercet.errors import RecipeError


def filter_sources(
    sources: Sequence[Source],
    judge: Judge,
    filtering: Filtering,
    places: Places,
    *,
    runner: Runner = LOOP,
) -> list[dict[str, Any]]:
    """Write the pairs of the sources that pass, and the verdict on each; a report for each key.

    A killed run goes on with the shards, and inside a shard with the vectors, that are missing.

    Raises:
        RecipeError: when no pair is left, or two sources have one name.
        DataError: when a source has changed since it was opened.
        ModelError: when the model gives vectors that are no numbers.
        StorageError: when the disk refuses.
    """
    named = {source.name: source for source in sources}
    if len(named) < len(sources):
        raise RecipeError("two sources have one name, and would go into one folder; rename one")
    screening = Screening(sources=named, rules=filtering.rules, work=places.work)
    fingerprint = judge.load().fingerprint()
    job = Judging(
        judge=judge, fingerprint=fingerprint, sources=named, filtering=filtering, places=places
    )
    reports: dict[str, dict[str, Any]] = {}
    units: list[WorkUnit] = []
    of_unit: list[str] = []
    for found in screened(screening, places.work / "manifest", runner):
        _write_dropped(found, places.out)
        shards = shards_of(found, filtering)
        units += [job.unit(found.key, number, shard) for number, shard in enumerate(shards)]
        of_unit += [found.key.folder] * len(shards)
        reports[found.key.folder] = _begun(found, len(shards))
    if not units:
        raise RecipeError(
            "no pair is left by the rules: " + _counted(reports.values()) + "; do without some "
            "(--without), or change their numbers"
        )
    done = run_units(job, units, places.out / "manifest", runner=runner)
    for folder, (_, report) in zip(of_unit, done, strict=True):
        _add(reports[folder], report)
    return list(reports.values())


def _write_dropped(found: Screened, out: Path) -> None:
    """The verdicts on pairs that a rule dropped, which are in no shard."""
    gone = ~found.left
    if gone.any():
        shard = Shard(found.rows[gone], found.positives[gone], found.texts[gone])
        reasons = np.array([found.reason(code) for code in found.reasons[gone].tolist()])
        path = out / "verdicts" / found.key.folder / "rules.parquet"
        write_verdicts(path, shard, None, None, reasons)


def _begun(found: Screened, shards: int) -> dict[str, Any]:
    """The report on a key, before its shards are ranked."""
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
        "score": 0.0,  # mean of all that were ranked
    }


def _add(report: dict[str, Any], of_shard: UnitReport) -> None:
    report["k"] = max(report["k"], of_shard["k"])
    report["dropped"][RANK] += of_shard["pairs"] - of_shard["kept"]
    report["score"] += of_shard["score_total"] / report["ranked"]
    for name in ("kept", "rows"):
        report[name] += of_shard[name]
    for k, count in of_shard["levels"].items():
        report["levels"][k] += count


def _counted(reports: Iterable[dict[str, Any]]) -> str:
    totals: dict[str, int] = {}
    for report in reports:
        for rule, count in report["dropped"].items():
            totals[rule] = totals.get(rule, 0) + count
    return ", ".join(f"{rule} {count:,}" for rule, count in totals.items() if count) or "none"
