"""Two processes that answer the same commands, so that a library is measured against another.

A peer has an environment of its own, with its own versions: only the standard library is needed
here.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

Answer = dict[str, Any]  # of a side, to a command


class Side:
    """A process that answers commands: one JSON object a line in, one out."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def __call__(self, do: str, **numbers: Any) -> Answer:
        """Send a command, wait for the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **numbers}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended at {do}; run it by hand to see why")
        return json.loads(line)

    def end(self) -> None:
        """Close its input, and wait; a process that does not end within a minute is killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:  # it has answered everything
            self._process.kill()
            self._process.wait()


def spent(call: Callable[[], Answer]) -> Answer:
    """What the call answers, with its CPU seconds and its highest memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest memory so far
    begin = time.process_time()
    answer = call()
    seconds = time.process_time() - begin
    return {"seconds": seconds, "peak": memory("VmHWM"), **answer}


def timed(requests: list[list[str]], encode: Callable[[list[str]], Any]) -> Answer:
    """CPU seconds of all requests, and milliseconds and CPU milliseconds of each."""
    clock, cpu = [time.perf_counter()], [time.process_time()]
    for texts in requests:
        encode(texts)
        clock.append(time.perf_counter())
        cpu.append(time.process_time())
    ms = [[1000 * (b - a) for a, b in pairwise(times)] for times in (clock, cpu)]
    return {"seconds": cpu[-1] - cpu[0], "ms": ms[0], "cpu_ms": ms[1]}


def memory(field: str, process: int | str = "self") -> int:
    """Bytes, as the system counts them for a process."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"the system does not tell {field}")


def serve(answer: Callable[..., Answer]) -> None:
    """Be a side: call ``answer(do, **numbers)`` for each command, until the input ends.

    What libraries print goes to the error stream.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(answer(command.pop("do"), **command)), file=answers, flush=True)
