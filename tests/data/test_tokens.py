import pytest
import torch

from tercet.data.tokens import Tokenizer
from tercet.errors import ModelError
from tests.toy import byte_bpe, wordpiece

TEXTS = ["a small web server", "x", "", "maps of rivers, mountains and the moon"]


@pytest.mark.parametrize("build", [wordpiece, byte_bpe])
def test_ids_are_those_of_the_stock_tokenizer(build):
    stock = build()
    ids = Tokenizer(stock)(TEXTS[:2] + TEXTS[3:], 100).ids
    assert [row.tolist() for row in ids] == stock(TEXTS[:2] + TEXTS[3:])["input_ids"]


def test_a_long_text_is_cut_as_stock_truncation_cuts_it_and_counted():
    stock = wordpiece()
    tokens = Tokenizer(stock)(TEXTS, 6)
    expected = stock(TEXTS, truncation=True, max_length=6)["input_ids"]
    assert [row.tolist() for row in tokens.ids] == expected
    assert tokens.truncated == sum(len(row) > 6 for row in stock(TEXTS)["input_ids"]) > 0


def test_an_empty_text_has_its_special_tokens_or_one_filler():
    assert Tokenizer(wordpiece())([""], 8).lengths == [2]
    stock = byte_bpe()
    assert Tokenizer(stock)([""], 8).ids[0].tolist() == [stock.eos_token_id]


@pytest.mark.parametrize("build", [wordpiece, byte_bpe])
@pytest.mark.parametrize("prompt", ["query: ", "Instruct: find it\nQuery: ", "7"])
@pytest.mark.parametrize("text", ["a small server", "7 days", "\nline", "für äöü", "한국어 文字"])
def test_the_prompt_is_never_pooled_and_the_text_always_is(build, prompt, text):
    stock = build()
    tokens = Tokenizer(stock)([text], 200, prompt, pool_prompt=False)
    packed = tokens.pack()
    offsets = stock(prompt + text, return_offsets_mapping=True)["offset_mapping"]
    for (start, end), pooled in zip(offsets, packed.pooled.tolist(), strict=True):
        if end > start:  # not a special token
            assert pooled == (end > len(prompt)), (start, end)


def test_an_empty_text_after_an_instruction_pools_everything():
    tokens = Tokenizer(wordpiece())(["", "a server"], 50, "query: ", pool_prompt=False)
    packed = tokens.pack()
    first = packed.pooled[: packed.lengths[0]]
    assert bool(first.all())
    assert not bool(packed.pooled[packed.lengths[0]])


def test_an_instruction_that_fills_the_window_leaves_all_pooled():
    tokens = Tokenizer(wordpiece())(["server"], 5, "a b c d e f g h ", pool_prompt=False)
    assert tokens.lengths == [5]
    assert bool(tokens.pack().pooled.all())


def test_packing_takes_texts_in_any_order():
    tokens = Tokenizer(wordpiece())(TEXTS, 100)
    packed = tokens.pack([3, 0])
    assert packed.lengths == [tokens.lengths[3], tokens.lengths[0]]
    assert packed.ids.tolist() == [*tokens.ids[3], *tokens.ids[0]]
    again = tokens.pack().take([3, 0])
    assert torch.equal(again.ids, packed.ids) and torch.equal(again.offsets, packed.offsets)


def test_append_end_changes_the_stock_tokenizer_too(tmp_path):
    from transformers import AutoTokenizer

    stock = byte_bpe()
    tokens = Tokenizer(stock, append_end=True)(["a server", ""], 50)
    assert all(row[-1] == stock.eos_token_id for row in tokens.ids)
    stock.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded("a server")["input_ids"] == tokens.ids[0].tolist()
    assert Tokenizer(reloaded, append_end=True)(["a server"], 50).ids[0].tolist() == (
        tokens.ids[0].tolist()
    )


def test_append_end_is_kept_when_a_text_is_cut():
    stock = byte_bpe()
    tokens = Tokenizer(stock, append_end=True)(["a small web server for static files"], 4)
    assert tokens.lengths == [4]
    assert tokens.ids[0][-1] == stock.eos_token_id


def test_a_tokenizer_without_an_end_of_text_is_refused_for_last_pooling():
    stock = byte_bpe()
    stock.eos_token = None
    with pytest.raises(ModelError, match="needs an end-of-text token"):
        Tokenizer(stock, append_end=True)


def test_token_ids_above_65535_survive():  # trap A9
    import numpy as np

    from tercet.data.tokens import Tokens

    tokens = Tokens([np.array([250_001, 65_536], dtype=np.int32)], [0], 0)
    assert tokens.pack().ids.tolist() == [250_001, 65_536]
