"""Fingerprints of weights, and results that are kept until the weights change."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_ENDS: Final = 256  # numbers
_SUMS: Final = 1_021  # of a weight's numbers; prime, so that exchanged rows change them too


def add_weights(
    digest: "hashlib.blake2b", weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Feed the names, shapes and both ends of weights to a digest: training moves them all.

    With a ``dtype``, weights count as they are when loaded in it. It costs nothing for large
    models; an edit in the middle of a weight goes unnoticed.
    """
    for name, weight in weights.items():
        flat = weight.detach().flatten()
        ends = torch.cat([flat[:_ENDS], flat[-_ENDS:]])
        if dtype is not None and ends.is_floating_point():
            ends = ends.to(dtype)
        ends = ends.float().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + ends.numpy().tobytes())


def fingerprint_of(weights: Mapping[str, Tensor]) -> str:
    """Return a fingerprint that changes with any number of the weights, compared as float32.

    Reads all of them, about 0.6 GB a second with SHA-256, which processors have instructions for.
    """
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.detach().cpu().float().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)  # no copy
    return digest.hexdigest()[:16]


class WeightCache(Generic[T]):
    """A value computed from weights, kept until they change. Copies and pickles begin empty."""

    def __init__(self) -> None:
        self._held: tuple[list[object], list[_Sums], T] | None = None

    def get(self, weights: Sequence[Tensor], make: Callable[[], T]) -> T:
        """Return the kept value, or make it now.

        A change is seen by place, type and version of a weight, and by sums of all its bits, since
        neither fused optimizers nor changes of ``weight.data`` count up the version. The sums read
        a weight once, at 8 to 20 GB a second.
        """
        facts: list[object] = []
        for weight in weights:
            facts += (weight.data_ptr(), version_of(weight), weight.dtype, weight.device)
            facts += (weight.shape, weight.stride())
        held = self._held
        if held is None or held[0] != facts or not all(sums.same() for sums in held[1]):
            self._held = held = (facts, [_Sums(weight) for weight in weights], make())
        return held[2]

    def drop(self) -> None:
        """Forget the value; the next call makes it again."""
        self._held = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return WeightCache, ()


class _Sums:
    """The sums of every 1,021st number of a weight, as integers, and the numbers that are left.

    Any changed bit changes them. They hold a view of the weight, to compare it again.
    """

    def __init__(self, weight: Tensor) -> None:
        flat = weight.detach()
        self._whole = flat.is_contiguous() and flat.nbytes % 8 == 0 and flat.data_ptr() % 8 == 0
        self._bits = flat.view(-1).view(torch.int64) if self._whole else flat
        self._sums, rest = self._now()
        self._rest = rest.clone()

    def same(self) -> bool:
        """Whether the weight still has the same numbers."""
        sums, rest = self._now()
        return torch.equal(sums, self._sums) and torch.equal(rest, self._rest)

    def _now(self) -> tuple[Tensor, Tensor]:
        bits = self._bits
        if not self._whole:
            bits = bits.contiguous().view(-1).view(torch.uint8).to(torch.int64)
        end = len(bits) // _SUMS * _SUMS
        return bits[:end].view(-1 if end else 0, _SUMS).sum(0), bits[end:]


def version_of(weight: Tensor) -> int | None:
    """Return how often a weight was changed in place; unknown if made in inference mode."""
    return None if weight.is_inference() else weight._version
