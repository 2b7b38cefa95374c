"""Large jobs in units that are done once: on this machine or on many, and after any kill.

A job is cut into units, each of which writes files of its own, whole or not at all, and gives a
report of plain values. What is finished is recorded in a manifest, a file a unit, with a hash of
all that its result hangs on. The same job started again does what is missing or has changed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from tercet.files import replacing_file
from tercet.progress import bar

Report: TypeAlias = dict[str, Any]
"""What a unit tells of itself: plain values that JSON can hold."""

DoUnit: TypeAlias = Callable[["Unit"], Report]


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a job that is done by one process, again from its beginning if that is killed."""

    name: str  # of its record, unique in the job, such as "news.de/0003"
    reads: Mapping[str, Any]  # what it works on: plain values that change when its input does
    size: int = 1  # how much of the job it is, for the progress bar


@runtime_checkable
class Job(Protocol):
    """Work on units. It is sent to other processes, so it can be pickled and holds no model."""

    @property
    def name(self) -> str:
        """What the progress bar calls it."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain values that all results hang on: models by fingerprint, numbers, versions."""
        ...

    def open(self) -> DoUnit:
        """Get ready, once in each process: load the model. What it returns does one unit."""
        ...


def run_units(job: Job, units: Sequence[Unit], manifest: Path) -> Iterator[tuple[Unit, Report]]:
    """Do the units that are not done yet; all of them with their reports, in order.

    Raises:
        StorageError: when a record cannot be written.
    """
    do: DoUnit | None = None
    with bar(job.name, sum(unit.size for unit in units)) as advance:
        for unit in units:
            report = recorded(job, unit, manifest)
            if report is None:
                do = do or job.open()
                report = do(unit)
                record(job, unit, manifest, report)
            advance(unit.size)
            yield unit, report


def recorded(job: Job, unit: Unit, manifest: Path) -> Report | None:
    """The report of a unit that is done, with the settings and the input of today."""
    try:
        found = json.loads(_path(manifest, unit).read_text(encoding="utf-8"))
        return found["report"] if found["of"] == _digest(job, unit) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def record(job: Job, unit: Unit, manifest: Path, report: Report) -> None:
    """Note that a unit is done; its files are in place by now."""
    content = {"of": _digest(job, unit), "report": report}
    with replacing_file(_path(manifest, unit)) as fresh:
        fresh.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def _path(manifest: Path, unit: Unit) -> Path:
    return manifest / f"{unit.name}.json"


def _digest(job: Job, unit: Unit) -> str:
    told = json.dumps([job.settings, unit.name, unit.reads], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
