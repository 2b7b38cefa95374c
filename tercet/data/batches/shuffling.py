"""Reordering of the parts of long documents, so that the answer is not always at the beginning.

In many pairs the first sentences of a document already answer its query, and a model that learns
to read only those fails on long texts (arXiv 2402.03216, appendix on data).
"""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Final, Literal, TypeAlias

import numpy as np

CutName: TypeAlias = Literal["characters", "words", "sentences"]
"""Where a document may be cut: anywhere, before a word, before a sentence."""

LONG: Final = 100  # characters; shorter texts are unchanged
PARTS: Final = 3

_BEFORE_WORDS: Final = re.compile(r"(?<=\s)(?=\S)")
_BEFORE_SENTENCES: Final = re.compile(
    r"""(?: [.!?\u2026] ['")\]\u00bb\u201d\u2019]* \s+  # an end mark, closing marks, a space
          | [\u3002\uff01\uff1f] ['")\u300d\u300f\uff09]* \s*  # those of Chinese and Japanese
          | \n \s* \n \s*  # an empty line
        ) (?=\S)""",
    re.VERBOSE,
)


def shuffled(text: str, random: np.random.Generator, at: CutName = "characters") -> str:
    """Return the text in three parts of about a third each, in another order, with a space between.

    It is cut at the places nearest to its thirds. A text of up to 100 characters, or with fewer
    than two such places, is returned unchanged.
    """
    if len(text) <= LONG:
        return text
    cuts = _nearest(_PLACES[at](text), len(text))
    if cuts is None:
        return text
    parts = [text[low:high].strip() for low, high in pairwise((0, *cuts, len(text)))]
    orders = [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    return " ".join(parts[part] for part in orders[int(random.integers(len(orders)))])


def _nearest(places: np.ndarray, length: int) -> tuple[int, ...] | None:
    """Return the places nearest to the thirds of the text; None if there are too few."""
    inner = places[(places > 0) & (places < length)]
    if len(inner) < PARTS - 1:
        return None
    first = int(np.abs(inner[:-1] - length / PARTS).argmin())
    rest = inner[first + 1 :]
    second = int(np.abs(rest - length * (PARTS - 1) / PARTS).argmin())
    return int(inner[first]), int(rest[second])


def _found(pattern: re.Pattern[str]) -> Callable[[str], np.ndarray]:
    return lambda text: np.array([match.end() for match in pattern.finditer(text)], np.int64)


_PLACES: Final[Mapping[CutName, Callable[[str], np.ndarray]]] = {
    "characters": lambda text: np.arange(1, len(text)),
    "words": _found(_BEFORE_WORDS),
    "sentences": _found(_BEFORE_SENTENCES),
}
