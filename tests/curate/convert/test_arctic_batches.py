import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.curate.convert import arctic as tables
from tercet.curate.convert.arctic import (
    TablesReport,
    examples_of_batch,
    examples_of_tables,
    token_batches,
    write_tables,
)
from tercet.curate.convert.arctic_batches import (
    BatchMetadata,
    batch_folders,
    read_batch,
    read_metadata,
    write_batches,
)
from tercet.errors import DataError
from tercet.types import Example

ROWS = [
    Example("first", ("a", "b"), ("c", "d")),
    Example("second", ("c",)),
    Example("third", ("a",), ("e",)),
]


def read(folder, report=None, **how):
    return list(examples_of_tables(folder, report or TablesReport(), work=folder / "work", **how))


def write(folder, **columns):
    for name, table in columns.items():
        pq.write_table(pa.table(table), folder / f"{name}.parquet")


@pytest.fixture
def folder(tmp_path):
    write(
        tmp_path,
        queries={"QUERY_ID": ["x", "y", "z"], "QUERY_TEXT": ["one", "two", "three"]},
        documents={"DOCUMENT_ID": ["3", "1", "2"], "DOCUMENT_TEXT": ["c", "a", "b"]},
        labels={"QUERY_ID": ["y", "x", "y"], "DOCUMENT_ID": ["2", "1", "3"]},
    )
    return tmp_path


@pytest.mark.parametrize("size", [1, 2, 4096])
def test_rows_written_as_tables_read_back_as_the_same_rows(tmp_path, monkeypatch, size):
    monkeypatch.setattr(tables, "ROWS", size)
    report = write_tables(tmp_path / "t", ROWS)
    assert (report.queries, report.rows, report.negatives) == (3, 3, 3)
    assert read(tmp_path / "t", mined=tmp_path / "t/mined.parquet") == ROWS
    assert [example.negatives for example in read(tmp_path / "t")] == [(), (), ()]
    schema = {name: pq.read_schema(tmp_path / f"t/{name}.parquet") for name in ("labels", "mined")}
    assert schema["labels"].names == ["QUERY_ID", "DOCUMENT_ID"]
    assert schema["mined"].names == ["QUERY_ID", "DOCUMENT_ID", "RELEVANCE"]
    texts = pq.read_table(tmp_path / "t/documents.parquet")["DOCUMENT_TEXT"].to_pylist()
    assert texts == ["a", "b", "c", "d", "e"]  # an equal text is one document


def test_ids_may_be_texts_and_a_query_without_a_label_gives_no_row(folder):
    report = TablesReport()
    assert read(folder, report) == [Example("one", ("a",)), Example("two", ("b", "c"))]
    assert (report.queries, report.rows, report.unanswered) == (3, 2, 1)
    write(
        folder,
        mined={
            "QUERY_ID": ["x", "x", "z"],
            "DOCUMENT_ID": ["2", "1", "1"],
            "RELEVANCE": [-1, -1, 0],
        },
    )
    # A document that answers the query is no negative of it.
    assert read(folder, mined=folder / "mined.parquet")[0] == Example("one", ("a",), ("b",))


@pytest.mark.parametrize(
    ("name", "table", "said"),
    [
        ("labels", {"QUERY_ID": ["x"]}, r'labels.parquet: has no column "DOCUMENT_ID"; rename one'),
        (
            "labels",
            {"QUERY_ID": ["x", "x"], "DOCUMENT_ID": ["1", "9"]},
            r"labels.parquet:2: \"DOCUMENT_ID\" '9' is not in documents.parquet; add it or drop",
        ),
        (
            "labels",
            {"QUERY_ID": ["x", "q"], "DOCUMENT_ID": ["1", "1"]},
            r"labels.parquet: 1 rows are of queries that are not in queries.parquet; drop them",
        ),
        (
            "documents",
            {"DOCUMENT_ID": ["1", "2", "1"], "DOCUMENT_TEXT": ["a", "b", "c"]},
            r'documents.parquet:3: "DOCUMENT_ID" is that of row 1 already; give each row an id',
        ),
        ("queries", {"QUERY_ID": ["x"], "QUERY_TEXT": [" "]}, r"queries.parquet:1: .* blank text"),
        ("queries", {"QUERY_ID": [0.5], "QUERY_TEXT": ["a"]}, r"queries.parquet:1: an id is 0.5"),
    ],
)
def test_tables_that_do_not_fit_together_are_refused(folder, name, table, said):
    write(folder, **{name: table})
    with pytest.raises(DataError, match=said):
        read(folder)


def by_letters(texts, role):
    return [np.array([*map(ord, text)]) for text in texts]


def as_letters(ids, role):
    return "".join(map(chr, ids))


def test_rows_written_as_batches_read_back_as_the_same_rows(tmp_path):
    metadata = BatchMetadata(tokenizer_huggingface_id="m", batch_size=2, max_seq_length=8)
    assert write_batches(tmp_path, token_batches(ROWS, by_letters, 2), metadata) == 2
    assert read_metadata(tmp_path) == metadata and read_metadata(tmp_path / "data") == metadata
    folders = batch_folders(tmp_path)
    assert [folder.name for folder in folders] == ["batch_00000000", "batch_00000001"]
    batches = [read_batch(folder) for folder in folders]
    assert [row for batch in batches for row in examples_of_batch(batch, as_letters)] == ROWS
    assert len(batches[0].documents) == 4  # "c" is there once
    with pytest.raises(DataError, match="batch_00000001: is of an earlier export; delete it"):
        write_batches(tmp_path, token_batches(ROWS, by_letters, 3), metadata)


def test_a_batch_that_does_not_fit_together_is_refused(tmp_path):
    metadata = BatchMetadata(tokenizer_huggingface_id="m", batch_size=2, max_seq_length=8)
    write_batches(tmp_path, token_batches(ROWS, by_letters, 3), metadata)
    (folder,) = batch_folders(tmp_path)
    relations = {"BATCH_QUERY_ID": [0, 0], "BATCH_DOCUMENT_ID": [0, 99], "RELEVANCE": [1.0, 1.0]}
    write(folder, relations=relations)
    said = r"relations.parquet:2: BATCH_DOCUMENT_ID 99 is not in documents.parquet; add it or drop"
    with pytest.raises(DataError, match=said):
        read_batch(folder)
    write(folder, relations={"BATCH_QUERY_ID": [0]})
    with pytest.raises(DataError, match=r'has no column "BATCH_DOCUMENT_ID"; rename one to it'):
        read_batch(folder)
    (folder / "relations.parquet").unlink()
    with pytest.raises(DataError, match=r"relations.parquet: no such file; a batch has three"):
        read_batch(folder)
    (tmp_path / "metadata.json").write_text(json.dumps({"batch_size": 1}))
    with pytest.raises(DataError, match="has no 'tokenizer_huggingface_id'; add it"):
        read_metadata(tmp_path)
    with pytest.raises(DataError, match=r"holds no data/batch_...; give the folder above data"):
        batch_folders(folder)
