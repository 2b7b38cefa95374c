"""Numbered tests of the Arctic-Embed specification: vectors in few bytes."""

from contextlib import closing

import numpy as np
import pytest
import torch

from tercet.rank.quantized import Quantizer, Ranges, bytes_of, truncated
from tercet.search.engine.engine import Record
from tercet.search.exact.exact_engine import ExactEngine
from tercet.vectors import Vectors
from tests.rank.formulas import inner_products

CLIPS = {"int8": 0.30, "int4": 0.18}  # published, for 256 dimensions


def unit(count, seed, dims=256):
    found = np.random.default_rng(seed).standard_normal((count, dims))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("precision", CLIPS)
def test_the_inner_product_of_codes_is_the_published_identity(precision):
    """Trap A18 of Arctic-Embed: <x, y> = c^2 <u, v> - c b (sum u + sum v) + dims b^2."""
    bits, b = {"int8": 8, "int4": 4}[precision], CLIPS[precision]
    left, right = unit(30, 0), unit(40, 1)
    step = 2 * b / (2**bits - 1)
    u, v = (np.rint(np.clip(x + b, 0, 2 * b) / step).astype(float) for x in (left, right))
    sums = u.sum(1)[:, None] + v.sum(1)
    identity = step**2 * u @ v.T - step * b * sums + 256 * b * b
    assert np.abs(identity - (step * u - b) @ (step * v - b).T).max() < 1e-13
    quantizer = Quantizer(precision, b)
    codes = quantizer.codes(left), quantizer.codes(right)
    assert np.abs(inner_products(*codes) - identity).max() < 1e-13
    exact = np.corrcoef(identity.ravel(), (left @ right.T).ravel())[0, 1]
    assert exact > {"int8": 0.9995, "int4": 0.98}[precision]


@pytest.mark.parametrize(("precision", "size"), [("int8", 256), ("int4", 128)])
def test_a_vector_of_256_dimensions_has_the_published_size_in_memory_and_on_disk(
    precision, size, tmp_path
):
    """Trap A18 of Arctic-Embed."""
    docs = truncated(unit(500, 2, dims=384), 256)
    assert Ranges.learned(docs).quantizer(precision).codes(docs).packed.nbytes == 500 * size
    assert bytes_of(precision, 256) == size
    with closing(ExactEngine(tmp_path / "index", stored=precision)) as engine:
        engine.upsert(
            [Record(str(i), "") for i in range(500)], Vectors(dense=torch.from_numpy(docs))
        )
    (file,) = (tmp_path / "index").glob("segment-*/codes.npy")
    assert file.stat().st_size == 500 * size + 128  # and the header of an .npy file


@pytest.mark.parametrize(("precision", "lowest", "highest"), [("int8", -128, 127), ("int4", 0, 15)])
def test_codes_end_at_the_clip_and_values_beyond_it_are_clipped(precision, lowest, highest):
    """Trap A18 of Arctic-Embed."""
    b = CLIPS[precision]
    quantizer = Quantizer(precision, b)
    near = quantizer.step / 2 * 0.99  # of the edge: still rounds to it
    values = np.array([[-9, -b - 1e-4, -b, near - b, b - near, b, b + 1e-4, 9]], np.float32)
    codes = quantizer.codes(values)
    assert codes.integers().tolist() == [[lowest] * 4 + [highest] * 4]
    assert np.allclose(codes.decoded(), [[-b] * 4 + [b] * 4], atol=1e-6)
    inside = quantizer.codes(np.array([[1.01 * quantizer.step / 2 - b]], np.float32))
    assert inside.integers().tolist() == [[lowest + 1]]
