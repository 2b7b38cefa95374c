"""Tokens that are marked where words begin, to mask whole words.

A marked token is one number, twice the id, plus one for the first token of a word, so that the
tokens of a source are one array.
"""

from typing import Final

import numpy as np
from jaxtyping import Bool, Int, Integer
from tokenizers import Encoding

from tercet.models.tokens import Tokenizer

# First and last character of scripts that put no space between words: Thai and Lao, Myanmar,
# Khmer, Japanese kana, Chinese characters.
_UNSPACED: Final = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def marked_pieces(
    tokenizer: Tokenizer, texts: list[str], max_tokens: int
) -> list[Int[np.ndarray, "tokens"]]:
    """Return the texts as marked tokens, in order, in pieces of at most ``max_tokens``.

    Each piece has the tokenizer's special tokens around it: a long text becomes several. A text
    without a token is left out.
    """
    head, tail = (2 * np.array(ids, np.int32) + 1 for ids in tokenizer.around)
    room = max(1, max_tokens - len(head) - len(tail))
    pieces = []
    for text, encoding in zip(texts, tokenizer.bare(texts), strict=True):
        body = 2 * np.array(encoding.ids, np.int32) + word_starts(text, encoding)
        for start in range(0, len(body), room):
            part = body[start : start + room]
            pieces.append(np.concatenate([head, part, tail]).astype(np.int32))
    return pieces


def unmarked(
    marked: Integer[np.ndarray, "tokens"],
) -> tuple[Integer[np.ndarray, "tokens"], Int[np.ndarray, "tokens"]]:
    """Return token ids, and the number of the word of each token, from zero."""
    return marked >> 1, np.cumsum(marked & 1) - 1


def word_starts(text: str, encoding: Encoding) -> Bool[np.ndarray, "tokens"]:
    """Return which tokens begin a word.

    A word is what the tokenizer's pre-tokenizer leaves together, and never contains white space.
    In a script without spaces each token is a word; otherwise a sentence would be one, and be
    masked as a whole.
    """
    words = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    starts = np.ones(len(words), dtype=bool)
    if len(words) < 2 or not text:
        return starts
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    space = np.fromiter((letter.isspace() for letter in text), bool, len(text))
    spaces = np.concatenate(([0], space.cumsum()))  # before each character
    begin, end = np.minimum(spans, len(text)).T
    blank = spaces[end] - spaces[begin] == end - begin  # tokens of white space only
    at, before = np.minimum(begin, len(text) - 1), np.maximum(begin - 1, 0)
    after_space = space[before][1:] & (begin[1:] > 0) & ~blank[:-1]
    low, high = np.array(_UNSPACED, np.uint32).T[..., None]
    unspaced = ((low <= letters) & (letters <= high)).any(axis=0)
    alone = unspaced[at][1:] | unspaced[np.maximum(end - 1, 0)][:-1]
    new = begin[1:] >= end[:-1]  # false for the next byte of a character
    starts[1:] = (words[1:] != words[:-1]) | (new & (space[at][1:] | after_space | alone))
    return starts
