"""A run of records and their vectors that never changes, in memory or mapped from a folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Float32, Int32, Int64, Shaped

from tercet.errors import DataError, IndexFolderError
from tercet.kinds import Kind
from tercet.search.engine.engine import Record, Value, Where
from tercet.search.exact.coding import Dense

ROWS_PER_GROUP: Final = 512  # records that are read together for the sake of one hit
SCHEMA: Final = pa.schema([(name, pa.string()) for name in ("id", "title", "text", "fields")])


@dataclass(frozen=True, slots=True, eq=False)
class Postings:
    """For each token that occurs, the rows that it occurs in and its weight there."""

    tokens: Int64[np.ndarray, "words"]  # ascending
    offsets: Int64[np.ndarray, "bounds"]  # word i has rows[offsets[i]:offsets[i + 1]]
    rows: Int32[np.ndarray, "postings"]  # ascending within a word
    weights: Float32[np.ndarray, "postings"]

    def scores(
        self, tokens: Int64[np.ndarray, "terms"], weights: Float32[np.ndarray, "terms"], count: int
    ) -> Float32[np.ndarray, "count"]:
        """The sum over shared tokens of the product of both weights, for each of ``count`` rows."""
        place = np.searchsorted(self.tokens, tokens)
        known = place < len(self.tokens)
        known[known] = self.tokens[place[known]] == tokens[known]
        rows, parts = [], []
        for word, weight in zip(place[known].tolist(), weights[known].tolist(), strict=True):
            where = slice(self.offsets[word], self.offsets[word + 1])
            rows.append(self.rows[where])
            parts.append(self.weights[where] * np.float32(weight))
        if not rows:
            return np.zeros(count, np.float32)
        summed = np.bincount(np.concatenate(rows), np.concatenate(parts), minlength=count)
        return summed.astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """One vector a token, records end to end."""

    vectors: Float[np.ndarray, "rows width"]  # float16 or float32
    offsets: Int64[np.ndarray, "bounds"]


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """The records of a segment: a table in memory, or a file of row groups.

    What reads the file raises an IndexFolderError where it finds it damaged.
    """

    source: pa.Table | pq.ParquetFile
    folder: Path | None = None  # of the segment; None: in memory
    _reading: Any = field(default_factory=Lock)

    def __len__(self) -> int:
        return int(self._starts()[-1])

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Documents":
        """These records, in memory.

        Raises:
            DataError: when a field holds something that JSON cannot say.
        """
        rows = [[r.id, r.title, r.text, _as_json(r)] for r in records]
        columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[]] * 4
        return cls(pa.table(columns, schema=SCHEMA))

    def blocks(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """All rows in order, so many at a time as are read together."""
        for group in range(len(self._starts()) - 1):
            yield self._group(group, columns)

    def read(self, rows: Int64[np.ndarray, "rows"]) -> list[Record]:
        """The records of these rows; each row group that holds one is read once."""
        starts = self._starts()
        group_of = np.searchsorted(starts, rows, side="right") - 1
        found: dict[int, Record] = {}
        for group in np.unique(group_of).tolist():
            here = rows[group_of == group]
            table = self._group(group, SCHEMA.names).take(pa.array(here - starts[group]))
            found.update(zip(here.tolist(), self.records_of(table), strict=True))
        return [found[row] for row in rows.tolist()]

    def ids(self) -> list[str]:
        """The id of each row."""
        return [name for block in self.blocks(["id"]) for name in self._column(block, "id")]

    def fields(self) -> Iterator[Mapping[str, Value | Sequence[Value]]]:
        """The fields of each row."""
        for block in self.blocks(["fields"]):
            for text in self._column(block, "fields"):
                with self._undamaged():
                    fields = _fields(text)
                yield fields

    def records_of(self, block: pa.Table) -> list[Record]:
        """The records of a block's rows."""
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
        """Name the folder and the remedy when the file is not what was written."""
        try:
            yield
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            if self.folder is None:
                raise
            raise damaged(self.folder, f"its records cannot be read: {error}") from error

    def _starts(self) -> Int64[np.ndarray, "bounds"]:
        """Where the row groups begin, and where the last one ends."""
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
                raise ValueError("there are fewer or more than there should be")
            return table


def damaged(folder: Path, problem: str) -> IndexFolderError:
    """What to say of a folder that nobody but a disk or an editor can have made so."""
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
class Segment:
    """Vectors of some kinds and the records that they belong to, row by row."""

    documents: Documents
    dense: Dense | None = None
    sparse: Postings | None = None
    multi: Rows | None = None
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
        """Which rows have the values that are asked for, in every field."""
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
        """The rows of each field's each value; read once, when the first filter comes."""
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
    """What a value is found by: Python takes True for 1."""
    return isinstance(value, bool), value
