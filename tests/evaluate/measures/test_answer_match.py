import sys
import unicodedata

import numpy as np
import pytest

from tercet.evaluate.measures.answer_match import answer_tokens, with_answers

WORDS = ["Paris", "in", "the", "naïve", "42", "½", "$", "-", "_", "ΟΔΟΣ", "กิน", "\u200b", "東京"]


def slow_tokens(text):
    """Character by character: a run of letters, numbers and marks, or one symbol."""
    found, run = [], ""
    for character in f"{unicodedata.normalize('NFD', text)} ":
        kind = unicodedata.category(character)[0]
        if kind in "LNM":
            run += character
            continue
        found += [run] if run else []
        run = ""
        found += [character] if kind not in "ZC" else []
    return [token.lower() for token in found]


def slow_holds(text, answers):
    tokens = slow_tokens(text)
    for answer in map(slow_tokens, answers):
        places = range(len(tokens) - len(answer) + 1)
        if answer and any(tokens[p : p + len(answer)] == answer for p in places):
            return True
    return False


def drawn(random, most):
    glue = [" ", "", "  ", "\n", ", "]
    count = random.integers(0, most)
    return "".join(f"{random.choice(WORDS)}{random.choice(glue)}" for _ in range(count))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Naïve (1)", ["nai\u0308ve", "(", "1", ")"]),
        ("U.S.A.", ["u", ".", "s", ".", "a", "."]),
        ("$1,000", ["$", "1", ",", "000"]),
        ("a_b", ["a", "_", "b"]),
        ("กิน", ["กิน"]),  # a vowel sign is a mark, and belongs to its word
        ("東京 は", ["東京", "は"]),
        ("ΟΔΟΣ.Δ", ["οδος", ".", "δ"]),  # the final sigma is that of the word, not of the text
        (" \u200b\t", []),
        ("", []),
    ],
)
def test_tokens_are_runs_of_letters_numbers_and_marks_and_single_symbols(text, tokens):
    assert answer_tokens(text) == tokens


def test_characters_of_every_category_are_parted_as_the_slow_loop_does():
    everything = (chr(code) for code in range(sys.maxunicode + 1))
    kinds: dict[str, list[str]] = {}
    for character in everything:
        kinds.setdefault(unicodedata.category(character), []).append(character)
    del kinds["Cs"]  # halves of characters are in no text
    for characters in kinds.values():
        text = "x".join(characters[:500])
        assert answer_tokens(text) == slow_tokens(text)


def holds_answer(text: str, answers: list[str]) -> bool:
    return len(with_answers(np.array([[0]]), [text], [answers]).docs) == 1


def test_an_answer_is_found_where_its_tokens_stand_one_after_the_other():
    text = "The Eiffel  Tower\n(1889) is in Paris."
    for answer in ("eiffel tower", "TOWER (1889)", "paris", "Tower ( 1889"):
        assert holds_answer(text, [answer])
    for answer in ("Eiffel (1889)", "tow", "188", "Tower Eiffel", "", " ", "\u200b"):
        assert not holds_answer(text, [answer])
    assert holds_answer(text, ["Rome", "Paris"]) and not holds_answer(text, [])
    assert not holds_answer("", ["", " "])
    composed, parted = "Café", unicodedata.normalize("NFD", "Café")
    assert (
        composed != parted and holds_answer(composed, [parted]) and holds_answer(parted, [composed])
    )


def test_what_is_found_is_what_a_slow_search_finds():
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(2_000):
        text, answers = drawn(random, 12), [drawn(random, 3) for _ in range(2)]
        assert answer_tokens(text) == slow_tokens(text)
        expected = slow_holds(text, answers)
        assert holds_answer(text, answers) == expected, (text, answers)
        seen.add(expected)
    assert seen == {True, False}


def test_ranked_documents_with_an_answer_are_relevant_and_no_others_are_looked_at():
    """3 queries, 4 documents; the last document holds every answer and is ranked nowhere."""
    documents = ["red fox", "a Red, fox", "blue", "red fox blue green"]
    ranking = np.array([[1, 0, -1], [2, 0, 1], [0, 1, 2]])
    found = with_answers(ranking, documents, [("red fox",), ("fox", "BLUE"), ("green",)])
    assert found.docs.tolist() == [0, 0, 1, 2]
    assert found.offsets.tolist() == [0, 1, 4, 4]
    assert set(found.grades.tolist()) == {1}
    assert found.grades_of(ranking).tolist() == [[0, 1, 0], [1, 1, 1], [0, 0, 0]]
