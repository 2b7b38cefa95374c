"""What the C library does with memory that tensors give back."""

from functools import cache
from typing import Final

import torch

_KEPT: Final = (32 << 20) - (64 << 10)  # bytes; glibc learns from blocks of up to 32 MiB


@cache
def keep_freed_memory() -> None:
    """Let the process keep up to 64 MiB of freed memory for its next tensors.

    glibc takes a block straight from the system when it is as large as the largest one that was
    freed so far, and gives the end of its heap back when that is twice as large. So activations of
    some megabytes are fetched again in every layer, and the system clears their pages each time: a
    tenth of the time of encoding. One block of nearly 32 MiB, the most that glibc learns from,
    freed untouched, moves both limits. Where they were set by hand, and with other C libraries,
    nothing changes.
    """
    torch.empty(_KEPT, dtype=torch.uint8)
