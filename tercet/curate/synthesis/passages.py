"""Passages: parts of documents that questions are asked about, and how they are drawn.

A passage consists of whole paragraphs, or of whole sentences if a paragraph is too long.
"""

import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np

from tercet.curate.filtering.scripts import share_of_letters
from tercet.data.files.documents import Document
from tercet.errors import RecipeError
from tercet.files.artifacts import fingerprint

THIRDS: Final = 3
PROSE: Final = 0.6  # minimum share of letters among the non-space characters of a passage

TextSpan: TypeAlias = tuple[int, int]

# Where texts are cut, coarse first: parts that are short enough are not cut further.
_SEPARATORS: Final = (
    re.compile(r"\n\s*\n\s*"),
    re.compile(r"\n\s*"),
    re.compile(r"(?<=[.!?])\s+|(?<=[。\uff01\uff1f])"),  # no space follows full-width marks
    re.compile(r"\s+"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageSampling:
    """Which documents and passages are drawn.

    Larger ``documents`` or ``samples`` add to what smaller ones draw.

    Raises:
        RecipeError: for numbers out of range.
    """

    documents: int | None = 1000  # at most; None: all
    samples: int = 1  # passages per document, at most
    least: int = 300  # minimum characters of a passage
    most: int = 1500  # maximum characters of a passage
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.documents is not None and self.documents < 1):
            raise RecipeError(
                f"documents and samples must be at least 1; got {self.documents} and {self.samples}"
            )
        if self.least < 1 or self.most < 2 * self.least:
            raise RecipeError(
                "the longest passage must be at least twice as long as the shortest; got "
                f"{self.least} to {self.most} characters"
            )


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document, ``text[start:end]``."""

    document: str  # its id
    title: str
    start: int
    end: int
    text: str
    position: float  # of its middle: 0 is the start of the document, 1 its end

    @property
    def third(self) -> int:
        """The third of the document that it lies in: 0, 1 or 2."""
        return min(int(self.position * THIRDS), THIRDS - 1)

    @property
    def digest(self) -> str:
        """A fingerprint of the text, to detect that the document has changed."""
        return fingerprint(self.text, size=8)


def draw_documents(
    documents: Iterable[Document], sampling: PassageSampling, count: int | None
) -> dict[str, int]:
    """Draw ``count`` documents, whatever their order in the file; return their ranks by id.

    Documents that are shorter than a passage are left out.
    """
    longer = (
        (seed_of(sampling.seed, document.id), document.id)
        for document in documents
        if len(document.text.strip()) >= sampling.least
    )
    drawn = sorted(longer) if count is None else heapq.nsmallest(count, longer)
    return {name: rank for rank, (_, name) in enumerate(drawn)}


def draw_passages(document: Document, sampling: PassageSampling, rank: int) -> list[Passage]:
    """Draw passages of a document that do not overlap, from different thirds if possible.

    The third of the first passage rotates with the document's rank, so that all thirds are drawn
    equally often over all documents. Passages that are no prose, such as tables, are not drawn.
    """
    random = np.random.default_rng(seed_of(sampling.seed, document.id, "passages"))
    spans = windows(document.text, sampling.least, sampling.most)
    passages = (_passage(document, *span) for span in spans)
    free = [passage for passage in passages if share_of_letters(passage.text) >= PROSE]
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


def windows(text: str, least: int, most: int) -> Iterator[TextSpan]:
    """Yield the shortest passage of ``least`` to ``most`` characters from each start."""
    # A part has at most most - least characters, so one more never makes a passage too long.
    parts = list(_parts(text, (0, len(text)), most - least))
    for first, (start, _) in enumerate(parts):
        for _, end in parts[first:]:
            length = len(text[start:end].strip())
            if length > most:  # spaces at the end of a part lie inside the passage now
                break
            if length >= least:
                begin = start + len(text[start:end]) - len(text[start:end].lstrip())
                yield begin, begin + length
                break


def _parts(text: str, span: TextSpan, limit: int, level: int = 0) -> Iterator[TextSpan]:
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


def seed_of(*parts: object) -> int:
    """Return a pseudo-random number below 2**63 that depends on all parts."""
    return int(fingerprint(repr(parts), size=8), 16) >> 1
