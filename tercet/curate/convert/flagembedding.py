"""Training rows of FlagEmbedding, as rows of tercet: what files and flags said, in each row.

A row that has all it needs can be trained on as it is; this is for the rest: names that keep other
rows' documents out, ``type``, prompts that came as flags, and the thresholds for small sets.
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
class Limits:
    """Which files are taken and how much of each; the reference's flags for the same."""

    rows: int | None = None  # of a file at most, drawn by the seed (max_example_num_per_dataset)
    small: int = 0  # files with fewer rows become one task, named by folder (small_threshold)
    drop: int = 0  # that task is left out where it has fewer rows (drop_threshold)

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise RecipeError(f"{self.rows} rows of a file are too few; ask for one or more")


@dataclass(frozen=True, slots=True)
class FlagSet:
    """The files to convert, counted, and what is left out of them."""

    files: tuple[FlagFile, ...]
    counts: Mapping[Path, int]  # rows of each file
    left_out: Counter[str]  # files, by reason


def flag_set(places: Sequence[Path], limits: Limits) -> FlagSet:
    """Count the rows of all files, and put small ones together.

    Raises:
        DataError: for a place without files, a file that is damaged or holds no row, or where
            nothing is left.
    """
    counts: dict[Path, int] = {}
    files: list[FlagFile] = []
    left_out: Counter[str] = Counter()
    for place in places:
        found = flag_files(place)
        if not found:
            raise DataError(place, None, "holds no .jsonl file; name the folder with the rows")
        for file in found:
            counts[file.path] = sum(1 for _ in iter_records(file.path, FIELDS, needs=_NEEDS))
        small = [file for file in found if place.is_dir() and counts[file.path] < limits.small]
        files += [file for file in found if file not in small]
        if sum(counts[file.path] for file in small) >= limits.drop:
            files += [FlagFile(file.path, place.name, file.own_group) for file in small]
        else:
            left_out["small files that have too few rows together"] += len(small)
    if not files:
        raise DataError(places[0], None, "has small files only, and all are left out; lower --drop")
    return FlagSet(tuple(files), counts, left_out)


def convert_flag_rows(
    chosen: FlagSet, rows: FlagRows, limits: Limits, advance: Callable[[int], None]
) -> Iterator[Example]:
    """The rows of all files, in order, as examples; ``advance`` is told how many were read.

    Raises:
        DataError: at the first row that cannot be read, naming file and line.
    """
    for number, file in enumerate(chosen.files):
        count = chosen.counts[file.path]
        kept = _drawn(count, limits.rows, [rows.seed, number])
        for place, record in enumerate(iter_records(file.path, FIELDS, needs=_NEEDS)):
            if place % _REPORT_EVERY == 0:
                advance(min(_REPORT_EVERY, count - place))
            if kept is not None and place not in kept:
                continue
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
