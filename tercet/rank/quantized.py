"""Small vectors: coordinates in 8, 4 or 1 bits, and inner products without decoding them.

A coordinate x becomes the number u of the nearest of 2^B values, evenly spaced from -b to b:

    c = 2 b / (2^B - 1)        u = round(clip(x + b, 0, 2 b) / c)        x ~ c u - b
    <x, y> ~ c^2 <u, v> - c b (sum u + sum v) + dims b^2

What becomes a code is the distance from a centre, the mean of such vectors: many models put all
texts far to one side, where signs are all the same and most of the range is not used. Centre and
range are learned from vectors of documents (:class:`Ranges`). Vectors are cut and scaled to unit
length before (:func:`truncated`), not after.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import inf, isfinite
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int8, Int32, Int64, UInt8
from torch import Tensor

from tercet.errors import BROKEN_MODEL, ModelError, RecipeError

CodePrecision: TypeAlias = Literal["int8", "int4", "binary"]
PRECISIONS: Final[tuple[CodePrecision, ...]] = get_args(CodePrecision)
Stored: TypeAlias = Literal["float32", "int8", "int4", "binary", "binary+int8"]
"""How a vector is stored; with ``binary+int8``, bits are searched and int8 codes score the hits."""
STORED: Final[tuple[Stored, ...]] = ("float32", "int8", "int4", "binary+int8", "binary")
BITS: Final[dict[CodePrecision, int]] = {"int8": 8, "int4": 4, "binary": 1}

_BLOCK: Final = 4_096  # vectors that are rounded at a time
_SHARES: Final = (  # of coordinates inside of the range: those that are tried
    *(0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9965, 0.9975),
    *(0.9985, 0.999, 0.9995, 0.9999, 0.99999, 1.0),
)
_COORDINATES: Final = 1 << 20  # that a range is learned from
_DIGITS: Final = 6  # of a centre's coordinates: a thousandth of the finest step
_EXACT: Final = 1_024  # products of two signed bytes whose sum float32 still holds exactly: 2^24


@dataclass(frozen=True, slots=True, eq=False)
class Quantizer:
    """Rounds coordinates to one of 2^bits values, evenly spaced around a centre."""

    precision: CodePrecision
    limit: float  # b: the lowest and highest value are so far from the centre
    centre: Float32[np.ndarray, "dims"] | None = None  # None: zero

    def __post_init__(self) -> None:
        assert self.limit > 0 and isfinite(self.limit), "a range of some width"

    @classmethod
    def learned(
        cls, vectors: Float[np.ndarray, "texts dims"], precision: CodePrecision
    ) -> "Quantizer":
        """Learn the mean of these vectors, and the range that rounds them with the smallest error.

        The error is squared, and the range a quantile of the coordinates' distances from the
        centre, from 0.9 to the largest: a wider one cuts fewer of them, and rounds all others more.
        For signs it is their mean. Of many vectors it takes some, at equal distances.

        Raises:
            ModelError: when there are no two different vectors, or they hold NaN or infinity.
        """
        some = np.asarray(vectors[:: max(1, vectors.size // _COORDINATES)], dtype=np.float64)
        _refuse_broken(some)
        centre = some.mean(axis=0).round(_DIGITS) if len(some) else some.sum(axis=0)
        distances = np.abs(some - centre).ravel()
        if not (distances > 10.0**-_DIGITS).any():
            raise ModelError(
                f"codes cannot be learned from {len(some):,} vectors that do not differ; give "
                "more texts, and a model that tells them apart"
            )
        around = centre.astype(np.float32)
        if precision == "binary":
            return cls(precision, float(distances.mean()), around)
        limits = [float(b) for b in np.quantile(distances, _SHARES) if b > 0]
        tried = [cls(precision, b) for b in limits]
        best = min(tried, key=lambda it: float(((it.rounded(distances) - distances) ** 2).mean()))
        return cls(precision, best.limit, around)

    @property
    def step(self) -> float:
        """Distance of neighbouring values: c."""
        return 2 * self.limit / (2 ** BITS[self.precision] - 1)

    @property
    def origin(self) -> float:
        """Distance of the code 0 from the centre: codes of 8 bits start at -128, others at 0."""
        return (128 if self.precision == "int8" else 0) * self.step - self.limit

    def rounded(self, values: Float[np.ndarray, "*any"]) -> Float64[np.ndarray, "*any"]:
        """Return the nearest distances from the centre that a code can represent."""
        if self.precision == "binary":
            return np.where(values > 0, self.limit, -self.limit)
        return self.step * self._numbers(np.asarray(values, np.float64)) - self.limit

    def _numbers(self, values: np.ndarray) -> np.ndarray:
        """Return the integer u of each distance."""
        return np.rint(np.clip(values + self.limit, 0, 2 * self.limit) / self.step)

    def codes(self, vectors: Float[np.ndarray, "texts dims"]) -> "Codes":
        """Return these vectors in codes.

        Raises:
            ModelError: when one holds NaN or infinity.
        """
        dims = vectors.shape[1]
        packed = np.empty((len(vectors), bytes_of(self.precision, dims)), dtype=np.uint8)
        for start in range(0, len(vectors), _BLOCK):
            block = np.asarray(vectors[start : start + _BLOCK])
            _refuse_broken(block, start)
            block = block if self.centre is None else block - self.centre
            packed[start : start + _BLOCK] = self._packed(block)
        return Codes(self, dims, packed)

    def _packed(self, block: np.ndarray) -> UInt8[np.ndarray, "texts bytes"]:
        if self.precision == "binary":
            return np.packbits(block > 0, axis=1)
        numbers = self._numbers(block).astype(np.uint8)
        if self.precision == "int8":
            return numbers ^ 128  # the bits of u - 128 in a signed byte
        half = -(-numbers.shape[1] // 2)
        found = numbers[:, :half].copy()
        found[:, : numbers.shape[1] - half] |= numbers[:, half:] << 4
        return found


def codes_of(stored: Stored) -> tuple[CodePrecision, ...]:
    """Return the codes of a stored vector: searched ones, then finer ones; empty for float32."""
    return tuple(precision for precision in stored.split("+") if precision in PRECISIONS)


def bytes_of(stored: Stored, dims: int) -> int:
    """Return the bytes of a vector, the last of which may be partly used."""
    if stored == "float32":
        return 4 * dims
    return sum(-(-BITS[precision] * dims // 8) for precision in codes_of(stored))


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Vectors whose coordinates are codes, packed into bytes; a mapped file is read as needed.

    Byte j of an ``int4`` vector holds coordinate j in its lower half, and in its upper half the
    one that is half of all coordinates further: so both halves unpack into runs. Of ``binary``
    the highest bit of byte j is the sign of coordinate 8 j, set above zero.
    """

    quantizer: Quantizer
    dims: int
    packed: UInt8[np.ndarray, "texts bytes"]

    def __len__(self) -> int:
        return len(self.packed)

    def take(self, rows: slice | Int64[np.ndarray, "rows"]) -> "Codes":
        """Return the codes of some texts."""
        return Codes(self.quantizer, self.dims, self.packed[rows])

    def integers(self) -> Int8[np.ndarray, "texts dims"]:
        """Return one code a coordinate: -128 to 127, 0 to 15, or 0 and 1."""
        precision, packed = self.quantizer.precision, np.asarray(self.packed)
        if precision == "int8":
            return packed.view(np.int8)
        if precision == "binary":
            return np.unpackbits(packed, axis=1, count=self.dims).view(np.int8)
        found = np.empty((len(packed), self.dims), dtype=np.uint8)
        half = packed.shape[1]
        np.bitwise_and(packed, 15, out=found[:, :half])
        np.right_shift(packed[:, : self.dims - half], 4, out=found[:, half:])
        return found.view(np.int8)

    def decoded(self) -> Float32[np.ndarray, "texts dims"]:
        """Return the vectors that the codes represent."""
        found, centre = self.around_centre(), self.quantizer.centre
        return found if centre is None else found + centre

    def around_centre(self) -> Float32[np.ndarray, "texts dims"]:
        """Return the decoded vectors without the centre, which all share."""
        found = self.integers().astype(np.float32)
        found *= np.float32(self.quantizer.step)
        found += np.float32(self.quantizer.origin)
        return found


@dataclass(frozen=True, slots=True)
class Ranges:
    """Centre and limits of the codes of a model's vectors, for one number of coordinates."""

    centre: tuple[float, ...]
    int8: float  # limits
    int4: float
    binary: float

    @classmethod
    def learned(cls, vectors: Float[np.ndarray, "texts dims"]) -> "Ranges":
        """Learn them from vectors of documents; see :meth:`Quantizer.learned`."""
        found = [Quantizer.learned(vectors, precision) for precision in PRECISIONS]
        centre = found[0].centre
        assert centre is not None
        return cls(
            tuple(round(float(number), _DIGITS) for number in centre),
            *(each.limit for each in found),
        )

    @classmethod
    def read(cls, record: Any) -> "Ranges":
        """Read them from the content of a file.

        Raises:
            ValueError: when the content is invalid.
        """
        try:
            limits = {name: float(record[name]) for name in PRECISIONS}
            found = cls(centre=tuple(map(float, record["centre"])), **limits)
        except (KeyError, TypeError) as error:
            raise ValueError(repr(error)) from error
        if not found.centre or not all(0 < limit < inf for limit in limits.values()):
            raise ValueError("a centre and limits above 0 are needed")
        if not all(abs(number) < inf for number in found.centre):
            raise ValueError("a centre of numbers is needed")
        return found

    def quantizer(self, precision: CodePrecision) -> Quantizer:
        """Return the quantizer for codes of this precision."""
        limit = {"int8": self.int8, "int4": self.int4, "binary": self.binary}[precision]
        return Quantizer(precision, limit, np.array(self.centre, dtype=np.float32))


def integer_product(
    left: Int8[np.ndarray, "left dims"], right: Int8[np.ndarray, "right dims"]
) -> Int32[np.ndarray, "left right"]:
    """Return all inner products of integer vectors, exact up to 131,000 dims."""
    if not len(left) or not len(right):
        return np.zeros((len(left), len(right)), dtype=np.int32)
    # What is mapped from a file cannot be written to, and torch has no such tensors.
    writable = (side if side.flags.writeable else side.copy() for side in (left, right))
    one, other = map(torch.from_numpy, writable)
    usable = left.shape[1] > 1 and _has_integers()  # torch 2.13 is wrong with one coordinate
    return (_by_integers if usable else _by_floats)(one, other).numpy()


def _by_integers(left: Tensor, right: Tensor) -> Tensor:
    return torch._int_mm(left, right.T)  # pyright: ignore[reportPrivateImportUsage]


def _by_floats(left: Tensor, right: Tensor) -> Tensor:
    """Multiply in parts so short that no sum is rounded."""
    found = torch.zeros(len(left), len(right), dtype=torch.int32)
    for ours, theirs in zip(left.split(_EXACT, 1), right.split(_EXACT, 1), strict=True):
        found += (ours.float() @ theirs.float().T).to(torch.int32)
    return found


@cache
def _has_integers() -> bool:
    """Whether torch multiplies bytes without error here, and faster than as floats.

    It does on chips with instructions for that. Without them there may be a plain loop, or pairs
    of products that are added in 16 bits, which the largest codes overflow: so both are tried.
    """
    left = torch.full((64, 256), -128, dtype=torch.int8)
    right = torch.full((1_024, 256), -128, dtype=torch.int8)
    right[::2], left[::2, 1::2] = 127, 127
    try:
        same = _by_integers(left, right).equal(_by_floats(left, right))
    except (AttributeError, RuntimeError, NotImplementedError):  # this torch or chip lacks it
        return False
    return same and _seconds(_by_integers, left, right) < _seconds(_by_floats, left, right)


def _seconds(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    """Return the shortest of some runs, since other processes may slow some down."""
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        product(left, right)
        found.append(time.perf_counter() - begin)
    return min(found)


def truncated(
    vectors: Float[np.ndarray, "texts dims"], kept: int
) -> Float32[np.ndarray, "texts kept"]:
    """Return the leading coordinates at unit length; a vector of zeros stays zero.

    Raises:
        RecipeError: when ``kept`` is not between 1 and the number of coordinates.
    """
    if not 0 < kept <= vectors.shape[1]:
        raise RecipeError(f"dims is {kept}, but the vectors have {vectors.shape[1]} coordinates")
    found = vectors[:, :kept].astype(np.float32)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.float32(1e-12))
    return found


def _refuse_broken(vectors: np.ndarray, before: int = 0) -> None:
    """Raise for NaN, which is nearest to nothing, and infinity, which would be clipped."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = before + int(finite.argmin())
        raise ModelError(f"vector {row} holds NaN or infinity and has no code; {BROKEN_MODEL}")
