"""Tables of texts in the layout of Arctic-Embed's training code, as rows of tercet and back.

``queries.parquet`` (QUERY_ID, QUERY_TEXT), ``documents.parquet`` (DOCUMENT_ID, DOCUMENT_TEXT) and
``labels.parquet`` (QUERY_ID, DOCUMENT_ID); a mined file adds RELEVANCE, below zero for a negative.
Ids are numbers or strings. Documents are spooled to disk; memory holds about 120 bytes for an id
and 16 for a pair.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from tercet.curate.mining.document_pools import TextStore
from tercet.curate.mining.relevant import RelevantDocuments
from tercet.data.batches.relation import hash_of
from tercet.data.files.examples import nonblank, shown, text_of
from tercet.errors import DataError
from tercet.files.artifacts import fingerprint_number
from tercet.files.atomic import clear_about, replacing_folder
from tercet.files.outputs import FolderKind, check_output, holds_only, mark
from tercet.files.parquet import open_parquet, parquet_parts
from tercet.files.records import readable
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
        documents: dict[int, int] = {}  # row by id
        with clear_about(work):
            for row, (document, text) in _rows(path, (DOCUMENT_ID, DOCUMENT_TEXT)):
                _add_id(documents, document, DOCUMENT_ID, path, row)
                texts.add(_text(text, DOCUMENT_TEXT, path, row))
        right, wrong = RelevantDocuments(), RelevantDocuments()
        for row, pair in _rows(labels, (QUERY_ID, DOCUMENT_ID)):
            right.add(*_pair(pair, documents, labels, row))
        if mined is not None:
            for row, (*pair, relevance) in _rows(mined, (QUERY_ID, DOCUMENT_ID, RELEVANCE)):
                if relevance:
                    (right if relevance > 0 else wrong).add(*_pair(pair, documents, mined, row))
        yield from _rows_of_queries(folder / "queries.parquet", right, wrong, texts, report)


def _rows_of_queries(
    path: Path,
    right: RelevantDocuments,
    wrong: RelevantDocuments,
    texts: TextStore,
    report: TablesReport,
) -> Iterator[Example]:
    seen: dict[int, int] = {}
    unused = len(right) + len(wrong)
    for row, (query, text) in _rows(path, (QUERY_ID, QUERY_TEXT)):
        key = _add_id(seen, query, QUERY_ID, path, row)
        query = _text(text, QUERY_TEXT, path, row)
        report.queries += 1
        found, others = right.of(key).tolist(), wrong.of(key).tolist()
        unused -= len(found) + len(others)
        if not found:
            report.unanswered += 1
            continue
        positives = dict.fromkeys(found)
        negatives = [document for document in dict.fromkeys(others) if document not in positives]
        report.rows += 1
        report.negatives += len(negatives)
        yield Example(query, tuple(texts.read(positives)), tuple(texts.read(negatives)))
    if unused:
        raise DataError(
            path.parent,
            None,
            f"{unused:,} rows of the labels or mined documents name queries that are not in "
            "queries.parquet; drop them",
        )


def _add_id(rows: dict[int, int], value: object, name: str, path: Path, row: int) -> int:
    """Add the row of an id and return its key; raise for a repeated one."""
    key = _key(value, path, row)
    first = rows.setdefault(key, len(rows))
    if first != row - 1:
        raise DataError(
            path, row, f'"{name}" repeats the id of row {first + 1}; give each row a unique id'
        )
    return key


def _pair(
    pair: Sequence[object], documents: Mapping[int, int], path: Path, row: int
) -> tuple[int, int]:
    """Return the key of the query and the row of the document."""
    query, document = pair
    found = documents.get(_key(document, path, row))
    if found is None:
        raise DataError(
            path,
            row,
            f'"{DOCUMENT_ID}" {shown(document)} is not in documents.parquet; add it or drop '
            "this row",
        )
    return _key(query, path, row), found


def _rows(path: Path, names: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the number of each row, from 1, and its values."""
    with readable(path), open_parquet(path) as file:
        there = file.schema_arrow.names
        for name in names:
            if name not in there:
                listed = ", ".join(f'"{each}"' for each in there)
                raise DataError(path, None, f'has no column "{name}"; rename one of {listed} to it')
        row = 0
        for part in parquet_parts(path, file, names):
            for values in part.to_pylist():
                row += 1
                yield row, tuple(values[name] for name in names)


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


def _is_older(folder: Path) -> bool:
    """Whether a folder without a marker holds all four tables, and with these columns only."""
    paths = {folder / f"{name}.parquet": schema for name, schema in _SCHEMAS.items()}
    if not holds_only(folder, TABLES.own):
        return False
    with suppress(DataError, OSError, pa.ArrowException):
        for path, schema in paths.items():
            with readable(path), open_parquet(path) as file:
                if not file.schema_arrow.equals(schema):
                    return False
        return True
    return False


TABLES: Final = FolderKind(
    "a folder of tables",
    is_data=True,
    own=tuple(f"{name}.parquet" for name in _SCHEMAS),
    is_older=_is_older,
)


def write_tables(folder: Path, examples: Iterable[Example]) -> TablesReport:
    """Write rows as four tables, ``mined.parquet`` among them; equal texts share an id.

    Raises:
        RecipeError: if the folder holds other things.
        StorageError: if the disk refuses; an earlier folder is still there then.
    """
    check_output(folder, kind=TABLES)
    report = TablesReport()
    waiting = iter(examples)
    ids: dict[str, dict[int, int]] = {QUERY_ID: {}, DOCUMENT_ID: {}}
    with replacing_folder(folder) as fresh, ExitStack() as stack:
        tables = {
            name: stack.enter_context(pq.ParquetWriter(fresh / f"{name}.parquet", schema))
            for name, schema in _SCHEMAS.items()
        }
        mark(fresh, TABLES)
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
    report.rows += len(examples)
    for example in examples:
        query = id_of(QUERY_ID, example.query)
        pairs += [(query, id_of(DOCUMENT_ID, text), 1) for text in example.positives]
        pairs += [(query, id_of(DOCUMENT_ID, text), -1) for text in example.negatives]
        report.negatives += len(example.negatives)
    return {
        "queries": new[QUERY_ID],
        "documents": new[DOCUMENT_ID],
        "labels": [pair[:2] for pair in pairs if pair[2] > 0],
        "mined": pairs,
    }
