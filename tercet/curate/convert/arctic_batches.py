"""Batches as Arctic-Embed's training code stores them: token ids, and which documents match.

A folder ``root/data/batch_00000000`` a batch, with three parquet files; ``root/metadata.json`` says
which tokenizer and prefixes made the tokens, which hold these prefixes. That binds data to one
model and one order, so it is for exchange; tercet trains on texts.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.errors import DataError
from tercet.files.atomic import replacing_file, replacing_folder

QUERY_ID: Final = "BATCH_QUERY_ID"
DOCUMENT_ID: Final = "BATCH_DOCUMENT_ID"
QUERY_TOKENS: Final = "QUERY_TOKEN_ID_LIST"
DOCUMENT_TOKENS: Final = "DOCUMENT_TOKEN_ID_LIST"
RELEVANCE: Final = "RELEVANCE"

_TOKENS: Final = pa.large_list(pa.uint32())  # 16 bits end at 65,535, and vocabularies have 250,000
QUERIES: Final = pa.schema({QUERY_ID: pa.uint64(), QUERY_TOKENS: _TOKENS})
DOCUMENTS: Final = pa.schema({DOCUMENT_ID: pa.uint64(), DOCUMENT_TOKENS: _TOKENS})
RELATIONS: Final = pa.schema(
    {QUERY_ID: pa.uint64(), DOCUMENT_ID: pa.uint64(), RELEVANCE: pa.int8()}
)
_NAME: Final = re.compile(r"batch_\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetadata:
    """What made the tokens; the names are those of the file."""

    tokenizer_huggingface_id: str
    batch_size: int
    max_seq_length: int
    query_prefix: str = ""
    document_prefix: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """One batch: tables of queries, documents, and of the pairs that are related at all."""

    queries: pa.Table
    documents: pa.Table
    relations: pa.Table  # relevance 1 for a positive, -1 for a negative

    @property
    def positives(self) -> int:
        """Pairs of a query and a document that answers it."""
        return int((self.relations[RELEVANCE].to_numpy() > 0).sum())

    def split(self, parts: int) -> "list[TokenBatch]":
        """Some smaller batches, by queries: each has the documents that its queries relate to.

        Every pair is in the part of its query, so no positive is lost; a document of queries of
        two parts is in both. Documents without a pair, which are negatives of all, are dealt out.
        """
        assert parts >= 1
        query_ids, document_ids = (
            _numbers(self.queries, QUERY_ID),
            _numbers(self.documents, DOCUMENT_ID),
        )
        pair_queries = _numbers(self.relations, QUERY_ID)
        pair_documents = _numbers(self.relations, DOCUMENT_ID)
        free = np.flatnonzero(~np.isin(document_ids, pair_documents))
        found: list[TokenBatch] = []
        for part, rows in enumerate(np.array_split(np.arange(len(query_ids)), parts)):
            pairs = np.isin(pair_queries, query_ids[rows])
            with_pair = np.flatnonzero(np.isin(document_ids, pair_documents[pairs]))
            documents = np.sort(np.concatenate([with_pair, free[part::parts]]))
            found.append(
                TokenBatch(
                    self.queries.take(pa.array(rows)),
                    self.documents.take(pa.array(documents)),
                    self.relations.filter(pa.array(pairs)),
                )
            )
        return [batch for batch in found if len(batch.queries)]


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


# ---- read ----------------------------------------------------------------------------------------


def batch_folders(root: Path) -> list[Path]:
    """The folders of batches below ``root/data``, in order.

    Raises:
        DataError: when there are none.
    """
    found = sorted(path for path in (root / "data").glob("batch_*") if _NAME.fullmatch(path.name))
    if not found:
        raise DataError(root, None, "holds no data/batch_...; give the folder above data")
    return found


def read_metadata(root: Path) -> BatchMetadata:
    """What made the tokens, from ``metadata.json`` in the folder or in the one above it.

    Raises:
        DataError: when neither is there, or it lacks a name.
    """
    places = (root / "metadata.json", root.parent / "metadata.json")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(places[0], None, "no such file, nor one above; it names the tokenizer")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return BatchMetadata(
            tokenizer_huggingface_id=str(record["tokenizer_huggingface_id"]),
            batch_size=int(record["batch_size"]),
            max_seq_length=int(record["max_seq_length"]),
            query_prefix=str(record.get("query_prefix", "")),
            document_prefix=str(record.get("document_prefix", "")),
        )
    except KeyError as error:
        raise DataError(path, None, f"has no {error.args[0]!r}; add it") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(path, None, f"cannot be read: {error}") from error


def read_batch(folder: Path) -> TokenBatch:
    """One batch; ids and tokens of any width become 64 and 32 bits.

    Raises:
        DataError: for a missing file or column, an id that is there twice, or a relation to one
            that is not there.
    """
    queries = _table(folder / "queries.parquet", QUERIES)
    documents = _table(folder / "documents.parquet", DOCUMENTS)
    relations = _table(folder / "relations.parquet", RELATIONS)
    for name, table in ((QUERY_ID, queries), (DOCUMENT_ID, documents)):
        ids, counts = np.unique(_numbers(table, name), return_counts=True)
        place = folder / ("queries.parquet" if name == QUERY_ID else "documents.parquet")
        if (counts > 1).any():
            twice = ids[counts.argmax()]
            raise DataError(place, None, f"{name} {twice} is there twice; give each its own")
        wanted = _numbers(relations, name)
        if (lost := ~np.isin(wanted, ids)).any():
            row = int(lost.argmax())
            raise DataError(
                folder / "relations.parquet",
                row + 1,
                f"{name} {wanted[row]} is not in {place.name}; add it or drop this row",
            )
    return TokenBatch(queries, documents, relations)


def _table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        found = pq.read_table(path, memory_map=False, use_threads=False)
        check_columns(path, found.column_names, schema.names)
        return found.select(schema.names).cast(schema)
    except FileNotFoundError as error:
        raise DataError(path, None, "no such file; a batch has three") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(path, None, f"cannot be read: {error}") from error


def check_columns(path: Path, names: list[str], needed: list[str]) -> None:
    """Refuse a table without a column that it needs.

    Raises:
        DataError: naming the column, and those that are there.
    """
    for name in needed:
        if name not in names:
            there = ", ".join(f'"{each}"' for each in names)
            raise DataError(path, None, f'has no column "{name}"; rename one to it: {there}')


# ---- write ---------------------------------------------------------------------------------------


def write_batches(root: Path, batches: Iterator[TokenBatch], metadata: BatchMetadata) -> int:
    """Write batches as they come, one in memory at a time; how many there were.

    Raises:
        StorageError: when the disk refuses; batches that are there are whole.
        DataError: when the folder holds more batches already, which would be mixed with these.
    """
    count = 0
    for batch in batches:
        write_batch(root / "data" / f"batch_{count:08d}", batch)
        count += 1
    there = [path for path in (root / "data").glob("batch_*") if _NAME.fullmatch(path.name)]
    if left := [path for path in there if int(path.name.removeprefix("batch_")) >= count]:
        raise DataError(left[0], None, "is of an earlier export; delete it, or export elsewhere")
    with replacing_file(root / "metadata.json") as fresh:
        record = {name: getattr(metadata, name) for name in BatchMetadata.__slots__}
        fresh.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return count


def write_batch(folder: Path, batch: TokenBatch) -> None:
    """Write one batch, whole or not at all.

    Raises:
        StorageError: when the disk refuses.
    """
    with replacing_folder(folder) as fresh:
        pq.write_table(batch.queries, fresh / "queries.parquet")
        pq.write_table(batch.documents, fresh / "documents.parquet")
        pq.write_table(batch.relations, fresh / "relations.parquet")
