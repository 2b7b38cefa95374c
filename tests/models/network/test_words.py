import numpy as np
import pytest
import torch

from tercet.models.network.words import Words, word_means

# Spec example: BOS t11 t12 t21 t22 t23 t31, for the words "abcd", "xyz" and "q".
EXAMPLE = np.array([[-1, -1], [0, 2], [2, 4], [4, 6], [6, 7], [7, 8], [8, 10]])


def loop(states, spans, words: Words, *, predictor: bool) -> list[torch.Tensor]:
    """The definition, a word at a time."""
    means = []
    for start, end in zip(words.starts, words.ends, strict=True):
        own = [p for p, (a, b) in enumerate(spans) if a < end and b > start]
        chosen = [max(p - 1, 0) for p in own] if predictor else own
        empty = torch.zeros(states.shape[1])
        means.append(torch.stack([states[p] for p in chosen]).mean(0) if own else empty)
    return means


def test_words_are_means_of_their_own_tokens_or_of_those_before_them():  # spec 12
    bos, t11, t12, t21, t22, t23, t31 = states = torch.randn(7, 3)
    words = [Words.joined(["abcd", "xyz", "q"])]
    (own,) = word_means(states, [EXAMPLE], words)
    expected = [(t11 + t12) / 2, (t21 + t22 + t23) / 3, t31]
    torch.testing.assert_close(own, torch.stack(expected))
    (before,) = word_means(states, [EXAMPLE], words, predictor=True)
    expected = [(bos + t11) / 2, (t12 + t21 + t22) / 3, t23]
    torch.testing.assert_close(before, torch.stack(expected))


def test_the_first_token_of_a_text_keeps_its_state_where_nothing_is_before_it():
    states = torch.randn(9, 3)
    spans = [EXAMPLE[1:4], EXAMPLE[1:]]  # no BOS
    words = [Words.joined(["abcd"]), Words.joined(["abcd", "xyz", "q"])]
    first, second = word_means(states, spans, words, predictor=True)
    torch.testing.assert_close(first[0], (states[0] + states[0]) / 2)
    torch.testing.assert_close(second[0], (states[3] + states[3]) / 2)  # not states[2]


@pytest.mark.parametrize("predictor", [False, True])
def test_all_texts_at_once_equal_a_loop(predictor):  # spec 12
    # A token over two words, one of a space alone, a word without a token, an empty text.
    texts = [["ab", "c", "def"], [], ["x", "yy"]]
    spans = [
        np.array([[-1, -1], [0, 4], [4, 5], [5, 7], [7, 8]]),
        np.array([[-1, -1]]),
        np.array([[0, 1], [-1, -1]]),
    ]
    words = [Words.joined(text) for text in texts]
    states = torch.randn(8, 5)
    found = word_means(states, spans, words, predictor=predictor)
    for of_text, part, text_spans, text_words in zip(
        found, states.split([5, 1, 2]), spans, words, strict=True
    ):
        assert of_text.shape == (len(text_words), 5)
        for vector, expected in zip(
            of_text, loop(part, text_spans, text_words, predictor=predictor), strict=True
        ):
            torch.testing.assert_close(vector, expected)


def test_tokens_of_one_letter_turned_around_count_for_their_own_word():
    words = Words.joined(["ab", "c"])
    token, word = words.of_tokens(np.array([[3, 4], [0, 1], [1, 2]]))
    assert (token.tolist(), word.tolist()) == ([1, 2, 0], [0, 0, 1])


def test_words_of_a_text_stand_between_white_space():
    words = Words.of("  to be,\n or\tnot ")
    assert words.starts.tolist() == [2, 5, 10, 13]
    assert words.ends.tolist() == [4, 8, 12, 16]
    assert len(Words.of(" \n")) == 0


def test_a_word_counts_as_read_when_its_last_character_was():
    words = Words.joined(["ab", "c", "def"])
    assert [len(words.within(n)) for n in range(9)] == [0, 0, 1, 1, 2, 2, 2, 2, 3]


def test_bfloat16_states_are_summed_in_float32():
    states = torch.full((257, 1), 1.0, dtype=torch.bfloat16)
    states[-1] = 130.0  # the sum is 386; in bfloat16 it would be 384 or 388
    spans = np.array([[i, i + 1] for i in range(257)])
    (mean,) = word_means(states, [spans], [Words.joined(["a" * 257])])
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(386 / 257, rel=1e-6)
