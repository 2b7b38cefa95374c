import gzip
import json
import os
import pickle
import tracemalloc
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.data.files import readers, scan, sources
from tercet.data.files.examples import ExampleFields
from tercet.data.files.readers import ParquetReader, row_group_cache
from tercet.data.files.sources import iter_examples, open_source, write_examples
from tercet.data.files.texts import open_texts
from tercet.errors import DataError, StorageError
from tercet.files import parquet, records
from tercet.types import Example, InBatch

GOOD = '{"query": "q", "positives": ["p"]}\n'
FORMATS = ("jsonl", "parquet")

few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Characters that UTF-8 can carry: all but halves of surrogate pairs.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def fields_of_valid_examples(draw):
    positives = draw(st.lists(texts, min_size=1, max_size=3).map(tuple))
    negatives = draw(st.lists(texts, max_size=3).map(tuple))

    def scores(count):
        return draw(st.none() | st.lists(numbers, min_size=count, max_size=count).map(tuple))

    return dict(
        query=draw(texts),
        positives=positives,
        negatives=negatives,
        positive_scores=scores(len(positives)),
        negative_scores=scores(len(negatives)),
        query_prompt=draw(st.none() | st.just("") | texts),
        document_prompt=draw(st.none() | texts),
        task=draw(texts),
        in_batch=draw(st.sampled_from([None, *get_args(InBatch)])),
        lang=draw(st.sampled_from(["", "de"])),
    )


def numbered(count):
    return [
        Example(f"query {i}", (f"answer {i} " + "x" * (i % 7),), task="t") for i in range(count)
    ]


def error_of(path):
    with pytest.raises(DataError) as caught:
        open_source(path)
    with pytest.raises(DataError) as streamed:
        list(iter_examples(path))
    assert str(caught.value) == str(streamed.value)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@few
@given(fields=st.lists(fields_of_valid_examples(), min_size=1, max_size=4))
@pytest.mark.parametrize("suffix", FORMATS)
def test_examples_read_back_as_they_were_written(tmp_path, suffix, fields):
    written = [Example(**some) for some in fields]
    path = tmp_path / f"nq.{suffix}"
    write_examples(path, written)
    assert list(iter_examples(path)) == written
    backwards = list(reversed(range(len(written))))
    assert open_source(path).examples(backwards) == written[::-1]


@few
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_any_bytes_opens_or_is_a_data_error(tmp_path, suffix, content):
    path = tmp_path / f"nq.{suffix}"
    path.write_bytes(content)
    try:
        open_source(path)
    except DataError:
        pass


@few
@given(data=st.data())
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_damaged_file_opens_or_is_a_data_error(tmp_path, suffix, data):
    path = tmp_path / f"nq.{suffix}"
    write_examples(path, numbered(5))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))] or content))
    try:
        source = open_source(path)
        source.examples([len(source) - 1, 0])
    except DataError:
        pass


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_source_knows_sizes_and_gives_rows_in_the_order_asked(tmp_path, suffix):
    path = tmp_path / f"nq.{suffix}"
    written = [
        Example("qq", ("p",), ("nnn", "n"), task="t"),
        Example("é" * 3, ("p",), task="t"),
        Example("q", ("four",), task="t", query_prompt="a long prompt"),
    ]
    write_examples(path, written)
    source = open_source(path, weight=0.5)
    assert (source.name, source.weight, len(source)) == ("nq", 0.5, 3)
    assert source.sizes.tolist() == [3, 6, 4]
    assert source.sizes.dtype == np.int32
    assert source.blocks.dtype == np.int64
    assert source.examples([2, 0, 2]) == [written[2], written[0], written[2]]
    assert source.examples([]) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_task_of_an_example_is_its_own_or_the_sources_name(tmp_path, suffix):
    path = tmp_path / f"nq.{suffix}"
    write_examples(path, [Example("q", ("p",)), Example("q", ("p",), task="own")])
    assert [example.task for example in iter_examples(path)] == ["nq", "own"]
    assert [example.task for example in iter_examples(path, "given")] == ["given", "own"]
    named = open_source(path, name="given")
    assert [example.task for example in named.examples([0, 1])] == ["given", "own"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_fingerprint_follows_the_content_and_nothing_else(tmp_path, suffix):
    path, copy = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    write_examples(path, numbered(3))
    write_examples(copy, numbered(3))
    before = open_source(path).fingerprint
    assert open_source(copy).fingerprint == before
    write_examples(path, [*numbered(2), Example("query 2", ("another",), task="t")])
    assert open_source(path).fingerprint != before


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "csv.gz"])
def test_fields_that_a_user_names_change_the_fingerprint_and_the_usual_ones_do_not(
    tmp_path, suffix
):
    path = tmp_path / f"a.{suffix}"
    record = {"query": "q", "positives": "p", "title": "t", "text": "x"}
    lines = {"jsonl": [json.dumps(record)], "csv": [",".join(record), ",".join(record.values())]}
    write = gzip.open if suffix.endswith("gz") else open
    with write(path, "wt") as file:
        file.write("\n".join(lines[suffix.partition(".")[0]]) + "\n")
    usual, texts = open_source(path).fingerprint, open_texts(path).fingerprint
    assert usual == texts == open_texts(path, field="text", blank_lines=True).fingerprint
    named = ExampleFields(query="title")
    others = [open_texts(path, field="title"), open_source(path, fields=named)]
    assert len({usual, *(each.fingerprint for each in others)}) == 3
    assert open_source(path, fields=ExampleFields()).fingerprint == usual
    again = open_texts(path, field="title")
    assert again.fingerprint == others[0].fingerprint


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_no_content(tmp_path):
    plain, odd = tmp_path / "plain.jsonl", tmp_path / "odd.jsonl"
    lines = ['{"query": "q1", "positives": ["p"]}', '{"query": "q2", "positives": ["p"]}']
    plain.write_text("\n".join(lines))
    odd.write_bytes(b"\xef\xbb\xbf\r\n \n" + "\r\n\r\n".join(lines).encode() + b"\r\n\n")
    source = open_source(odd, name="n")
    assert source.examples([1, 0]) == open_source(plain, name="n").examples([1, 0])
    assert source.fingerprint == open_source(plain).fingerprint


def test_a_byte_order_mark_right_before_the_first_example_is_no_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert open_source(path).examples([0])[0].query == "q"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", ":3: not JSON: "),
        (b"[]", ":3: expected an object with named fields, {...}, got list"),
        (b'{"query": " ", "positives": ["p"]}', ':3: "query" holds a blank text'),
        (b'{"query": "q"}', ':3: "positives" is missing or empty; a query needs'),
        (b'{"query": 1, "positives": ["p"]}', ':3: "query" must be a text, got 1'),
        (b'{"query": "\xff"}', ":3: invalid UTF-8 at byte 47 of the file (0xff); save the file as"),
        (b"[" * 100_000, ":3: JSON is nested too deeply"),
        (b"1" * 5000, ":3: "),
    ],
)
def test_a_message_says_file_line_and_problem(tmp_path, line, problem):
    path = tmp_path / "nq.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    assert len(GOOD) == 35
    assert error_of(path).startswith(problem)


def test_the_byte_of_invalid_utf8_counts_a_byte_order_mark(tmp_path):
    path = tmp_path / "nq.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'"\xc3("\n')
    assert ":1: invalid UTF-8 at byte 4 of the file (0xc3)" in error_of(path)


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_records_is_refused(tmp_path, content):
    path = tmp_path / "nq.jsonl"
    path.write_bytes(content)
    assert error_of(path) == ": holds no records; write one JSON object per line"


def test_a_file_without_line_ends_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 50)
    path = tmp_path / "nq.jsonl"
    path.write_text(GOOD + "[" + GOOD.strip() * 10)
    assert error_of(path).startswith(":2: is longer than 50 bytes; end the line of each record")


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    assert error_of(tmp_path / "absent.jsonl") == ": no such file"
    assert error_of(tmp_path / "absent.parquet") == ": no such file"
    (tmp_path / "folder.jsonl").mkdir()
    assert error_of(tmp_path / "folder.jsonl") == ": is a folder; give one of its files"
    (tmp_path / "a.doc").write_text("query,positive\n")
    assert error_of(tmp_path / "a.doc") == (
        ': unknown kind of file ".doc"; use .jsonl, .csv, .tsv or .parquet'
    )


def test_parquet_without_the_columns_is_refused_with_the_columns_it_has(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"ask": ["q"], "pos": [["p"]]}), path)
    assert error_of(path) == (
        ': has no column "query"; rename one of its columns to it, or name it with --query-field: '
        '"ask", "pos"'
    )
    pq.write_table(pa.table({"query": ["q"], "reply": ["p"]}), path)
    assert error_of(path).startswith(': has no column "positives"; rename one of its columns')


def test_parquet_of_another_writer_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table(
        {
            "query": pa.array(["a", "b"], pa.large_string()),
            "pos": pa.array([["p"], ["q", "r"]], pa.large_list(pa.large_string())),
            "neg_scores": pa.array([None, []], pa.list_(pa.float32())),
            "position": [1, 2],
            "task": pa.array(["t", "t"]).dictionary_encode(),
        }
    )
    pq.write_table(table, path)
    expected = [
        Example("a", ("p",), task="t"),
        Example("b", ("q", "r"), negative_scores=(), task="t"),
    ]
    assert list(iter_examples(path)) == expected
    assert open_source(path).examples([1, 0]) == expected[::-1]


def test_an_error_in_parquet_names_the_row_counted_from_1(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"query": ["q", "q", "q"], "positives": [["p"], ["p"], []]})
    pq.write_table(table, path, row_group_size=2)
    assert error_of(path).startswith(':3: "positives" is missing or empty')
    pq.write_table(pa.table({"query": [1], "positives": [["p"]]}), path)
    assert error_of(path) == ':1: "query" must be a text, got 1'
    pq.write_table(pa.table({"query": pa.array([], pa.string()), "positives": []}), path)
    assert error_of(path).startswith(": holds no records")


def test_parquet_with_a_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    bad = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"query": bad, "positives": [["p"]]}), path)
    assert error_of(path).startswith(": cannot be read: ")


def cached_groups(path):
    return {key[-1] for key in row_group_cache._tables if key[0] == path}


def test_the_blocks_of_parquet_are_its_row_groups_and_few_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    monkeypatch.setattr(sources, "ROWS_PER_GROUP", 4)
    write_examples(path, numbered(10))
    source = open_source(path)
    assert source.blocks.tolist() == [0, 4, 8]
    order = [9, 0, 5, 4, 3, 8]
    assert source.examples(order) == [numbered(10)[row] for row in order]
    assert isinstance(source.reader, ParquetReader)
    assert cached_groups(path) == {0, 1, 2}
    monkeypatch.setattr(row_group_cache, "_kept_bytes", 1)
    source.examples([5, 0])
    assert cached_groups(path) == {0, 1}


def test_two_windows_of_the_shuffle_fit_in_the_memory_for_row_groups(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    monkeypatch.setattr(sources, "ROWS_PER_GROUP", 4)
    write_examples(path, numbered(12))
    metadata = pq.read_metadata(path)
    largest = max(metadata.row_group(group).total_byte_size for group in range(3))
    windows = []
    for cached in (1, 6 * largest, 1 << 28):
        monkeypatch.setattr(readers, "CACHED_BYTES", cached)
        windows.append(open_source(path).window)
    assert windows == [1, 3, 8]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_source_can_be_pickled_and_read_elsewhere(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_examples(path, numbered(5))
    source = open_source(path)
    source.examples([1])
    assert pickle.loads(pickle.dumps(source)).examples([3, 1]) == source.examples([3, 1])


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_changed_after_it_was_opened_is_not_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_examples(path, numbered(5))
    source = open_source(path)
    write_examples(path, numbered(6))
    with pytest.raises(DataError, match="has changed since it was opened"):
        source.examples([0])
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        source.examples([0])


def test_a_change_that_keeps_size_and_time_is_found_at_the_line_it_breaks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 2)
    source = open_source(path)
    status = path.stat()
    path.write_text(GOOD + GOOD.replace("{", "x"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.examples([0])[0].query == "q"
    with pytest.raises(DataError, match="has changed since it was opened"):
        source.examples([1])


def test_a_file_that_changes_while_it_is_opened_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 2000)

    def interfere(done):
        with path.open("a") as file:
            file.write(GOOD)

    with pytest.raises(DataError, match="has changed since it was opened"):
        open_source(path, progress=interfere)


@pytest.mark.parametrize("suffix", FORMATS)
def test_progress_rises_to_one(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(scan, "ROWS_PER_REPORT", 10)
    path = tmp_path / f"a.{suffix}"
    write_examples(path, numbered(25))
    reported = []
    open_source(path, progress=reported.append)
    assert reported == pytest.approx([0.36, 0.76, 1.0], abs=0.04)


@pytest.mark.parametrize("suffix", FORMATS)
def test_opening_and_reading_never_hold_the_whole_file(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(sources, "ROWS_PER_GROUP", 16)
    path = tmp_path / f"a.{suffix}"
    filler = np.random.default_rng(0).bytes(8000).hex()
    write_examples(path, (Example(f"q {i} {filler}", ("p",), task="t") for i in range(500)))
    monkeypatch.setattr(scan, "ROWS_PER_REPORT", 1)
    outside_python = []
    open_source(path).examples([0])  # what pyarrow imports at the first read is not counted
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    source = open_source(path, progress=lambda _: outside_python.append(pa.total_allocated_bytes()))
    source.examples([0, 499])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # of 8 MB
    assert max(outside_python) - before < 2e6


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_cannot_be_finished_leaves_the_old_one_alone(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_examples(path, numbered(2))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r':3: cannot be written: "query" holds a blank text'):
        write_examples(path, [*numbered(2), Example(" ", ("p",))])

    def interrupted():
        yield from numbered(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_examples(path, interrupted())

    def disk_full():
        yield from numbered(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"could not be written: No space left on device"):
        write_examples(path, disk_full())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_reader_of_a_file_that_is_replaced_continues_with_the_old_one(tmp_path):
    path = tmp_path / "a.jsonl"
    write_examples(path, numbered(2))
    before = path.read_bytes()
    with path.open("rb") as reader:
        write_examples(path, numbered(9))
        assert reader.read() == before


def test_a_missing_folder_is_made_and_an_unknown_format_is_refused(tmp_path):
    write_examples(tmp_path / "absent" / "a.jsonl", numbered(1))
    assert list(iter_examples(tmp_path / "absent" / "a.jsonl")) == numbered(1)
    with pytest.raises(DataError, match="unknown kind of file"):
        write_examples(tmp_path / "a.csv", numbered(1))


def test_jsonl_is_written_as_readable_text(tmp_path):
    path = tmp_path / "a.jsonl"
    write_examples(path, [Example("søk", ("p\u2028",), task="t")])
    assert path.read_bytes().count(b"\n") == 1
    assert "søk" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_bytes()) == {"query": "søk", "positives": ["p\u2028"], "task": "t"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_fields_that_are_not_read_are_reported_once_with_the_nearest_known_one(
    tmp_path, caplog, suffix
):
    path = tmp_path / f"nq{suffix}"
    rows = [{"query": "q", "positives": ["p"], "negatvies": ["n"], "number": 3, "rank": [1]}] * 3
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    open_source(path)
    open_source(path)
    assert [record.getMessage() for record in caplog.records] == [
        f'{path}: 3 records have a field "negatvies", which is ignored; did you mean "negatives"?',
        f'{path}: fields that are not read: "number"',
    ]
