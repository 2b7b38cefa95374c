"""Immutable runs of records with their vectors, in memory or mapped from a folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Float32, Int64, Shaped, UInt8

from tercet.data.files.readers import RowGroupCache
from tercet.errors import DataError, IndexFolderError
from tercet.kinds import Kind
from tercet.rank.coded import FACTOR, scores_of, top_k_coded
from tercet.rank.quantized import Codes, Quantizer, Ranges, Stored, bytes_of, codes_of
from tercet.rank.scoring import Postings
from tercet.rank.topk import Hits
from tercet.search.engine.engine import Record, Value, Where

CANDIDATES: Final = 100  # of codes, at least: their cost is negligible
ROWS_PER_GROUP: Final = 512  # records that are read for one hit
_ROW_GROUPS: Final = RowGroupCache(
    32 << 20, least=0
)  # of all open indexes, for the next question's hits
SCHEMA: Final = pa.schema([(name, pa.string()) for name in ("id", "title", "text", "fields")])


@dataclass(frozen=True, slots=True, eq=False)
class SegmentTokens:
    """One vector a token, records end to end."""

    vectors: Float[np.ndarray, "rows width"]  # float16 or float32
    offsets: Int64[np.ndarray, "bounds"]


@dataclass(frozen=True, slots=True, eq=False)
class RecordTable:
    """The records of a segment: a table in memory, or a file of row groups.

    Methods that read a damaged file raise IndexFolderError.
    """

    source: pa.Table | pq.ParquetFile
    folder: Path | None = None  # of the segment; None: in memory
    _reading: Any = field(default_factory=Lock)
    _key: object = field(default_factory=object)  # of this table in the cache of row groups

    def __len__(self) -> int:
        return int(self._starts()[-1])

    @classmethod
    def of(cls, records: Sequence[Record]) -> "RecordTable":
        """Hold these records in memory.

        Raises:
            DataError: when JSON cannot represent a field.
        """
        rows = [[r.id, r.title, r.text, _as_json(r)] for r in records]
        columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[]] * 4
        return cls(pa.table(columns, schema=SCHEMA))

    def blocks(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """Yield all rows in order, by row groups."""
        for group in range(len(self._starts()) - 1):
            yield self._group(group, columns)

    def read(self, rows: Int64[np.ndarray, "rows"]) -> list[Record]:
        """Return the records of these rows; row groups that were read last are kept in memory."""
        starts = self._starts()
        group_of = np.searchsorted(starts, rows, side="right") - 1
        found: dict[int, Record] = {}
        for group in np.unique(group_of).tolist():
            here = rows[group_of == group]
            load = partial(self._group, group, SCHEMA.names)
            kept = isinstance(self.source, pq.ParquetFile)
            table = _ROW_GROUPS.get((self._key, group), load) if kept else load()
            chosen = table.take(_as_array(here - starts[group]))
            found.update(zip(here.tolist(), self.records_of(chosen), strict=True))
        return [found[row] for row in rows.tolist()]

    def ids(self) -> Iterator[str]:
        """Yield the id of each row."""
        for block in self.blocks(["id"]):
            yield from self._column(block, "id")

    def fields(self) -> Iterator[Mapping[str, Value | Sequence[Value]]]:
        """Yield the fields of each row."""
        for block in self.blocks(["fields"]):
            for text in self._column(block, "fields"):
                with self._undamaged():
                    fields = _fields(text)
                yield fields

    def records_of(self, block: pa.Table) -> list[Record]:
        """Return the records of a block's rows."""
        columns = (self._column(block, name) for name in SCHEMA.names)
        with self._undamaged():
            return [
                Record(id=name, title=title, text=text, fields=_fields(fields))
                for name, title, text, fields in zip(*columns, strict=True)
            ]

    def _column(self, block: pa.Table, name: str) -> list[str]:
        with self._undamaged():
            return block[name].to_pylist()

    @contextmanager
    def _undamaged(self) -> Iterator[None]:
        """Turn errors of a damaged file into an IndexFolderError."""
        try:
            yield
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            if self.folder is None:
                raise
            raise damaged(self.folder, f"its records cannot be read: {error}") from error

    def _starts(self) -> Int64[np.ndarray, "bounds"]:
        """Return where the row groups begin, and where the last one ends."""
        if not isinstance(self.source, pq.ParquetFile):
            return np.array([0, self.source.num_rows])
        about = self.source.metadata
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        return np.cumsum([0, *sizes])

    def _group(self, group: int, columns: Sequence[str]) -> pa.Table:
        if not isinstance(self.source, pq.ParquetFile):
            return self.source.select(list(columns))
        with self._reading, self._undamaged():
            table = self.source.read_row_group(group, columns=list(columns))
            if len(table) != self.source.metadata.row_group(group).num_rows:
                raise ValueError("a row group has the wrong number of records")
            return table


def damaged(folder: Path, problem: str) -> IndexFolderError:
    """Return the error for a folder with damaged content."""
    return IndexFolderError(
        f"{folder}: the index is damaged ({' '.join(problem.split())}); build it again with: "
        "tercet index --fresh"
    )


def _as_json(record: Record) -> str:
    try:
        return json.dumps(dict(record.fields))
    except (TypeError, ValueError) as error:
        raise DataError(
            "records",
            None,
            f"the fields of {record.id!r} cannot be kept: {error}; use texts, numbers, truth "
            "values, or lists of these",
        ) from error


@dataclass(frozen=True, slots=True, eq=False)
class Coding:
    """Quantizers of vectors of one width: of the codes searched, and perhaps of finer ones."""

    dims: int
    quantizers: tuple[Quantizer, ...]

    @classmethod
    def by(cls, stored: Stored, ranges: Ranges) -> "Coding":
        """Return the coding by these ranges, for ``stored`` other than float32."""
        return cls(len(ranges.centre), tuple(map(ranges.quantizer, codes_of(stored))))

    @property
    def bytes(self) -> tuple[int, ...]:
        """Bytes of a vector in each array of codes."""
        return tuple(bytes_of(each.precision, self.dims) for each in self.quantizers)

    def coded(self, vectors: Float32[np.ndarray, "docs dims"]) -> "CodedVectors":
        """Return these vectors in codes."""
        return CodedVectors(self, tuple(each.codes(vectors).packed for each in self.quantizers))


@dataclass(frozen=True, slots=True, eq=False)
class CodedVectors:
    """Vectors in codes, in memory or mapped from files."""

    coding: Coding
    arrays: tuple[UInt8[np.ndarray, "docs _"], ...]

    def __len__(self) -> int:
        return len(self.arrays[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the array that the codes represent."""
        return len(self), self.coding.dims

    @property
    def nbytes(self) -> int:
        """The size of the codes."""
        return sum(array.nbytes for array in self.arrays)

    def nearest(
        self,
        queries: Float32[np.ndarray, "queries dims"],
        k: int,
        allowed: Bool[np.ndarray, "docs"] | None,
    ) -> Hits:
        """Return the ``k`` best of the allowed documents; see :func:`top_k_coded`."""
        coarse, *others = map(self._codes, range(len(self.arrays)))
        finer = others[0] if others else None
        factor = max(FACTOR, -(-CANDIDATES // max(k, 1)))
        return top_k_coded(queries, coarse, k, factor=factor, finer=finer, allowed=allowed)

    def scores(
        self, queries: Float32[np.ndarray, "queries dims"], rows: slice | Int64[np.ndarray, "rows"]
    ) -> Float32[np.ndarray, "queries rows"]:
        """Return the scores of queries with these rows, by the finest codes."""
        return scores_of(queries, self._codes(-1).take(rows))

    def _codes(self, sort: int) -> Codes:
        return Codes(self.coding.quantizers[sort], self.coding.dims, self.arrays[sort])


DenseVectors: TypeAlias = Float32[np.ndarray, "_ _"] | CodedVectors
"""The dense vectors of a segment, in float32 or in codes."""


def arrays_of(dense: DenseVectors) -> tuple[Shaped[np.ndarray, "docs _"], ...]:
    """Return the arrays that are stored, one row a document."""
    return dense.arrays if isinstance(dense, CodedVectors) else (dense,)


def dense_of(arrays: Sequence[Shaped[np.ndarray, "docs _"]], coding: Coding | None) -> DenseVectors:
    """Return the vectors that were stored as these arrays."""
    return arrays[0] if coding is None else CodedVectors(coding, tuple(arrays))


def coding_of(dense: DenseVectors | None) -> Coding | None:
    """Return how vectors became codes; None for float32."""
    return dense.coding if isinstance(dense, CodedVectors) else None


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Vectors of some kinds and the records that they belong to, row by row."""

    documents: RecordTable
    dense: DenseVectors | None = None
    sparse: Postings | None = None
    multi: SegmentTokens | None = None
    _values: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def widths(self) -> dict[Kind, int]:
        """The kinds of vectors, with their widths; 0 for terms."""
        found: dict[Kind, int] = {}
        if self.dense is not None:
            found["dense"] = self.dense.shape[1]
        if self.sparse is not None:
            found["sparse"] = 0
        if self.multi is not None:
            found["multi"] = self.multi.vectors.shape[1]
        return found

    @property
    def bytes(self) -> int:
        """The size of the vectors."""
        arrays: list[Any] = [self.dense]
        if self.sparse is not None:
            arrays += [self.sparse.rows, self.sparse.weights]
        if self.multi is not None:
            arrays.append(self.multi.vectors)
        return sum(array.nbytes for array in arrays if array is not None)

    def fulfilling(self, where: Where) -> Bool[np.ndarray, "docs"]:
        """Return which rows have one of the wanted values in every field."""
        kept = np.ones(len(self), dtype=np.bool_)
        if where and "by value" not in self._values:
            self._values["by value"] = self._rows_by_value()
        for name, wanted in where.items():
            having = np.zeros(len(self), dtype=np.bool_)
            for value in _listed(wanted):
                having[self._values["by value"].get((name, *_key(value)), [])] = True
            kept &= having
        return kept

    def _rows_by_value(self) -> dict[tuple[str, bool, Value], Shaped[np.ndarray, "rows"]]:
        """Return the rows of each value of each field."""
        found: dict[tuple[str, bool, Value], list[int]] = {}
        for row, fields in enumerate(self.documents.fields()):
            for name, values in fields.items():
                for value in _listed(values):
                    found.setdefault((name, *_key(value)), []).append(row)
        return {key: np.array(rows, np.int32) for key, rows in found.items()}


def _fields(text: str) -> Mapping[str, Value | Sequence[Value]]:
    return json.loads(text) if text != "{}" else {}


def _listed(value: Value | Sequence[Value]) -> Sequence[Value]:
    return [value] if isinstance(value, str | int | float | bool) else value


def _key(value: Value) -> tuple[bool, Value]:
    """Return a key that distinguishes True from 1."""
    return isinstance(value, bool), value


def _as_array(numbers: Int64[np.ndarray, "numbers"]) -> pa.Array:
    """Return an arrow array of the same memory; ``pa.array`` would import pandas for it."""
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])
