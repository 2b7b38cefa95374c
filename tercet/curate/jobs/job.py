"""Large jobs in units that are done once: on this machine or on many, and after any kill.

A job is cut into units, each of which writes files of its own, whole or not at all, and gives a
report of plain values. What is finished is recorded in a manifest, a file a unit, with a hash of
all that its result hangs on. The same job started again does what is missing or has changed.
"""

import hashlib
import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from tercet import errors
from tercet.curate.jobs.runners import LOOP, LostError, Runner, spread
from tercet.errors import RecipeError, TercetError
from tercet.files.atomic import replacing_file, sole_writer
from tercet.files.progress import Advance, bar

UnitReport: TypeAlias = dict[str, Any]
"""What a unit tells of itself: plain values that JSON can hold."""

DoUnit: TypeAlias = Callable[["WorkUnit"], UnitReport]

_LOSSES: Final = 3  # engines in a row that broke before a unit was done

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A part of a job that is done by one process, again from its beginning if that is killed."""

    name: str  # of its record, unique in the job, such as "news.de/0003"
    reads: Mapping[str, Any]  # what it works on: plain values that change when its input does
    size: int = 1  # how much of the job it is, for the progress bar


@runtime_checkable
class BulkJob(Protocol):
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


def run_units(
    job: BulkJob, units: Sequence[WorkUnit], manifest: Path, *, runner: Runner = LOOP
) -> Iterator[tuple[WorkUnit, UnitReport]]:
    """Do the units that are not done yet; all of them with their reports, in order.

    Where they are done makes no difference to what is written. On a cluster the folders lie on a
    disk that all its machines share.

    Raises:
        RecipeError: when another process is at the same job, or its workers are lost again and
            again.
        StorageError: when a record cannot be written.
    """
    manifest = manifest.resolve()
    with sole_writer(manifest), bar(job.name, sum(unit.size for unit in units)) as advance:
        if runner.used == "loop":
            yield from _one_by_one(job, units, manifest, advance)
        else:
            yield from _spread_out(job, units, manifest, runner, advance)


def _one_by_one(
    job: BulkJob, units: Sequence[WorkUnit], manifest: Path, advance: Advance
) -> Iterator[tuple[WorkUnit, UnitReport]]:
    do: DoUnit | None = None
    for unit in units:
        report = recorded(job, unit, manifest)
        if report is None:
            do = do or job.open()
            report = do(unit)
            record(job, unit, manifest, report)
        advance(unit.size)
        yield unit, report


def _spread_out(
    job: BulkJob, units: Sequence[WorkUnit], manifest: Path, runner: Runner, advance: Advance
) -> Iterator[tuple[WorkUnit, UnitReport]]:
    """An engine does what is missing, in any order; when it breaks, a new one does the rest."""
    bench = _Bench(job, manifest, _mark(manifest), Path.cwd())
    reports: dict[str, UnitReport] = {}
    losses = 0
    while missing := _missing(job, units, manifest, reports, advance):
        before = len(reports)
        try:
            for answer in spread(runner, bench, [json.dumps(asdict(unit)) for unit in missing]):
                name, size, report = _read_answer(answer)
                reports[name] = report
                advance(size)
        except LostError as error:
            losses = 0 if len(reports) > before else losses + 1
            if losses == _LOSSES:
                raise RecipeError(
                    f"{job.name}: its workers were lost {losses} times before a unit was done "
                    f"({error}); if they ran out of memory, take fewer workers; what is done is "
                    "kept, and the same command goes on"
                ) from error
            log.warning("%s: a worker was lost (%s); the others' work goes on", job.name, error)
    yield from ((unit, reports[unit.name]) for unit in units)


def _missing(
    job: BulkJob,
    units: Sequence[WorkUnit],
    manifest: Path,
    reports: dict[str, UnitReport],
    advance: Advance,
) -> list[WorkUnit]:
    """Units without a record; the reports of others are put to the rest."""
    missing: list[WorkUnit] = []
    for unit in units:
        if unit.name not in reports:
            report = recorded(job, unit, manifest)
            if report is None:
                missing.append(unit)
            else:
                reports[unit.name] = report
                advance(unit.size)
    return missing


def recorded(job: BulkJob, unit: WorkUnit, manifest: Path) -> UnitReport | None:
    """The report of a unit that is done, with the settings and the input of today."""
    try:
        found = json.loads(_path(manifest, unit).read_text(encoding="utf-8"))
        return found["report"] if found["of"] == _digest(job, unit) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def record(job: BulkJob, unit: WorkUnit, manifest: Path, report: UnitReport) -> None:
    """Note that a unit is done; its files are in place by now."""
    content = {"of": _digest(job, unit), "report": report}
    with replacing_file(_path(manifest, unit)) as fresh:
        fresh.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def forget(unit: WorkUnit, manifest: Path) -> None:
    """Take it that a unit is not done."""
    _path(manifest, unit).unlink(missing_ok=True)


def _path(manifest: Path, unit: WorkUnit) -> Path:
    return manifest / f"{unit.name}.json"


def _digest(job: BulkJob, unit: WorkUnit) -> str:
    told = json.dumps([job.settings, unit.name, unit.reads], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class _Bench:
    """What a process that works is sent: the job, and how it finds the folders of the driver.

    It answers with the unit and its report, or with what went wrong. A mistake of the user comes
    back as the same error; anything else as the text of its traceback.
    """

    job: BulkJob
    manifest: Path
    mark: str  # what the driver's lock says, so that another disk of the same path is noticed
    folder: Path  # where the driver stands: paths may be relative to it

    def __call__(self, threads: int | None) -> Callable[[str], str]:
        if threads is not None:
            _use_threads(threads)
        with suppress(OSError):  # not there on this machine; then paths have to be full ones
            os.chdir(self.folder)
        do: DoUnit | None = None

        def answer(told: str) -> str:
            nonlocal do
            unit = WorkUnit(**json.loads(told))
            try:
                if do is None:
                    self._check_disk()
                    do = self.job.open()
                report = do(unit)
                record(self.job, unit, self.manifest, report)
            except TercetError as error:
                return json.dumps({"error": [type(error).__name__, str(error)]})
            except Exception:  # noqa: BLE001  (the driver raises it; no engine tries again)
                return json.dumps({"bug": traceback.format_exc()})
            return json.dumps({"unit": unit.name, "size": unit.size, "report": report})

        return answer

    def _check_disk(self) -> None:
        if _mark(self.manifest) != self.mark:
            raise RecipeError(
                f"{self.manifest}: is not the same folder on {socket.gethostname()}; all machines "
                "of a cluster have to share the disk that is written to"
            )


def _read_answer(answer: str) -> tuple[str, int, UnitReport]:
    """The name and size of a unit that is done, and its report.

    Raises:
        TercetError: as it was raised where the unit was done.
        RuntimeError: for anything else that was.
    """
    found = json.loads(answer)
    if "error" in found:
        name, message = found["error"]
        kind: type[TercetError] = getattr(errors, name)
        error = kind.__new__(kind, message)  # the message is finished: __init__ would write another
        raise error
    if "bug" in found:
        raise RuntimeError(f"a worker failed:\n{found['bug']}")
    return found["unit"], found["size"], found["report"]


def _mark(manifest: Path) -> str:
    try:
        return (manifest / ".lock").read_text(encoding="utf-8")
    except OSError:
        return ""


def _use_threads(count: int) -> None:
    """So many threads for torch, whether it is loaded already or will be."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)
