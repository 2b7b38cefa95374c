import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.curate.convert import arctic as tables
from tercet.curate.convert.arctic import (
    TablesReport,
    examples_of_tables,
    write_tables,
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
    # A document that answers the query is not its negative.
    assert read(folder, mined=folder / "mined.parquet")[0] == Example("one", ("a",), ("b",))


@pytest.mark.parametrize(
    ("name", "table", "said"),
    [
        (
            "labels",
            {"QUERY_ID": ["x"]},
            r'labels.parquet: has no column "DOCUMENT_ID"; rename one of',
        ),
        (
            "labels",
            {"QUERY_ID": ["x", "x"], "DOCUMENT_ID": ["1", "9"]},
            r"labels.parquet:2: \"DOCUMENT_ID\" '9' is not in documents.parquet; add it or drop",
        ),
        (
            "labels",
            {"QUERY_ID": ["x", "q"], "DOCUMENT_ID": ["1", "1"]},
            r"1 rows of the labels or mined documents name queries that are not in queries",
        ),
        (
            "documents",
            {"DOCUMENT_ID": ["1", "2", "1"], "DOCUMENT_TEXT": ["a", "b", "c"]},
            r'documents.parquet:3: "DOCUMENT_ID" repeats the id of row 1; give each',
        ),
        ("queries", {"QUERY_ID": ["x"], "QUERY_TEXT": [" "]}, r"queries.parquet:1: .* blank text"),
        (
            "queries",
            {"QUERY_ID": [0.5], "QUERY_TEXT": ["a"]},
            r"queries.parquet:1: an id must be a number from 0 or a string; got 0.5",
        ),
    ],
)
def test_tables_that_do_not_fit_together_are_refused(folder, name, table, said):
    write(folder, **{name: table})
    with pytest.raises(DataError, match=said):
        read(folder)
