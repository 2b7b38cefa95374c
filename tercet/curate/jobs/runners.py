"""Where the parts of a large job are done: in this process, in several, or on a cluster.

One way for all of them: a function is opened once in each process that works, and makes a text of
each text that it is given. Daft spreads the texts, over processes of this machine or over the
machines of a Ray cluster. Nothing here knows what the texts say.
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

Engine: TypeAlias = Literal["auto", "loop", "daft", "ray"]
"""What hands out the work: nothing at all, Daft on this machine, or Daft on a Ray cluster."""

_SILENT: Final = {  # in all processes that work: no reports home, no bars but our own
    "DO_NOT_TRACK": "1",
    "DAFT_PROGRESS_BAR": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_PATIENCE: Final = 5.0  # seconds for a cluster to answer; Ray itself waits for many minutes
_HERE: Final = ("localhost", "127.0.0.1", "::1", "[::1]")


class LostError(Exception):
    """The engine stopped before its work was done: a process or a machine of it is gone."""


@runtime_checkable
class Opener(Protocol):
    """Gets ready in a process that works, with so many threads. It can be pickled."""

    def __call__(self, threads: int | None) -> Callable[[str], str]:
        """What makes a text of a text. None: as many threads as there are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Where work is done.

    Raises:
        RecipeError: for no worker, or a cluster without an address.
    """

    engine: Engine = "auto"  # a plain loop in one process, Daft for several
    workers: int = 1  # processes on each machine
    address: str | None = None  # of a Ray cluster: HOST:PORT of its head, or auto

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise RecipeError(f"workers is {self.workers}; ask for 1 or more")
        if self.engine == "ray" and not self.address:
            raise RecipeError(
                "the runner ray needs --address, where its cluster is: HOST:6379 of the machine "
                "on which `ray start --head` ran"
            )
        if self.engine != "ray" and self.address:
            raise RecipeError(
                f"an address is of a Ray cluster, and the runner is {self.engine}; take "
                "--runner ray, or leave the address out"
            )
        if self.engine == "loop" and self.workers > 1:
            raise RecipeError("a loop is one process; take --runner daft, or leave the workers out")

    @property
    def several(self) -> bool:
        """Whether the work is done in other processes than this one."""
        return self.workers > 1 or self.engine == "ray"

    @property
    def used(self) -> Literal["loop", "daft", "ray"]:
        """The engine. One process needs none: its bars show, and its notes are not mixed up.

        Raises:
            MissingExtraError: when more than one process is asked for, and Daft is not there.
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
    """What is made of the texts, each as it is done.

    Raises:
        LostError: when a process that works is gone and the engine does not go on without it.
        MissingExtraError: when Daft, or Ray, is not installed.
        RecipeError: when no cluster answers at the address.
    """
    if runner.used == "loop":
        work = opener(None)
        yield from (work(text) for text in texts)
    elif runner.used == "ray":
        with redirect_stdout(sys.stderr):  # where Ray prints of workers that it starts again
            daft, how, threads = _on_ray(runner)
            yield from _by_daft(daft, opener, texts, how, threads, parts=len(texts))
    else:
        daft, how, threads = _on_this_machine(runner)
        yield from _by_daft(daft, opener, texts, how, threads, parts=1)


class Worker:
    """What lives in a process that works; Daft makes one there from its name."""

    def __init__(self, opener: Opener, threads: int | None) -> None:
        self._work = opener(threads)

    def made(self, texts: Any) -> list[str]:
        """What is made of a batch of texts."""
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
    """A frame of one column, each text of which is a batch, and on a cluster a partition."""
    made = daft.method.batch(return_dtype=daft.DataType.string(), batch_size=1)
    made(Worker.made)  # a mark on the method; the class itself is found by its name elsewhere
    worker = daft.cls(**how)(Worker)(opener, threads)
    frame = daft.from_pydict({"text": list(texts)})
    if parts > 1:
        frame = frame.into_partitions(parts)
    rows = frame.select(worker.made(frame["text"]).alias("made")).iter_rows()
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise LostError(str(error).strip().partition("\n")[0] or repr(error)) from error
        yield row["made"]


def _on_this_machine(runner: Runner) -> tuple[Any, dict[str, Any], int | None]:
    """Daft with work in this process, or in several that share its threads."""
    daft = _daft()
    _set(daft.set_runner_native, "daft")
    if runner.workers == 1:
        return daft, {"use_process": False, "max_concurrency": 1}, None
    threads = max(1, _threads() // runner.workers)
    return daft, {"use_process": True, "max_concurrency": runner.workers}, threads


def _on_ray(runner: Runner) -> tuple[Any, dict[str, Any], int]:
    """Daft with work on all machines of a cluster; those with a GPU alone, where there are some.

    A worker asks Ray for a little less than its share of a machine: so many of them fit on it and
    no more, and what Daft itself has to place there never waits for them.
    """
    daft = _daft()
    assert runner.address is not None, "a runner checks this"
    machines = _machines(runner.address)
    _set(lambda: daft.set_runner_ray(noop_if_initialized=True), "ray")
    cpus, gpus = (min(machine.get(key, 0.0) for machine in machines) for key in ("CPU", "GPU"))
    how = {
        "cpus": _rounded_down(cpus / (runner.workers + 0.5)),
        "gpus": min(1.0, _rounded_down(gpus / runner.workers)),
        "max_concurrency": runner.workers * len(machines),
    }
    return daft, how, max(1, int(cpus) // runner.workers)


def _rounded_down(amount: float) -> float:
    return int(amount * 1e4) / 1e4  # as fine as Ray counts


def _machines(address: str) -> list[Mapping[str, float]]:
    """What each machine of the cluster has, of those that may work."""
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
            ) from (error)
    nodes: Any = ray.nodes()
    found = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    if not found:
        raise RecipeError(f"--address {address}: no machine of the cluster has a CPU to offer")
    return [machine for machine in found if machine.get("GPU")] or found


def _check_answers(address: str) -> None:
    """Refuse an address where nobody is at home, at once.

    Raises:
        RecipeError: when it is none, or nothing answers.
    """
    if address == "auto":
        return
    from ray.util import get_node_ip_address

    host, _, port = address.removeprefix("ray://").rpartition(":")
    host = get_node_ip_address() if host in _HERE else host.strip("[]")  # as Ray takes it
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except ValueError:
        raise RecipeError(f"--address {address}: write HOST:PORT, such as head:6379") from None
    except (OSError, OverflowError) as error:
        raise RecipeError(
            f"--address {address}: nothing answers there ({error}); start a cluster with "
            "`ray start --head --port=6379`, or correct the address"
        ) from error


def _daft() -> Any:
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)  # before it is imported
    try:
        import daft
    except ImportError:
        raise MissingExtraError("this runner", "bulk") from None
    logging.getLogger("daft_local_execution").setLevel(logging.CRITICAL)  # we tell of errors
    return daft


def _set(choose: Callable[[], object], name: str) -> None:
    """Tell Daft where to run; it takes one answer for the life of a process."""
    from daft.runners import get_or_infer_runner_type

    wanted = {"daft": "native"}.get(name, name)
    try:
        choose()
    except ValueError as error:  # it has had its answer
        if get_or_infer_runner_type() != wanted:
            raise RecipeError(
                "Daft runs elsewhere in this process already, and cannot change that; begin a new "
                f"process for the runner {name}"
            ) from error


def _threads() -> int:
    """Those of this process, which need not load torch to know."""
    if "torch" in sys.modules:
        import torch

        return torch.get_num_threads()
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdecimal() else len(os.sched_getaffinity(0))
