import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.files.similarity import SimilaritySet, is_similarity_file
from tercet.errors import DataError

PAIRS = [("a cat", "a dog", 2.5), ("a dog", "a cat", 2), ("a cat", "a cat", 5), ("rain", "sun", 0)]


def write(path, records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def as_records(*names):
    return [dict(zip(names, pair, strict=True)) for pair in PAIRS]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("names", [("text1", "text2"), ("sentence1", "sentence2")])
@pytest.mark.parametrize("score", ["score", "label", "similarity"])
def test_a_file_of_pairs_is_read_by_any_of_its_names_and_equal_texts_are_one(
    tmp_path, suffix, names, score
):
    path = write(tmp_path / f"sts{suffix}", as_records(*names, score))
    assert is_similarity_file(path)
    data = SimilaritySet.from_file(path)
    assert data.name == "sts"
    assert data.texts == ("a cat", "a dog", "rain", "sun")
    assert data.pairs.tolist() == [[0, 1], [1, 0], [0, 0], [2, 3]]
    assert data.scores.tolist() == [2.5, 2, 5, 0]


GOOD = b'{"text1": "a", "text2": "b", "score": 1}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text1":\n', r"sts.jsonl:2: not JSON"),
        (b"[3]\n", r"sts.jsonl:2: expected an object"),
        (b'{"text2": "b", "score": 1}', r'sts.jsonl:2: "text1" is missing; a pair needs "text1", '),
        (b'{"text1": "b", "score": 1}', r'sts.jsonl:2: "text2" is missing; a pair needs "text1", '),
        (b'{"text1": "a", "text2": " ", "score": 1}', r':2: "text2" holds a blank text'),
        (b'{"text1": "a", "sentence2": 3, "score": 1}', r':2: "sentence2" must be a text, got 3'),
        (b'{"text1": "a", "text2": "b"}', r':2: "score" is missing; give the similarity'),
        (
            b'{"text1": "a", "text2": "b", "label": "yes"}',
            r":2: \"label\" must hold numbers, got 'yes'",
        ),
        (b'{"text1": "a", "text2": "b", "score": NaN}', r':2: "score" must hold finite numbers'),
        (b'{"text1": "a", "text2": "b", "score": 1, "label": 2}', r':2: "score" and "label" are'),
        (b'{"text1": "c", "text2": "d", "score": 1.0}', r'sts.jsonl: every "score" is 1; a corre'),
        (b"", r'sts.jsonl: every "score" is 1; a correlation needs scores that differ'),
    ],
)
def test_what_is_wrong_in_a_file_of_pairs_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "sts.jsonl"
    path.write_bytes(GOOD + line)
    with pytest.raises(DataError, match=message):
        SimilaritySet.from_file(path)


def test_a_column_that_is_missing_in_parquet_is_named(tmp_path):
    path = write(tmp_path / "sts.parquet", [{"text1": "a", "text2": "b", "grade": 1}])
    with pytest.raises(DataError, match=r'has no column "score"; rename one .*"grade"'):
        SimilaritySet.from_file(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_of_examples_and_folders_are_no_files_of_pairs(tmp_path, suffix):
    path = write(tmp_path / f"pairs{suffix}", [{"query": "a", "positives": ["b"]}])
    assert not is_similarity_file(path)
    assert not is_similarity_file(tmp_path)


def test_a_first_line_that_is_damaged_is_left_to_the_reader(tmp_path):
    path = tmp_path / "sts.jsonl"
    path.write_text('{"text1":\n')
    assert not is_similarity_file(path)
    with pytest.raises(DataError, match="no such file"):
        is_similarity_file(tmp_path / "none.jsonl")


def test_texts_are_drawn_where_there_are_more_pairs_than_texts():
    assert SimilaritySet.of("s", [("a", "b", 1), ("b", "c", 2), ("c", "a", 3)]).unit == "pairs"
    dense = [("a", "b", 1), ("b", "c", 2), ("c", "a", 3), ("b", "a", 4)]
    data = SimilaritySet.of("s", dense)
    assert data.unit == "texts"
    assert (data.count("texts"), data.count("pairs")) == (3, 4)
