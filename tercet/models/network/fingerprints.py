"""Fingerprints of weights, and results that are kept until the weights change."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_ENDS: Final = 256  # numbers
_SUMS: Final = 1_021  # of a weight's numbers; prime, so that exchanged rows change them too


def add_weights(digest: "hashlib.blake2b", weights: Mapping[str, Tensor]) -> None:
    """Feed the names, shapes and both ends of weights to a digest: training moves them all.

    It costs nothing for large models; an edit in the middle of a weight goes unnoticed.
    """
    for name, weight in weights.items():
        flat = weight.detach().flatten()
        ends = torch.cat([flat[:_ENDS], flat[-_ENDS:]]).float().cpu()
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
        self._held: tuple[tuple[object, ...], Tensor, T] | None = None

    def get(self, weights: Sequence[Tensor], make: Callable[[], T]) -> T:
        """Return the kept value, or make it now.

        A change is seen by place, type and version of a weight, and by sums of all its bits, since
        neither fused optimizers nor changes of ``weight.data`` count up the version. The sums read
        a weight once, at about 20 GB a second.
        """
        facts = tuple((w.data_ptr(), _version(w), w.dtype, w.shape, w.device) for w in weights)
        sums = torch.cat([_sums(weight) for weight in weights])
        held = self._held
        if held is None or held[0] != facts or not torch.equal(held[1], sums):
            self._held = held = (facts, sums, make())
        return held[2]

    def drop(self) -> None:
        """Forget the value; the next call makes it again."""
        self._held = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return WeightCache, ()


def _version(weight: Tensor) -> int | None:
    """Return how often a weight was changed in place; unknown if made in inference mode."""
    return None if weight.is_inference() else weight._version


def _sums(weight: Tensor) -> Tensor:
    """Return the sums of every 1,021st number, as integers, which any changed bit changes."""
    flat = weight.detach().contiguous().flatten()
    if flat.numel() * flat.element_size() % 8 == 0 and flat.data_ptr() % 8 == 0:
        bits = flat.view(torch.int64)
    else:
        bits = flat.view(torch.uint8).to(torch.int64)
    rows = len(bits) // _SUMS
    sums = bits[: rows * _SUMS].view(rows, _SUMS).sum(0)
    rest = bits[rows * _SUMS :]
    sums[: len(rest)] += rest
    return sums
