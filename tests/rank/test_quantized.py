"""Vectors in few bytes. A18: identity, byte counts, codes at the edges; A6: unit length again."""

import numpy as np
import pytest
import torch

from tercet.errors import ModelError, RecipeError
from tercet.rank import quantized
from tercet.rank.quantized import (
    PRECISIONS,
    Quantizer,
    Ranges,
    bytes_of,
    integer_product,
    truncated,
)
from tests.rank.formulas import inner_products

RANGES = {"int8": 0.30, "int4": 0.18, "binary": 0.125}


def unit(count, dims, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, dims))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def as_in_the_paper(vectors, bits, b):
    """u = round(clip(x + b, 0, 2b) / c) and c u - b, for each number alone."""
    c = 2 * b / (2**bits - 1)
    u = np.array([[round(min(max(x + b, 0), 2 * b) / c) for x in row] for row in vectors.tolist()])
    return u, c * u - b


@pytest.mark.parametrize("dims", [7, 64, 255])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_codes_are_those_of_the_formula_a18(precision, dims):
    b, bits = RANGES[precision], {"int8": 8, "int4": 4}[precision]
    vectors = unit(5, dims).astype(np.float64)
    u, decoded = as_in_the_paper(vectors, bits, b)
    codes = Quantizer(precision, b).codes(vectors)
    assert (codes.integers().astype(int) + (128 if bits == 8 else 0) == u).all()
    assert codes.decoded() == pytest.approx(decoded, abs=1e-6)


def test_binary_codes_are_signs_with_zero_below():
    codes = Quantizer("binary", 0.5).codes(np.array([[0.1, -0.1, 0.0, 1e-30, -0.0]]))
    assert codes.integers().tolist() == [[1, 0, 0, 1, 0]]
    assert codes.packed.tolist() == [[0b10010000]]
    assert codes.decoded().tolist() == [[0.5, -0.5, -0.5, 0.5, -0.5]]


def exactly(codes):
    """What codes stand for, in float64."""
    quantizer = codes.quantizer
    centre = 0 if quantizer.centre is None else quantizer.centre.astype(np.float64)
    return quantizer.step * codes.integers().astype(np.float64) + quantizer.origin + centre


@pytest.mark.parametrize("dims", [1, 7, 8, 9, 256])
@pytest.mark.parametrize("one", PRECISIONS)
@pytest.mark.parametrize("other", PRECISIONS)
def test_inner_products_of_codes_are_those_of_what_they_stand_for_a18(one, other, dims):
    """The identity, to 1e-12: of both sides alike and of different ones, around zero and not."""
    x, y = unit(4, dims), unit(6, dims, seed=1)
    for centre in (None, y.mean(0)):
        left = Quantizer(one, RANGES[one]).codes(x)
        right = Quantizer(other, 1.3 * RANGES[other], centre).codes(y)
        products = exactly(left) @ exactly(right).T
        assert inner_products(left, right) == pytest.approx(products, abs=1e-12)
        assert inner_products(right, left) == pytest.approx(products.T, abs=1e-12)
        assert inner_products(right, right) == pytest.approx(
            exactly(right) @ exactly(right).T, abs=1e-12
        )


def test_signs_that_differ_can_be_counted_from_an_inner_product():
    x, y = unit(3, 20), unit(4, 20, seed=1)
    quantizer = Quantizer("binary", 20**-0.5)
    found = inner_products(quantizer.codes(x), quantizer.codes(y))
    differ = [[sum((a > 0) != (b > 0)) for b in y] for a in x]
    assert (20 - found * 20) / 2 == pytest.approx(np.array(differ))


@pytest.mark.parametrize(
    ("precision", "dims", "size"),
    [
        *(("int8", 256, 256), ("int4", 256, 128), ("binary", 256, 32), ("float32", 256, 1024)),
        *(("int4", 7, 4), ("binary", 9, 2), ("int4", 1, 1)),
    ],
)
def test_a_vector_has_so_many_bytes_a18(precision, dims, size):
    assert bytes_of(precision, dims) == size
    if precision != "float32":
        assert Quantizer(precision, 0.2).codes(unit(3, dims)).packed.shape == (3, size)


@pytest.mark.parametrize(("precision", "lowest", "highest"), [("int8", -128, 127), ("int4", 0, 15)])
def test_what_is_beyond_the_range_becomes_its_edge_a18(precision, lowest, highest):
    b = 0.25
    values = np.array([[-9.0, -b, b, 9.0, np.nextafter(b, 0), 0.26, -0.26]], dtype=np.float32)
    found = Quantizer(precision, b).codes(values)
    assert found.integers().tolist() == [
        [lowest, lowest, highest, highest, highest, highest, lowest]
    ]
    assert found.decoded()[0, [0, 3]] == pytest.approx([-b, b])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_vectors_without_a_number_are_refused(bad):
    vectors = unit(5_000, 4)
    vectors[4_998, 2] = bad
    with pytest.raises(ModelError, match="vector 4998 holds NaN or infinity and has no code"):
        Quantizer("int4", 0.2).codes(vectors)
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        Quantizer.learned(vectors, "int8")


def test_nothing_can_be_learned_from_vectors_that_do_not_differ():
    for vectors in (np.zeros((3, 4)), np.zeros((0, 4)), np.tile(unit(1, 4), (5, 1))):
        with pytest.raises(ModelError, match=f"from {len(vectors)} vectors that do not differ"):
            Quantizer.learned(vectors, "int4")


def test_the_learned_range_is_near_the_best_one_of_a_normal_distribution():
    """Uniform steps of a normal distribution err least at 2.7 deviations with 16 of them.

    Signs do with their value at its mean distance, which is 0.798 deviations.
    """
    vectors = 5 + np.random.default_rng(0).standard_normal((2_000, 100))
    found = Quantizer.learned(vectors, "int4")
    assert found.limit == pytest.approx(2.73, abs=0.15)
    assert found.centre == pytest.approx(vectors.mean(0), abs=1e-5)
    assert 3.5 < Quantizer.learned(vectors, "int8").limit < np.abs(vectors - 5).max()
    assert Quantizer.learned(vectors, "binary").limit == pytest.approx(0.798, abs=0.005)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_other_range_rounds_with_a_smaller_error(precision):
    vectors = unit(400, 32)
    vectors[:, 0] += 0.8  # one coordinate far from the others, as of real models
    chosen = Quantizer.learned(vectors, precision)
    distances = np.abs(vectors - vectors.mean(0, dtype=np.float64))
    shares = (0.9, 0.95, 0.99, 0.999, 1.0) if precision != "binary" else (0.4, 0.5, 0.6, 0.9)

    def error(b):
        codes = Quantizer(precision, b, chosen.centre).codes(vectors)
        return ((exactly(codes) - vectors) ** 2).mean()

    others = [error(float(np.quantile(distances, share))) for share in shares]
    assert error(chosen.limit) <= min(others) + 1e-9


def test_a_centre_keeps_what_signs_tell_of_vectors_far_to_one_side():
    """As those of models trained with a low temperature: without it all signs are the same."""
    vectors = unit(200, 32) + 0.5
    centred = Quantizer.learned(vectors, "binary")
    plain = Quantizer("binary", centred.limit)
    assert plain.codes(vectors).integers().mean() > 0.99
    assert centred.codes(vectors).integers().mean() == pytest.approx(0.5, abs=0.02)
    assert centred.codes(vectors).decoded().mean(0) == pytest.approx(vectors.mean(0), abs=0.05)


def test_what_is_learned_is_some_of_many_vectors(monkeypatch):
    vectors = unit(1_000, 16)
    vectors[1::2] *= 50  # those that are not looked at
    monkeypatch.setattr(quantized, "_COORDINATES", 16 * 500)
    found, same = Quantizer.learned(vectors, "int4"), Quantizer.learned(vectors[::2], "int4")
    assert found.limit == same.limit
    assert found.centre is not None and (found.centre == same.centre).all()


def test_ranges_are_those_of_each_precision():
    vectors = unit(300, 12) + 0.2
    found = Ranges.learned(vectors)
    for precision in PRECISIONS:
        alone, kept = Quantizer.learned(vectors, precision), found.quantizer(precision)
        assert (kept.codes(vectors).packed == alone.codes(vectors).packed).all()
        assert kept.limit == alone.limit


def test_the_integer_product_has_no_error_at_the_largest_codes():
    """Sums of 16 bits would overflow, and one of float32 would round beyond 1,024 coordinates."""
    random = np.random.default_rng(0)
    left = random.integers(-128, 128, (3, 3_000)).astype(np.int8)
    right = random.integers(-128, 128, (40, 3_000)).astype(np.int8)
    left[0], right[0], right[1] = -128, -128, 127
    exact = left.astype(np.int64) @ right.astype(np.int64).T
    assert (integer_product(left, right) == exact).all()
    one, other = torch.from_numpy(left), torch.from_numpy(right)
    assert (quantized._by_floats(one, other).numpy() == exact).all()
    assert integer_product(left[:0], right).shape == (0, 40)


def test_a_chip_whose_integers_overflow_is_not_trusted(monkeypatch):
    def overflowing(left, right):
        return (left.float() @ right.float().T).clamp(-32_768, 32_767).to(torch.int32)

    quantized._has_integers.cache_clear()
    monkeypatch.setattr(quantized, "_by_integers", overflowing)
    assert not quantized._has_integers()

    def missing(left, right):
        raise AttributeError("no such product")

    quantized._has_integers.cache_clear()
    monkeypatch.setattr(quantized, "_by_integers", missing)
    left, right = np.array([[3, -4]], np.int8), np.array([[5, 6]], np.int8)
    assert integer_product(left, right).tolist() == [[-9]]
    quantized._has_integers.cache_clear()


def test_truncated_vectors_have_unit_length_again_a6():
    vectors = unit(4, 10)
    vectors[2] = 0
    found = truncated(vectors, 3)
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1, 0, 1])
    assert found[0] == pytest.approx(vectors[0, :3] / np.linalg.norm(vectors[0, :3]))
    with pytest.raises(RecipeError, match="dims is 11, but the vectors have 10"):
        truncated(vectors, 11)


def test_some_rows_of_codes_are_those_of_some_vectors():
    vectors = unit(9, 7)
    quantizer = Quantizer("int4", 0.4)
    rows = np.array([8, 0, 8])
    assert (
        quantizer.codes(vectors).take(rows).packed == quantizer.codes(vectors[rows]).packed
    ).all()
