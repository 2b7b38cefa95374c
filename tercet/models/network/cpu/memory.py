"""Memory of encoding on a CPU: freed blocks that are kept, and few row lengths."""

from functools import cache
from typing import Final

import torch

from tercet.segments import Packed

_KEPT: Final = (32 << 20) - (64 << 10)  # bytes; glibc learns from blocks of up to 32 MiB
_ROWS: Final = 64  # more are rounded up, by an eighth at most; no bit of a result changes


@cache
def keep_freed_memory() -> None:
    """Let the process keep up to 64 MiB of freed memory for its next tensors.

    Otherwise glibc fetches activations of some megabytes from the system again in every layer,
    which clears their pages: a tenth of the time of encoding. Its limits grow with the largest
    block freed so far: hence one of nearly 32 MiB, the most that it learns from, freed untouched.
    """
    torch.empty(_KEPT, dtype=torch.uint8)


def rounded(texts: Packed) -> Packed:
    """Return the texts, and some texts of one token behind them, so that few row lengths occur.

    oneDNN keeps a kernel of 100 KB and more for each number of rows. Packed batches have as many as
    their tokens: hundreds of megabytes after some ten thousand texts. No bit of a state changes.
    """
    rows = len(texts.ids)
    added = -rows % (1 << max(rows.bit_length() - 5, 3)) if rows > _ROWS else 0
    if not added:
        return texts
    ends = texts.offsets[-1] + torch.arange(1, added + 1)
    return Packed(
        torch.cat([texts.ids, texts.ids[:1].expand(added)]),
        torch.cat([texts.offsets, ends.to(texts.offsets.dtype)]),
        torch.cat([texts.pooled, texts.pooled[:1].expand(added)]),
    )
