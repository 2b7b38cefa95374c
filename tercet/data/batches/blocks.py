"""Texts as tokens, in blocks of up to a given size, which training steps are made of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from tercet.data.batches.relation import hash_of
from tercet.data.files.sources import Source
from tercet.distributed import is_main
from tercet.errors import DataError
from tercet.files.artifacts import fingerprint
from tercet.files.progress import bar
from tercet.segments import batches_within
from tercet.types import Example

TokenIds: TypeAlias = Callable[[Sequence[str]], list[np.ndarray]]
"""A function from texts to their token ids, special tokens included."""

SHORTEST: Final = 2  # tokens of a text: the first one is never predicted
TEXTS_AT_ONCE: Final = 4_096
LINES_TOGETHER: Final = 1_000  # lines that the reference code concatenates


@dataclass(frozen=True, slots=True, eq=False)
class TokenBlocks:
    """The texts of a source as blocks of tokens, readable in any order. Four bytes per token.

    A block holds as many whole texts as fit, which do not attend to each other. A text that is
    longer than a block is cut into several.
    """

    name: str
    weight: float | int
    ids: np.ndarray  # [tokens] int32, of all texts end to end
    pieces: np.ndarray  # [pieces + 1] int64, where each text or part of one begins in ids
    bounds: np.ndarray  # [blocks + 1] int64, where each block begins in pieces
    fingerprint: str  # of the source and the way it was cut
    skipped: int  # texts with less than two tokens

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def sizes(self) -> np.ndarray:
        """The number of tokens of each block."""
        return np.diff(self.pieces[self.bounds]).astype(np.int32)

    @property
    def blocks(self) -> np.ndarray:
        """One block: all rows are cheap to read in any order."""
        return np.zeros(1, np.int64)

    @property
    def window(self) -> int:
        """The one block."""
        return 1

    def read(self, rows: Sequence[int]) -> list[list[np.ndarray]]:
        """Return the texts of these blocks."""
        return [
            [
                self.ids[self.pieces[i] : self.pieces[i + 1]]
                for i in range(self.bounds[row], self.bounds[row + 1])
            ]
            for row in rows
        ]


def token_blocks(
    source: Source,
    ids_of: TokenIds,
    max_tokens: int,
    *,
    concatenated: bool = False,
    every_text: bool = False,
) -> TokenBlocks:
    """Cut the texts of a source into blocks of at most ``max_tokens``.

    The texts are the queries of its examples, as in files of plain texts. ``every_text`` takes
    the documents too, and each text once.

    With ``concatenated``, as in LLM2Vec's scripts, a thousand lines at a time are put end to end
    and cut into blocks regardless of where texts end, and an incomplete last block is dropped.

    Raises:
        DataError: if no text has two tokens, or not one block is full.
    """
    every = list(_tokens(source, ids_of, every_text=every_text))
    texts = [ids for ids in every if concatenated or len(ids) >= SHORTEST]
    if concatenated:
        pieces = list(_concatenated(texts, max_tokens))
        counts = [1] * len(pieces)
    else:
        pieces = [part for ids in texts for part in _cut(ids, max_tokens)]
        counts = [len(block) for block in batches_within(pieces, max_tokens, len)]
    if not pieces:
        why = (
            f"its texts do not fill one block of {max_tokens} tokens; give more or longer texts"
            if concatenated
            else "no text has two tokens, so there is nothing to predict; give longer texts"
        )
        raise DataError(source.path, None, why)
    lengths = [len(piece) for piece in pieces]
    made = f"{source.fingerprint} {max_tokens} {concatenated} {sum(lengths)}"
    made += " every text" if every_text else ""
    return TokenBlocks(
        name=source.name,
        weight=source.weight,
        ids=np.concatenate(pieces).astype(np.int32, copy=False),
        pieces=np.concatenate(([0], np.cumsum(lengths))),
        bounds=np.concatenate(([0], np.cumsum(counts))),
        fingerprint=fingerprint(made),
        skipped=len(every) - len(texts),
    )


def _tokens(source: Source, ids_of: TokenIds, *, every_text: bool) -> Iterator[np.ndarray]:
    read: set[int] = set()  # hashes of texts
    with bar(f"tokenize {source.name}", len(source), shown=is_main()) as advance:
        for start in range(0, len(source), TEXTS_AT_ONCE):
            rows = range(start, min(start + TEXTS_AT_ONCE, len(source)))
            examples = source.examples(rows)
            texts = [example.query for example in examples]
            if every_text:
                texts = list(_unread(examples, read))
            yield from ids_of(texts)
            advance(len(rows))


def _unread(examples: Sequence[Example], read: set[int]) -> Iterator[str]:
    """Yield the texts of the examples that were not read before."""
    for example in examples:
        for text in (example.query, *example.positives, *example.negatives):
            key = hash_of(text)
            if key not in read:
                read.add(key)
                yield text


def _cut(ids: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), max_tokens):
        part = ids[start : start + max_tokens]
        if len(part) >= SHORTEST:
            yield part


def _concatenated(texts: Sequence[np.ndarray], max_tokens: int) -> Iterator[np.ndarray]:
    for start in range(0, len(texts), LINES_TOGETHER):
        row = np.concatenate(texts[start : start + LINES_TOGETHER])
        for first in range(0, len(row) - max_tokens + 1, max_tokens):
            yield row[first : first + max_tokens]
