"""A job for tests that other processes can import, and a driver that can be killed.

A unit writes the square of a number into a file. ``log`` says which process did which.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.curate.jobs.job import DoUnit, UnitReport, WorkUnit, run_units
from tercet.curate.jobs.runners import Runner
from tercet.errors import DataError
from tercet.files.atomic import replacing_file


def units(count: int) -> list[WorkUnit]:
    return [WorkUnit(f"numbers/{number}", {"number": number}) for number in range(count)]


@dataclass(frozen=True)
class Squares:
    out: Path
    power: int = 2
    pause: float = 0.0  # seconds a unit
    breaks_at: int | None = None  # an error of the user
    fails_at: int | None = None  # a bug
    dies_at: int | None = None  # its process is killed
    times: int = 1  # so often
    name: str = "squares"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"power": self.power}

    def files(self, unit: WorkUnit) -> Sequence[Path]:
        return [self.out / f"{unit.reads['number']}.txt"]

    def open(self) -> DoUnit:
        self._tell("opened")
        return self._do

    def _do(self, unit: WorkUnit) -> UnitReport:
        number = unit.reads["number"]
        self._tell(f"begun {number}")
        time.sleep(self.pause)
        if number == self.breaks_at:
            raise DataError(self.out / "numbers.jsonl", number, "is odd; make it even")
        if number == self.fails_at:
            raise ZeroDivisionError("of this number")
        if number == self.dies_at:
            deaths = log_of(self.out, "killed")
            if len(deaths) < self.times:
                self._tell("killed")
                os.kill(os.getpid(), signal.SIGKILL)
        with replacing_file(self.out / f"{number}.txt") as fresh:
            fresh.write_text(str(number**self.power))
        self._tell(f"done {number}")
        return {"result": number**self.power}

    def _tell(self, what: str) -> None:
        line = f"{what} {os.getpid()} {_node()} {os.environ.get('OMP_NUM_THREADS')}\n"
        handle = os.open(self.out / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, line.encode())
        os.close(handle)


def log_of(out: Path, what: str) -> list[list[str]]:
    """Return the words of the lines of the log that begin with ``what``."""
    lines = [line.split() for line in (out / "log").read_text().splitlines()]
    return [line[1:] for line in lines if line[0] == what]


def files(out: Path) -> dict[str, str]:
    """Return what the job has written, with its records."""
    places = (*out.glob("*.txt"), *out.rglob("*.json"))
    return {str(path.relative_to(out)): path.read_text() for path in places}


def _node() -> str:
    if "ray" not in sys.modules:
        return socket.gethostname()
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else "none"


def drive(how: Mapping[str, Any]) -> None:
    """Do the described job, and print its results."""
    out = Path(how["out"])
    job = Squares(out, **how.get("job", {}))
    runner = Runner(**how["runner"])
    done = run_units(job, units(how["count"]), out / "manifest", runner=runner)
    results = [report["result"] for _, report in done]
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    from tests.curate import squares  # so that other processes find the job under this name

    squares.drive(json.loads(sys.argv[1]))
