"""Training rows of FlagEmbedding as rows of tercet.

What FlagEmbedding reads from file names and flags is written into each row: ``no_in_batch_neg``,
``type``, prompts given as flags, and the thresholds for small data sets.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from tercet.data.files.examples import parse_example
from tercet.errors import DataError, RecipeError
from tercet.files.records import iter_records, parsed
from tercet.models.formats.bge_m3_files import FIELDS, FlagFile, FlagRows, flag_files
from tercet.types import Example

_NEEDS: Final = (("query",), ("pos",))
_REPORT_EVERY: Final = 1_000  # rows


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLimits:
    """Which files are read and how many rows of each; FlagEmbedding's flags in brackets.

    Raises:
        RecipeError: if rows is below 1.
    """

    rows: int | None = None  # per file at most, drawn by the seed (max_example_num_per_dataset)
    small: int = 0  # files with fewer rows become one task, named by folder (small_threshold)
    drop: int = 0  # that task is left out if it has fewer rows (drop_threshold)

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise RecipeError(f"rows per file must be at least 1; got {self.rows}")


@dataclass(frozen=True, slots=True)
class FlagSet:
    """The files to convert, their numbers of rows, and the files that are left out."""

    files: tuple[FlagFile, ...]
    counts: Mapping[Path, int]  # rows of each file
    left_out: Counter[str]  # files, by reason


def flag_set(places: Sequence[Path], limits: FileLimits) -> FlagSet:
    """Count the rows of all files, and group small files into one task.

    Raises:
        DataError: for a folder without files, a damaged or empty file, or if no file is left.
    """
    counts: dict[Path, int] = {}
    files: list[FlagFile] = []
    left_out: Counter[str] = Counter()
    for place in places:
        found = flag_files(place)
        if not found:
            raise DataError(place, None, "has no .jsonl file; give the folder with the rows")
        for file in found:
            counts[file.path] = sum(1 for _ in iter_records(file.path, FIELDS, needs=_NEEDS))
        small = [file for file in found if place.is_dir() and counts[file.path] < limits.small]
        files += [file for file in found if file not in small]
        if sum(counts[file.path] for file in small) >= limits.drop:
            files += [FlagFile(file.path, place.name, file.own_group) for file in small]
        else:
            left_out["small files with too few rows together"] += len(small)
    if not files:
        raise DataError(places[0], None, "has only small files, all left out; lower --drop")
    return FlagSet(tuple(files), counts, left_out)


def convert_flag_rows(
    chosen: FlagSet, rows: FlagRows, limits: FileLimits, advance: Callable[[int], None]
) -> Iterator[Example]:
    """Yield the rows of all files, in order; ``advance`` gets the number of rows read.

    Raises:
        DataError: at the first row that cannot be read, with file and line.
    """
    for number, file in enumerate(chosen.files):
        count = chosen.counts[file.path]
        kept = _drawn(count, limits.rows, [rows.seed, number])
        for place, record in enumerate(iter_records(file.path, FIELDS, needs=_NEEDS)):
            if place % _REPORT_EVERY == 0:
                advance(min(_REPORT_EVERY, count - place))
            if kept is None or place in kept:
                yield parsed(
                    file.path,
                    record,
                    lambda it, of=file, at=place: parse_example(
                        rows.record(it.value, at, own_group=of.own_group), of.task
                    ),
                )


def _drawn(count: int, at_most: int | None, seed: Sequence[int]) -> frozenset[int] | None:
    if at_most is None or count <= at_most:
        return None
    chosen: list[int] = np.random.default_rng(seed).choice(count, at_most, replace=False).tolist()
    return frozenset(chosen)
