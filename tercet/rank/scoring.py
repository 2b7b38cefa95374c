"""Scores of queries with documents by each kind of vectors (arXiv 2402.03216, section 3.2).

- *Lexical scores* by terms: the sum over shared tokens of the product of their
  weights. :func:`lexical_scores` has gradients; :func:`lexical_sums` and :class:`Postings` touch
  matching terms only.
- *Late interaction* by token vectors: the mean over a query's tokens of their largest dot
  product with a token of the document; zero where a text has no tokens. :func:`late_interaction`
  has gradients; :func:`late_interaction_of_dots` and :func:`listed_late_interaction` are for
  search.

Nothing is padded, and nothing is as wide as the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from tercet.kinds import Kind
from tercet.segments import maximum, moved, ragged_places, row_of, runs_within
from tercet.vectors import Terms, TokenRows, Vectors

BLOCK_TOKENS: Final = 2_048  # of documents, compared at a time on a CPU
_BLOCK_PRODUCTS: Final = 1 << 27  # of tokens on a GPU: half a gigabyte of float32


def scores_of(kind: Kind, queries: Vectors, docs: Vectors) -> Float[Tensor, "queries docs"]:
    """Return the scores of all pairs by one kind, which both sides have."""
    if kind == "dense":
        assert queries.dense is not None and docs.dense is not None
        return queries.dense @ docs.dense.T
    if kind == "sparse":
        assert queries.sparse is not None and docs.sparse is not None
        return lexical_scores(queries.sparse, docs.sparse)
    assert queries.multi is not None and docs.multi is not None
    return late_interaction(queries.multi, docs.multi)


def paired_scores(kind: Kind, queries: Vectors, docs: Vectors) -> Float[Tensor, "pairs"]:
    """Return the score of each query with the document of the same row, by one kind.

    Equal to the diagonal of :func:`scores_of`, which would compare all with all.
    """
    assert len(queries) == len(docs), "a document for each query"
    if kind == "dense":
        assert queries.dense is not None and docs.dense is not None
        return (queries.dense * docs.dense).sum(1)
    if kind == "sparse":
        assert queries.sparse is not None and docs.sparse is not None
        return _paired_lexical_scores(queries.sparse.merged(), docs.sparse.merged())
    assert queries.multi is not None and docs.multi is not None
    found = queries.multi.vectors.new_zeros(len(queries))
    own, others = (each.offsets.diff().tolist() for each in (queries.multi, docs.multi))
    pairs = zip(queries.multi.vectors.split(own), docs.multi.vectors.split(others), strict=True)
    for row, (tokens, of_doc) in enumerate(pairs):
        if len(tokens) and len(of_doc):
            found[row] = (tokens @ of_doc.T).amax(1).mean()
    return found


def _is_gpu(values: Tensor) -> bool:
    """Whether values are on a GPU, where a call costs more than spare products."""
    return values.device.type == "cuda"


# ---- terms ---------------------------------------------------------------------------------------


def lexical_scores(queries: Terms, docs: Terms) -> Float[Tensor, "queries docs"]:
    """Return the lexical scores of all pairs, with gradients (arXiv 2402.03216, section 3.2).

    A token that occurs several times in a text counts by its largest weight there. Only tokens of
    the queries can score: documents drop all others, both sides become small matrices, and one
    product scores all pairs.
    """
    # The number of distinct tokens would have to be read from a GPU. A repeated one scores zero.
    repeats = _is_gpu(queries.ids)
    vocabulary = queries.ids.sort().values if repeats else queries.ids.unique()
    return _columns(queries, vocabulary) @ _columns(docs, vocabulary).T


def _columns(texts: Terms, vocabulary: Int[Tensor, "words"]) -> Float[Tensor, "texts words"]:
    """Return the largest weight of each word in each text."""
    flat = texts.weights.new_zeros(len(texts) * len(vocabulary))
    if len(vocabulary):
        place = torch.searchsorted(vocabulary, texts.ids).clamp_max(len(vocabulary) - 1)
        cell = row_of(texts.offsets, place) * len(vocabulary) + place
        known, weights = vocabulary[place] == texts.ids, texts.weights
        if _is_gpu(known):  # a zero changes nothing: no weight is smaller
            weights = torch.where(known, weights, 0)
        else:
            cell, weights = cell[known], weights[known]
        flat = flat.scatter_reduce(0, cell, weights, "amax")
    return flat.view(len(texts), len(vocabulary))


def lexical_sums(queries: Terms, docs: Terms) -> Float[Tensor, "queries docs"]:
    """Return the lexical scores of merged terms, by inverted lists; without gradients."""
    order = docs.ids.argsort(stable=True)
    ids, weights = docs.ids[order], docs.weights[order]
    owner = row_of(docs.offsets)[order]
    low = torch.searchsorted(ids, queries.ids)
    places, bounds = ragged_places(low, torch.searchsorted(ids, queries.ids, right=True))
    term = row_of(bounds)  # the query's term of each place
    cell = row_of(queries.offsets)[term] * len(docs) + owner[places]
    products = queries.weights[term] * weights[places]
    flat = products.new_zeros(len(queries) * len(docs)).index_add_(0, cell, products)
    return flat.view(len(queries), len(docs))


def _paired_lexical_scores(queries: Terms, docs: Terms) -> Float[Tensor, "pairs"]:
    """Join merged terms on the row and the token."""
    size = 1 + max((int(each.ids.max()) for each in (queries, docs) if len(each.ids)), default=0)
    cells, of_docs = (row_of(each.offsets) * size + each.ids for each in (queries, docs))
    found = queries.weights.new_zeros(len(queries))
    if not len(of_docs):
        return found
    place = torch.searchsorted(of_docs, cells).clamp_max(len(of_docs) - 1)
    (shared,) = (of_docs[place] == cells).nonzero(as_tuple=True)
    products = queries.weights[shared] * docs.weights[place[shared]]
    return found.index_add(0, cells[shared] // size, products)


@dataclass(frozen=True, slots=True, eq=False)
class Postings:
    """The documents that contain each token, and its weight there; arrays may be mapped files."""

    tokens: Int64[np.ndarray, "words"]  # ascending
    offsets: Int64[np.ndarray, "bounds"]  # word i has rows[offsets[i]:offsets[i + 1]]
    rows: Int32[np.ndarray, "postings"]  # ascending within a word
    weights: Float32[np.ndarray, "postings"]

    def scores(
        self, tokens: Int64[np.ndarray, "terms"], weights: Float32[np.ndarray, "terms"], count: int
    ) -> Float32[np.ndarray, "count"]:
        """Return the lexical score of one query's merged terms with each of ``count`` rows.

        Sums are computed in float64, and read no more than the lists of the query's tokens.
        """
        place = np.searchsorted(self.tokens, tokens)
        known = place < len(self.tokens)
        known[known] = self.tokens[place[known]] == tokens[known]
        rows, parts = [], []
        for word, weight in zip(place[known].tolist(), weights[known].tolist(), strict=True):
            where = slice(self.offsets[word], self.offsets[word + 1])
            rows.append(self.rows[where])
            parts.append(self.weights[where] * np.float32(weight))
        if not rows:
            return np.zeros(count, np.float32)
        summed = np.bincount(np.concatenate(rows), np.concatenate(parts), minlength=count)
        return summed.astype(np.float32)

    def weights_in(self, row: int, tokens: Sequence[int]) -> dict[int, float]:
        """Return the weights of those of some tokens that a row has."""
        found: dict[int, float] = {}
        for token, word in zip(tokens, np.searchsorted(self.tokens, tokens).tolist(), strict=True):
            if word < len(self.tokens) and self.tokens[word] == token:
                begin, end = self.offsets[word], self.offsets[word + 1]
                place = begin + np.searchsorted(self.rows[begin:end], row)
                if place < end and self.rows[place] == row:
                    found[token] = float(self.weights[place])
        return found


# ---- token vectors -------------------------------------------------------------------------------


def late_interaction(queries: TokenRows, docs: TokenRows) -> Float[Tensor, "queries docs"]:
    """Return the late interaction of all pairs, with gradients (arXiv 2402.03216, section 3.2).

    Forward keeps only which token of the document won; backward touches the winners alone.
    """
    best = _MaxSim.apply(queries.vectors, docs.vectors, docs.offsets)  # [docs, query tokens]
    return _query_means(best, queries.offsets)


def late_interaction_of_dots(
    dots: Float[Tensor, "doc_tokens query_tokens"],
    doc_offsets: Int[Tensor, "doc_bounds"],
    query_offsets: Int[Tensor, "query_bounds"],
) -> Float[Tensor, "queries docs"]:
    """Return the late interaction of all pairs from the dot products of their tokens."""
    best = maximum(dots, doc_offsets)
    return _query_means(best.masked_fill(best == -inf, 0), query_offsets)


def listed_late_interaction(
    queries: TokenRows,
    docs: TokenRows,
    rows: Int[Tensor, "docs"],
    wanted: Int[Tensor, "queries ranks"],
) -> Float[Tensor, "queries ranks"]:
    """Return the late interaction of each query with the documents that its list names.

    ``rows`` are those of ``docs``, ascending; other documents of a list score zero.
    """
    found = torch.zeros(wanted.shape)
    if not len(rows):
        return found
    place = torch.searchsorted(rows, wanted.clamp_min(0)).clamp_max(len(rows) - 1)
    here = rows[place] == wanted
    for query in here.any(dim=1).nonzero().ravel().tolist():
        some = docs.take(place[query][here[query]])
        scores = late_interaction(queries.take(torch.tensor([query])), some)
        found[query, here[query]] = scores[0]
    return found


def _query_means(
    best: Float[Tensor, "docs query_tokens"], offsets: Int[Tensor, "bounds"]
) -> Float[Tensor, "queries docs"]:
    sums = best.new_zeros(len(offsets) - 1, len(best)).index_add(0, row_of(offsets, best.T), best.T)
    return sums / moved(offsets.diff().clamp_min(1), sums.device)[:, None]


class _MaxSim(torch.autograd.Function):
    """For each document and query token, the largest dot product.

    A CPU takes the documents one by one; a GPU some at a time, padded, since a call costs more
    there than some products too many.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, docs: Tensor, offsets: Tensor) -> Tensor:
        best = queries.new_zeros(len(offsets) - 1, len(queries))
        winner = torch.full(best.shape, -1, dtype=torch.int32, device=queries.device)
        largest = _largest_padded if _is_gpu(docs) else _largest_one_by_one
        largest(queries, docs, offsets, best, winner)
        ctx.save_for_backward(queries, docs, winner)
        ctx.offsets = offsets
        return best

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        queries, docs, winner = ctx.saved_tensors
        by_queries, by_docs = torch.zeros_like(queries), torch.zeros_like(docs)
        if len(docs) and _is_gpu(docs):
            _add_by_products(gradient, winner, ctx.offsets, (queries, docs), (by_queries, by_docs))
        elif len(docs):
            for row, won in zip(gradient, winner.long(), strict=True):
                weight = (row * (won >= 0))[:, None]
                won = won.clamp_min(0)
                by_queries.addcmul_(weight, docs[won])
                by_docs.index_add_(0, won, weight * queries)
        return by_queries, by_docs, None


def _largest_one_by_one(
    queries: Tensor, docs: Tensor, offsets: Tensor, best: Tensor, winner: Tensor
) -> None:
    """Write the largest products of each document, and which of its tokens has it."""
    bounds = offsets.tolist()
    for first, end in runs_within(bounds, BLOCK_TOKENS):
        base = bounds[first]
        dots = docs[base : bounds[end]] @ queries.T  # a document is a run of rows
        for doc in range(first, end):
            low, high = bounds[doc] - base, bounds[doc + 1] - base
            if low < high:
                best[doc], place = dots[low:high].max(0)
                winner[doc] = (place + bounds[doc]).to(torch.int32)


def _largest_padded(
    queries: Tensor, docs: Tensor, offsets: Tensor, best: Tensor, winner: Tensor
) -> None:
    """Write them for documents of similar length at a time, padded with their last tokens."""
    lengths = offsets.diff()
    order = lengths.argsort(descending=True, stable=True)
    order = order[: int((lengths > 0).sum())]  # empty documents have no products
    begins, ranked = offsets[order], lengths[order].tolist()  # the longest first
    at_once = _BLOCK_PRODUCTS // max(1, len(queries), docs.shape[1])
    first = 0
    while first < len(order):
        longest = ranked[first]
        some = order[first : first + max(1, at_once // longest)]
        some = some[2 * lengths[some] > longest]  # padding takes no more than the texts
        inside = torch.arange(longest)
        begin = begins[first : first + len(some), None]
        token = moved(begin + torch.minimum(inside, lengths[some][:, None] - 1), docs.device)
        found, place = (docs[token] @ queries.T).max(1)  # [documents, query tokens]
        rows = moved(some, docs.device)
        best[rows] = found.to(best.dtype)
        winner[rows] = token.gather(1, place).to(torch.int32)
        first += len(some)


def _add_by_products(
    gradient: Tensor,
    winner: Tensor,
    offsets: Tensor,
    vectors: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
) -> None:
    """Add the gradients of some documents at a time, as products with a mostly empty matrix."""
    (queries, docs), (by_queries, by_docs) = vectors, sums
    bounds = offsets.tolist()
    for first, end in runs_within(bounds, _BLOCK_PRODUCTS // max(1, len(queries))):
        rows = slice(bounds[first], bounds[end])
        if rows.start == rows.stop:
            continue
        won = winner[first:end]
        weights = (gradient[first:end] * (won >= 0)).to(docs.dtype)
        place = (won.long() - rows.start).clamp_min(0)  # [documents, query tokens]
        slope = docs.new_zeros(rows.stop - rows.start, len(queries))
        slope.scatter_add_(0, place, weights)
        by_queries.addmm_(slope.T, docs[rows])
        by_docs[rows] = slope @ queries
