"""What a number type costs on this CPU."""

import timeit
from functools import cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

_CLEARLY_SLOWER: Final = 1.3  # times the time of float32


@cache
def bfloat16_ratio() -> float:
    """Return the time of a bfloat16 matrix product over that of a float32 one, measured once."""
    x, weight = torch.randn(256, 384), torch.randn(768, 384)
    return _seconds(x.bfloat16(), weight.bfloat16()) / _seconds(x, weight)


def bfloat16_instructions() -> tuple[str, ...]:
    """Return the instructions of this CPU for products of bfloat16."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return tuple(name for name in ("avx512_bf16", "amx_bf16") if capabilities.get(name))


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, and torch's build uses them."""
    return bool(bfloat16_instructions()) and torch.backends.mkldnn.is_available()


def warning_of(precision: torch.dtype, device: torch.device | str) -> str | None:
    """Return a warning if this precision costs time on this device instead of saving it."""
    if precision != torch.bfloat16 or torch.device(device).type != "cpu" or has_bfloat16():
        return None
    ratio = bfloat16_ratio()
    if ratio <= _CLEARLY_SLOWER:
        return None
    return (
        f"this CPU has no instructions for bfloat16, which takes {ratio:.1f} times as long as "
        "float32 here; take float32 (make an index again with --dtype float32)"
    )


def _seconds(x: Tensor, weight: Tensor) -> float:
    """Return the shortest of five runs, since other processes may delay some."""
    return min(timeit.repeat(lambda: F.linear(x, weight), number=1, repeat=5))
