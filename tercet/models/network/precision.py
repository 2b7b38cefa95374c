"""Whether a CPU has instructions for bfloat16: without them its products are slower, not faster."""

import time
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F

SLOWER: Final = (
    "this CPU has no instructions for bfloat16, which takes {ratio:.1f} times as long as float32 "
    "here; leave out --precision bfloat16"
)
_CLEARLY: Final = 1.3  # times the time of float32


@cache
def bfloat16_ratio() -> float:
    """Time of a matrix product in bfloat16 over that in float32, measured once, in milliseconds."""
    x, weight = torch.randn(256, 384), torch.randn(768, 384)
    return _seconds(x.bfloat16(), weight.bfloat16()) / _seconds(x, weight)


def warning_of(precision: torch.dtype, device: torch.device | str) -> str | None:
    """What to say to a user of this type on this device, if it costs time instead of saving it."""
    if precision != torch.bfloat16 or torch.device(device).type != "cpu":
        return None
    ratio = bfloat16_ratio()
    return SLOWER.format(ratio=ratio) if ratio > _CLEARLY else None


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    """The shortest of some runs: another process may have held up the others."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        F.linear(x, weight)
        found.append(time.perf_counter() - begin)
    return min(found)
