"""Tokens of training texts, made once and mapped from disk.

A folder of the cache holds those of one source and role: ``ids.npy`` (uint32, the texts end to
end), ``offsets.npy`` (int64), ``about.npy`` (which tokens are pooled), and 128 bits of each prompt
and text, sorted, to find it by. A text that is not there, such as a newly mined negative, is
tokenized when it is needed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from tercet import distributed
from tercet.data.batches.collate import PromptOf, Tokenize, example_prompt
from tercet.data.files.sources import Source
from tercet.files.arrays import GrowingArray
from tercet.files.artifacts import KeptResults, fingerprint
from tercet.files.atomic import replacing_folder
from tercet.files.checksums import seal
from tercet.files.progress import Bars, bar
from tercet.models.tokens import Tokens
from tercet.models.zoo.zoo import cache_folder
from tercet.types import Example, Role

ROLES: Final[tuple[Role, ...]] = ("query", "document")
_EXAMPLES_AT_ONCE: Final = 512
_VERSION: Final = 1  # raise it when the same tokenizer gives other tokens, or files change
_ARRAYS: Final = frozenset(("ids", "offsets", "about", "keys", "order"))

_TokenizedText: TypeAlias = tuple[np.ndarray, int, tuple[int, int], bool]
"""Token ids, how many are skipped, the bounds of those left out, and whether it was truncated."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredTokens:
    """The tokens of one source and role."""

    ids: np.ndarray  # [tokens] uint32
    offsets: np.ndarray  # [texts + 1] int64
    about: np.ndarray  # [texts, 4] int32: skipped, bounds of what is left out, whether truncated
    keys: np.ndarray  # [texts, 2] uint64, sorted by the first
    order: np.ndarray  # [texts] int64, the text of each key

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the text of each key; -1 if there is none."""
        places = np.minimum(np.searchsorted(self.keys[:, 0], keys[:, 0]), len(self.keys) - 1)
        known = (self.keys[places] == keys).all(axis=1)
        return np.where(known, self.order[places], -1)

    def text(self, number: int) -> _TokenizedText:
        """Return the tokens of a text."""
        ids = self.ids[self.offsets[number] : self.offsets[number + 1]].astype(np.int32)
        skipped, first, last, truncated = self.about[number].tolist()
        return ids, skipped, (first, last), bool(truncated)


class CachedTokens:
    """A ``Tokenize`` function that looks texts up in stored tokens before it calls another one."""

    def __init__(self, tokenize: Tokenize, stored: Mapping[Role, Sequence[StoredTokens]]) -> None:
        self._tokenize = tokenize
        self._stored = {role: list(some) for role, some in stored.items()}
        self.missed = 0  # texts that were not stored

    def __call__(self, texts: Sequence[str], role: Role, prompts: Sequence[str]) -> Tokens:
        """Return the tokens of these texts."""
        keys = _keys_of(texts, prompts)
        found: dict[int, _TokenizedText] = {}
        stored = self._stored.get(role, [])
        left = np.arange(len(texts))
        for one in stored:
            if not len(left):
                break
            numbers = one.find(keys[left])
            known = numbers >= 0
            for place, number in zip(left[known].tolist(), numbers[known].tolist(), strict=True):
                found[place] = one.text(number)
            if known.any():  # the texts of a batch are of one source: the next call tries it first
                self._stored[role] = [one, *(other for other in stored if other is not one)]
            left = left[~known]
        others = left.tolist()
        self.missed += len(others)
        fresh = self._tokenize([texts[i] for i in others], role, [prompts[i] for i in others])
        found |= zip(others, _each(fresh), strict=True)
        return _joined([found[place] for place in range(len(texts))])


def stored_tokens(
    sources: Sequence[Source],
    made_with: Callable[[Role], str],
    tokenize: Tokenize,
    prompt_of: PromptOf,
    *,
    bars: Bars = bar,
) -> dict[Role, list[StoredTokens]]:
    """Return the tokens of all sources by role; the first process makes those that are missing.

    ``made_with`` is all that they depend on besides texts and prompts: the tokenizer, the maximum
    length, what is put around texts.

    Raises:
        StorageError: if the disk refuses; TERCET_CACHE says where the cache is.
        DataError: if a source has changed since it was opened.
    """
    cache = KeptResults(cache_folder() / "tokens", _VERSION, mapped=True)
    found: dict[Role, list[StoredTokens]] = {role: [] for role in ROLES}
    for role in ROLES:
        for source in sources:
            prompt = prompt_of(role, source.task or source.name)
            key = (source.fingerprint, role, made_with(role), prompt)
            if distributed.is_main() and _find(cache, key) is None:
                _write(cache.path(*key), source, role, tokenize, prompt_of, bars)
            distributed.barrier()
            stored = _find(cache, key)
            assert stored is not None, "it was just written"
            found[role].append(stored)
    return found


def _find(cache: KeptResults, key: tuple[str, ...]) -> StoredTokens | None:
    kept = cache.find(*key)
    return StoredTokens(**kept[1]) if kept is not None and kept[1].keys() == _ARRAYS else None


def _write(
    folder: Path, source: Source, role: Role, tokenize: Tokenize, prompt_of: PromptOf, bars: Bars
) -> None:
    """Write the tokens of all texts of a role."""
    keys: list[np.ndarray] = []
    with (
        replacing_folder(folder) as fresh,
        ExitStack() as arrays,
        bars(f"tokens of {source.name}, {role}", len(source)) as advance,
    ):

        def array(name: str, kind: type, *row: int) -> GrowingArray:
            made = GrowingArray.open(fresh / f"{name}.npy", np.dtype(kind), row)
            return arrays.enter_context(made)

        ids, offsets = array("ids", np.uint32), array("offsets", np.int64)
        about = array("about", np.int32, 4)
        offsets.add(np.zeros(1, np.int64))
        end = 0
        for texts, prompts, rows in _texts(source, role, prompt_of):
            tokens = tokenize(texts, role, prompts)
            keys.append(_keys_of(texts, prompts))
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
        arrays.close()  # their files are complete from here on
        seal(fresh, folder.name)


def _keys_of(texts: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """Return 128 bits of each prompt and text, as two numbers."""
    keys = [fingerprint(f"{len(p)} {p}{text}") for text, p in zip(texts, prompts, strict=True)]
    return np.frombuffer(bytes.fromhex("".join(keys)), "<u8").reshape(-1, 2)


def _texts(
    source: Source, role: Role, prompt_of: PromptOf
) -> Iterator[tuple[list[str], list[str], int]]:
    """Yield the distinct texts of a role with their prompts, from some examples at a time."""
    for start in range(0, len(source), _EXAMPLES_AT_ONCE):
        rows = range(start, min(start + _EXAMPLES_AT_ONCE, len(source)))
        pairs = dict.fromkeys(
            (text, prompt)
            for example in source.examples(rows)
            for prompt in [example_prompt(example, role, prompt_of)]
            for text in (_texts_of(example, role))
        )
        yield [text for text, _ in pairs], [prompt for _, prompt in pairs], len(rows)


def _texts_of(example: Example, role: Role) -> tuple[str, ...]:
    """Return the texts of a role; of a pair with a similarity score, both are queries."""
    if role == "document":
        return (*example.positives, *example.negatives)
    return (example.query,) if example.score is None else (example.query, *example.positives)


def _each(tokens: Tokens) -> list[_TokenizedText]:
    left_out = tokens.left_out or [(0, 0)] * len(tokens)
    return list(zip(tokens.ids, tokens.skipped, left_out, tokens.cuts, strict=True))


def _joined(texts: Sequence[_TokenizedText]) -> Tokens:
    cuts = [cut for *_, cut in texts]
    ids, skipped = [ids for ids, *_ in texts], [skipped for _, skipped, *_ in texts]
    return Tokens(ids, skipped, sum(cuts), [left for _, _, left, _ in texts], cuts=cuts)
