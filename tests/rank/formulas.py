"""Scores by slow or plain formulas, which tests compare the package with."""

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tercet.kinds import Weights
from tercet.rank.quantized import Codes, integer_product
from tercet.rank.scoring import scores_of
from tercet.segments import offsets_of
from tercet.vectors import TokenRows, Vectors


def weighted_scores(
    queries: Vectors, docs: Vectors, weights: Weights
) -> Float[Tensor, "queries docs"]:
    """The weighted sum of the scores by every kind that both sides have and that counts."""
    total = torch.zeros(len(queries), len(docs))
    for kind in queries.kinds:
        if weights.of(kind) and kind in docs.kinds:
            total = total + scores_of(kind, queries, docs) * weights.of(kind)
    return total


def with_padded_rows(docs: TokenRows) -> TokenRows:
    """A row of zeros more for each document shorter than the longest.

    So late interaction repeats a defect of the reference code of BGE-M3, in which padding competes.
    """
    lengths = docs.offsets.diff()
    parts = [
        _with_zeros(rows) if len(rows) < int(lengths.max()) else rows
        for rows in docs.vectors.split(lengths.tolist())
    ]
    return TokenRows(torch.cat(parts), offsets_of(torch.tensor([len(part) for part in parts])))


def _with_zeros(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def inner_products(left: Codes, right: Codes) -> Float64[np.ndarray, "left right"]:
    """All inner products of what both stand for, from one product of their whole numbers.

    With values c s + a on one side and c' t + a' on the other, it is
    c c' <s, t> + c a' sum s + c' a sum t + dims a a'. The product of whole numbers has no error.
    A centre m adds <c s + a, m'> + <m, c' t + a'> + <m, m'>: one number a text.
    For vectors of one bit without a centre it says how many signs differ: dims - <x, y> / limit^2
    is twice their Hamming distance.
    """
    assert left.dims == right.dims, "vectors of one width"
    ours, theirs = left.integers(), right.integers()
    one, other = left.quantizer, right.quantizer
    found = integer_product(ours, theirs) * (one.step * other.step)
    found += one.step * other.origin * ours.sum(axis=1, dtype=np.int64)[:, None]
    found += other.step * one.origin * theirs.sum(axis=1, dtype=np.int64)
    found += left.dims * one.origin * other.origin
    nothing = np.zeros(left.dims)
    here, there = (nothing if it.centre is None else it.centre + nothing for it in (one, other))
    found += (one.step * (ours @ there) + one.origin * there.sum())[:, None]
    found += other.step * (theirs @ here) + other.origin * here.sum()
    return found + here @ there
