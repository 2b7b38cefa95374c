"""Word vectors: the mean of the hidden states of each word's tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tercet import segments


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """The character spans of a text's words."""

    starts: np.ndarray
    ends: np.ndarray

    @staticmethod
    def of(text: str) -> "Words":
        """Return the spans between white space."""
        bounds = [match.span() for match in re.finditer(r"\S+", text)]
        return Words(*np.array(bounds, dtype=np.int64).reshape(-1, 2).T)

    @staticmethod
    def joined(words: Sequence[str]) -> "Words":
        """Return the word spans of ``words`` joined by single spaces."""
        lengths = np.array([len(word) for word in words], dtype=np.int64)
        ends = (lengths + 1).cumsum() - 1
        return Words(ends - lengths, ends)

    def __len__(self) -> int:
        return len(self.ends)

    def within(self, characters: int) -> "Words":
        """Return the words that end within this many characters."""
        whole = int(np.searchsorted(self.ends, characters, side="right"))
        return Words(self.starts[:whole], self.ends[:whole])

    def of_tokens(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs of a token and a word that share a character, ordered by word.

        A token over two words belongs to both; one of white space alone to none.
        """
        first = np.searchsorted(self.ends, spans[:, 0], side="right")
        beyond = np.searchsorted(self.starts, spans[:, 1], side="left")
        counts = np.maximum(beyond - first, 0)
        token = np.arange(len(spans)).repeat(counts)
        place = np.arange(len(token)) - (counts.cumsum() - counts).repeat(counts)
        word = first.repeat(counts) + place
        order = word.argsort(kind="stable")  # a normalizer may reorder letters
        return token[order], word[order]


def word_means(
    states: Float[Tensor, "tokens hidden"],
    spans: Sequence[np.ndarray],
    words: Sequence[Words],
    *,
    predictor: bool = False,
) -> list[Tensor]:
    """Return the mean state of each word's tokens, in float32: [words, hidden] for each text.

    ``spans`` are those of ``Tokens``. With ``predictor`` the mean is over the states one place
    earlier (arXiv 2404.05961, appendix D.1.3); the first token of a text keeps its state. A word
    without a token (its characters were normalized away) is a row of zeros.
    """
    tokens, counts, start = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for text_spans, text_words in zip(spans, words, strict=True):
        token, word = text_words.of_tokens(text_spans)
        tokens.append(start + (np.maximum(token - 1, 0) if predictor else token))
        counts.append(np.bincount(word, minlength=len(text_words)))
        start += len(text_spans)
    chosen = torch.from_numpy(np.concatenate(tokens)).to(states.device)
    lengths = torch.from_numpy(np.concatenate(counts)).to(states.device)
    sums = segments.total(states[chosen], segments.offsets_of(lengths))
    means = sums / lengths.clamp(min=1).unsqueeze(1)
    return list(means.split([len(text_words) for text_words in words]))
