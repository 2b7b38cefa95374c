"""NV-Embed (arXiv 2405.17428), tests 12 to 14: rows of classes, topics and scores; test texts."""

from collections import Counter
from dataclasses import replace

import pytest

from tercet.curate.convert.classification import convert_labelled
from tercet.curate.convert.conversion import Conversion
from tercet.curate.convert.decontaminate import EvaluationTexts, Match, Removal, decontaminate
from tercet.curate.convert.scored_pairs import convert_similarity
from tercet.data.files.labelled import LabelledText
from tercet.data.files.similarity import SimilaritySet
from tercet.types import Example

WANTED = Conversion(task="moods", instruction="Name the mood.", negatives=3, seed=5)
PROMPT = "Instruct: Name the mood.\nQuery: "
SIZES = {"joy": 6, "fear": 4, "anger": 3, "awe": 1}
CLASSES = [
    LabelledText(f"{label} {number}", (label,))
    for label, size in SIZES.items()
    for number in range(size)
]
LABEL_OF = {text.text: text.labels[0] for text in CLASSES}
BINARY = CLASSES[:10]


def rows_of(texts, wanted=WANTED, **how):
    return convert_labelled(texts, wanted, **how).rows


# ---- 12: classes and topics ------------------------------------------------------------------


def test_a_label_row_answers_a_text_with_the_words_of_its_label():
    """Test 12 of NV-Embed."""
    words = {"joy": "It is about joy.", "awe": "It is about awe."}
    rows = rows_of(CLASSES, mode="label", label_texts=words)
    known = [words.get(label, label) for label in SIZES]
    assert [row.query for row in rows] == list(LABEL_OF)
    for row in rows:
        positive = words.get(LABEL_OF[row.query], LABEL_OF[row.query])
        assert row.positives == (positive,)
        assert sorted((positive, *row.negatives)) == sorted(known)
        assert (row.query_prompt, row.document_prompt) == (PROMPT, "")
        assert (row.task, row.in_batch) == ("moods", "none")


def test_an_example_row_answers_a_text_with_another_of_its_class():
    """Test 12 of NV-Embed."""
    rows = rows_of(CLASSES[:13])
    assert [row.query for row in rows] == [text.text for text in CLASSES[:13]]
    for row in rows:
        label = LABEL_OF[row.query]
        (positive,) = row.positives
        assert LABEL_OF[positive] == label
        assert len(set(row.negatives)) == 3
        assert all(LABEL_OF[negative] != label for negative in row.negatives)
        assert (row.query_prompt, row.document_prompt) == (PROMPT, PROMPT)
        assert row.in_batch == "none"


def test_a_binary_set_is_in_label_mode_with_one_negative_and_no_copies_of_it():
    """Test 12 of NV-Embed."""
    converted = convert_labelled(BINARY, WANTED)
    assert converted.mode == "label"
    assert {row.negatives for row in converted.rows} == {("joy",), ("fear",)}


def test_a_set_with_fewer_texts_than_negatives_has_fewer_and_no_copies():
    """Test 12 of NV-Embed."""
    rows = rows_of([*CLASSES[:2], *CLASSES[6:8], *CLASSES[10:12]], replace(WANTED, negatives=7))
    assert [len(row.negatives) for row in rows] == [4] * 6
    assert all(len(set(row.negatives)) == 4 for row in rows)


def test_a_class_with_one_example_gets_its_label_or_no_row_and_is_counted():
    """Test 12 of NV-Embed."""
    instead = convert_labelled(CLASSES, WANTED)
    (lone,) = [row for row in instead.rows if row.query == "awe 0"]
    assert lone.positives == ("awe",)
    assert sorted(lone.negatives) == ["anger", "fear", "joy"]
    assert lone.document_prompt == ""
    assert (len(instead.rows), instead.label_instead) == (14, 1)
    skipped = convert_labelled(CLASSES, WANTED, lonely="skip")
    assert all(row.query != "awe 0" for row in skipped.rows)
    assert skipped.skipped == {"no other text of its label": 1}


def test_a_query_is_never_its_own_positive_nor_is_a_copy_of_it():
    """Test 12 of NV-Embed."""
    copies = [replace(text, text=text.text.upper() + " ") for text in CLASSES]
    for seed in range(30):
        for row in rows_of([*CLASSES, *copies], replace(WANTED, seed=seed)):
            texts = [row.query, *row.positives, *row.negatives]
            assert len({" ".join(text.lower().split()) for text in texts}) == len(texts)


def test_rows_are_balanced_by_the_label_of_their_positive():
    """Test 12 of NV-Embed."""
    converted = convert_labelled(CLASSES, WANTED, rows=8)
    # ceil(8 / 4) = 2 each; of awe there is one, and what it leaves goes to the largest.
    assert converted.labels == {"joy": 3, "fear": 2, "anger": 2, "awe": 1}
    assert converted.skipped == {"not drawn": 6}


@pytest.mark.parametrize("mode", ["label", "example"])
def test_the_seed_decides_the_rows_and_nothing_else_does(mode):
    """Test 12 of NV-Embed."""
    first = rows_of(CLASSES, mode=mode, rows=9)
    assert rows_of(CLASSES, mode=mode, rows=9) == first
    assert rows_of(CLASSES, replace(WANTED, seed=6), mode=mode, rows=9) != first


TOPICS = [
    LabelledText("stars", ("physics", "astronomy")),
    LabelledText("lenses", ("physics", "optics")),
    LabelledText("planets", ("astronomy",)),
    LabelledText("cells", ("biology",)),
    LabelledText("genes", ("biology", "medicine")),
    LabelledText("glasses", ("optics", "medicine")),
]
TOPICS_OF = {text.text: set(text.labels) for text in TOPICS}


def test_of_several_topics_one_is_drawn_and_none_of_them_is_a_negative():
    """Test 12 of NV-Embed."""
    drawn = Counter()
    for seed in range(60):
        for row in rows_of(TOPICS, replace(WANTED, seed=seed, negatives=9), mode="label"):
            own = TOPICS_OF[row.query]
            assert row.positives[0] in own
            assert set(row.negatives) == set().union(*TOPICS_OF.values()) - own
            drawn[row.query, row.positives[0]] += 1
    assert all(15 < drawn["stars", topic] < 45 for topic in ("physics", "astronomy"))


def test_texts_that_share_any_topic_are_no_negatives():
    """Test 12 of NV-Embed."""
    for seed in range(30):
        for row in rows_of(TOPICS, replace(WANTED, seed=seed, negatives=9)):
            own = TOPICS_OF[row.query]
            assert TOPICS_OF[row.positives[0]] & own
            apart = {text for text, topics in TOPICS_OF.items() if not topics & own}
            assert set(row.negatives) == apart


def test_of_several_topics_one_that_another_text_has_is_drawn():
    """Test 12 of NV-Embed."""
    texts = [*TOPICS, LabelledText("quarks", ("physics", "quantum"))]
    for seed in range(20):
        converted = convert_labelled(texts, replace(WANTED, seed=seed))
        assert converted.label_instead == 0


# ---- 13: scored pairs ------------------------------------------------------------------------

SCORED = [
    ("the cat sits on the mat", "a cat is on the mat", 4.0),
    ("the cat sits on the rug", "a dog lies on the rug", 3.99),
    ("the cat eats on the mat", "the cat sits on the mat", 2.51),
    ("the cat sits on the sofa", "the cat sits on the mat", 2.5),
    ("rain falls on the sea", "snow falls on the hills", 1.0),
]


def converted_pairs(pairs=SCORED, **how):
    wanted = Conversion(task="sts", instruction="Retrieve similar text.", negatives=4)
    return convert_similarity(SimilaritySet.of("sts", pairs), wanted, **how)


def test_a_score_of_4_gives_both_directions_and_3_99_gives_none():
    """Test 13 of NV-Embed."""
    converted = converted_pairs()
    first, second, _ = SCORED[0]
    assert [(row.query, row.positives) for row in converted.rows] == [
        (first, (second,)),
        (second, (first,)),
    ]
    assert (converted.records, len(converted.rows)) == (5, 2)
    assert converted.skipped == {"score too low": 4}


def test_no_text_with_a_recorded_score_above_2_5_is_a_negative():
    """Test 13 of NV-Embed."""
    forth, back = converted_pairs().rows
    assert len(forth.negatives) == len(back.negatives) == 4
    assert "the cat eats on the mat" not in forth.negatives  # 2.51
    assert "the cat sits on the sofa" in forth.negatives  # 2.5
    assert "the cat eats on the mat" in back.negatives  # nobody compared these two
    for row in (forth, back):
        assert not {row.query, *row.positives} & set(row.negatives)


def test_the_first_rank_is_never_a_negative():
    """Test 13 of NV-Embed."""
    # By its repeated words "tea tea ..." is ahead of the query itself, which comes second.
    pairs = [("tea cup", "warm drink", 5.0), ("tea tea cup cup tea cup", "tea pot", 0.0)]
    (row,) = converted_pairs(pairs).rows
    assert (row.query, row.negatives) == ("tea cup", ("tea pot",))


def test_prompts_stand_on_both_sides():
    """Test 13 of NV-Embed."""
    for row in converted_pairs().rows:
        assert row.query_prompt == "Instruct: Retrieve similar text.\nQuery: "
        assert row.document_prompt == row.query_prompt
        assert row.in_batch == "none"


def test_another_scale_is_mapped_to_ours():
    """Test 13 of NV-Embed."""
    # From 1 to 4: 3.4 becomes (3.4 - 1) / 3 * 5 = 4, 3.39 becomes 3.98, and 2.5 becomes 2.5.
    pairs = [
        ("the cat sits on the mat", "a cat is on the mat", 3.4),
        ("the cat sits on the rug", "a dog lies on the rug", 3.39),
        ("the cat eats on the mat", "the cat sits on the mat", 2.51),
        ("the cat sits on the sofa", "the cat sits on the mat", 2.5),
    ]
    assert converted_pairs(pairs).rows == ()
    forth, back = converted_pairs(pairs, rescale=(1, 4)).rows
    assert (forth.query, back.query) == pairs[0][:2]
    assert "the cat eats on the mat" not in forth.negatives
    assert "the cat sits on the sofa" in forth.negatives


# ---- 14: test texts in training data ---------------------------------------------------------

LONG = "A small library that reads and writes archives, with a command to list what they hold."
SHORT = "viewer for large images"
JAPANESE = (
    "これは画像を表示するための小さなプログラムで、多くの形式の画像ファイルを読み書きできます。"
)
INDEXED = (LONG, SHORT, JAPANESE)

EXACT = [
    LONG.upper(),
    f"  {SHORT.replace(' ', chr(10))} ",
    "\uff56\uff49\uff45\uff57\uff45\uff52 for large images",
]
NEAR = [
    LONG.replace("small", "tiny"),
    f"{LONG} Really.",
    LONG.replace(",", ""),
    f"{SHORT}s",
    JAPANESE.replace("多く", "様々"),
]
NEAR_TOPIC = [
    "A small library that plays music and records it, with a command to list what it knows.",
    "reads and writes archives",
    "viewer for large texts",
    "viewer for image files",
    "これは音楽を再生するための小さなプログラムで、多くの形式の音楽ファイルを読み込めます。",
]


@pytest.fixture
def against():
    texts = EvaluationTexts()
    texts.add("test.jsonl", INDEXED)
    return texts


@pytest.mark.parametrize(
    ("texts", "likeness"), [(EXACT, "exact"), (NEAR, "near"), (NEAR_TOPIC, None)]
)
def test_planted_duplicates_are_found_and_texts_of_the_same_topic_are_not(against, texts, likeness):
    """Test 14 of NV-Embed."""
    expected = likeness and Match("test.jsonl", likeness)
    assert {text: against.find(text) for text in texts} == dict.fromkeys(texts, expected)


def test_every_field_of_a_row_is_looked_at(against):
    """Test 14 of NV-Embed."""
    keep = [
        Example(f"query {n}", (text,), (NEAR_TOPIC[n - 1],)) for n, text in enumerate(NEAR_TOPIC)
    ]
    planted = [
        Example(EXACT[0], ("p",), ("n",)),
        Example("q", (NEAR[3],), ("n",)),
        Example("q", (NEAR[4], "p"), (EXACT[1], "n", NEAR[0])),
    ]
    removal = Removal()
    rows = list(decontaminate([keep[0], *planted, *keep[1:]], against, removal))
    assert rows == [keep[0], Example("q", ("p",), ("n",)), *keep[1:]]
    assert (removal.rows, removal.kept) == (8, 6)
    assert removal.texts == {
        ("test.jsonl", "query", "exact"): 1,
        ("test.jsonl", "positives", "near"): 2,
        ("test.jsonl", "negatives", "exact"): 1,
        ("test.jsonl", "negatives", "near"): 1,
    }
