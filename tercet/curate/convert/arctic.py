"""Tables of texts in the layout of Arctic-Embed's training code, as rows of tercet and back.

``queries.parquet`` (QUERY_ID, QUERY_TEXT), ``documents.parquet`` (DOCUMENT_ID, DOCUMENT_TEXT) and
``labels.parquet`` (QUERY_ID, DOCUMENT_ID); a mined file adds RELEVANCE, below zero for a negative.
Ids are numbers or strings. Documents are spooled to disk, a row group at a time; memory holds 8
bytes for an id and 16 for a pair.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.curate.mining.documents import TextStore
from tercet.data.batches.relation import hash_of
from tercet.data.files.examples import nonblank, shown, text_of
from tercet.errors import DataError
from tercet.files.artifacts import fingerprint_number
from tercet.files.atomic import clear_about, replacing_folder
from tercet.files.records import open_parquet, readable
from tercet.types import Example

QUERY_ID, QUERY_TEXT = "QUERY_ID", "QUERY_TEXT"
DOCUMENT_ID, DOCUMENT_TEXT = "DOCUMENT_ID", "DOCUMENT_TEXT"
RELEVANCE: Final = "RELEVANCE"
ROWS: Final = 4096  # rows that are Python objects, or wait to be written, at the same time

_LABELS: Final = pa.schema({QUERY_ID: pa.uint64(), DOCUMENT_ID: pa.uint64()})
_SCHEMAS: Final = {
    "queries": pa.schema({QUERY_ID: pa.uint64(), QUERY_TEXT: pa.string()}),
    "documents": pa.schema({DOCUMENT_ID: pa.uint64(), DOCUMENT_TEXT: pa.string()}),
    "labels": _LABELS,
    "mined": pa.schema([*_LABELS, pa.field(RELEVANCE, pa.int8())]),
}


@dataclass(slots=True)
class TablesReport:
    """Counts of a conversion from or to tables."""

    queries: int = 0
    rows: int = 0
    unanswered: int = 0  # queries without a label; they give no row
    negatives: int = 0


# ---- tables to rows ------------------------------------------------------------------------------


def examples_of_tables(
    folder: Path, report: TablesReport, *, work: Path, mined: Path | None = None
) -> Iterator[Example]:
    """Yield a row for each query that has a label, in the order of the queries.

    Negatives are the documents of ``mined`` whose relevance is below zero, in its order; those
    above zero are positives like those of the labels.

    Raises:
        DataError: for a missing file or column, a repeated id, or an unknown one.
        StorageError: if there is no room for the texts in ``work``.
    """
    path, labels = folder / "documents.parquet", folder / "labels.parquet"
    with clear_about(work):
        work.mkdir(parents=True, exist_ok=True)
        texts = TextStore(work)
    with closing(texts):
        ids = array("Q")
        with clear_about(work):
            for row, values in _rows(path, (DOCUMENT_ID, DOCUMENT_TEXT)):
                ids.append(_key(values[0], path, row))
                texts.add(_text(values[1], DOCUMENT_TEXT, path, row))
        documents = _IdIndex.of(ids, path, DOCUMENT_ID)
        right, wrong = _LabelledPairs(documents), _LabelledPairs(documents)
        for row, values in _rows(labels, (QUERY_ID, DOCUMENT_ID)):
            right.add(values[0], values[1], labels, row)
        if mined is not None:
            for row, values in _rows(mined, (QUERY_ID, DOCUMENT_ID, RELEVANCE)):
                if values[2] is not None and values[2] != 0:
                    (right if values[2] > 0 else wrong).add(values[0], values[1], mined, row)
        yield from _rows_of_queries(folder / "queries.parquet", right, wrong, texts, report)
        for pairs, place in ((right, labels), (wrong, mined)):
            if place is not None:
                pairs.check_used(place)


def _rows_of_queries(
    path: Path,
    right: "_LabelledPairs",
    wrong: "_LabelledPairs",
    texts: TextStore,
    report: TablesReport,
) -> Iterator[Example]:
    seen = array("Q")
    for row, values in _rows(path, (QUERY_ID, QUERY_TEXT)):
        key = _key(values[0], path, row)
        seen.append(key)
        query = _text(values[1], QUERY_TEXT, path, row)
        report.queries += 1
        answers = dict.fromkeys(right.of(key))
        others = [document for document in dict.fromkeys(wrong.of(key)) if document not in answers]
        if not answers:
            report.unanswered += 1
            continue
        report.rows += 1
        report.negatives += len(others)
        yield Example(query, tuple(texts.read(answers)), tuple(texts.read(others)))
    _IdIndex.of(seen, path, QUERY_ID)


@dataclass(frozen=True, slots=True, eq=False)
class _IdIndex:
    """The row of each id of a table."""

    ordered: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, ids: array, path: Path, name: str) -> "_IdIndex":
        found = np.frombuffer(ids, np.uint64)
        rows = np.argsort(found, kind="stable")
        ordered = found[rows]
        if len(repeats := np.flatnonzero(ordered[1:] == ordered[:-1])):
            first, second = sorted(rows[repeats[0] : repeats[0] + 2].tolist())
            raise DataError(
                path,
                second + 1,
                f'"{name}" repeats the id of row {first + 1}; give each row a unique id',
            )
        return cls(ordered, rows)

    def row(self, key: int) -> int | None:
        """Return the row of an id, if the table has it."""
        place = int(np.searchsorted(self.ordered, np.uint64(key)))
        known = place < len(self.ordered) and int(self.ordered[place]) == key
        return int(self.rows[place]) if known else None


class _LabelledPairs:
    """Rows of documents by query; 16 bytes a pair."""

    def __init__(self, documents: _IdIndex) -> None:
        self._documents = documents
        self._queries, self._rows = array("Q"), array("q")
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._used = 0

    def add(self, query: object, document: object, path: Path, line: int) -> None:
        """Add a pair; all of them before the first call of ``of``."""
        row = self._documents.row(_key(document, path, line))
        if row is None:
            raise DataError(
                path,
                line,
                f'"{DOCUMENT_ID}" {shown(document)} is not in documents.parquet; add it or drop '
                "this row",
            )
        self._queries.append(_key(query, path, line))
        self._rows.append(row)

    def of(self, query: int) -> list[int]:
        """Return the documents of a query, in the order in which they were added."""
        if self._sorted is None:
            queries = np.frombuffer(self._queries, np.uint64)
            order = np.argsort(queries, kind="stable")
            self._sorted = queries[order], np.frombuffer(self._rows, np.int64)[order]
        queries, rows = self._sorted
        wanted = np.uint64(query)
        start = np.searchsorted(queries, wanted, side="left")
        found = rows[start : np.searchsorted(queries, wanted, side="right")].tolist()
        self._used += len(found)
        return found

    def check_used(self, path: Path) -> None:
        """Raise if some pairs belong to queries that were never asked for."""
        if lost := len(self._queries) - self._used:
            raise DataError(
                path,
                None,
                f"{lost:,} rows name queries that are not in queries.parquet; drop them",
            )


def _rows(path: Path, names: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the number of each row, from 1, and its values."""
    with readable(path), open_parquet(path) as file:
        there = file.schema_arrow.names
        for name in names:
            if name not in there:
                listed = ", ".join(f'"{each}"' for each in there)
                raise DataError(path, None, f'has no column "{name}"; rename one of {listed} to it')
        row = 0
        for batch in file.iter_batches(ROWS, columns=list(names), use_threads=False):
            columns = [batch.column(name).to_pylist() for name in names]
            for values in zip(*columns, strict=True):
                row += 1
                yield row, values


def _key(value: object, path: Path, row: int) -> int:
    """Return 64 bits for an id: the number itself, or a hash of the string."""
    if isinstance(value, int) and 0 <= value < 1 << 64:
        return value
    if isinstance(value, str):
        return fingerprint_number(value)
    raise DataError(path, row, f"an id must be a number from 0 or a string; got {shown(value)}")


def _text(value: object, name: str, path: Path, row: int) -> str:
    try:
        return nonblank(text_of(value, name), name)
    except ValueError as error:
        raise DataError(path, row, str(error)) from error


# ---- rows to tables ------------------------------------------------------------------------------


def write_tables(folder: Path, examples: Iterable[Example]) -> TablesReport:
    """Write rows as four tables, ``mined.parquet`` among them; equal texts share an id.

    Memory holds a hash and a number for each distinct text.

    Raises:
        StorageError: if the disk refuses; an earlier folder is still there then.
    """
    report = TablesReport()
    waiting = iter(examples)
    ids: dict[str, dict[int, int]] = {QUERY_ID: {}, DOCUMENT_ID: {}}
    with replacing_folder(folder) as fresh, ExitStack() as stack:
        tables = {
            name: stack.enter_context(pq.ParquetWriter(fresh / f"{name}.parquet", schema))
            for name, schema in _SCHEMAS.items()
        }
        while some := list(islice(waiting, ROWS)):
            for name, rows in _table_rows(some, ids, report).items():
                columns = list(zip(*rows, strict=True)) or [() for _ in _SCHEMAS[name].names]
                arrays = [
                    pa.array(column, field.type)
                    for column, field in zip(columns, _SCHEMAS[name], strict=True)
                ]
                tables[name].write_table(pa.table(arrays, schema=_SCHEMAS[name]))
    report.queries = len(ids[QUERY_ID])
    return report


def _table_rows(
    examples: Sequence[Example], ids: dict[str, dict[int, int]], report: TablesReport
) -> dict[str, Sequence[tuple[object, ...]]]:
    new: dict[str, list[tuple[int, str]]] = {QUERY_ID: [], DOCUMENT_ID: []}

    def id_of(kind: str, text: str) -> int:
        known = ids[kind]
        key = hash_of(text)
        if key not in known:
            known[key] = len(known)
            new[kind].append((known[key], text))
        return known[key]

    pairs: list[tuple[int, int, int]] = []
    for example in examples:
        query = id_of(QUERY_ID, example.query)
        pairs += [(query, id_of(DOCUMENT_ID, text), 1) for text in example.positives]
        pairs += [(query, id_of(DOCUMENT_ID, text), -1) for text in example.negatives]
        report.rows += 1
        report.negatives += len(example.negatives)
    return {
        "queries": new[QUERY_ID],
        "documents": new[DOCUMENT_ID],
        "labels": [pair[:2] for pair in pairs if pair[2] > 0],
        "mined": pairs,
    }
