import pytest

from tercet.curate.convert.conversion import Conversion
from tercet.curate.convert.scored_pairs import convert_similarity
from tercet.data.files.similarity import SimilaritySet
from tercet.errors import RecipeError
from tercet.evaluate.measures.bm25 import bm25_scores

WANTED = Conversion(task="sts", instruction="Retrieve similar text.", negatives=2)


def made(*pairs, wanted=WANTED, **how):
    return convert_similarity(SimilaritySet.of("sts", pairs), wanted, **how)


PAIRS = [
    ("red cat sleeps", "red cat naps", 4.5),
    ("red cat runs", "blue cat runs", 1.0),
    ("red dog sleeps", "green cat eats", 2.0),
    ("red cat sleeps", "cat sleeps all day", 3.0),
]


def test_negatives_are_the_best_by_bm25_that_the_rules_allow():
    row = made(*PAIRS).rows[0]
    texts = SimilaritySet.of("sts", PAIRS).texts
    scores = next(bm25_scores([row.query], texts))
    ranked = [texts[i] for i in sorted(range(len(texts)), key=lambda i: -scores[i])]
    allowed = [t for t in ranked[1:] if t not in ("red cat naps", "cat sleeps all day")]
    assert row.negatives == tuple(allowed[:2])


def test_related_texts_do_not_cost_negatives():
    """However many texts are barred, the list is deep enough for those behind them."""
    barred = [("red cat sleeps", f"red cat sleeps {word}", 3.0) for word in "abcdefgh"]
    rows = made(*PAIRS, *barred).rows
    assert len(rows[0].negatives) == 2


def test_copies_of_a_text_take_one_place():
    copies = ["red cat sleeps " + word for word in ("HERE", "HEre", "HerE", "hERE", "heRE", "here")]
    rows = made(*PAIRS, *zip(copies[::2], copies[1::2], (1.0, 1.0, 1.0), strict=True)).rows
    first, second = rows[0].negatives
    assert first.lower() == "red cat sleeps here" != second.lower()


def test_copies_of_the_query_are_no_negatives():
    rows = made(*PAIRS, ("RED cat sleeps", "x", 1.0), ("Red  cat sleeps", "y", 1.0)).rows
    assert all(text.lower().split()[:3] != ["red", "cat", "sleeps"] for text in rows[0].negatives)


def test_a_pair_is_used_once_whichever_way_round_it_stands():
    converted = made(*PAIRS, ("red cat naps", "red cat sleeps", 5.0), ("Cat", "cat", 5.0))
    assert len(converted.rows) == 2
    assert converted.skipped == {
        "score too low": 3,
        "repeats an earlier pair": 1,
        "both texts are equal": 1,
    }
    assert converted.records == 6


def test_a_query_that_shares_no_word_with_any_text_gives_no_row():
    converted = made(("sun", "moon", 5.0), ("one", "two", 0.0))
    assert converted.rows == ()
    assert converted.skipped == {"no negative for either text": 1, "score too low": 1}


def test_a_scale_without_room_is_refused():
    with pytest.raises(RecipeError, match="lowest, then highest score; got 5, 1"):
        made(*PAIRS, rescale=(5, 1))
