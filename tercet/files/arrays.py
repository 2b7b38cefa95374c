"""Vectors of texts in a folder: plain .npy files that grow text by text and are read mapped.

- ``dense.npy``: float32, one row per text.
- ``sparse_ids.npy`` and ``sparse_weights.npy``: int32 and float32, the terms of all texts end to
  end, those of a text by ascending id.
- ``multi.npy``: float16, one row per token, the rows of all texts end to end.
- ``sparse_offsets.npy`` and ``multi_offsets.npy``: int64. Text ``i`` has the terms or rows from
  ``offsets[i]`` up to ``offsets[i + 1]``.

Files of other kinds are absent. ``numpy.load(path, mmap_mode="r")`` opens each.
"""

from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from mmap import MADV_DONTNEED, mmap
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tercet.files.artifacts import write_npy_header
from tercet.files.checksums import damage, note_damage
from tercet.files.limits import ARRAY_ERRORS, unreadable
from tercet.files.outputs import holds_only
from tercet.files.records import readable
from tercet.kinds import Kind
from tercet.segments import ragged_places
from tercet.vectors import Terms, TokenRows, Vectors

_VALUES: Final[dict[Kind, tuple[str, ...]]] = {
    "dense": ("dense",),
    "sparse": ("sparse_ids", "sparse_weights"),
    "multi": ("multi",),
}
_TYPES: Final = {
    "dense": np.dtype(np.float32),
    "sparse_ids": np.dtype(np.int32),
    "sparse_weights": np.dtype(np.float32),
    "sparse_offsets": np.dtype(np.int64),
    "multi": np.dtype(np.float16),  # of unit vectors: a dot product keeps three digits
    "multi_offsets": np.dtype(np.int64),
}
_LAST_64: Final = (1 << 64) - 1
NAMES: Final = frozenset(f"{name}.npy" for name in _TYPES)  # that may be in such a folder


class VectorWriter:
    """Writes the vectors of texts into an empty folder, some texts at a time."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self._folder, self._open_files = folder, files
        self._files: dict[str, GrowingArray] = {}
        self._ends: dict[Kind, int] = {}

    @staticmethod
    @contextmanager
    def open(folder: Path) -> "Iterator[VectorWriter]":
        """Yield a writer; the end of the context finishes its files.

        After an error they are useless, so the folder should be one that appears whole
        (``tercet.files.atomic.replacing_folder``).
        """
        with ExitStack() as files:
            yield VectorWriter(folder, files)

    def add(self, vectors: Vectors) -> None:
        """Append the vectors of some texts, of the same kinds as those before."""
        if vectors.dense is not None:
            self._grow("dense", vectors.dense)
        if vectors.sparse is not None:
            terms = vectors.sparse.merged()
            self._grow("sparse_ids", terms.ids)
            self._grow("sparse_weights", terms.weights)
            self._grow_offsets("sparse", terms.offsets)
        if vectors.multi is not None:
            self._grow("multi", vectors.multi.vectors)
            self._grow_offsets("multi", vectors.multi.offsets)

    def _grow(self, name: str, values: Tensor) -> None:
        rows = values.detach().cpu().numpy()
        if name not in self._files:
            file = GrowingArray.open(self._folder / f"{name}.npy", _TYPES[name], rows.shape[1:])
            self._files[name] = self._open_files.enter_context(file)
        self._files[name].add(rows)

    def _grow_offsets(self, kind: Kind, offsets: Tensor) -> None:
        end = self._ends.get(kind)
        self._grow(f"{kind}_offsets", offsets if end is None else end + offsets[1:])
        self._ends[kind] = (end or 0) + int(offsets[-1])


def read_vectors(folder: Path, rows: Int[np.ndarray, "texts"], kind: Kind) -> Vectors:
    """Return the vectors of one kind of these texts, in float32; nothing else is read.

    Raises:
        DataError: if a file is absent or damaged.
    """
    values = [mapped_array(folder / f"{name}.npy") for name in _VALUES[kind]]
    if kind == "dense":
        return Vectors(dense=torch.from_numpy(np.array(values[0][rows])))
    offsets = mapped_array(folder / f"{kind}_offsets.npy")
    begins, ends = (torch.from_numpy(np.array(offsets[each])) for each in (rows, rows + 1))
    places, bounds = ragged_places(begins, ends)
    chosen = [np.array(each[places.numpy()]) for each in values]
    if kind == "sparse":
        ids, weights = (torch.from_numpy(each) for each in chosen)
        return Vectors(sparse=Terms(ids.long(), weights, bounds))
    return Vectors(multi=TokenRows(torch.from_numpy(chosen[0].astype(np.float32)), bounds))


def is_whole(folder: Path, texts: int, kind: Kind) -> bool:
    """Whether a folder holds vectors of one kind of this many texts, as they were written."""
    names = [*_VALUES[kind], f"{kind}_offsets"]
    if not folder.exists() or any(unreadable(folder / f"{name}.npy") for name in names):
        return False
    if (path := damage(folder)) is not None:
        note_damage(path)
        return False
    try:
        values = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _VALUES[kind]]
        if kind == "dense":
            return len(values[0]) == texts
        offsets = np.load(folder / f"{kind}_offsets.npy", mmap_mode="r")
    except ARRAY_ERRORS:
        return False
    return len(offsets) == texts + 1 and all(len(each) == offsets[-1] for each in values)


def holds_only_vectors(folder: Path) -> bool:
    """Whether all files in a folder are arrays as a writer makes them, by their names and types."""
    files = [path for path in folder.glob("*.npy") if path.is_file()]
    try:
        found = {path: np.load(path, mmap_mode="r") for path in files}
    except (OSError, ValueError, EOFError):
        return False
    typed = all(array.dtype == _TYPES.get(path.stem) for path, array in found.items())
    return typed and holds_only(folder, NAMES)


class GrowingArray:
    """An array in a .npy file that grows by rows."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any], row: tuple[int, ...]) -> None:
        self._file, self._dtype, self._row, self._rows = file, dtype, row, 0

    @staticmethod
    @contextmanager
    def open(path: Path, dtype: np.dtype[Any], row: tuple[int, ...]) -> "Iterator[GrowingArray]":
        """Yield an array with rows of this shape, whose number is written at the end.

        After an error the file states that it holds no rows.
        """
        with path.open("wb") as file:
            made = GrowingArray(file, dtype, row)
            write_npy_header(file, (0, *row), dtype)
            begin = file.tell()
            yield made
            file.seek(0)
            write_npy_header(file, (made._rows, *row), dtype)
            assert file.tell() == begin, "numpy leaves room in a header for a growing number"

    def add(self, values: Shaped[np.ndarray, "..."]) -> None:
        """Append rows."""
        assert values.shape[1:] == self._row, "rows of one width"
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self._rows += len(values)


class KeySet:
    """A set of 64-bit numbers in one array, 12 to 24 bytes each."""

    def __init__(self) -> None:
        self._table, self._count = array("Q", [0]) * 1024, 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: int) -> bool:
        return self._table[self._place(_nonzero(key))] != 0

    def add(self, key: int) -> bool:
        """Add a number, whose last 64 bits count; return whether it is new."""
        key = _nonzero(key)
        if self._table[place := self._place(key)]:
            return False
        self._table[place] = key
        self._count += 1
        if 3 * self._count > 2 * len(self._table):
            old, self._table = self._table, array("Q", [0]) * (2 * len(self._table))
            for each in old:
                if each:
                    self._table[self._place(each)] = each
        return True

    def _place(self, key: int) -> int:
        """Return where a number is, or the free place where it belongs."""
        last = len(self._table) - 1
        place = key & last
        while (there := self._table[place]) and there != key:
            place = (place + 1) & last
        return place


def _nonzero(key: int) -> int:
    return (key & _LAST_64) or 1  # 0 is a free place


def release(array: np.ndarray) -> None:
    """Take the pages of a mapped array out of this process's memory; they can be read again."""
    mapping = getattr(array, "_mmap", None)
    if isinstance(mapping, mmap) and hasattr(mapping, "madvise"):
        mapping.madvise(MADV_DONTNEED)


def mapped_array(path: Path) -> np.ndarray:
    """Map a ``.npy`` file; for each use, as a process may not keep thousands of files open."""
    with readable(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)
