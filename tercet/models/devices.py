"""The device that runs a model: which one, its type of numbers, its free memory.

All that this module decides for a GPU changes time and memory. On a CPU it changes nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
from filelock import FileLock, Timeout

from tercet import distributed
from tercet.errors import RecipeError

NumberType: TypeAlias = Literal["float32", "bfloat16"]
NUMBER_TYPES: Final[tuple[NumberType, ...]] = get_args(NumberType)

ON_CPU: Final = 2_048  # tokens encoded together
LEAST_ON_GPU: Final = 2_048  # tokens with which a large model keeps a GPU busy
MOST_ON_GPU: Final = 131_072
_ON_GPU: Final = 16_384  # tokens, of a model with this many numbers in its layers
_NUMBERS: Final = 300_000_000
_SHARE: Final = 0.5  # of free memory, for encoding
_OF_HIDDEN, _OF_INNER = 24, 4  # states of one layer that exist at the same time, generously
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_KEPT: Final[list[FileLock]] = []  # until the process ends
_MODES: Final = {"tf32": "high", "bf16": "medium"}  # of torch.set_float32_matmul_precision


# ---- which device ----------------------------------------------------------------------------


def find_device(name: str | None = None) -> torch.device:
    """Return the device of this name, by default a GPU if there is one, else the CPU.

    "cuda" is the device of this process: in ``torchrun`` the one with its local rank, in a worker
    of a job its own. Float32 products on a GPU take TF32 from then on.

    Raises:
        RecipeError: if there is no such device here, or several processes would share it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    _refuse_to_share(name)
    if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.device_count() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    # torch has no error class for this: a RuntimeError says that the name, the number or the
    # driver is unknown, an AssertionError that torch was built without such devices.
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"the device {name!r} cannot be used here; leave it out to take a GPU if there is "
            "one, or else the CPU"
        ) from error
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


def _refuse_to_share(name: str) -> None:
    """Refuse one GPU, named by its number, for all processes that ``torchrun`` started here."""
    processes = distributed.local_world_size()
    numbered = name.startswith("cuda:")
    if numbered and processes > 1 and torch.cuda.device_count() > 1:
        raise RecipeError(
            f"the device must be cuda for several processes, so that each takes its own GPU; got "
            f"{name}, which all {processes} processes of this machine would share"
        )


def take_own_gpu(folder: Path, workers: int) -> None:
    """Give this worker process a GPU, and its part of it if there are more workers than GPUs.

    Workers of a machine choose by locks in ``folder``, which a killed one releases. It must happen
    before the process uses a GPU: torch sees no other one afterwards, and calls its own ``cuda``.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return
    locks = (FileLock(folder / f".gpu-{n}.lock", thread_local=False) for n in count())
    number, lock = next((n, each) for n, each in enumerate(locks) if _is_mine(each))
    _KEPT.append(lock)
    names = [name for name in os.environ.get(_VISIBLE, "").split(",") if name]
    names = names or [str(n) for n in range(gpus)]
    os.environ[_VISIBLE] = names[number % gpus]
    if torch.cuda.device_count() != 1:  # the driver was asked before, and does not look again
        torch.cuda.set_device(number % gpus)
    if (sharing := -(-workers // gpus)) > 1:
        torch.cuda.set_per_process_memory_fraction(1 / sharing)


def _is_mine(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def number_type(device: torch.device) -> NumberType:
    """Return the type of numbers for products on a device: bfloat16 on a GPU that computes in it.

    GPUs before compute capability 8 emulate bfloat16, which is slow, so they take float32.
    """
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 numbers on a GPU without TF32 for a while, such as to compare states."""
    mode = _MODES.get(str(torch.backends.cuda.matmul.fp32_precision))
    if mode is None:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(mode)


# ---- how much at a time ----------------------------------------------------------------------


def usual_tokens(device: torch.device, numbers: int) -> int:
    """Return how many tokens are worth encoding together, if memory allows.

    ``numbers`` are those in the layers of the model. A GPU waits for the host unless a layer's
    products take longer than their launches: a small model needs more tokens for that.
    """
    if device.type != "cuda":
        return ON_CPU
    return power_of_two(min(max(_ON_GPU * _NUMBERS // max(numbers, 1), LEAST_ON_GPU), MOST_ON_GPU))


def layer_numbers(model: Any) -> int:
    """Return how many numbers a model of transformers has without its token table."""
    table = model.get_input_embeddings().weight
    return sum(p.numel() for p in model.parameters() if p is not table)


def encoded_tokens(model: Any, device: torch.device) -> int:
    """Return how many tokens to encode together without a graph: for the memory and the model."""
    if device.type != "cuda":
        return ON_CPU
    usual = usual_tokens(device, layer_numbers(model))
    config, weight = model.config.get_text_config(), next(model.parameters())
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    of_token = weight.element_size() * (_OF_HIDDEN * config.hidden_size + _OF_INNER * inner)
    return power_of_two(max(1, min(usual, free_bytes(device) * _SHARE / of_token)))


def power_of_two(number: float | int) -> int:
    """Return the largest power of two up to a number, at least 1.

    Small differences in free memory, as between a run and its continuation, then change nothing.
    """
    return 1 << max(int(number).bit_length() - 1, 0)


# ---- free memory -----------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a device that this process may still take.

    On a GPU, what torch's allocator keeps for later counts as free. Processes that were given a
    part of a GPU (``torch.cuda.set_per_process_memory_fraction``) take no more than that.
    """
    if device.type != "cuda":
        return free_memory() // distributed.local_world_size()
    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - taken
    given = torch.cuda.is_initialized()  # otherwise it has no part yet
    own = int(total * torch.cuda.get_per_process_memory_fraction(device)) if given else total
    return max(0, min(free + kept, own - taken))


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that are free, in this container if it has a limit.

    ``root`` is where the file systems of the kernel are.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: assume that half of the memory is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    groups = root / "sys/fs/cgroup"
    for name in _groups_of_process(root):
        try:
            limit = int((groups / name / "memory.max").read_text())
            used = int((groups / name / "memory.current").read_text())
            parts = (groups / name / "memory.stat").read_text().splitlines()
            cached = dict(part.split() for part in parts).get("inactive_file", "0")
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        free = min(free, max(0, limit - used + int(cached)))
    return free


def _groups_of_process(root: Path) -> list[str]:
    """Return the control groups (version 2) that this process belongs to, the innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    inner = next((line[len("0::/") :] for line in lines if line.startswith("0::/")), "")
    path = Path(inner)
    return [str(each) for each in (path, *path.parents)]
