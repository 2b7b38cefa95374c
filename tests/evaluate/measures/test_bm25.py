import sys
from collections import Counter
from math import log

import numpy as np
import pytest

from tercet.errors import MissingExtraError
from tercet.evaluate.measures.bm25 import bm25_scores, bm25_top_k, by_letters, words

DOCS = [
    "a library to read PNG images",
    "a library to write PNG files: PNG, and other files",
    "a game",
    "",
]


def by_the_formula(query, docs, k1=0.9, b=0.4):
    """sum over query words of idf * tf / (tf + k1 * (1 - b + b * length / mean length))."""
    counts = [Counter(words(doc)) for doc in docs]
    mean = sum(c.total() for c in counts) / len(docs)
    scores = np.zeros(len(docs))
    for word in words(query):
        having = sum(word in c for c in counts)
        idf = log(1 + (len(docs) - having + 0.5) / (having + 0.5))
        for row, c in enumerate(counts):
            scores[row] += idf * c[word] / (c[word] + k1 * (1 - b + b * c.total() / mean))
    return scores


@pytest.mark.parametrize("query", ["png library", "PNG png", "a", "a library of games"])
def test_scores_equal_the_formula(query):
    (scores,) = bm25_scores([query], DOCS)
    np.testing.assert_allclose(scores, by_the_formula(query, DOCS), atol=1e-6)


def test_words_are_lower_cased_runs_of_word_characters():
    assert words("C++: libFoo-2.1, d'été_x") == ["c", "libfoo", "2", "1", "d", "été_x"]


def test_runs_of_han_kana_and_hangul_are_cut_into_pairs():
    assert words("GNU데이터") == ["gnu", "데이", "이터"]
    assert words("日本語 カメラ") == ["日本", "本語", "カメ", "メラ"]
    assert words("x円") == ["x", "円"]
    assert words("\U00020000\U00020001\U00020002") == [
        "\U00020000\U00020001",
        "\U00020001\U00020002",
    ]


def test_letters_are_taken_in_threes_inside_of_words_and_other_scripts_stay_in_pairs():
    (parts,) = by_letters(["Häuser, x 日本語"], "query")
    assert parts == ["^hä", "häu", "äus", "use", "ser", "er$", "^x$", "日本", "本語"]


def test_a_word_that_is_inflected_shares_letters_but_is_another_word():
    assert bm25_top_k(["Haus"], ["viele Häuser"], 1).rows.tolist() == [[-1]]
    found = bm25_top_k(["Bibliothek"], ["Spiele", "Bibliotheken"], 2, by_letters)
    assert found.rows.tolist() == [[1, -1]]


def test_only_documents_that_share_a_word_are_listed():
    hits = bm25_top_k(["png", "nothing here", ""], DOCS, 3)
    assert hits.rows.tolist() == [[1, 0, -1], [-1, -1, -1], [-1, -1, -1]]
    assert hits.scores[0, 0] > hits.scores[0, 1] > hits.scores[0, 2] == 0


def test_equal_scores_are_ranked_by_lower_row():
    docs = ["same words"] * 50
    assert bm25_top_k(["words"], docs, 10).rows.tolist() == [list(range(10))]


@pytest.mark.parametrize("docs", [[], ["", "..."]])
def test_documents_without_a_word_are_no_error(docs):
    assert bm25_top_k(["png"], docs, 5).rows.tolist() == [[-1] * len(docs)]


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tercet\[bm25\]'"):
        bm25_top_k(["png"], DOCS, 1)
