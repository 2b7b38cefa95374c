"""How well texts match, by each kind of vector: matrices of all queries and all documents.

Nothing here is padded, and nothing is as wide as the vocabulary. All of it can be differentiated.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tercet.kinds import Kind, Weights
from tercet.segments import row_of
from tercet.vectors import Terms, TokenRows, Vectors

BLOCK_TOKENS: Final = 2_048  # of documents, compared at a time


def scores_of(kind: Kind, queries: Vectors, docs: Vectors) -> Float[Tensor, "queries docs"]:
    """The scores by one kind, which both sides have."""
    if kind == "dense":
        assert queries.dense is not None and docs.dense is not None
        return queries.dense @ docs.dense.T
    if kind == "sparse":
        assert queries.sparse is not None and docs.sparse is not None
        return lexical_scores(queries.sparse, docs.sparse)
    assert queries.multi is not None and docs.multi is not None
    return late_interaction(queries.multi, docs.multi)


def weighted_scores(
    queries: Vectors, docs: Vectors, weights: Weights
) -> Float[Tensor, "queries docs"]:
    """The weighted sum of the scores by every kind that both sides have and that counts."""
    total = None
    for kind in queries.kinds:
        if weights.of(kind) and kind in docs.kinds:
            part = scores_of(kind, queries, docs) * weights.of(kind)
            total = part if total is None else total + part
    assert total is not None, "a kind with a weight that both sides have"
    return total


def lexical_scores(queries: Terms, docs: Terms) -> Float[Tensor, "queries docs"]:
    """The sum over tokens in both texts of the product of their largest weights there.

    Only tokens that occur in some query can score, so the vocabulary is those: documents drop the
    rest, both sides become small matrices, and one product scores all pairs (arXiv 2402.03216,
    section 3.2; exact).
    """
    vocabulary = queries.ids.unique()
    return _columns(queries, vocabulary) @ _columns(docs, vocabulary).T


def _columns(texts: Terms, vocabulary: Int[Tensor, "words"]) -> Float[Tensor, "texts words"]:
    """The largest weight of each word in each text."""
    flat = texts.weights.new_zeros(len(texts) * len(vocabulary))
    if len(vocabulary):
        place = torch.searchsorted(vocabulary, texts.ids).clamp_max(len(vocabulary) - 1)
        (known,) = (vocabulary[place] == texts.ids).nonzero(as_tuple=True)
        cell = row_of(texts.offsets)[known] * len(vocabulary) + place[known]
        flat = flat.scatter_reduce(0, cell, texts.weights[known], "amax")
    return flat.view(len(texts), len(vocabulary))


def late_interaction(
    queries: TokenRows, docs: TokenRows, *, padded_rows: bool = False
) -> Float[Tensor, "queries docs"]:
    """The mean over a query's tokens of their largest dot product with a token of the document.

    A text without tokens scores zero. Forward keeps only which token won; backward touches the
    winners alone (arXiv 2402.03216, section 3.2).

    ``padded_rows`` repeats a defect of the reference code, to compare with it: a document shorter
    than the longest one has a row of zeros too, so that no dot product with it is below zero.
    """
    rows = row_of(queries.offsets)
    best = _MaxSim.apply(
        queries.vectors, docs.vectors, docs.offsets, BLOCK_TOKENS, padded_rows
    )  # [docs, query tokens]
    sums = best.new_zeros(len(queries), len(docs)).index_add(0, rows, best.T)
    return sums / queries.offsets.diff().clamp_min(1)[:, None]


class _MaxSim(torch.autograd.Function):
    """For each document and query token, the largest dot product."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, docs: Tensor, offsets: Tensor, block: int, padded_rows: bool
    ) -> Tensor:
        bounds = offsets.tolist()
        best = queries.new_zeros(len(bounds) - 1, len(queries))
        winner = torch.full(best.shape, -1, dtype=torch.int32, device=queries.device)
        longest = max((high - low for low, high in pairwise(bounds)), default=0)
        for first, last in _blocks(bounds, block):
            base = bounds[first]
            dots = docs[base : bounds[last]] @ queries.T  # a document is a run of rows
            for doc in range(first, last):
                low, high = bounds[doc] - base, bounds[doc + 1] - base
                if low == high:
                    continue
                value, place = dots[low:high].max(0)
                won = (place + bounds[doc]).to(torch.int32)
                if padded_rows and high - low < longest:
                    won, value = won.masked_fill(value < 0, -1), value.clamp_min(0)
                best[doc], winner[doc] = value, won
        ctx.save_for_backward(queries, docs, winner)
        return best

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        queries, docs, winner = ctx.saved_tensors
        by_queries, by_docs = torch.zeros_like(queries), torch.zeros_like(docs)
        for row, won in zip(gradient, winner.long(), strict=True):
            weight = (row * (won >= 0))[:, None]
            won = won.clamp_min(0)
            if not len(docs):
                break
            by_queries.addcmul_(weight, docs[won])
            by_docs.index_add_(0, won, weight * queries)
        return by_queries, by_docs, None, None, None


def _blocks(bounds: list[int], tokens: int) -> Iterator[tuple[int, int]]:
    """Runs of documents of at most ``tokens`` tokens together, or one longer document."""
    first = 0
    while first < len(bounds) - 1:
        last = first + 1
        while last < len(bounds) - 1 and bounds[last + 1] - bounds[first] <= tokens:
            last += 1
        yield first, last
        first = last


def paired_scores(kind: Kind, queries: Vectors, docs: Vectors) -> Float[Tensor, "pairs"]:
    """The score of each query with the document of the same row, by one kind that both have.

    Equal to the diagonal of :func:`scores_of`, which would compare all with all.
    """
    assert len(queries) == len(docs), "a document for each query"
    if kind == "dense":
        assert queries.dense is not None and docs.dense is not None
        return (queries.dense * docs.dense).sum(1)
    if kind == "sparse":
        assert queries.sparse is not None and docs.sparse is not None
        return _paired_terms(queries.sparse.merged(), docs.sparse.merged())
    assert queries.multi is not None and docs.multi is not None
    found = queries.multi.vectors.new_zeros(len(queries))
    own, others = (each.offsets.diff().tolist() for each in (queries.multi, docs.multi))
    pairs = zip(queries.multi.vectors.split(own), docs.multi.vectors.split(others), strict=True)
    for row, (tokens, of_doc) in enumerate(pairs):
        if len(tokens) and len(of_doc):
            found[row] = (tokens @ of_doc.T).amax(1).mean()
    return found


def _paired_terms(queries: Terms, docs: Terms) -> Float[Tensor, "pairs"]:
    """Where each text has each token once: a join on the row and the token."""
    size = 1 + max((int(each.ids.max()) for each in (queries, docs) if len(each.ids)), default=0)
    cells, of_docs = (row_of(each.offsets) * size + each.ids for each in (queries, docs))
    found = queries.weights.new_zeros(len(queries))
    if not len(of_docs):
        return found
    place = torch.searchsorted(of_docs, cells).clamp_max(len(of_docs) - 1)
    (shared,) = (of_docs[place] == cells).nonzero(as_tuple=True)
    products = queries.weights[shared] * docs.weights[place[shared]]
    return found.index_add(0, cells[shared] // size, products)
