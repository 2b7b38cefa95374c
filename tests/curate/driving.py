"""Jobs whose driver is a separate process, so that it can be killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.processes import ROOT


def start(out: Path, runner: dict[str, Any], count: int = 6, **job: Any) -> subprocess.Popen:
    """Start a driver in another process, in a folder without our code."""
    out.mkdir(exist_ok=True)
    how = json.dumps({"out": str(out), "runner": runner, "count": count, "job": job})
    command = [sys.executable, "-m", "tests.curate.squares", how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=out, env=environment, stdout=pipe, stderr=pipe)


def ended(driver: subprocess.Popen, *, seconds: float = 300) -> tuple[int, str, str]:
    """Return the exit status and output of a driver; kill it if it takes too long."""
    try:
        said, complaint = driver.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        driver.kill()
        raise AssertionError(driver.communicate()[1].decode()) from None
    return driver.returncode, said.decode(), complaint.decode()


def wait_for(path: Path, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def wait_until_quiet(out: Path) -> None:
    """Wait for workers whose driver was killed to finish their units."""
    before = None
    while before != (before := (out / "log").read_text()):
        time.sleep(0.5)
