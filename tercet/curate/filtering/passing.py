"""Which pairs are compared with each other, and which rank among them is good enough."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from zlib import crc32

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from tercet.curate.filtering.pair_rules import PairRules
from tercet.curate.filtering.screen import Screened
from tercet.errors import RecipeError
from tercet.files.atomic import replacing_file
from tercet.files.records import readable

LEVELS: Final = (1, 2, 3, 5, 10, 20, 30)  # of which it is told how many pairs each would keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtering:
    """Which pairs are kept.

    Raises:
        RecipeError: for numbers that keep nothing, or everything.
    """

    k: int = 20  # the worst rank that is kept
    top_share: float | None = None  # in place of k: this part of the shard, the best at least
    shard: int = 3_000_000  # pairs that are compared with each other
    seed: int = 0  # of the shuffle
    rules: PairRules = field(default_factory=PairRules)

    def __post_init__(self) -> None:
        if self.k < 1 or self.shard < 1:
            raise RecipeError(
                f"the {self.k} best of shards of {self.shard} pairs are none; give numbers above 0"
            )
        if self.k >= self.shard and self.top_share is None:
            raise RecipeError(
                f"the {self.k} best of shards of {self.shard} pairs are all of them; "
                "ask for fewer, or for larger shards"
            )
        if self.top_share is not None and not 0 < self.top_share < 1:
            raise RecipeError(f"a share of {self.top_share:g} is none between 0 and 1")

    def level(self, size: int) -> int:
        """The worst rank that is kept in a shard of so many pairs."""
        return self.k if self.top_share is None else max(1, round(self.top_share * size))


PRESETS: Final = {
    "arctic": Filtering(k=20, shard=3_000_000),  # arXiv 2412.04506
    "e5": Filtering(k=2, shard=1_000_000),  # arXiv 2212.03533
    "nomic": Filtering(k=2, shard=1_000_000),  # arXiv 2402.01613
}


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """Pairs that are compared with each other, by row and positive."""

    rows: Int64[np.ndarray, "pairs"]
    positives: Int32[np.ndarray, "pairs"]
    texts: UInt64[np.ndarray, "pairs"]

    @property
    def digest(self) -> str:
        """A hash of which pairs these are."""
        digest = hashlib.blake2b(digest_size=12)
        for array in (self.rows, self.positives, self.texts):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Write it where the process that ranks it will look."""
        save_arrays(path, rows=self.rows, positives=self.positives, texts=self.texts)

    @classmethod
    def read(cls, path: Path) -> "Shard":
        """The shard that was written there."""
        with readable(path), np.load(path) as found:
            return cls(found["rows"], found["positives"], found["texts"])


def shards_of(found: Screened, filtering: Filtering) -> list[Shard]:
    """The pairs that are left, shuffled and cut into shards of equal size, each in file order.

    There are max(1, round(pairs / shard)) of them: a short last one would be an easier test. The
    positives of a row stay together.
    """
    left = np.flatnonzero(found.left)
    rows = np.unique(found.rows[left])
    count = min(max(1, round(len(left) / filtering.shard)), max(len(rows), 1))
    seed = [filtering.seed, crc32(found.key.folder.encode())]
    number_of_row = np.empty(len(rows), np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    for number, part in enumerate(np.array_split(shuffled, count)):
        number_of_row[part] = number
    number_of = number_of_row[np.searchsorted(rows, found.rows[left])]
    parts = [left[number_of == number] for number in range(count)]
    return [
        Shard(found.rows[part], found.positives[part], found.texts[part])
        for part in parts
        if len(part)
    ]


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays into a file that appears whole or not at all."""
    with replacing_file(path) as fresh, fresh.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
