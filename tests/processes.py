"""Several processes on this machine, described to each other as torchrun does it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_together(script: str, *arguments: str, count: int = 2) -> None:
    """Run a script in ``count`` processes at once; fail with what they said if one fails."""
    described = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",  # NCCL refuses two processes on one GPU
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**described, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ended = [process.returncode for process in processes]  # below zero: by that signal
    assert ended == [0] * count, "\n".join([f"ended with {ended}", *said])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
