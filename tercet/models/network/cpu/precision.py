"""What a number type costs on this CPU."""

import timeit
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

_CLEARLY_SLOWER: Final = 1.3  # times the time of float32


@cache
def bfloat16_ratio() -> float:
    """Return the time of a bfloat16 matrix product over that of a float32 one, measured once."""
    x, weight = torch.randn(256, 384), torch.randn(768, 384)
    return _seconds(x.bfloat16(), weight.bfloat16()) / _seconds(x, weight)


def warning_of(precision: torch.dtype, device: torch.device | str) -> str | None:
    """Return a warning if this precision costs time on this device instead of saving it."""
    if precision != torch.bfloat16 or torch.device(device).type != "cpu":
        return None
    ratio = bfloat16_ratio()
    if ratio <= _CLEARLY_SLOWER:
        return None
    return (
        f"this CPU has no instructions for bfloat16, which takes {ratio:.1f} times as long as "
        "float32 here; leave out --dtype bfloat16"
    )


def _seconds(x: Tensor, weight: Tensor) -> float:
    """Return the shortest of five runs, since other processes may delay some."""
    return min(timeit.repeat(lambda: F.linear(x, weight), number=1, repeat=5))
