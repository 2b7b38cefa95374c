import pytest

from tercet.curate.convert.arctic_batches import batch_folders, read_batch
from tercet.data.files.sources import iter_examples, write_examples
from tercet.types import Example
from tests.cli.lines import cells

ROWS = [
    Example("play music", ("a player of music",), ("read mail", "a map"), task="rows"),
    Example("maps", ("a map", "make maps"), task="rows"),
    Example("mail", ("read mail",), ("make maps",), task="rows"),
]


@pytest.fixture
def rows(tmp_path):
    write_examples(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


def test_rows_go_to_tables_and_back(tercet, refused, rows, tmp_path):
    tables, back = tmp_path / "tables", tmp_path / "back" / "rows.jsonl"
    ended = tercet("convert", "to-arctic", rows, "--out", tables)
    assert ended.status == 0 and ["3", "3", "0", "3"] in map(cells, ended.out.splitlines())
    work = ("--work", tmp_path / "work")
    mined = ("--mined", tables / "mined.parquet")
    assert tercet("convert", "arctic", tables, *mined, "--out", back, *work).status == 0
    assert list(iter_examples(back)) == ROWS
    assert "is read, or a file; give another" in refused("convert", "to-arctic", rows, "--out", tmp_path)  # noqa: E501  # fmt: skip
    (tables / "labels.parquet").unlink()
    said = refused("convert", "arctic", tables, "--out", tmp_path / "none.jsonl", *work)
    assert said == f"{tables}/labels.parquet: no such file"
    assert not (tmp_path / "none.jsonl").exists()


def test_rows_go_to_batches_of_tokens_and_back(tercet, rows, encoder_folder, tmp_path):
    batches, smaller, back = tmp_path / "batches", tmp_path / "smaller", tmp_path / "rows2.jsonl"
    model = ("--model", encoder_folder)
    command = ("convert", "to-arctic-batches", rows, *model, "--out", batches, "--batch-size", 2)
    assert tercet(*command).status == 0
    assert len(batch_folders(batches)) == 2
    assert tercet("convert", "arctic-split", batches, "--out", smaller).status == 0
    found = [read_batch(folder) for folder in batch_folders(smaller)]
    assert [(len(batch.queries), batch.positives) for batch in found] == [(1, 1), (1, 2), (1, 1)]
    for folder in (batches, smaller):
        assert tercet("convert", "arctic-batches", folder, *model, "--out", back).status == 0
        read = list(iter_examples(back))
        assert [len(example.positives) for example in read] == [1, 2, 1]
        assert [len(example.negatives) for example in read] == [2, 0, 1]
        assert read[1].positives[0] == read[0].negatives[1] != ""
