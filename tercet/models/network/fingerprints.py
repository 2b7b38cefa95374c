"""Fingerprints of weights, and results that are kept until the weights change."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_ENDS: Final = 256  # numbers
_SAMPLED: Final = 256  # entries of a weight that are compared to see whether it changed


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

        A change is seen by place, dtype and version of a weight, and by a sample of its entries,
        since fused optimizers do not count up the version.
        """
        facts = tuple((w.data_ptr(), _version(w), w.dtype, w.device) for w in weights)
        sample = torch.cat([_sample(weight) for weight in weights])
        held = self._held
        if held is None or held[0] != facts or not torch.equal(held[1], sample):
            self._held = held = (facts, sample, make())
        return held[2]

    def drop(self) -> None:
        """Forget the value; the next call makes it again."""
        self._held = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return WeightCache, ()


def _version(weight: Tensor) -> int | None:
    """Return how often a weight was changed in place; unknown if made in inference mode."""
    return None if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> Tensor:
    """Return some hundred entries, from all columns: an optimizer's step moves nearly all."""
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLED) | 1].float()
