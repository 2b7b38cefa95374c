import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.files import similarity
from tercet.data.files.similarity import (
    SimilaritySet,
    debtags_similarity,
    is_similarity_file,
    lee_similarity,
)
from tercet.errors import DataError

PACKAGES = Path(__file__).parents[3] / "examples/data/packages.en.parquet"
PAIRS = [("a cat", "a dog", 2.5), ("a dog", "a cat", 2), ("a cat", "a cat", 5), ("rain", "sun", 0)]


def write(path, records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def as_records(*names):
    return [dict(zip(names, pair, strict=True)) for pair in PAIRS]


def package(short, *tags, split="test"):
    return {"short": short, "tags": list(tags), "split": split}


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
        (b'{"text1": "a", "text2": "b"}', r':2: "score" is missing; write how alike'),
        (
            b'{"text1": "a", "text2": "b", "label": "1"}',
            r":2: \"label\" must hold numbers, got '1'",
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


@pytest.mark.skipif(find_spec("gensim") is None, reason="gensim is not installed")
def test_lees_texts_give_all_pairs_of_fifty():
    data = lee_similarity()
    assert (len(data.texts), len(data.pairs)) == (50, 1225)
    assert len({tuple(sorted(pair)) for pair in data.pairs.tolist()}) == 1225
    assert data.scores.min() == pytest.approx(0.2)
    assert data.scores.max() == 1
    assert data.unit == "texts"
    assert data.texts[0].startswith("The national executive of the strife-torn Democrats")
    # The matrix begins with 1, 0.3, 0.24: the first text and itself, the second, the third.
    assert data.scores[:2].tolist() == [0.3, 0.24]


def install_lee(folder, monkeypatch, texts, scores):
    (folder / "gensim/test/test_data").mkdir(parents=True)
    (folder / "gensim/__init__.py").write_text("raise ImportError('must not be imported')\n")
    (folder / similarity._LEE_TEXTS).write_text(texts, encoding="latin-1")
    (folder / similarity._LEE_SCORES).write_text(scores)
    monkeypatch.syspath_prepend(folder)


def test_lees_texts_are_read_without_importing_their_package(tmp_path, monkeypatch):
    scores = "1\t.3\t.5\n0\t1\t.7\n0\t0\t1\n"
    install_lee(tmp_path, monkeypatch, "one pound: £1\ntwo\nthree\n", scores)
    data = lee_similarity()
    assert data.texts == ("one pound: £1", "two", "three")
    assert data.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert data.scores.tolist() == [0.3, 0.5, 0.7]


def test_lees_texts_of_another_number_than_their_scores_are_refused(tmp_path, monkeypatch):
    install_lee(tmp_path, monkeypatch, "one\ntwo\n", "1 .3 .5\n0 1 .7\n0 0 1\n")
    with pytest.raises(DataError, match=r"does not fit 2 texts; install .* gensim==4.4.0"):
        lee_similarity()


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(similarity.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"lee.cor: is not here; .*pip install --no-deps gensim=="):
        lee_similarity()


def test_packages_are_as_alike_as_their_tags_on_the_subject(tmp_path):
    rows = [
        package("one", "a::1", "a::2", "a::3", "role::program", "interface::x11"),
        package("two", "a::1", "a::2", "b::1", "b::2", "role::program"),
        package("three", "c::1", "c::2", "c::3", "role::program"),
        package("few", "a::1", "a::2", "role::program", "interface::x11"),
        package("elsewhere", "a::1", "a::2", "a::3", split="train"),
    ]
    data = debtags_similarity(write(tmp_path / "packages.jsonl", rows), pairs=20)
    alike = {
        frozenset(data.texts[i] for i in pair): score
        for pair, score in zip(data.pairs.tolist(), data.scores, strict=True)
    }
    # one and two share a::1 and a::2 of five tags; the others share nothing.
    assert alike == {
        frozenset(("one", "two")): pytest.approx(2 / 5),
        frozenset(("one", "three")): 0,
        frozenset(("two", "three")): 0,
    }


def test_pairs_of_packages_span_the_whole_range_and_no_text_stands_in_many():
    data = debtags_similarity(PACKAGES)
    steps = np.bincount(np.minimum((data.scores * 10).astype(int), 9), minlength=10)
    assert (steps[:6] == 200).all()
    assert (steps >= 50).all()
    assert (steps <= 200).all()
    assert np.bincount(data.pairs.ravel()).max() <= 10
    assert (data.pairs[:, 0] != data.pairs[:, 1]).all()
    assert len({tuple(sorted(pair)) for pair in data.pairs.tolist()}) == len(data.pairs)


def test_the_seed_alone_decides_the_pairs_of_packages(tmp_path):
    rows = [package(f"p{n}", *(f"a::{n * k % 7}" for k in (1, 2, 3))) for n in range(1, 60)]
    path = write(tmp_path / "packages.jsonl", rows)
    one, same, other = (debtags_similarity(path, pairs=50, seed=seed) for seed in (1, 1, 2))
    assert one.texts == same.texts
    assert one.pairs.tolist() == same.pairs.tolist()
    assert one.texts != other.texts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([package("one", "a", "b", "c")], r'has no two packages with 3 tags .* split "test"'),
        (
            [package("one", "a") | {"tags": "a"}],
            r"jsonl:1: \"tags\" must be a list of texts, got 'a'",
        ),
        ([package("one", "a") | {"tags": [3]}], r'jsonl:1: "tags" must be a text, got 3'),
        ([{"tags": []}], r'jsonl:1: "short" must be a text, got None'),
    ],
)
def test_what_is_no_table_of_packages_is_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        debtags_similarity(write(tmp_path / "packages.jsonl", rows))
