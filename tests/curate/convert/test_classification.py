import numpy as np
import pytest

from tercet.curate.convert.classification import convert_labelled
from tercet.curate.convert.conversion import Conversion
from tercet.data.files.labelled import LabelledText
from tercet.errors import RecipeError

WANTED = Conversion(task="t", instruction="Sort.", negatives=3)


def made(*texts, **how):
    return convert_labelled(
        [LabelledText(text, tuple(labels.split())) for text, labels in texts],
        how.pop("wanted", WANTED),
        **how,
    )


SIZES = {"a": 4, "b": 3, "c": 2, "d": 5}
FOUR = [(f"{label}{i}", label) for label, size in SIZES.items() for i in range(size)]


def test_the_mode_follows_the_number_of_labels():
    assert made(*FOUR).mode == "example"
    assert made(*FOUR[:7]).mode == "label"
    assert made(*FOUR[:7], mode="example").mode == "example"


def test_positives_of_a_label_are_equally_likely():
    counts = np.zeros((4, 4))
    for seed in range(600):
        wanted = Conversion(task="t", instruction="", seed=seed)
        for row in made(*FOUR, wanted=wanted).rows[:4]:
            counts[int(row.query[1]), int(row.positives[0][1])] += 1
    assert (np.diag(counts) == 0).all()
    others = counts[~np.eye(4, dtype=bool)]
    assert others.min() > 150 and others.max() < 250  # 200 expected


def test_negatives_are_equally_likely_even_where_nearly_all_texts_share_the_label():
    texts = [(f"a{i}", "a") for i in range(300)] + [("b0", "b"), ("b1", "b"), ("c0", "c")]
    converted = made(*texts, ("c1", "c"), wanted=Conversion(task="t", instruction="", negatives=2))
    seen = [negative for row in converted.rows[:300] for negative in row.negatives]
    assert all(len(set(row.negatives)) == 2 for row in converted.rows[:300])
    shares = [seen.count(name) for name in ("b0", "b1", "c0", "c1")]
    assert sum(shares) == len(seen) == 600
    assert min(shares) > 110  # 150 expected


def test_equal_texts_are_one_with_the_labels_of_all():
    texts = [("Same  text", "a"), ("same text", "b"), ("x", "a"), ("y", "b"), ("z", "c")]
    converted = made(*texts, ("w", "c"))
    assert converted.skipped == {"repeats an earlier text": 1}
    first = converted.rows[0]
    assert first.query == "Same  text"
    assert set(first.negatives) == {"z", "w"}
    assert all("Same  text" not in row.negatives for row in converted.rows if row.query in "xy")


def test_a_text_without_a_label_gives_no_row_and_is_nobodys_negative():
    converted = made(*FOUR, ("unknown", ""))
    assert converted.skipped == {"has no label": 1}
    assert converted.records == 15
    assert all("unknown" not in row.negatives for row in converted.rows)


def test_a_text_that_shares_a_label_with_all_others_has_no_negative():
    converted = made(("x", "a b c"), *FOUR[:7], ("c0", "c"), ("c1", "c"))
    assert converted.skipped == {"no text or label to tell it from": 1}
    label = made(("x", "a b c"), *FOUR[:7], ("c0", "c"), ("c1", "c"), mode="label")
    assert label.skipped == {"no text or label to tell it from": 1}


def test_a_text_that_is_the_words_of_its_label_gives_no_row():
    converted = made(("Joy", "a"), ("x", "a"), ("y", "b"), label_texts={"a": "joy"}, mode="label")
    assert converted.skipped == {"is the words of its label": 1}
    assert [row.query for row in converted.rows] == ["x", "y"]


def test_labels_of_the_same_words_are_no_negatives_of_each_other():
    words = {"a": "Mirth", "b": "mirth", "c": "grief", "d": "Grief"}
    rows = made(*FOUR, label_texts=words, mode="label").rows
    assert [row.negatives for row in rows[:7]] == [("grief",)] * 7


def test_a_label_whose_words_are_the_query_is_no_negative():
    converted = made(("B", "a"), *FOUR, mode="label")
    first = converted.rows[0]
    assert (first.query, first.positives) == ("B", ("a",))
    assert sorted(first.negatives) == ["c", "d"]
    assert converted.label_instead == 0


def test_the_label_is_drawn_anew_for_each_text():
    texts = [(f"x{i}", "a b") for i in range(40)] + [("c0", "c"), ("c1", "c")]
    labels = made(*texts).labels
    assert 8 < labels["a"] < 32 and labels["a"] + labels["b"] == 40


def test_one_label_alone_is_refused():
    with pytest.raises(RecipeError, match="must have at least 2 different labels; got 1"):
        made(*FOUR[:4])


def test_the_report_counts_what_became_of_each_text():
    converted = made(*FOUR, ("lone", "e"), rows=9)
    assert (converted.records, len(converted.rows)) == (15, 9)
    assert converted.skipped == {"not drawn": 6}
    assert converted.labels == {"a": 2, "d": 2, "b": 2, "c": 2, "e": 1}
    assert converted.label_instead == 1
    assert {len(row.negatives) for row in converted.rows} == {3}
