"""From one hidden state a token to one vector a word."""

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
    """Where the words of a text begin and end, in characters."""

    starts: np.ndarray
    ends: np.ndarray

    @staticmethod
    def of(text: str) -> "Words":
        """What stands between white space."""
        bounds = [match.span() for match in re.finditer(r"\S+", text)]
        return Words(*np.array(bounds, dtype=np.int64).reshape(-1, 2).T)

    @staticmethod
    def joined(words: Sequence[str]) -> "Words":
        """Those of a text that is these words with a space between."""
        lengths = np.array([len(word) for word in words], dtype=np.int64)
        ends = (lengths + 1).cumsum() - 1
        return Words(ends - lengths, ends)

    def __len__(self) -> int:
        return len(self.ends)

    def within(self, characters: int) -> "Words":
        """Those that end within that many characters."""
        whole = int(np.searchsorted(self.ends, characters, side="right"))
        return Words(self.starts[:whole], self.ends[:whole])

    def of_tokens(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a token and a word that share a character, the words in order.

        A token over two words is a part of both; one of white space alone is a part of none.
        """
        first = np.searchsorted(self.ends, spans[:, 0], side="right")
        beyond = np.searchsorted(self.starts, spans[:, 1], side="left")
        counts = np.maximum(beyond - first, 0)
        token = np.arange(len(spans)).repeat(counts)
        place = np.arange(len(token)) - (counts.cumsum() - counts).repeat(counts)
        word = first.repeat(counts) + place
        order = word.argsort(kind="stable")  # a normalizer may turn letters around
        return token[order], word[order]


def word_means(
    states: Float[Tensor, "tokens hidden"],
    spans: Sequence[np.ndarray],
    words: Sequence[Words],
    *,
    predictor: bool = False,
) -> list[Tensor]:
    """The mean state of each word's tokens, in float32: [words, hidden] for each text.

    ``spans`` are the characters of each token, text by text (see ``Tokens``). With ``predictor``
    a token stands for the one after it, as where a model was trained to predict a token from the
    state before it: the mean is over the states one place earlier. The first token of a text has
    none before it and keeps its own, which happens where the tokenizer puts no token in front.
    A word without a token (its characters were normalized away) is a row of zeros.
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
