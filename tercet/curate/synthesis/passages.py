"""Passages: parts of a document that a question can be asked about, and which of them are drawn.

A passage is a run of whole paragraphs; of whole sentences where a paragraph is too long.
"""

import hashlib
import heapq
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np

from tercet.data.files.documents import Document
from tercet.errors import RecipeError

THIRDS: Final = 3
PROSE: Final = 0.6  # least share of letters among the characters of a passage that are no spaces

Span: TypeAlias = tuple[int, int]

# Where a text is cut, coarse first: a part that is short enough is not cut any further.
_SEPARATORS: Final = (
    re.compile(r"\n\s*\n\s*"),
    re.compile(r"\n\s*"),
    re.compile(r"(?<=[.!?])\s+|(?<=[。\uff01\uff1f])"),  # full-width: no space follows
    re.compile(r"\s+"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Which documents and passages are drawn.

    A larger ``documents`` or ``samples`` keeps what a smaller one drew, and adds to it.

    Raises:
        RecipeError: for numbers that cannot go together.
    """

    documents: int | None = 1000  # at most; None: all of them
    samples: int = 1  # passages of each document, at most
    least: int = 300  # characters of a passage
    most: int = 1500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.documents is not None and self.documents < 1):
            raise RecipeError("nothing would be asked; draw one or more passages of a document")
        if self.least < 1 or self.most < 2 * self.least:
            raise RecipeError(
                f"no text can be cut into passages of {self.least} to {self.most} characters; the "
                "longest has to be twice as long as the shortest, or more"
            )


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document, ``text[start:end]``."""

    document: str  # its id
    title: str
    start: int
    end: int
    text: str
    position: float  # of its middle: 0 is the begin of the document, 1 its end

    @property
    def third(self) -> int:
        """In which third of the document it lies: 0, 1 or 2."""
        return min(int(self.position * THIRDS), THIRDS - 1)

    @property
    def digest(self) -> str:
        """Tells whether another text stands there now."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()


def draw_documents(
    documents: Iterable[Document], sampling: Sampling, count: int | None
) -> dict[str, int]:
    """The ranks of ``count`` documents by id: random, whatever their order in the file.

    Left out are those that are shorter than a passage.
    """
    longer = (
        (seed_of(sampling.seed, document.id), document.id)
        for document in documents
        if len(document.text.strip()) >= sampling.least
    )
    drawn = sorted(longer) if count is None else heapq.nsmallest(count, longer)
    return {name: rank for rank, (_, name) in enumerate(drawn)}


def draw_passages(document: Document, sampling: Sampling, rank: int) -> list[Passage]:
    """Passages of a document that do not overlap, each from another third where there is one.

    The third of the first one goes round with the document's rank, so that over all documents
    as many questions are about their ends as about their begins. Passages that are no prose,
    such as tables of numbers, are not drawn.
    """
    random = np.random.default_rng(seed_of(sampling.seed, document.id, "passages"))
    free = [
        passage
        for start, end in windows(document.text, sampling.least, sampling.most)
        if _is_prose((passage := _passage(document, start, end)).text)
    ]
    drawn: list[Passage] = []
    for sample in range(sampling.samples):
        thirds = [(rank + sample + shift) % THIRDS for shift in range(THIRDS)]
        choices = next(filter(None, ([p for p in free if p.third == t] for t in thirds)), None)
        if choices is None:
            break
        found = choices[int(random.integers(len(choices)))]
        drawn.append(found)
        free = [p for p in free if p.end <= found.start or p.start >= found.end]
    return drawn


def windows(text: str, least: int, most: int) -> Iterator[Span]:
    """All passages of ``least`` to ``most`` characters: from each begin the shortest one."""
    # A part is at most most - least long, so one more never makes a passage too long.
    parts = list(_parts(text, (0, len(text)), most - least))
    for first, (start, _) in enumerate(parts):
        for _, end in parts[first:]:
            length = len(text[start:end].strip())
            if length > most:  # blanks that were at an end and now lie within
                break
            if length >= least:
                begin = start + len(text[start:end]) - len(text[start:end].lstrip())
                yield begin, begin + length
                break


def _parts(text: str, span: Span, limit: int, level: int = 0) -> Iterator[Span]:
    start, end = span
    if level == len(_SEPARATORS):
        cuts = [*range(start, end, limit), end]
    else:
        found = (match.end() for match in _SEPARATORS[level].finditer(text, start, end))
        cuts = [start, *found, end]
    for part in pairwise(cuts):
        if part[1] - part[0] > limit:
            yield from _parts(text, part, limit, level + 1)
        elif part[0] < part[1]:
            yield part


def _passage(document: Document, start: int, end: int) -> Passage:
    position = (start + end) / 2 / len(document.text)
    text = document.text[start:end]
    return Passage(document.id, document.title, start, end, text, position)


def _is_prose(text: str) -> bool:
    seen = [char for char in text if not char.isspace()]
    letters = sum(unicodedata.category(char)[0] in "LM" for char in seen)
    return letters >= PROSE * len(seen)


def seed_of(*parts: object) -> int:
    """A number below 2**63 that hangs on all parts, and looks random."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
