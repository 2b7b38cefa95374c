"""Several processes on this machine, described to each other as torchrun does it.

They are forks of a server that has imported the package once, so that each starts at once.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = ["tercet.training.loop", "tercet.recipes.finetune", "tests.toy"]
SECONDS = 600

os.environ["PYTHONPATH"] = str(ROOT)  # the server imports from here
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(IMPORTED)


def run_together(script: str, *arguments: str, count: int = 2) -> None:
    """Run a script in ``count`` processes at once; fail with what they said if one fails."""
    described = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "CUDA_VISIBLE_DEVICES": "",  # NCCL refuses two processes on one GPU
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.txt" for rank in range(count)]
        processes = [
            forks.Process(
                target=_run, args=(script, arguments, {**described, "RANK": str(rank)}, output)
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(timeout=SECONDS)
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = [output.read_text() if output.exists() else "" for output in outputs]
    ended = [process.exitcode for process in processes]  # below zero: by that signal
    assert ended == [0] * count, "\n".join([f"ended with {ended}", *said])


def _run(script: str, arguments: tuple[str, ...], described: dict[str, str], output: Path) -> None:
    os.environ.update(described)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
