"""Readers of the records of given rows: lines of a file, row groups, shards of a folder.

No reader holds an open file, so it can be pickled and used by several threads.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.data.files.examples import EXAMPLE_FIELDS
from tercet.errors import DataError
from tercet.files.parquet import open_parquet
from tercet.files.records import Names, columns_of, readable

CACHED_BYTES: Final = 1 << 28  # 256 MiB: two windows of one file's row groups fit into it
KEPT_BYTES: Final = 1 << 30  # 1 GiB of row groups of all files that are read by rows
WINDOW_BLOCKS: Final = 8  # are shuffled together, if two such windows fit in the cache
LINES_BYTES: Final = 1 << 26  # 64 MiB of lines are a block of the shuffle

Found = TypeVar("Found")

FileStamp: TypeAlias = tuple[int, int]
"""The size and modification time of a file, which change when it is written to."""


@runtime_checkable
class Reader(Protocol):
    """Reads the records of given rows, in the given order."""

    def read(self, rows: Sequence[int]) -> list[object]:
        """Return the records of these rows."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LineReader:
    """Reads lines by seeking to where they begin."""

    path: Path
    stamp: FileStamp
    offsets: np.ndarray  # [rows] int64
    decode: Callable[[str], object] = json.loads

    def read(self, rows: Sequence[int]) -> list[object]:
        """Return the records of these lines, which are read in the order of the file."""
        check_stamp(self.path, self.stamp)
        wanted = np.asarray(rows, np.int64)
        lines = [b""] * len(wanted)
        with readable(self.path), self.path.open("rb") as file:
            for place in np.argsort(wanted, kind="stable").tolist():
                file.seek(int(self.offsets[wanted[place]]))
                lines[place] = file.readline()
        try:
            return [self.decode(line.decode("utf-8")) for line in lines]
        except ValueError as error:
            raise changed(self.path) from error


@dataclass(frozen=True, slots=True, eq=False)
class ParquetReader:
    """Reads row groups; all readers share a cache of the last used ones, of up to 1 GiB."""

    path: Path
    stamp: FileStamp
    blocks: np.ndarray  # [row groups] int64, the first row of each
    fields: Sequence[Names] = EXAMPLE_FIELDS

    def read(self, rows: Sequence[int]) -> list[object]:
        """Return the records of these rows; each row group is read once."""
        check_stamp(self.path, self.stamp)
        wanted = np.asarray(rows, np.int64)
        groups = np.searchsorted(self.blocks, wanted, side="right") - 1

        def of_group(group: int, places: np.ndarray) -> list[object]:
            inside = pa.array(wanted[places] - self.blocks[group])
            return self._group(group).take(inside).to_pylist()

        with readable(self.path):
            return gathered(groups, of_group)

    def _group(self, group: int) -> pa.Table:
        def load() -> pa.Table:
            with open_parquet(self.path) as file:
                columns = columns_of(file.schema_arrow.names, self.fields)
                return file.read_row_group(group, columns=columns, use_threads=False)

        return row_group_cache.get((self.path, self.stamp, tuple(self.fields), group), load)


class RowGroupCache:
    """The last used row groups of some files, for all threads of this process."""

    def __init__(self, kept_bytes: int, *, least: int = 2) -> None:
        self._kept_bytes, self._least = kept_bytes, least  # of row groups in memory
        self._tables: OrderedDict[tuple[object, ...], pa.Table] = OrderedDict()
        self._bytes, self._lock = 0, Lock()

    def get(self, key: tuple[object, ...], load: Callable[[], pa.Table]) -> pa.Table:
        """Return a row group, loading it if needed; two threads may load the same one."""
        with self._lock:
            table = self._tables.get(key)
        table = load() if table is None else table
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self._bytes += table.nbytes
            self._tables.move_to_end(key)
            while len(self._tables) > self._least and self._bytes > self._kept_bytes:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
        return table


row_group_cache: Final = RowGroupCache(KEPT_BYTES)


@dataclass(frozen=True, slots=True, eq=False)
class ChosenReader:
    """Reads a selection of the rows of another reader, such as those of one language."""

    whole: Reader
    rows: np.ndarray  # [rows] of the other, ascending

    def read(self, rows: Sequence[int]) -> list[object]:
        """Return the records of these rows."""
        return self.whole.read(self.rows[np.asarray(rows, np.int64)].tolist())


@dataclass(frozen=True, slots=True, eq=False)
class ShardReader:
    """Reads several files as if they were one."""

    parts: tuple[Reader, ...]
    firsts: np.ndarray  # [parts] int64, the first row of each

    def read(self, rows: Sequence[int]) -> list[object]:
        """Return the records of these rows; each part is read once."""
        wanted = np.asarray(rows, np.int64)
        owners = np.searchsorted(self.firsts, wanted, side="right") - 1
        return gathered(
            owners,
            lambda part, places: self.parts[part].read(
                (wanted[places] - self.firsts[part]).tolist()
            ),
        )


def gathered(owners: np.ndarray, read: Callable[[int, np.ndarray], Sequence[Found]]) -> list[Found]:
    """Call ``read`` once for each owner with the places it owns; return all in order."""
    found: dict[int, Found] = {}
    for owner in np.unique(owners).tolist():
        places = np.flatnonzero(owners == owner)
        found.update(zip(places.tolist(), read(owner, places), strict=True))
    return [found[place] for place in range(len(owners))]


def row_groups(path: Path) -> tuple[np.ndarray, int]:
    """Return the first row of each row group, and the groups per window of the shuffle."""
    with readable(path):
        metadata = pq.read_metadata(path)
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    first_rows = np.concatenate(([0], np.cumsum([group.num_rows for group in groups[:-1]])))
    largest = max(group.total_byte_size for group in groups)
    window = min(max(CACHED_BYTES // 2 // max(largest, 1), 1), WINDOW_BLOCKS)
    return first_rows.astype(np.int64), window


def line_blocks(offsets: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the first row of each 64 MiB of lines, and the blocks per window of the shuffle."""
    ends = np.arange(0, int(offsets[-1]) + 1, LINES_BYTES)
    first_rows = np.unique(np.searchsorted(offsets, ends)).astype(np.int64)
    return first_rows, 1 if len(first_rows) == 1 else WINDOW_BLOCKS


def blocks_among(rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Return the places, among ascending rows, of the first row of each block."""
    firsts = np.unique(np.searchsorted(rows, blocks))
    return firsts[firsts < len(rows)].astype(np.int64)


def stamp_of(path: Path, parts: Sequence[Path] = ()) -> FileStamp:
    """Return the size and modification time of a file; of its parts, if it is a folder of some."""
    with readable(path):
        states = [part.stat() for part in parts or (path,)]
    return sum(it.st_size for it in states), max(it.st_mtime_ns for it in states)


def check_stamp(path: Path, stamp: FileStamp, parts: Sequence[Path] = ()) -> None:
    """Raise a DataError if a file, or a part of it, was written to."""
    if stamp_of(path, parts) != stamp:
        raise changed(path)


def changed(path: Path) -> DataError:
    """Return the error that a file is no longer the one that was opened."""
    return DataError(path, None, "has changed since it was opened; start the command again")
