"""Tables of texts and batches of tokens as Arctic-Embed's code has them, and rows of tercet.

``queries.parquet`` (QUERY_ID, QUERY_TEXT), ``documents.parquet`` (DOCUMENT_ID, DOCUMENT_TEXT) and
``labels.parquet`` (QUERY_ID, DOCUMENT_ID); a mined file adds RELEVANCE, below zero for a negative.
Ids are numbers or texts. Texts are read a row group at a time and wait on the disk: in memory are 8
bytes for an id and 16 for a pair.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.curate.convert.arctic_batches import (
    DOCUMENTS,
    QUERIES,
    RELATIONS,
    TokenBatch,
    check_columns,
)
from tercet.curate.mining.documents import TextStore
from tercet.data.batches.relation import hash_of
from tercet.data.files.examples import nonblank, shown, text_of
from tercet.errors import DataError
from tercet.files.atomic import clear_about, replacing_folder
from tercet.files.records import open_parquet, readable
from tercet.types import Example, Role

QUERY_ID, QUERY_TEXT = "QUERY_ID", "QUERY_TEXT"
DOCUMENT_ID, DOCUMENT_TEXT = "DOCUMENT_ID", "DOCUMENT_TEXT"
RELEVANCE: Final = "RELEVANCE"
ROWS: Final = 4096  # that are Python objects, or wait to be written, at the same time

_QUERIES: Final = pa.schema({QUERY_ID: pa.uint64(), QUERY_TEXT: pa.string()})
_DOCUMENTS: Final = pa.schema({DOCUMENT_ID: pa.uint64(), DOCUMENT_TEXT: pa.string()})
_LABELS: Final = pa.schema({QUERY_ID: pa.uint64(), DOCUMENT_ID: pa.uint64()})
_MINED: Final = pa.schema([*_LABELS, pa.field(RELEVANCE, pa.int8())])


@dataclass(slots=True)
class TablesReport:
    """What became of the queries of some tables."""

    queries: int = 0
    rows: int = 0
    unanswered: int = 0  # queries without a label; no row is made of them
    negatives: int = 0


# ---- tables to rows ------------------------------------------------------------------------------


def examples_of_tables(
    folder: Path, report: TablesReport, *, work: Path, mined: Path | None = None
) -> Iterator[Example]:
    """A row for each query that has a label, in the order of the queries.

    Negatives are the documents of ``mined`` whose relevance is below zero, in its order; those
    above zero are positives like those of the labels.

    Raises:
        DataError: for a missing file or column, an id that is there twice, or an unknown one.
        StorageError: when there is no room for the texts in ``work``.
    """
    path = folder / "documents.parquet"
    with clear_about(work):
        work.mkdir(parents=True, exist_ok=True)
        texts = TextStore(work)
    with closing(texts):
        ids = array("Q")
        with clear_about(work):
            for row, values in _rows(path, (DOCUMENT_ID, DOCUMENT_TEXT)):
                ids.append(_key(values[0], path, row))
                texts.add(_text(values[1], DOCUMENT_TEXT, path, row))
        documents = _Ids.of(ids, path, DOCUMENT_ID)
        right, wrong = _Pairs(documents), _Pairs(documents)
        for row, values in _rows(folder / "labels.parquet", (QUERY_ID, DOCUMENT_ID)):
            right.add(values[0], values[1], folder / "labels.parquet", row)
        if mined is not None:
            for row, values in _rows(mined, (QUERY_ID, DOCUMENT_ID, RELEVANCE)):
                if values[2] is not None and values[2] != 0:
                    (right if values[2] > 0 else wrong).add(values[0], values[1], mined, row)
        yield from _rows_of_queries(folder / "queries.parquet", right, wrong, texts, report)
        for pairs, place in ((right, folder / "labels.parquet"), (wrong, mined)):
            if place is not None:
                pairs.check_used(place)


def _rows_of_queries(
    path: Path, right: "_Pairs", wrong: "_Pairs", texts: TextStore, report: TablesReport
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
    _Ids.of(seen, path, QUERY_ID)


@dataclass(frozen=True, slots=True, eq=False)
class _Ids:
    """Where each id of a table is."""

    ordered: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, ids: array, path: Path, name: str) -> "_Ids":
        found = np.frombuffer(ids, np.uint64)
        rows = np.argsort(found, kind="stable")
        ordered = found[rows]
        if len(twice := np.flatnonzero(ordered[1:] == ordered[:-1])):
            first, second = sorted(rows[twice[0] : twice[0] + 2].tolist())
            raise DataError(
                path,
                second + 1,
                f'"{name}" is that of row {first + 1} already; give each row an id of its own',
            )
        return cls(ordered, rows)

    def row(self, key: int) -> int | None:
        """The row of an id."""
        place = int(np.searchsorted(self.ordered, np.uint64(key)))
        known = place < len(self.ordered) and int(self.ordered[place]) == key
        return int(self.rows[place]) if known else None


class _Pairs:
    """Documents of queries, by row; 16 bytes a pair."""

    def __init__(self, documents: _Ids) -> None:
        self._documents = documents
        self._queries, self._rows = array("Q"), array("q")
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._used = 0

    def add(self, query: object, document: object, path: Path, line: int) -> None:
        """Note a pair. Not after the first question."""
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
        """The documents of a query, in the order in which they came."""
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
        """Refuse pairs of queries that never came."""
        if lost := len(self._queries) - self._used:
            raise DataError(
                path,
                None,
                f"{lost:,} rows are of queries that are not in queries.parquet; drop them",
            )


def _rows(path: Path, names: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The number of each row, from 1, and its values."""
    with readable(path), open_parquet(path) as file:
        check_columns(path, file.schema_arrow.names, list(names))
        row = 0
        for batch in file.iter_batches(ROWS, columns=list(names), use_threads=False):
            columns = [batch.column(name).to_pylist() for name in names]
            for values in zip(*columns, strict=True):
                row += 1
                yield row, values


def _key(value: object, path: Path, row: int) -> int:
    """64 bits for an id: the number itself, or a hash of its text."""
    if isinstance(value, int) and 0 <= value < 1 << 64:
        return value
    if isinstance(value, str):
        digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little")
    raise DataError(path, row, f"an id is {shown(value)}; give a number of 0 or more, or a text")


def _text(value: object, name: str, path: Path, row: int) -> str:
    try:
        return nonblank(text_of(value, name), name)
    except ValueError as error:
        raise DataError(path, row, str(error)) from error


# ---- rows to tables ------------------------------------------------------------------------------


def write_tables(folder: Path, examples: Iterable[Example]) -> TablesReport:
    """Write rows as four tables, ``mined.parquet`` among them; equal texts share an id.

    Memory is a hash and a number for each distinct text.

    Raises:
        StorageError: when the disk refuses; what was there before is still there.
    """
    report = TablesReport()
    waiting = iter(examples)
    ids: dict[str, dict[int, int]] = {QUERY_ID: {}, DOCUMENT_ID: {}}
    with replacing_folder(folder) as fresh, ExitStack() as stack:
        tables = {
            name: stack.enter_context(pq.ParquetWriter(fresh / f"{name}.parquet", schema))
            for name, schema in (
                ("queries", _QUERIES),
                ("documents", _DOCUMENTS),
                ("labels", _LABELS),
                ("mined", _MINED),
            )
        }
        while some := list(islice(waiting, ROWS)):
            for name, table in _as_tables(some, ids, report).items():
                tables[name].write_table(table)
    report.queries = len(ids[QUERY_ID])
    return report


def _as_tables(
    examples: Sequence[Example], ids: dict[str, dict[int, int]], report: TablesReport
) -> dict[str, pa.Table]:
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
        "queries": _table(new[QUERY_ID], _QUERIES),
        "documents": _table(new[DOCUMENT_ID], _DOCUMENTS),
        "labels": _table([pair[:2] for pair in pairs if pair[2] > 0], _LABELS),
        "mined": _table(pairs, _MINED),
    }


def _table(rows: Sequence[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [() for _ in schema.names]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)],
        schema=schema,
    )


# ---- rows and batches of tokens ------------------------------------------------------------------


def token_batches(
    examples: Iterable[Example],
    tokenize: Callable[[Sequence[str], Role], Sequence[np.ndarray]],
    size: int,
) -> Iterator[TokenBatch]:
    """Batches of so many rows, in their order; equal texts of a batch are one query or document."""
    waiting = iter(examples)
    while some := list(islice(waiting, size)):
        queries = {text: i for i, text in enumerate(dict.fromkeys(e.query for e in some))}
        texts = dict.fromkeys(t for e in some for t in (*e.positives, *e.negatives))
        documents = {text: i for i, text in enumerate(texts)}
        # A text that answers a query in one row is no negative of it in another.
        pairs = {(queries[e.query], documents[t]): -1 for e in some for t in e.negatives}
        pairs |= {(queries[e.query], documents[t]): 1 for e in some for t in e.positives}
        yield TokenBatch(
            _table(list(enumerate(tokenize(list(queries), "query"))), QUERIES),
            _table(list(enumerate(tokenize(list(documents), "document"))), DOCUMENTS),
            _table([(*pair, relevance) for pair, relevance in sorted(pairs.items())], RELATIONS),
        )


def examples_of_batch(
    batch: TokenBatch, decode: Callable[[Sequence[int], Role], str]
) -> Iterator[Example]:
    """The rows of a batch, their texts decoded; a query without a positive gives none."""
    texts = [decode(ids, "document") for ids in batch.documents[1].to_pylist()]
    place = {name: row for row, name in enumerate(batch.documents[0].to_pylist())}
    related: dict[int, tuple[list[str], list[str]]] = {}
    for query, document, relevance in zip(*(c.to_pylist() for c in batch.relations), strict=True):
        right, wrong = related.setdefault(query, ([], []))
        if relevance:
            (right if relevance > 0 else wrong).append(texts[place[document]])
    for query, ids in zip(*(column.to_pylist() for column in batch.queries), strict=True):
        right, wrong = related.get(query, ([], []))
        if right:
            yield Example(decode(ids, "query"), tuple(right), tuple(wrong))
