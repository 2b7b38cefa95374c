import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from examples import similarity_sets
from examples.similarity_sets import debtags_similarity, lee_similarity
from tercet.errors import DataError

PACKAGES = Path(__file__).parents[2] / "examples/data/packages.en.parquet"


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def package(short, *tags, split="test"):
    return {"short": short, "tags": list(tags), "split": split}


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
    (folder / similarity_sets._LEE_TEXTS).write_text(texts, encoding="latin-1")
    (folder / similarity_sets._LEE_SCORES).write_text(scores)
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
    monkeypatch.setattr(similarity_sets.importlib.util, "find_spec", lambda name: None)
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
