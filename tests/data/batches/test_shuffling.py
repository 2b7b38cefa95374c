import re
from itertools import pairwise, permutations

import numpy as np
import pytest

from tercet.data.batches.shuffling import CutName, shuffled

LONG = "".join(chr(ord("a") + i // 40) for i in range(120))  # 40 a, 40 b, 40 c


def all_shuffles(text: str, at: CutName = "characters") -> set[str]:
    return {shuffled(text, np.random.default_rng(seed), at) for seed in range(100)}


def test_a_long_text_is_cut_into_equal_thirds_that_change_places():
    parts = ("a" * 40, "b" * 40, "c" * 40)
    orders = {" ".join(order) for order in permutations(parts)}
    assert all_shuffles(LONG) == orders - {" ".join(parts)}


def test_a_text_of_a_hundred_characters_stays_and_one_more_does_not():
    assert all_shuffles(LONG[:100]) == {LONG[:100]}
    assert LONG[:101] not in all_shuffles(LONG[:101])


@pytest.mark.parametrize("length", [101, 102, 103, 1000])
def test_no_character_is_lost_and_parts_differ_by_one_at_most(length):
    text = "".join(chr(0x4E00 + i) for i in range(length))
    for found in all_shuffles(text):
        parts = found.split(" ")
        assert sorted("".join(parts)) == sorted(text)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_words_stay_whole_where_words_are_cut_between():
    text = " ".join(f"word{i:02}" for i in range(30))
    found = all_shuffles(text, "words")
    assert len(found) == 5 and text not in found
    for other in found:
        numbers = [int(word[4:]) for word in other.split(" ")]
        assert sorted(numbers) == list(range(30))
        assert sum(b != a + 1 for a, b in pairwise(numbers)) in (1, 2)  # no part is cut itself


def test_sentences_stay_whole_where_sentences_are_cut_between():
    sentences = [f"Sentence number {i} ends here{mark}" for i, mark in enumerate('.!?.…."'[:6])]
    text = " ".join(sentences)
    for found in all_shuffles(text, "sentences"):
        assert found != text
        assert sorted(re.split(r"(?<=[.!?…]) ", found)) == sorted(sentences)


def test_sentences_end_in_japanese_and_at_an_empty_line_too():
    text = "これは文です。" * 20
    for found in all_shuffles(text, "sentences"):
        assert found.count(" ") == 2 and sorted(found.replace(" ", "")) == sorted(text)
        assert all(part.endswith("。") for part in found.split(" "))
    title, one, two = "A title", "w" * 50, "v" * 50
    found = all_shuffles(f"{title}\n\n{one}\n\n{two}", "sentences")
    assert f"{two} {one} {title}" in found


def test_a_text_with_too_few_places_to_cut_stays_as_it_is():
    assert all_shuffles("x" * 300, "words") == {"x" * 300}
    one_break = "x" * 150 + " " + "y" * 150
    assert all_shuffles(one_break, "words") == {one_break}
