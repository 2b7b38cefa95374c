from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples.restoration import restoration, write_restoration
from tercet.data.files.conll import UNLABELLED, read_labelled

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"


def test_words_lose_what_their_labels_say():
    assert restoration('The "GNU editor" (nano), for C: easy; why not? Yes!') == [
        ("the", "Aa", "O"),
        ("gnu", "AA", "O"),
        ("editor", "aa", "O"),
        ("nano", "aa", ","),
        ("for", "aa", "O"),
        ("c", "Aa", ","),
        ("easy", "aa", ","),
        ("why", "aa", "O"),
        ("not", "aa", "."),
        ("yes", "Aa", UNLABELLED),
    ]


def test_the_point_of_an_abbreviation_is_no_mark_and_a_comma_after_it_is():
    words = restoration("pictures, e.g. maps, etc., in files etc. and more. End.")
    assert [(word, mark) for word, _, mark in words] == [
        ("pictures", ","),
        ("e.g", "O"),
        ("maps", ","),
        ("etc", "O"),
        ("in", "O"),
        ("files", "O"),
        ("etc", "O"),
        ("and", "O"),
        ("more", "."),
        ("end", UNLABELLED),
    ]


def test_marks_inside_a_word_stay_and_what_has_no_letter_is_no_word():
    words = restoration("C++ 2.6 - mkTeX & client/server * x")
    assert [word for word, _, _ in words] == ["c++", "2.6", "mktex", "client/server", "x"]
    assert [case for _, case, _ in words] == ["Aa", "aa", "aa", "aa", "aa"]


def test_a_text_without_a_word_has_no_rows():
    assert restoration(" - ... ") == []


def test_only_whole_paragraphs_of_some_length_are_written_and_each_once(tmp_path):
    good = "One two three four five, six seven eight nine ten eleven twelve thirteen fourteen. End."
    texts = ["Too short.", good + "\nmore", good, good[:-1], "A" + good, "B" + good]
    write_restoration(tmp_path / "some.conll", texts, 2)
    found = read_labelled(tmp_path / "some.conll")
    assert [it.words[0] for it in found] == ["one", "aone"]
    assert found[0].labels == ("O", "O", "O", "O", ",", *["O"] * 8, ".", UNLABELLED)
    assert read_labelled(tmp_path / "some.conll", 2)[0].labels[0] == "Aa"


@pytest.mark.parametrize(("split", "sentences"), [("train", 1_500), ("test", 500)])
def test_the_example_files_are_what_the_packages_give(tmp_path, split, sentences):
    packages = pq.read_table(EXAMPLES / "packages.en.parquet", columns=["long", "split"])
    texts = [row["long"] for row in packages.to_pylist() if row["split"] == split]
    write_restoration(tmp_path / "again.conll", texts, sentences)
    shipped = EXAMPLES / f"restoration.{split}.conll"
    assert (tmp_path / "again.conll").read_bytes() == shipped.read_bytes()
    assert len(read_labelled(shipped)) == sentences
