import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from tercet.curate.convert.decontaminate import (
    EvaluationTexts,
    Match,
    Removal,
    decontaminate,
    evaluation_texts,
    normal_form,
    overlap,
    shingles,
    withhold,
)
from tercet.errors import MissingExtraError, RecipeError
from tercet.types import Example

TEST = "The quick brown fox jumps over the lazy dog near the river bank in early spring."


def indexed(*texts, threshold=0.8):
    found = EvaluationTexts(threshold)
    found.add("test.jsonl", texts)
    return found


def test_the_normal_form_ignores_width_case_and_spaces():
    assert normal_form("  \uff26\uff4f\uff4f\tBAR\n \ufb01sh ") == "foo bar fish"


def test_shingles_are_all_runs_of_four_characters_or_a_shorter_text_itself():
    assert shingles("abcde") == {"abcd", "bcde"}
    assert shingles("abc") == {"abc"}
    assert shingles("né画像") == {"né画画", "é画画像", "画画像像"}
    assert overlap(shingles("abcde"), shingles("bcdef")) == 1 / 3


@pytest.mark.parametrize("threshold", [0.4, 0.6, 0.8])
def test_near_texts_are_those_of_a_search_through_all(threshold):
    random = np.random.default_rng(0)
    words = [f"w{n}x" for n in range(300)]
    tests = [" ".join(random.choice(words, 12)) for _ in range(40)]
    index = indexed(*tests, threshold=threshold)
    found = expected = 0
    for test in tests * 5:
        changed = test.split()
        for place in random.choice(12, random.integers(0, 12), replace=False):
            changed[place] = random.choice(words)
        text = " ".join(changed)
        likeness = max(overlap(shingles(text), shingles(other)) for other in tests)
        expected += likeness >= threshold
        hit = index.find(text)
        found += hit is not None
        assert hit is None or likeness >= threshold
    assert 20 < expected < 180
    assert found == expected


def test_a_text_that_is_blank_matches_nothing():
    index = indexed("", " \n", TEST)
    assert len(index) == 1
    assert index.find(" ") is None


def test_a_text_in_two_files_is_counted_for_the_first():
    index = indexed(TEST)
    index.add("other.jsonl", [TEST.upper(), "Something else entirely."])
    assert index.find(TEST) == Match("test.jsonl", "exact")
    assert index.find("something ELSE entirely.") == Match("other.jsonl", "exact")


def test_an_answer_is_not_remembered_beyond_a_new_file():
    index = indexed("Something else entirely.")
    assert index.find(TEST) is None
    index.add("more.jsonl", [TEST])
    assert index.find(TEST) == Match("more.jsonl", "exact")


ROW = Example(
    "a query",
    ("first answer", "second answer"),
    ("no answer", "nor this"),
    positive_scores=(0.9, 0.8),
    negative_scores=(0.2, 0.1),
)


def cleaned(row, *texts):
    removal = Removal()
    return list(decontaminate([row], indexed(*texts), removal)), removal


def test_a_text_goes_together_with_its_score():
    rows, removal = cleaned(ROW, "First Answer", "NOR this")
    assert rows == [
        replace(
            ROW,
            positives=("second answer",),
            positive_scores=(0.8,),
            negatives=("no answer",),
            negative_scores=(0.2,),
        )
    ]
    assert removal.texts == {
        ("test.jsonl", "positives", "exact"): 1,
        ("test.jsonl", "negatives", "exact"): 1,
    }
    assert (removal.rows, removal.kept) == (1, 1)


def test_a_row_goes_with_its_query_and_with_its_last_positive():
    assert cleaned(ROW, "A query")[0] == []
    rows, removal = cleaned(ROW, *ROW.positives)
    assert (rows, removal.kept) == ([], 0)


def test_a_row_of_its_own_negatives_only_goes_with_the_last_of_them():
    assert len(cleaned(ROW, *ROW.negatives)[0]) == 1
    rows, removal = cleaned(replace(ROW, in_batch="none"), *ROW.negatives)
    assert (rows, removal.without_negatives) == ([], 1)
    bare = replace(ROW, negatives=(), negative_scores=None, in_batch="none")
    assert cleaned(bare, "unrelated")[0] == [bare]  # it had none to lose


def test_a_row_without_scores_keeps_none():
    plain = Example("a query", ("answer",), ("other", "another"))
    assert cleaned(plain, "OTHER")[0] == [replace(plain, negatives=("another",))]


def test_rows_are_read_one_at_a_time():
    read = []

    def rows():
        for number in range(3):
            read.append(number)
            yield replace(ROW, query=f"query {number}")

    next(decontaminate(rows(), indexed(TEST), Removal()))
    assert read == [0]


def test_items_of_any_kind_are_withheld():
    removal = Removal()
    pairs = [("x", "y"), ("z", TEST.lower())]
    kept = list(withhold(pairs, lambda pair: pair, against=indexed(TEST), removal=removal))
    assert kept == [("x", "y")]
    assert (removal.rows, removal.kept) == (2, 1)


def lines(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_of_examples_the_queries_and_their_answers_count(tmp_path):
    row = {"query": "q", "positives": ["p1", "p2"], "negatives": ["n"]}
    assert list(evaluation_texts(lines(tmp_path / "a.jsonl", row))) == ["q", "p1", "p2"]


def test_of_scored_pairs_both_texts_count(tmp_path):
    pairs = [{"text1": "a", "text2": "b", "score": s} for s in (1, 2)]
    assert list(evaluation_texts(lines(tmp_path / "a.jsonl", *pairs))) == ["a", "b"]


def test_of_labelled_and_plain_texts_the_texts_count_and_no_label(tmp_path):
    labelled = lines(tmp_path / "a.jsonl", {"text": "a", "label": "x"}, {"text": "b", "label": 1})
    assert list(evaluation_texts(labelled)) == ["a", "b"]
    plain = tmp_path / "a.txt"
    plain.write_text("one\ntwo\n")
    assert list(evaluation_texts(plain)) == ["one", "two"]


def test_of_a_beir_folder_the_queries_and_the_documents_that_answer_them_count(tmp_path):
    lines(tmp_path / "corpus.jsonl", *({"_id": f"d{i}", "text": f"text {i}"} for i in range(4)))
    lines(tmp_path / "queries.jsonl", {"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"})
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("q1\td3\t1\nq1\td1\t2\nq1\td2\t0\n")
    assert list(evaluation_texts(tmp_path)) == ["one", "text 1", "text 3"]


def test_a_threshold_out_of_range_is_refused():
    for threshold in (0.2, 1.01):
        with pytest.raises(RecipeError, match=f"between 0.3 and 1, such as 0.8; got {threshold}"):
            EvaluationTexts(threshold)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(MissingExtraError, match=r"near duplicates .*'tercet\[curate\]'"):
        EvaluationTexts()
