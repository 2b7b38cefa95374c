"""Nearest neighbours by inner product with every document, in blocks that fit in memory.

Equal scores are ranked by lower document row, with every block size and every library.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from tercet.errors import MissingExtraError, ModelError
from tercet.rank.topk import Best

_QUERY_BLOCK: Final = 256  # with 16,384 documents a block: 16 MB of scores
_FEW: Final = 64  # queries, to which the documents are better multiplied from the left: by up to 2
_BROKEN_MODEL: Final = "the model is broken, or it was run in a precision too low for it"


@dataclass(frozen=True, slots=True)
class Hits:
    """The best documents of each query, best first."""

    scores: Float32[np.ndarray, "queries ranks"]
    rows: Int64[np.ndarray, "queries ranks"]


def top_k(
    queries: Float[np.ndarray, "queries dim"],
    docs: Float[np.ndarray, "docs doc_dim"],
    k: int,
    *,
    block: int = 16_384,
    use_faiss: bool | None = None,
) -> Hits:
    """The ``k`` documents of largest inner product with each query; all of them if ``k`` is more.

    ``docs`` may be a memory-mapped file larger than RAM: it is read in blocks of ``block`` rows.
    ``use_faiss`` None takes faiss where it is installed and measured to be faster (its kernels
    run at the speed of the matrix product); both ways rank equal scores by lower row. Vectors
    are compared in float32; scores of a document may differ in the last bit between the two.

    Raises:
        ModelError: when queries and documents differ in width, or hold NaN. (A document with NaN
            among good ones is not looked for, which would cost a search: engines do that.)
        MissingExtraError: when faiss is asked for and not installed.
    """
    check_queries(queries, docs.shape[1])
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    k = min(k, len(docs))
    if not len(queries) or k < 1:
        shape = (len(queries), max(k, 0))
        return Hits(np.zeros(shape, np.float32), np.zeros(shape, np.int64))
    if use_faiss is None:
        use_faiss = find_spec("faiss") is not None and _faiss_is_faster(len(queries), docs)
    search = _by_faiss if use_faiss else _by_blocks
    hits = search(queries, docs, k, block)
    if np.isnan(hits.scores).any() or (hits.rows < 0).any():
        raise ModelError(f"the documents' vectors hold NaN; {_BROKEN_MODEL}")
    return hits


def check_queries(queries: Float[np.ndarray, "queries dim"], dim: int) -> None:
    """Refuse queries of another width than the documents, or with a number that is none.

    Raises:
        ModelError: naming both widths, or the query.
    """
    if queries.shape[1] != dim:
        raise ModelError(
            f"queries have {queries.shape[1]} dimensions and documents {dim}; "
            "embed both with the same model and the same number of dimensions"
        )
    finite = np.isfinite(queries).all(axis=1)
    if not finite.all():
        raise ModelError(
            f"the vector of query {int(finite.argmin())} holds NaN or infinity; {_BROKEN_MODEL}"
        )


def _by_blocks(queries: np.ndarray, docs: np.ndarray, k: int, block: int) -> Hits:
    found = [
        _search_block(queries[start : start + _QUERY_BLOCK], docs, k, block)
        for start in range(0, len(queries), _QUERY_BLOCK)
    ]
    return Hits(np.concatenate([h.scores for h in found]), np.concatenate([h.rows for h in found]))


def _search_block(queries: np.ndarray, docs: np.ndarray, k: int, block: int) -> Hits:
    best = Best(len(queries), k)
    for start in range(0, len(docs), block):
        part = np.asarray(docs[start : start + block], dtype=np.float32)
        few = len(queries) < _FEW
        best.add(np.ascontiguousarray((part @ queries.T).T) if few else queries @ part.T, start)
    return Hits(*best.hits())


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row and their columns; the lower column first among equals.

    ``torch.topk`` picks any of several equal values. Whether that mattered shows in the value
    after the last: only if it equals the last one was there a choice, and that row is sorted.
    """
    k = min(k, scores.shape[1])
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    had_choice = values[:, k - 1] == values[:, k] if values.shape[1] > k else None
    columns = columns[:, :k].sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if had_choice is not None and had_choice.any():
        sure, order = scores[had_choice].sort(dim=1, descending=True, stable=True)
        values[had_choice], columns[had_choice] = sure[:, :k], order[:, :k]
    return values, columns


def _faiss_is_faster(queries: int, docs: np.ndarray) -> bool:
    """Whether faiss beats our blocks, as measured with faiss 1.15 and one thread.

    Up to three queries its direct kernel wins, by 1.1 to 1.7. From 128,000 query values on it
    takes the matrix product, and is as fast as we are or faster by 1.4 at most: its blocks have
    4,096 queries, ours 256. In between it runs the direct kernel query by query, and takes up to
    14 times as long as we do.
    """
    if docs.dtype != np.float32 or not docs.flags.c_contiguous:
        return False  # faiss would copy all of it
    return queries <= 3 or queries * docs.shape[1] >= 128_000


def _by_faiss(queries: np.ndarray, docs: np.ndarray, k: int, block: int) -> Hits:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("search by faiss", "faiss") from error
    docs = np.ascontiguousarray(docs, dtype=np.float32)
    wanted = min(k + 1, len(docs))  # one more, to see whether the last place was a choice
    scores, rows = faiss.knn(queries, docs, wanted, metric=faiss.METRIC_INNER_PRODUCT)
    had_choice = _ends_in_a_tie(scores, k)
    order = np.lexsort((rows[:, :k], -scores[:, :k]), axis=1)
    hits = Hits(
        np.take_along_axis(scores[:, :k], order, axis=1),
        np.take_along_axis(rows[:, :k], order, axis=1).astype(np.int64),
    )
    if had_choice.any():
        sure = _by_blocks(queries[had_choice], docs, k, block)
        hits.scores[had_choice], hits.rows[had_choice] = sure.scores, sure.rows
    return hits


def _ends_in_a_tie(scores: np.ndarray, k: int) -> Bool[np.ndarray, "queries"]:
    if scores.shape[1] <= k:
        return np.zeros(len(scores), dtype=np.bool_)
    return scores[:, k - 1] == scores[:, k]
