"""BM25, the baseline without a model: it ranks by the words that query and document share.

A gain over it is what a trained embedder is worth. Words are lower-cased runs of word
characters, with no stemming and no stop words, so that it serves any language alike.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from jaxtyping import Float32

from tercet.errors import MissingExtraError
from tercet.search.exact import Hits, largest

K1: Final = 0.9  # how soon a repeated word stops to add; Anserini's and BEIR's baseline
B: Final = 0.4  # how far a long document is marked down

# Scripts in which a run of letters is more than a word: Han, Kana and Hangul.
_UNSPACED: Final = (
    "\u1100-\u11ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]+|[^\W{_UNSPACED}]+")
_STARTS_UNSPACED = re.compile(f"[{_UNSPACED}]")


def words(text: str) -> list[str]:
    """Lower-cased runs of word characters; Han, Kana and Hangul runs cut into pairs.

    ``"GNU 데이터"`` has the words ``gnu``, ``데이``, ``이터``; a run of one character is itself.
    """
    return [word for run in _WORD.findall(text.lower()) for word in _cut(run)]


def bm25_scores(
    queries: Sequence[str], docs: Sequence[str]
) -> Iterator[Float32[np.ndarray, "docs"]]:
    """For each query in turn, the score of every document: Lucene's BM25, k1 0.9, b 0.4.

    A word that stands twice in a query counts twice. A document that shares no word scores 0.

    Raises:
        MissingExtraError: when bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError("BM25", "bm25") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it speaks at the debug level
    texts = [words(doc) for doc in docs]
    if not any(texts):  # bm25s divides by the mean length
        yield from (np.zeros(len(docs), np.float32) for _ in queries)
        return
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index(texts, show_progress=False)
    for query in queries:
        known = [word for word in words(query) if word in index.vocab_dict]
        yield index.get_scores(known) if known else np.zeros(len(docs), np.float32)


def bm25_top_k(queries: Sequence[str], docs: Sequence[str], k: int) -> Hits:
    """The ``k`` best documents of each query; equal scores are ranked by lower row.

    Only documents that share a word with the query are listed: after them the row is -1, as in
    a word index, where the order of all others would be an accident.

    Raises:
        MissingExtraError: when bm25s is not installed.
    """
    k = min(k, len(docs))
    scores = np.zeros((len(queries), k), np.float32)
    rows = np.zeros((len(queries), k), np.int64)
    for query, row_scores in enumerate(bm25_scores(queries, docs)):
        best, places = largest(torch.from_numpy(row_scores)[None], k)
        scores[query], rows[query] = best.numpy(), places.numpy()
    return Hits(scores, np.where(scores > 0, rows, -1))


def _cut(run: str) -> list[str]:
    if len(run) == 1 or not _STARTS_UNSPACED.match(run):
        return [run]
    return [run[start : start + 2] for start in range(len(run) - 1)]
