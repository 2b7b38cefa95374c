"""Where the units of a large job are done: in this process, in several, or on a cluster.

Each worker process opens a function once, which maps strings to strings. Daft distributes the
strings over processes of this machine or machines of a Ray cluster. Nothing here interprets them.
"""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

from tercet.errors import MissingExtraError, RecipeError

RunnerName: TypeAlias = Literal["auto", "loop", "daft", "ray"]
"""What distributes the work: a plain loop, Daft on this machine, or Daft on a Ray cluster."""

_SILENT: Final = {  # in all workers: no telemetry, no progress bars but our own
    "DO_NOT_TRACK": "1",
    "DAFT_PROGRESS_BAR": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_TIMEOUT: Final = 5.0  # seconds for a cluster to answer; Ray itself waits for many minutes
_HERE: Final = ("localhost", "127.0.0.1", "::1", "[::1]")


class LostError(Exception):
    """The engine stopped before the work was done: a process or machine is gone."""


@runtime_checkable
class Opener(Protocol):
    """Prepares a worker process. It can be pickled."""

    def __call__(self, threads: int | None) -> Callable[[str], str]:
        """Return the function from string to string; with ``threads`` None it takes all."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Where work is done.

    Raises:
        RecipeError: for fewer than 1 worker, or settings that contradict each other.
    """

    engine: RunnerName = "auto"  # a plain loop for one process, Daft for several
    workers: int = 1  # processes on each machine
    address: str | None = None  # of a Ray cluster: HOST:PORT of its head, or auto
    own_gpus: bool = False  # whether each process of this machine takes a GPU for itself

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise RecipeError(f"workers must be at least 1; got {self.workers}")
        if self.engine == "ray" and not self.address:
            raise RecipeError(
                "--runner ray needs --address, the address of the cluster: HOST:6379 of the "
                "machine on which `ray start --head` ran"
            )
        if self.engine != "ray" and self.address:
            raise RecipeError(
                f"--address is for a Ray cluster; got the runner {self.engine}; use --runner ray, "
                "or leave the address out"
            )
        if self.engine == "loop" and self.workers > 1:
            raise RecipeError(
                "--runner loop is one process; use --runner daft, or leave the workers out"
            )

    @property
    def several(self) -> bool:
        """Whether the work is done in other processes than this one."""
        return self.workers > 1 or self.engine == "ray"

    @property
    def used(self) -> Literal["loop", "daft", "ray"]:
        """The engine that is used. One process needs no Daft: its progress bars stay visible.

        Raises:
            MissingExtraError: if several processes are asked for and Daft is not installed.
        """
        if self.engine != "auto":
            return self.engine
        if self.workers == 1:
            return "loop"
        if find_spec("daft") is None:
            raise MissingExtraError("work in several processes", "bulk")
        return "daft"


LOOP: Final = Runner(engine="loop")


def spread(runner: Runner, opener: Opener, texts: Sequence[str]) -> Iterator[str]:
    """Yield the result of each string from Daft's workers, in the order in which they finish.

    Raises:
        LostError: if a worker is gone and the engine cannot continue without it.
        MissingExtraError: if Daft or Ray is not installed.
        RecipeError: if no cluster answers at the address.
    """
    daft = _import_daft()
    if runner.used == "ray":
        with redirect_stdout(sys.stderr):  # Ray prints about workers that it restarts
            how, threads = _on_ray(daft, runner)
            yield from _by_daft(daft, opener, texts, how, threads, parts=len(texts))
    else:
        how, threads = _on_this_machine(daft, runner)
        yield from _by_daft(daft, opener, texts, how, threads, parts=1)


class DaftWorker:
    """The object in a worker process; Daft creates it from its name."""

    def __init__(self, opener: Opener, threads: int | None) -> None:
        self._work = opener(threads)

    def results(self, texts: Any) -> list[str]:
        """Return the results of a batch of strings."""
        return [self._work(text) for text in texts.to_pylist()]


def _by_daft(
    daft: Any,
    opener: Opener,
    texts: Sequence[str],
    how: Mapping[str, Any],
    threads: int | None,
    *,
    parts: int,
) -> Iterator[str]:
    """Map a frame of one column, of which each row is a batch and, on a cluster, a partition."""
    mark = daft.method.batch(return_dtype=daft.DataType.string(), batch_size=1)
    mark(DaftWorker.results)  # in place: workers find the class by its name
    worker = daft.cls(**how)(DaftWorker)(opener, threads)
    frame = daft.from_pydict({"text": list(texts)})
    if parts > 1:
        frame = frame.into_partitions(parts)
    rows = frame.select(worker.results(frame["text"]).alias("result")).iter_rows()
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise LostError(str(error).strip().partition("\n")[0] or repr(error)) from error
        yield row["result"]


def _on_this_machine(daft: Any, runner: Runner) -> tuple[dict[str, Any], int | None]:
    """Return the arguments of workers in this or several processes, and the threads of each."""
    _set_runner(daft.set_runner_native, "daft")
    several = runner.workers > 1
    threads = max(1, _threads() // runner.workers) if several else None
    return {"use_process": several, "max_concurrency": runner.workers}, threads


def _on_ray(daft: Any, runner: Runner) -> tuple[dict[str, Any], int]:
    """Return the arguments of workers on a cluster, and the threads of each.

    If some machines have a GPU, only those are used. A worker asks Ray for a little less than its
    share of a machine, so that ``workers`` fit on it and Daft's own tasks never wait for them.
    """
    assert runner.address is not None, "a runner checks this"
    machines = _machines(runner.address)
    _set_runner(lambda: daft.set_runner_ray(noop_if_initialized=True), "ray")
    cpus, gpus = (min(machine.get(key, 0.0) for machine in machines) for key in ("CPU", "GPU"))
    how = {
        "cpus": _rounded_down(cpus / (runner.workers + 0.5)),
        "gpus": min(1.0, _rounded_down(gpus / runner.workers)),
        "max_concurrency": runner.workers * len(machines),
    }
    return how, max(1, int(cpus) // runner.workers)


def _rounded_down(amount: float) -> float:
    return int(amount * 1e4) / 1e4  # Ray's resolution


def _machines(address: str) -> list[Mapping[str, float]]:
    """Return the resources of each machine of the cluster that can work."""
    try:
        import ray
    except ImportError:
        raise MissingExtraError("work on a Ray cluster", "bulk") from None
    if not ray.is_initialized():
        _check_answers(address)
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": _SILENT},
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            about = str(error).strip().partition("\n")[0]
            raise RecipeError(
                f"--address {address}: no cluster can be joined there: {about}"
            ) from error
    nodes: Any = ray.nodes()
    found = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    if not found:
        raise RecipeError(f"--address {address}: no machine of the cluster has a CPU to offer")
    return [machine for machine in found if machine.get("GPU")] or found


def _check_answers(address: str) -> None:
    """Check that something answers at an address."""
    if address == "auto":
        return
    from ray.util import get_node_ip_address

    host, _, port = address.removeprefix("ray://").rpartition(":")
    host = get_node_ip_address() if host in _HERE else host.strip("[]")  # as Ray takes it
    try:
        socket.create_connection((host, int(port)), timeout=_TIMEOUT).close()
    except ValueError:
        raise RecipeError(f"--address {address}: write HOST:PORT, such as head:6379") from None
    except (OSError, OverflowError) as error:
        raise RecipeError(
            f"--address {address}: nothing answers there ({error}); start a cluster with "
            "`ray start --head --port=6379`, or correct the address"
        ) from error


def _import_daft() -> Any:
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)  # before it is imported
    try:
        import daft
    except ImportError:
        raise MissingExtraError("this runner", "bulk") from None
    logging.getLogger("daft_local_execution").setLevel(logging.CRITICAL)  # errors are ours
    return daft


def _set_runner(choose: Callable[[], object], name: str) -> None:
    """Set where Daft runs; it can be set once per process."""
    from daft.runners import get_or_infer_runner_type

    try:
        choose()
    except ValueError as error:  # it is set already
        if get_or_infer_runner_type() != {"daft": "native"}.get(name, name):
            raise RecipeError(
                "Daft uses another runner in this process already and cannot change it; start a "
                f"new process for --runner {name}"
            ) from error


def _threads() -> int:
    """Return the number of threads of this process, without loading torch."""
    if "torch" in sys.modules:
        import torch

        return torch.get_num_threads()
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdecimal() else len(os.sched_getaffinity(0))
