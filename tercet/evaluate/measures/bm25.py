"""BM25, the baseline without a model: it ranks by the words that query and document share.

Words are lower-cased runs of word characters, without stemming or stop words, so that all languages
are treated alike; or the tokens of a model, to see what its sparse vectors learned beyond counts.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import torch
from jaxtyping import Float32

from tercet.errors import MissingExtraError
from tercet.models.embedder import Embedder
from tercet.models.network.heads import SpecialIds
from tercet.rank.topk import Hits, largest
from tercet.types import Role

WordsOf: TypeAlias = Callable[[Sequence[str], Role], list[list[str]]]
"""A function that returns the words of each of several texts of one role."""

K1: Final = 0.9  # saturation of repeated words; as in Anserini and BEIR's baseline
B: Final = 0.4  # strength of length normalisation

# Scripts written without spaces between words: Han, Kana and Hangul.
_UNSPACED: Final = (
    "\u1100-\u11ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]+|[^\W{_UNSPACED}]+")
_STARTS_UNSPACED = re.compile(f"[{_UNSPACED}]")


def words(text: str) -> list[str]:
    """Return lower-cased runs of word characters; Han, Kana and Hangul runs are cut into bigrams.

    ``"GNU 데이터"`` has the words ``gnu``, ``데이``, ``이터``; a run of one character stays whole.
    """
    return [word for run in _WORD.findall(text.lower()) for word in _cut(run)]


def by_words(texts: Sequence[str], role: Role) -> list[list[str]]:
    """Return the words of each text, which do not depend on its role."""
    return [words(text) for text in texts]


def by_letters(texts: Sequence[str], role: Role) -> list[list[str]]:
    """Return the character trigrams of each text's words, with marks for their ends.

    ``"Häuser"`` has ``^hä``, ``häu``, ``äus``, ``use``, ``ser`` and ``er$``, so that it shares some
    with ``Haus`` and ``Häusern``: a baseline for languages that inflect or compound words. Han,
    Kana and Hangul stay in bigrams, as in :func:`words`.
    """
    return [[part for run in words(text) for part in _letters(run)] for text in texts]


def by_tokens_of(embedder: Embedder) -> WordsOf:
    """Return a function whose words are the embedder's token ids, truncated at its length limits.

    Prompts are left out, and so are the ids that are never terms of sparse vectors.
    """
    tokenizer, settings = embedder.tokenizer, embedder.settings
    special = SpecialIds.of(tokenizer.stock).never_terms

    def split(texts: Sequence[str], role: Role) -> list[list[str]]:
        rows = tokenizer(texts, settings.max_tokens(role)).ids
        return [[str(number) for number in row[~np.isin(row, special)].tolist()] for row in rows]

    return split


def bm25_scores(
    queries: Sequence[str], docs: Sequence[str], words_of: WordsOf = by_words
) -> Iterator[Float32[np.ndarray, "docs"]]:
    """Yield for each query the score of every document: Lucene's BM25, k1 0.9, b 0.4.

    A word that occurs twice in a query counts twice. A document that shares no word scores 0.

    Raises:
        MissingExtraError: if bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError("BM25", "bm25") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs at the debug level
    texts = words_of(docs, "document")
    if not any(texts):  # bm25s divides by the mean length
        yield from (np.zeros(len(docs), np.float32) for _ in queries)
        return
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index(texts, show_progress=False)
    for query in words_of(queries, "query"):
        known = [word for word in query if word in index.vocab_dict]
        yield index.get_scores(known) if known else np.zeros(len(docs), np.float32)


def bm25_top_k(
    queries: Sequence[str], docs: Sequence[str], k: int, words_of: WordsOf = by_words
) -> Hits:
    """Return the ``k`` best documents of each query; equal scores are ranked by lower row.

    Only documents that share a word with the query are listed, as in a word index; after them the
    row is -1.

    Raises:
        MissingExtraError: if bm25s is not installed.
    """
    k = min(k, len(docs))
    scores = np.zeros((len(queries), k), np.float32)
    rows = np.zeros((len(queries), k), np.int64)
    for query, row_scores in enumerate(bm25_scores(queries, docs, words_of)):
        best, places = largest(torch.from_numpy(row_scores)[None], k)
        scores[query], rows[query] = best.numpy(), places.numpy()
    return Hits(scores, np.where(scores > 0, rows, -1))


def _letters(word: str) -> list[str]:
    if _STARTS_UNSPACED.match(word):
        return [word]
    whole = f"^{word}$"
    return [whole[start : start + 3] for start in range(len(whole) - 2)]


def _cut(run: str) -> list[str]:
    if len(run) == 1 or not _STARTS_UNSPACED.match(run):
        return [run]
    return [run[start : start + 2] for start in range(len(run) - 1)]
