import logging
import sys

import numpy as np
import pytest

from tercet.data.files.conll import UNLABELLED, LabelledSentence
from tercet.errors import MissingExtraError, RecipeError
from tercet.evaluate.measures.latent_words import (
    ProbedModel,
    compare_words,
    entities,
    linear_probe,
    score_words,
    word_baselines,
    word_differences,
    word_probe,
)
from tercet.models.embedder import Embedder
from tests import toy

VOCABULARY = sorted({word.strip(",") for text in toy.SENTENCES for word in text.split()})


def sentence(text: str) -> LabelledSentence:
    """From "word/label word/label"."""
    pairs = [pair.rsplit("/", 1) for pair in text.split()]
    return LabelledSentence(tuple(w for w, _ in pairs), tuple(label for _, label in pairs))


def about_the_next_word(count: int, *, seed: int) -> list[LabelledSentence]:
    """Random words; the label says in which half of the alphabet the next one is."""
    random = np.random.default_rng(seed)
    found = []
    for length in random.integers(2, 4, count):
        words = tuple(str(word) for word in random.choice(VOCABULARY[:12], length))
        later = ["late" if word >= VOCABULARY[6] else "early" for word in words[1:]]
        found.append(LabelledSentence(words, (*later, UNLABELLED)))
    return found


TEST = [
    sentence("Ann/B-PER Lee/I-PER met/O Bob/B-PER"),
    sentence("in/O New/B-LOC York/I-LOC City/I-LOC"),
    sentence("it/_ rains/O"),
]
TOLD = (
    ("B-PER", "I-PER", "O", "O"),  # one of two spans, nothing wrong
    ("O", "B-LOC", "I-LOC", "O"),  # a span that ends too early
    ("B-PER", "B-LOC"),  # the first word is not counted; the second is a span too many
)


def test_accuracy_counts_labelled_words_alike():
    # Right: 3 of 4, 3 of 4, 0 of 1.
    result = score_words("by hand", TEST, TOLD)
    assert result.scores["accuracy"].mean == pytest.approx(6 / 9)
    assert result.cut == 0


def test_macro_f1_is_the_mean_over_the_labels_of_the_test_words():
    # 2 right / (there + told). B-PER: 2/(2+1), I-PER: 2/(1+1), O: 4/(3+4), B-LOC: 2/(1+2),
    # I-LOC: 2/(2+1).
    macro = (2 / 3 + 1 + 4 / 7 + 2 / 3 + 2 / 3) / 5
    assert score_words("by hand", TEST, TOLD).scores["macro F1"].mean == pytest.approx(macro)


def test_a_label_that_no_test_word_has_costs_the_words_it_was_told_of_only():
    test = [sentence("a/X b/X c/Y")]
    # X: 2/(2+1), Y: 2/(1+1); Z has no place in the mean.
    result = score_words("by hand", test, (("X", "Z", "Y"),))
    assert result.scores["macro F1"].mean == pytest.approx((2 / 3 + 1) / 2)


def test_a_label_that_a_draw_lacks_does_not_lower_it():
    test = [sentence("a/X"), sentence("b/Y")]
    found = score_words("right", test, (("X",), ("Y",))).scores["macro F1"]
    assert (found.mean, found.low, found.high) == (1, 1, 1)


def test_entity_f1_counts_whole_spans():
    # There: Ann Lee, Bob, New York City. Told: Ann Lee, New York, rains. Right: 1.
    assert score_words("by hand", TEST, TOLD).scores["entity F1"].mean == pytest.approx(2 / 6)


@pytest.mark.parametrize("labels", ["a/X b/O", "a/O b/O", "a/B-X b/O c/NN"])
def test_labels_that_mark_no_entities_have_no_entity_f1(labels):
    test = [sentence(labels)]
    assert "entity F1" not in score_words("none", test, (test[0].labels,)).scores


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ("B-A I-A O B-A", {("A", 0, 2), ("A", 3, 4)}),
        ("B-A B-A I-A", {("A", 0, 1), ("A", 1, 3)}),
        ("I-A I-A I-B O I-A", {("A", 0, 2), ("B", 2, 3), ("A", 4, 5)}),
        ("B-A I-B", {("A", 0, 1), ("B", 1, 2)}),
        ("B-A _ I-A", {("A", 0, 1), ("A", 2, 3)}),
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_are_read_as_conlleval_reads_them(labels, spans):
    assert entities(labels.split()) == spans


def test_baselines_know_the_labels_and_not_the_context():
    train = [sentence("a/X a/Y a/Y b/X b/_ c/X"), sentence("b/X")]
    test = [sentence("a/Y b/Y new/X"), sentence("c/_ a/X")]
    majority, lexicon = word_baselines(train, test)
    assert majority.predicted == (("X", "X", "X"), ("X", "X"))
    assert lexicon.predicted == (("Y", "X", "X"), ("X", "Y"))
    assert majority.scores["accuracy"].mean == 2 / 4
    assert lexicon.scores["accuracy"].mean == 2 / 4


def test_words_that_were_cut_are_counted_and_not_scored():
    result = score_words("cut", TEST, (TOLD[0][:2], TOLD[1], ()))
    assert result.cut == 3  # met, Bob, rains; "it" has no label
    assert result.scores["accuracy"].mean == pytest.approx(5 / 6)
    # Ann Lee is right, New York is not New York City.
    assert result.scores["entity F1"].mean == pytest.approx(2 * 1 / (2 + 2))


def test_differences_are_on_the_words_that_both_have_read():
    test = [sentence("a/X b/Y c/X"), sentence("d/Y")]
    before = score_words("before", test, (("X", "X"), ("X",)))
    after = score_words("after", test, (("X", "Y", "Y"), ("X",)))
    found = word_differences(after, before, test)["accuracy"]
    assert found.mean == pytest.approx(2 / 3 - 1 / 3)  # c is not counted: before did not read it
    back = word_differences(before, after, test)["accuracy"]
    assert (back.low, back.high) == (-found.high, -found.low)


def test_a_difference_to_itself_is_zero():
    result = score_words("by hand", TEST, TOLD)
    for found in word_differences(result, result, TEST).values():
        assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_words_of_one_sentence_stand_or_fall_together(random):
    right = random.random(60) < 0.5
    test = [LabelledSentence(("w",) * 10, ("X",) * 10)] * 60
    whole = score_words("whole", test, tuple((("X" if it else "Y"),) * 10 for it in right))
    # As uncertain as 60 words, not as 600.
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 60)
    found = whole.scores["accuracy"]
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert found.queries == 60


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_a_probe_finds_a_direction_that_tells_labels_apart(random):
    # Unlabelled words carry vectors that would mislead; widths and shifts differ by coordinate.
    scale, shift = np.array([1, 1000, 0.01], np.float32), np.array([0, 5e3, 7], np.float32)
    vectors = [random.normal(size=(n, 3)).astype(np.float32) for n in (40, 70, 90)]
    labels = [np.where(it[:, 1] > 0, "up", "down") for it in vectors]
    labels[0][:] = UNLABELLED
    train = [LabelledSentence(("w",) * len(it), tuple(map(str, it))) for it in labels]
    classify = linear_probe(train, [it * scale + shift for it in vectors])
    fresh = random.normal(size=(200, 3)).astype(np.float32)
    told = np.array(classify(fresh * scale + shift))
    assert (told == np.where(fresh[:, 1] > 0, "up", "down")).mean() > 0.9
    assert classify(fresh[:0]) == []


def test_a_coordinate_that_never_changes_is_no_harm(random):
    vectors = random.normal(size=(50, 2)).astype(np.float32)
    vectors[:, 0] = 3
    labels = tuple("up" if it > 0 else "down" for it in vectors[:, 1])
    classify = linear_probe([LabelledSentence(("w",) * 50, labels)], [vectors])
    assert np.mean([a == b for a, b in zip(classify(vectors), labels, strict=True)]) > 0.9


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ("a/X b/X", "the training sentences have only one label, 'X'"),
        ("a/_ b/_", "the training sentences have no labelled word"),
    ],
)
def test_a_probe_needs_two_labels(labels, problem):
    with pytest.raises(RecipeError, match=problem):
        linear_probe([sentence(labels)], [np.zeros((2, 3), np.float32)])


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tercet\[probe\]'"):
        linear_probe(TEST, [np.zeros((len(it.words), 2), np.float32) for it in TEST])


def test_reading_both_ways_tells_of_the_next_word(decoder_folder):
    train, test = about_the_next_word(250, seed=1), about_the_next_word(120, seed=2)
    stages = [
        ProbedModel(it, lambda it=it: Embedder.load(decoder_folder, attention=it))
        for it in ("causal", "bidirectional")
    ]
    found = compare_words(stages, train, test)
    causal, both_ways = found.results[2:]
    assert both_ways.scores["accuracy"].mean > 0.65
    assert causal.scores["accuracy"].mean < 0.6  # the labels are a coin's, as far as it reads
    assert found.differences["bidirectional"]["accuracy"].low > 0.05


def test_the_table_has_a_row_a_model_and_differences_to_the_first(decoder_folder):
    train, test = about_the_next_word(40, seed=1), about_the_next_word(30, seed=2)
    stages = [
        ProbedModel("here", lambda: Embedder.load(decoder_folder)),
        ProbedModel("before", lambda: Embedder.load(decoder_folder), predictor=True),
    ]
    found = compare_words(stages, train, test)
    assert found.results[2].predicted != found.results[3].predicted
    header, *rows = found.rows()
    assert header == ("model", "accuracy", "minus first", "macro F1", "minus first", "cut")
    assert [row[0] for row in rows] == [
        "most frequent label",
        "label of the word",
        *"here before".split(),
    ]
    assert rows[2][2] == rows[2][4] == "-"
    assert "-" != rows[3][2] != rows[1][2]
    assert {len(row) for row in rows} == {6}


def test_words_past_the_longest_text_are_counted(decoder_folder, caplog):
    train = [sentence("read/X mail/Y in/X"), sentence("play/X music/Y")]
    test = [sentence("the/X " * 30), sentence("mail/Y")]
    embedder = Embedder.load(decoder_folder, document_tokens=8)
    with caplog.at_level(logging.WARNING, logger="tercet"):
        result = word_probe(embedder, train, test)
    kept = len(result.predicted[0])
    assert 0 < kept < 30
    assert (result.cut, result.train_cut) == (30 - kept, 0)
    assert f"{30 - kept} of 31 words were cut off" in caplog.text


def test_two_models_cannot_share_a_name(decoder_folder):
    stage = ProbedModel("one", lambda: Embedder.load(decoder_folder))
    with pytest.raises(RecipeError, match="two rows would be called 'one'"):
        compare_words([stage, stage], TEST, TEST)
