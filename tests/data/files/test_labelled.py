import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.files.labelled import (
    LabelledText,
    is_labelled_file,
    read_label_texts,
    read_labelled_texts,
)
from tercet.errors import DataError


def write(path, records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_one_label_may_be_a_text_or_a_number(tmp_path, suffix):
    records = [{"text": "a", "label": 3, "split": "train"}, {"text": "b", "label": 0}]
    path = write(tmp_path / f"classes{suffix}", records)
    assert is_labelled_file(path)
    assert list(read_labelled_texts(path)) == [
        LabelledText("a", ("3",), "train"),
        LabelledText("b", ("0",)),
    ]
    named = write(tmp_path / f"names{suffix}", [{"text": "a", "label": "joy"}])
    assert list(read_labelled_texts(named)) == [LabelledText("a", ("joy",))]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_several_labels_are_kept_once_each_and_none_is_no_error(tmp_path, suffix):
    records = [{"text": "a", "labels": ["x", "y", "x"]}, {"text": "b", "labels": []}]
    path = write(tmp_path / f"topics{suffix}", records)
    assert is_labelled_file(path)
    assert [text.labels for text in read_labelled_texts(path)] == [("x", "y"), ()]


def test_true_and_false_are_labels(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": flag} for flag in (True, False)])
    assert [text.labels for text in read_labelled_texts(path)] == [("true",), ("false",)]


def test_fields_are_joined_and_all_but_the_first_may_be_absent(tmp_path):
    records = [
        {"title": "Stars", "abstract": "Of gas.", "topics": ["astro::sun", "role::talk"]},
        {"title": "Stones", "topics": ["role::talk"]},
    ]
    path = write(tmp_path / "a.jsonl", records)
    read = list(
        read_labelled_texts(
            path,
            text_field=("title", "abstract"),
            label_field="topics",
            label_prefix="astro::",
        )
    )
    assert read == [LabelledText("Stars Of gas.", ("sun",)), LabelledText("Stones", ())]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text":\n', r"a.jsonl:2: not JSON"),
        (b"[3]\n", r"a.jsonl:2: expected an object"),
        (b'{"label": "x"}', r'a.jsonl:2: "text" is missing; it holds the text'),
        (b'{"text": " ", "label": "x"}', r'a.jsonl:2: "text" holds a blank text'),
        (b'{"text": 4, "label": "x"}', r'a.jsonl:2: "text" must be a text, got 4'),
        (b'{"text": "b"}', r'a.jsonl:2: "label" is missing; it holds the label, or a list'),
        (b'{"text": "b", "label": " "}', r'a.jsonl:2: "label" holds a blank text'),
        (b'{"text": "b", "labels": ["x", 0.5]}', r'"labels" must hold a text or a whole .* 0\.5'),
        (b'{"text": "b", "label": 1, "labels": [1]}', r'"label" and "labels" are two names'),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "label": "x"}\n' + line)
    with pytest.raises(DataError, match=message):
        list(read_labelled_texts(path))


def test_a_column_that_is_missing_in_parquet_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", [{"text": "a", "section": "x"}])
    with pytest.raises(DataError, match=r'has no column "label"; rename one .*"section"'):
        list(read_labelled_texts(path))
    assert not is_labelled_file(path)


@pytest.mark.parametrize(
    "record",
    [
        {"query": "a", "positives": ["b"]},
        {"text1": "a", "text2": "b", "label": 1},
        {"text": "a"},
    ],
)
def test_other_files_are_not_labelled(tmp_path, record):
    assert not is_labelled_file(write(tmp_path / "a.jsonl", [record]))
    assert not is_labelled_file(tmp_path)


def test_the_words_of_labels_are_one_object(tmp_path):
    path = tmp_path / "words.json"
    path.write_text('{"0": "sadness", "1": "joy"}')
    assert read_label_texts(path) == {"0": "sadness", "1": "joy"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["joy"]', r"words.json: must be one object of labels .* got list"),
        ('{"0": 1}', r'"0" must be a text, got 1'),
        ('{"0": " "}', r'"0" holds a blank text'),
        ("{", r"must be one object of labels"),
    ],
)
def test_a_file_of_words_that_is_none_says_why(tmp_path, content, message):
    path = tmp_path / "words.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_label_texts(path)
