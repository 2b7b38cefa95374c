"""Which documents hold an answer: how a search is judged where nobody judged documents.

A document counts when the tokens of one of the query's answers stand in it, one after the other
and in their order. That is how MKQA is scored (arXiv 2402.03216, section 4.2), by the rule of DPR
(arXiv 2004.04906). Words of a language without spaces between them are found only between marks.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Final

import numpy as np
from jaxtyping import Int

from tercet.metrics import Judgements

_REMEMBERED: Final = 1 << 16  # documents whose tokens are kept: many are found by several queries
_IN_WORDS: Final = "LNM"  # letters, numbers, and marks that belong to them
_BETWEEN: Final = "ZC"  # separators and control characters


def answer_tokens(text: str) -> list[str]:
    """Runs of letters, numbers and marks, and single symbols, in NFD and lower case.

    ``"naïve (1)"`` has the tokens ``nai\u0308ve``, ``(``, ``1``, ``)``.
    """
    plain = unicodedata.normalize("NFD", text)
    parts = plain.translate({ord(character): _parted(character) for character in set(plain)})
    # Only now: the small form of a Greek sigma depends on where its word ends.
    return [token.lower() for token in parts.split()]


def with_answers(
    ranking: Int[np.ndarray, "queries ranks"],
    documents: Sequence[str],
    answers: Sequence[Sequence[str]],
) -> Judgements:
    """The ranked documents that hold one of their query's answers, as relevant ones.

    Others are not looked at, so this says nothing of what a search has missed.
    """

    @lru_cache(_REMEMBERED)
    def tokens(row: int) -> str:
        return _joined(documents[row])

    found: list[dict[int, int]] = []
    for rows, wanted in zip(ranking.tolist(), answers, strict=True):
        joined = [_joined(answer) for answer in wanted]
        found.append({row: 1 for row in rows if row >= 0 and _holds(tokens(row), joined)})
    return Judgements.of(found)


def _holds(text: str, answers: Sequence[str]) -> bool:
    return any(answer in text for answer in answers if not answer.isspace())


def _joined(text: str) -> str:
    """Tokens with one space around each, so that a run of them is a part of the text."""
    return f" {' '.join(answer_tokens(text))} "


@cache
def _parted(character: str) -> str:
    """A part of a word as it is, a symbol between spaces, and a space for what is between."""
    kind = unicodedata.category(character)[0]
    if kind in _BETWEEN:
        return " "
    return character if kind in _IN_WORDS else f" {character} "
