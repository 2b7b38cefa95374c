"""Tokens of training texts, made once and mapped from disk.

A folder holds those of one source and role: ``ids.npy`` (uint32, the texts end to end),
``offsets.npy`` (int64), what is pooled of each text, and 128 bits of its prompt and its text,
sorted, to find it by. So a text that is not there, such as a negative that was mined since, is
tokenized as ever, and what is found is what the tokenizer would say.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from tercet import distributed
from tercet.data.batches.collate import PromptOf, Tokenize
from tercet.data.files.sources import Source
from tercet.files.arrays import GrowingArray
from tercet.files.atomic import replacing_folder
from tercet.files.progress import Bars, bar
from tercet.models.tokens import Tokens
from tercet.models.zoo.zoo import cache_folder
from tercet.types import Example, Role

ROLES: Final[tuple[Role, ...]] = ("query", "document")
_AT_ONCE: Final = 512  # examples
_VERSION: Final = 1  # raise it when the same tokenizer gives other tokens, or files change
_ARRAYS: Final = ("ids", "offsets", "about", "keys", "order")

_Text: TypeAlias = tuple[np.ndarray, int, tuple[int, int], bool]
"""Token ids, how many are skipped, the bounds of those left out, and whether it was cut."""


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """The tokens of one source and role."""

    ids: np.ndarray  # [tokens] uint32
    offsets: np.ndarray  # [texts + 1] int64
    about: np.ndarray  # [texts, 4] int32: skipped, bounds of what is left out, whether it was cut
    keys: np.ndarray  # [texts, 2] uint64, sorted by the first
    order: np.ndarray  # [texts] int64, which text a key is that of

    @staticmethod
    def open(folder: Path) -> "Shelf":
        """Map the files of a folder."""
        return Shelf(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The text of each key; -1 where there is none."""
        places = np.minimum(np.searchsorted(self.keys[:, 0], keys[:, 0]), len(self.keys) - 1)
        known = (self.keys[places] == keys).all(axis=1)
        return np.where(known, self.order[places], -1)


class CachedTokens:
    """Tokenizes as another function does, and takes what it said before from shelves."""

    def __init__(self, tokenize: Tokenize, shelves: Mapping[Role, Sequence[Shelf]]) -> None:
        self._tokenize = tokenize
        self._shelves = {role: list(some) for role, some in shelves.items()}
        self.missed = 0  # texts that were on no shelf

    def __call__(self, texts: Sequence[str], role: Role, prompts: Sequence[str]) -> Tokens:
        """The tokens of these texts."""
        keys = keys_of(texts, prompts)
        found: dict[int, tuple[Shelf, int]] = {}
        shelves = self._shelves.get(role, [])
        left = np.arange(len(texts))
        for shelf in list(shelves):
            if not len(left):
                break
            rows = shelf.find(keys[left])
            known = rows >= 0
            for place, row in zip(left[known].tolist(), rows[known].tolist(), strict=True):
                found[place] = shelf, row
            if known.any() and shelves[0] is not shelf:  # the texts of a batch are of one source
                shelves.remove(shelf)
                shelves.insert(0, shelf)
            left = left[~known]
        others = left.tolist()
        self.missed += len(others)
        fresh = self._tokenize([texts[i] for i in others], role, [prompts[i] for i in others])
        return _together(len(texts), found, dict(zip(others, _each(fresh), strict=True)))


def keys_of(texts: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """128 bits of each prompt and text, as two numbers."""
    digests = [
        hashlib.blake2b(f"{len(prompt)} {prompt}{text}".encode(), digest_size=16).digest()
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def folder_of(source: Source, role: Role, made_with: str, prompt: str) -> Path:
    """Where the tokens of a source are kept.

    ``made_with`` is all that they hang on beside texts and prompts: the tokenizer, the greatest
    length, what is put around texts.
    """
    told = repr((_VERSION, source.fingerprint, role, made_with, prompt))
    digest = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
    return cache_folder() / "tokens" / digest


def build(
    source: Source,
    role: Role,
    folder: Path,
    tokenize: Tokenize,
    prompt_of: PromptOf,
    *,
    bars: Bars = bar,
) -> None:
    """Write the tokens of all texts of a role; nothing where they are already.

    The folder appears when it is complete, and not before.

    Raises:
        StorageError: when the disk refuses.
        DataError: when the source has changed since it was opened.
    """
    if (folder / "order.npy").exists():
        return
    keys: list[np.ndarray] = []
    with (
        replacing_folder(folder) as fresh,
        GrowingArray(fresh / "ids.npy", np.dtype(np.uint32), ()) as ids,
        GrowingArray(fresh / "offsets.npy", np.dtype(np.int64), ()) as offsets,
        GrowingArray(fresh / "about.npy", np.dtype(np.int32), (4,)) as about,
        bars(f"tokens of {source.name}, {role}", len(source)) as advance,
    ):
        offsets.add(np.zeros(1, np.int64))
        end = 0
        for texts, prompts, rows in _texts(source, role, prompt_of):
            tokens = tokenize(texts, role, prompts)
            keys.append(keys_of(texts, prompts))
            ids.add(np.concatenate(tokens.ids).astype(np.uint32))
            ends = end + np.cumsum(tokens.lengths)
            offsets.add(ends)
            end = int(ends[-1])
            about.add(np.array([[s, *left, cut] for _, s, left, cut in _each(tokens)], np.int32))
            advance(rows)
        every = np.concatenate(keys)
        order = np.argsort(every[:, 0], kind="stable")
        np.save(fresh / "keys.npy", every[order])
        np.save(fresh / "order.npy", order.astype(np.int64))


def _texts(
    source: Source, role: Role, prompt_of: PromptOf
) -> Iterator[tuple[list[str], list[str], int]]:
    """The texts of a role with their prompts, those of some examples at a time, each once there."""
    for start in range(0, len(source), _AT_ONCE):
        rows = range(start, min(start + _AT_ONCE, len(source)))
        pairs = dict.fromkeys(
            (text, prompt)
            for example in source.examples(rows)
            for prompt in [_prompt(example, role, prompt_of)]
            for text in _of_role(example, role)
        )
        yield [text for text, _ in pairs], [prompt for _, prompt in pairs], len(rows)


def _of_role(example: Example, role: Role) -> tuple[str, ...]:
    if role == "query":
        return (example.query,)
    return (*example.positives, *example.negatives)


def _prompt(example: Example, role: Role, prompt_of: PromptOf) -> str:
    own = example.query_prompt if role == "query" else example.document_prompt
    return prompt_of(role, example.task) if own is None else own


def _each(tokens: Tokens) -> list[_Text]:
    left_out = tokens.left_out or [(0, 0)] * len(tokens)
    return list(zip(tokens.ids, tokens.skipped, left_out, tokens.cuts, strict=True))


def _together(
    count: int, found: Mapping[int, tuple[Shelf, int]], fresh: Mapping[int, _Text]
) -> Tokens:
    """Texts from shelves and tokenized ones, in order."""
    tokens = Tokens([], [], 0)
    for place in range(count):
        ids, skipped, left, cut = fresh[place] if place in fresh else _taken(*found[place])
        tokens.ids.append(ids)
        tokens.skipped.append(skipped)
        tokens.left_out.append(left)
        tokens.cuts.append(cut)
    return Tokens(tokens.ids, tokens.skipped, sum(tokens.cuts), tokens.left_out, cuts=tokens.cuts)


def _taken(shelf: Shelf, row: int) -> _Text:
    ids = shelf.ids[shelf.offsets[row] : shelf.offsets[row + 1]].astype(np.int32)
    skipped, first, last, cut = shelf.about[row].tolist()
    return ids, skipped, (first, last), bool(cut)


def shelves_of(
    sources: Sequence[Source],
    made_with: Callable[[Role], str],
    tokenize: Tokenize,
    prompt_of: PromptOf,
) -> dict[Role, list[Shelf]]:
    """The tokens of all sources by role; those that are not there are made by the first process.

    Raises:
        StorageError: when the disk refuses; TERCET_CACHE says where the cache is.
        DataError: when a source has changed since it was opened.
    """
    found: dict[Role, list[Shelf]] = {}
    for role in ROLES:
        for source in sources:
            prompt = prompt_of(role, source.task or source.name)
            folder = folder_of(source, role, made_with(role), prompt)
            if distributed.is_main():
                build(source, role, folder, tokenize, prompt_of)
            distributed.barrier()
            found.setdefault(role, []).append(Shelf.open(folder))
    return found
