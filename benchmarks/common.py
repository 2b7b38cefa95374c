"""What the benchmarks share: fair timing, memory of a process of its own, and the result file."""

import json
import multiprocessing
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each call, in turn, so that a busy machine disturbs all of them alike.

    Every function is called once before, uncounted. CPU seconds are those of all threads: set
    the number of threads to one where they are compared.
    """
    for function in functions.values():
        function()
    spent: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            spent[name].append(time.process_time() - begin)
    return spent


def extra_memory(prepare: Callable[[], Callable[[], Any]]) -> int:
    """Bytes that a call needs at its peak, above what is there before it.

    ``prepare`` makes the call's inputs; both run in a fresh process with one thread, whose
    resident memory is read every few milliseconds. Both have to be importable.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_extra_memory, args=(prepare, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _send_extra_memory(prepare: Callable[[], Callable[[], Any]], pipe: Connection) -> None:
    import psutil

    torch.set_num_threads(1)
    call = prepare()
    resident = psutil.Process().memory_info
    before = peak = resident().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = call()  # what it returns is part of what it needs
    peak = max(peak, resident().rss)
    done.set()
    watcher.join()
    del kept
    pipe.send(peak - before)


def write_results(name: str, rows: list[Row], *packages: str, out: Path | None = None) -> Path:
    """Print the rows, and write them with commit, machine and versions to the results folder.

    ``out`` is another file to write.

    A row has ``name``, ``ours``, ``peer``, ``unit``, ``ratio`` (above 1: ours is better),
    ``target`` and ``error``, and whatever else belongs beside them.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    Console(width=160).print(table)
    path = RESULTS / f"{name}.json" if out is None else out
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "benchmark": name,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(*packages),
        "rows": rows,
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return path


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def commit() -> str:
    """The commit that was measured, with a mark if files differ from it."""
    here = Path(__file__).parent
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """Processor, memory and accelerator, without the name of the computer."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of the packages everything runs on, and of those named."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "sentence-transformers", *packages):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def settings(numbers: str) -> tuple[str, ...]:
    """Return the words of a training for settings such as ``"seed=0 unified.steps=80"``."""
    return tuple(word for each in numbers.split() for word in ("--set", each))
