"""Which documents hold an answer: how a search is judged without judged documents.

A document counts if the tokens of one of the query's answers occur in it one after the other. MKQA
is scored like this (arXiv 2402.03216, section 4.2), by the rule of DPR (arXiv 2004.04906). Words of
a language without spaces between them are found only between punctuation marks.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Final

import numpy as np
from jaxtyping import Int

from tercet.metrics import Judgements

_CACHED: Final = 1 << 16  # documents whose tokens are cached: several queries find the same ones
_IN_WORDS: Final = "LNM"  # letters, numbers, and marks that belong to them
_BETWEEN: Final = "ZC"  # separators and control characters


def answer_tokens(text: str) -> list[str]:
    """Return runs of letters, numbers and marks, and single symbols, in NFD and lower case.

    ``"naïve (1)"`` has the tokens ``nai\u0308ve``, ``(``, ``1``, ``)``.
    """
    plain = unicodedata.normalize("NFD", text)
    parts = plain.translate({ord(character): _separated(character) for character in set(plain)})
    # Lower case only now: the small form of a Greek sigma depends on where its word ends.
    return [token.lower() for token in parts.split()]


def with_answers(
    ranking: Int[np.ndarray, "queries ranks"],
    documents: Sequence[str],
    answers: Sequence[Sequence[str]],
) -> Judgements:
    """Judge as relevant the ranked documents that hold one of their query's answers.

    Other documents are not looked at, so this cannot say what a search has missed.
    """

    @lru_cache(_CACHED)
    def tokens(row: int) -> str:
        return _joined(documents[row])

    found: list[dict[int, int]] = []
    for rows, wanted in zip(ranking.tolist(), answers, strict=True):
        joined = [each for each in map(_joined, wanted) if not each.isspace()]
        found.append(
            {row: 1 for row in rows if row >= 0 and any(each in tokens(row) for each in joined)}
        )
    return Judgements.of(found)


def _joined(text: str) -> str:
    """Join tokens with one space around each, so that a run of them is a substring."""
    return f" {' '.join(answer_tokens(text))} "


@cache
def _separated(character: str) -> str:
    """Return a part of a word unchanged, a symbol between spaces, a space for a separator."""
    kind = unicodedata.category(character)[0]
    if kind in _BETWEEN:
        return " "
    return character if kind in _IN_WORDS else f" {character} "
