"""Large jobs in units of work, on one machine or many, that continue after a kill.

Each unit writes its own files, whole or not at all, and returns a report of plain values. A
manifest has a file per finished unit, with a fingerprint of all that its result depends on and the
checksums of its files. The same job started again does the units that are missing, have changed,
or whose files are damaged.
"""

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
from tercet.files.artifacts import fingerprint, read_json, write_json
from tercet.files.atomic import sole_writer
from tercet.files.checksums import checksum, checksums, note_absence, note_damage, sealed, unsealed
from tercet.files.limits import read_text
from tercet.files.progress import Advance, bar
from tercet.files.signals import end_with
from tercet.models.devices import take_own_gpu

UnitReport: TypeAlias = dict[str, Any]
"""The report on a finished unit: plain values that JSON can hold."""

DoUnit: TypeAlias = Callable[["WorkUnit"], UnitReport]

_LOSSES: Final = 3  # consecutive failures of the engine without a finished unit

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A part of a job that one process does; it starts over if that process is killed."""

    name: str  # of its record, unique in the job, such as "news.de/0003"
    reads: Mapping[str, Any]  # its input, as plain values that change when the input does
    size: int = 1  # its share of the job, for the progress bar


@runtime_checkable
class BulkJob(Protocol):
    """Work in units. It is sent to other processes, so it can be pickled and holds no model."""

    @property
    def name(self) -> str:
        """The label of the progress bar."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain values that all results depend on: fingerprints of models, numbers, versions."""
        ...

    def open(self) -> DoUnit:
        """Prepare a process, such as by loading the model; return the function that does a unit."""
        ...

    def files(self, unit: WorkUnit) -> Sequence[Path]:
        """Return the files and folders that a unit writes, if it has something to write there."""
        ...


def run_units(
    job: BulkJob, units: Sequence[WorkUnit], manifest: Path, *, runner: Runner = LOOP
) -> Iterator[tuple[WorkUnit, UnitReport]]:
    """Do the units that are not done yet; yield all units with their reports, in order.

    The runner does not change what is written. On a cluster, the folders must be on a disk that
    all machines share.

    Raises:
        RecipeError: if another process does the same job, or workers are lost repeatedly.
        StorageError: if a record cannot be written.
    """
    manifest = manifest.resolve()
    with sole_writer(manifest), bar(job.name, sum(unit.size for unit in units)) as advance:
        if runner.used == "loop":
            yield from _one_by_one(job, units, manifest, advance)
        else:
            yield from _in_processes(job, units, manifest, runner, advance)


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


def _in_processes(
    job: BulkJob, units: Sequence[WorkUnit], manifest: Path, runner: Runner, advance: Advance
) -> Iterator[tuple[WorkUnit, UnitReport]]:
    """Have an engine do the missing units, in any order; if it fails, start another."""
    driver = os.getpid() if runner.used == "daft" else None
    gpus = runner.workers if runner.own_gpus and runner.used == "daft" else None
    opener = _JobOpener(job, manifest, _lock_text(manifest), Path.cwd(), driver, gpus)
    reports: dict[str, UnitReport] = {}
    losses = 0
    while missing := _missing(job, units, manifest, reports, advance):
        before = len(reports)
        try:
            for answer in spread(runner, opener, [json.dumps(asdict(unit)) for unit in missing]):
                name, size, report = _read_answer(answer)
                reports[name] = report
                advance(size)
        except LostError as error:
            losses = 0 if len(reports) > before else losses + 1
            if losses == _LOSSES:
                raise RecipeError(
                    f"{job.name}: workers were lost {losses} times before a unit was done "
                    f"({error}); if they ran out of memory, use fewer workers; finished units are "
                    "kept, and the same command continues"
                ) from error
            log.warning("%s: a worker was lost (%s); the job continues", job.name, error)
    yield from ((unit, reports[unit.name]) for unit in units)


def _missing(
    job: BulkJob,
    units: Sequence[WorkUnit],
    manifest: Path,
    reports: dict[str, UnitReport],
    advance: Advance,
) -> list[WorkUnit]:
    """Return the units without a record; add the reports of the others to ``reports``."""
    for unit in units:
        if unit.name not in reports and (report := recorded(job, unit, manifest)) is not None:
            reports[unit.name] = report
            advance(unit.size)
    return [unit for unit in units if unit.name not in reports]


def recorded(job: BulkJob, unit: WorkUnit, manifest: Path) -> UnitReport | None:
    """Return the report of a unit that was done with the same settings and input."""
    path = _path(manifest, unit)
    try:
        found = unsealed(read_json(path))
        if found["of"] != _digest(job, unit):
            return None
        if "files" not in found:
            note_absence(manifest)
            there = all(place.exists() for place in job.files(unit))
            return found["report"] if there else None
        for place, was in zip(job.files(unit), found["files"], strict=True):
            if _contents(place) != was:
                note_damage(place)
                return None
        return found["report"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        note_damage(path)
        return None


def record(job: BulkJob, unit: WorkUnit, manifest: Path, report: UnitReport) -> None:
    """Record that a unit is done, after its files are in place."""
    files = [_contents(path) for path in job.files(unit)]
    content = {"of": _digest(job, unit), "report": report, "files": files}
    write_json(_path(manifest, unit), sealed(content), indent=None)


def _contents(path: Path) -> Any:
    """Return the checksum of a file, those of all files in a folder, or None."""
    if path.is_dir():
        return checksums(path)
    return checksum(path) if path.exists() else None


def _path(manifest: Path, unit: WorkUnit) -> Path:
    return manifest / f"{unit.name}.json"


def _digest(job: BulkJob, unit: WorkUnit) -> str:
    about = [job.settings, unit.name, unit.reads]
    return fingerprint(json.dumps(about, sort_keys=True, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class _JobOpener:
    """What is sent to a worker process: the job, and where the driver's folders are.

    The worker answers with a report, an error of the user, or the traceback of any other error.
    """

    job: BulkJob
    manifest: Path
    lock: str  # the text of the driver's lock, to detect another disk with the same path
    folder: Path  # the driver's working directory: paths may be relative to it
    driver: int | None = None  # its process, which workers of the same machine do not outlive
    sharing_gpus: int | None = None  # workers of this machine, each of which takes its own GPU

    def __call__(self, threads: int | None) -> Callable[[str], str]:
        if self.driver not in (None, os.getpid()):
            end_with(self.driver)
            if self.sharing_gpus is not None:
                take_own_gpu(self.manifest, self.sharing_gpus)
        if threads is not None:
            _use_threads(threads)
        with suppress(OSError):  # missing on this machine: paths must be absolute then
            os.chdir(self.folder)
        do: DoUnit | None = None

        def answer(text: str) -> str:
            nonlocal do
            unit = WorkUnit(**json.loads(text))
            try:
                if do is None:
                    if _lock_text(self.manifest) != self.lock:
                        raise RecipeError(
                            f"{self.manifest}: is another folder on {socket.gethostname()}; all "
                            "machines of a cluster must share the disk of the output"
                        )
                    do = self.job.open()
                report = do(unit)
                record(self.job, unit, self.manifest, report)
            except TercetError as error:
                return json.dumps({"error": [type(error).__name__, str(error)]})
            except Exception:  # noqa: BLE001  (the driver raises it; no engine retries)
                return json.dumps({"bug": traceback.format_exc()})
            return json.dumps({"unit": unit.name, "size": unit.size, "report": report})

        return answer


def _read_answer(answer: str) -> tuple[str, int, UnitReport]:
    """Return the name, size and report of a finished unit, or raise the worker's error."""
    found = json.loads(answer)
    if "error" in found:
        name, message = found["error"]
        kind: type[TercetError] = getattr(errors, name)
        error = kind.__new__(kind, message)  # __init__ would format the message again
        raise error
    if "bug" in found:
        raise RuntimeError(f"a worker failed:\n{found['bug']}")
    return found["unit"], found["size"], found["report"]


def _lock_text(manifest: Path) -> str:
    try:
        return read_text(manifest / ".lock")
    except (OSError, ValueError):
        return ""


def _use_threads(count: int) -> None:
    """Set the number of torch's threads, whether it is loaded already or will be."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)
