import numpy as np
import pytest

from tercet.data.batches.masking import Masking
from tercet.data.batches.whole_words import marked_pieces, unmarked, word_starts
from tercet.models.tokens import Tokenizer
from tests.models.test_tokens import EVERY, across_words, metaspace
from tests.toy import SENTENCES, byte_bpe, wordpiece

TEXT = "encrypting musical terminology in the file"


def words_of(build, text: str) -> list[tuple[str, int]]:
    """The characters of each word, without spaces around, and how many tokens it has."""
    tokenizer = Tokenizer(build())
    (encoding,) = tokenizer.bare([text])
    words: list[list[tuple[int, int]]] = []
    for start, span in zip(word_starts(text, encoding), encoding.offsets, strict=True):
        if start:
            words.append([])
        words[-1].append(span)
    return [(text[word[0][0] : word[-1][1]].strip(), len(word)) for word in words]


@pytest.mark.parametrize("build", [b for b in EVERY if b is not across_words])
def test_words_are_what_stands_between_spaces(build):
    words = words_of(build, TEXT)
    assert [word for word, _ in words] == TEXT.split()
    assert min(count for _, count in words[:3]) > 1  # or whole words would be nothing special


def test_a_tokenizer_without_words_of_its_own_is_cut_at_spaces():
    (encoding,) = Tokenizer(across_words()).bare([TEXT])
    assert len(set(encoding.word_ids)) == 1
    words = words_of(across_words, TEXT)
    # A token that holds two words begins one and ends another, so there may be fewer than spaces.
    assert len(TEXT.split()) // 2 < len(words) <= len(TEXT.split())


@pytest.mark.parametrize("text", ["日本語の文字です", "ภาษาไทยไม่มีช่องว่าง", "中文没有空格"])
def test_where_a_script_has_no_spaces_each_token_is_a_word(text):
    build = across_words
    (encoding,) = Tokenizer(build()).bare([text])
    starts = word_starts(text, encoding)
    spans = np.array(encoding.offsets)
    assert len(starts) > 1 or spans[0].tolist() == [0, len(text)]
    new = np.r_[True, spans[1:, 0] >= spans[:-1, 1]]
    assert (starts == new).all()


def test_bytes_of_one_character_stay_together():
    (encoding,) = Tokenizer(byte_bpe()).bare(["語文"])
    assert len(encoding.ids) == 6  # three bytes each
    assert word_starts("語文", encoding).tolist() == [True, False, False] * 2


def test_korean_words_are_not_cut():
    text = "한국어 문자"
    starts = word_starts(text, Tokenizer(byte_bpe()).bare([text])[0])
    assert np.flatnonzero(starts).tolist() == [0, 9] and len(starts) == 16


@pytest.mark.parametrize("build", EVERY)
def test_pieces_are_the_stock_ids_when_they_are_short_enough(build):
    stock = build()
    pieces = marked_pieces(Tokenizer(stock), list(SENTENCES), 1_000)
    assert [unmarked(p)[0].tolist() for p in pieces] == stock(list(SENTENCES))["input_ids"]


@pytest.mark.parametrize("build", [wordpiece, metaspace])
def test_a_long_text_becomes_several_with_special_tokens_around_each(build):
    tokenizer = Tokenizer(build())
    head, tail = tokenizer.around
    text = " ".join(SENTENCES)
    (whole,) = tokenizer.bare([text])
    pieces = [unmarked(p) for p in marked_pieces(tokenizer, [text, ""], 10)]
    assert len(pieces) > 3 and all(len(ids) <= 10 for ids, _ in pieces)
    bodies = [ids[len(head) : len(ids) - len(tail)].tolist() for ids, _ in pieces]
    assert [i for body in bodies for i in body] == whole.ids
    assert all(ids[: len(head)].tolist() == head for ids, _ in pieces)
    assert all(ids[len(ids) - len(tail) :].tolist() == tail for ids, _ in pieces)
    assert all(words[0] == 0 and (np.diff(words) >= 0).all() for _, words in pieces)


def test_whole_words_are_masked_with_their_share_at_8192_tokens():
    """Trap B12 of BGE-M3."""
    (marked,) = marked_pieces(Tokenizer(wordpiece()), [" ".join([TEXT] * 800)], 8_192)[:1]
    ids, words = unmarked(marked)
    assert len(ids) == 8_192
    allowed = ~np.isin(ids, wordpiece().all_special_ids)
    mask = Masking(probability=0.3)
    shares = []
    for seed in range(20):
        _, chosen = mask(
            ids, allowed, np.random.default_rng(seed), mask=4, vocabulary=250, words=words
        )
        assert not chosen[~allowed].any()
        inside = np.flatnonzero((words[1:] == words[:-1]) & allowed[1:] & allowed[:-1])
        assert len(inside) > 100 and (chosen[inside] == chosen[inside + 1]).all()
        shares.append(chosen[allowed].mean())
    # Some 3,000 words: one share has a deviation of about 0.01, the mean of twenty 0.002.
    assert np.mean(shares) == pytest.approx(0.3, abs=0.008)


def test_masks_of_single_tokens_are_what_they_were():
    ids, allowed = np.arange(5, 25), np.ones(20, dtype=bool)
    masking = Masking(probability=0.5)
    each = masking(ids, allowed, np.random.default_rng(3), mask=4, vocabulary=9)
    alone = masking(
        ids, allowed, np.random.default_rng(3), mask=4, vocabulary=9, words=np.arange(20)
    )
    assert all((a == b).all() for a, b in zip(each, alone, strict=True))
