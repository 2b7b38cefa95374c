import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from tercet.errors import ModelError, RecipeError
from tercet.models.tokens import Form, Tokenizer, Tokens
from tests.toy import SENTENCES, byte_bpe, wordpiece


def _stock(fast: FastTokenizer, trainer) -> transformers.PreTrainedTokenizerFast:
    fast.train_from_iterator(SENTENCES, trainer)
    fast.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def metaspace() -> transformers.PreTrainedTokenizerFast:
    """As SentencePiece cuts: a token begins with the space before it; BOS before a text."""
    fast = FastTokenizer(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    return _stock(fast, trainer)


def across_words() -> transformers.PreTrainedTokenizerFast:
    """As Llama 2: spaces are letters, so a token may hold two words, or end in a space."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))  # pyright: ignore
    fast.normalizer = normalizers.Sequence(  # pyright: ignore
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>"]
    return _stock(fast, trainers.BpeTrainer(vocab_size=300, special_tokens=special))


def trimmed_bpe() -> transformers.PreTrainedTokenizerFast:
    """As Llama 3: byte-level, its offsets without the space before a word, and a BOS."""
    stock = byte_bpe()
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    stock.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), template]  # pyright: ignore
    )
    return stock


EVERY = [wordpiece, byte_bpe, trimmed_bpe, metaspace, across_words]
TEXTS = ["a small web server", "x", "", "maps of rivers, mountains and the moon"]


@pytest.mark.parametrize("build", EVERY)
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


@pytest.mark.parametrize("build", EVERY)
@pytest.mark.parametrize("prompt", ["query: ", "Instruct: find it\nQuery: ", "7"])
@pytest.mark.parametrize("text", ["a small server", "7 days", "\nline", "für äöü", "한국어 文字"])
def test_the_prompt_is_never_pooled_and_the_text_always_is(build, prompt, text):
    stock = build()
    tokens = Tokenizer(stock)([text], 200, prompt, Form(pool_prompt=False))
    packed = tokens.pack()
    offsets = stock(prompt + text, return_offsets_mapping=True)["offset_mapping"]
    for (start, end), pooled in zip(offsets, packed.pooled.tolist(), strict=True):
        if end > start:  # not a special token
            assert pooled == (end > len(prompt)), (start, end)


def test_an_empty_text_after_an_instruction_pools_everything():
    tokens = Tokenizer(wordpiece())(["", "a server"], 50, "query: ", Form(pool_prompt=False))
    packed = tokens.pack()
    first = packed.pooled[: packed.lengths[0]]
    assert bool(first.all())
    assert not bool(packed.pooled[packed.lengths[0]])


def test_an_instruction_that_fills_the_window_leaves_all_pooled():
    tokens = Tokenizer(wordpiece())(["server"], 5, "a b c d e f g h ", Form(pool_prompt=False))
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
    tokens = Tokens([np.array([250_001, 65_536], dtype=np.int32)], [0], 0)
    assert tokens.pack().ids.tolist() == [250_001, 65_536]


def pooled_of(tokens: Tokens, row: int) -> list[bool]:
    return tokens.pack([row]).pooled.tolist()


@pytest.mark.parametrize("build", EVERY)
@pytest.mark.parametrize("suffix", [" [end]", "</s>", "7", "\nanswer:"])
@pytest.mark.parametrize(
    "text", ["a small server", "7 days", "\nline  ", "für äöü 1", "!@#$%^&*() the moon"]
)
def test_a_suffix_is_read_but_not_pooled_and_the_text_always_is(build, suffix, text):  # spec 10
    stock, prompt = build(), "find: "
    form = Form(pool_prompt=False, pool_special=False, suffix=suffix)
    tokens = Tokenizer(stock)([text], 200, prompt, form)
    whole = stock(prompt + text + suffix, return_offsets_mapping=True)
    assert tokens.ids[0].tolist() == whole["input_ids"]
    start, end = len(prompt), len(prompt + text)
    for (a, b), pooled in zip(whole["offset_mapping"], pooled_of(tokens, 0), strict=True):
        if b > a:  # neither a special token nor a trimmed space
            assert pooled == (b > start and a < end), (a, b)
        elif b == 0:
            assert not pooled


@pytest.mark.parametrize("build", EVERY)
def test_a_long_text_is_cut_between_prompt_and_suffix(build):
    stock, prompt, suffix = build(), "count words: ", " [end]"
    form = Form(pool_prompt=False, pool_special=False, suffix=suffix)
    tokenizer = Tokenizer(stock)
    whole = tokenizer([TEXTS[3]], 200, prompt, form)
    room = whole.lengths[0] - 5
    cut = tokenizer([TEXTS[3]], room, prompt, form)
    assert (whole.truncated, cut.truncated, cut.lengths) == (0, 1, [room])
    kept = [i for i, pooled in enumerate(pooled_of(whole, 0)) if pooled]
    expected = np.delete(whole.ids[0], kept[-5:])
    assert cut.ids[0].tolist() == expected.tolist()
    assert pooled_of(cut, 0) == np.delete(pooled_of(whole, 0), kept[-5:]).tolist()
    assert sum(pooled_of(cut, 0)) == len(kept) - 5 > 0


def test_prompt_and_suffix_that_fill_the_window_pool_everything():
    form = Form(pool_prompt=False, suffix=" of files")
    tokens = Tokenizer(wordpiece())(["server"], 7, "a b c d e f g h ", form)
    stock = wordpiece()
    assert stock.decode(tokens.ids[0]) == "[CLS] a b c of files [SEP]"
    assert all(pooled_of(tokens, 0))


def test_a_pooled_suffix_and_the_special_tokens_are_part_of_the_vector():
    tokenizer = Tokenizer(wordpiece())
    asked = {"suffix": " files", "pool_prompt": False}
    some = tokenizer(["the moon"], 50, "count ", Form(**asked))
    assert pooled_of(some, 0) == [False, False, True, True, False, True]  # [CLS] ... [SEP]
    more = tokenizer(["the moon"], 50, "count ", Form(**asked, pool_suffix=True))
    assert pooled_of(more, 0) == [False, False, True, True, True, True]
    none = tokenizer(["the moon"], 50, "", Form(suffix=" files", pool_special=False))
    assert pooled_of(none, 0) == [False, True, True, False, False]


@pytest.mark.parametrize("build", EVERY)
def test_an_empty_text_pools_all_tokens_whatever_is_around_it(build):
    form = Form(pool_prompt=False, pool_special=False, suffix=" files")
    tokens = Tokenizer(build())(["", "the moon"], 50, "count ", form)
    assert all(pooled_of(tokens, 0)) and not all(pooled_of(tokens, 1))


def test_the_end_of_text_token_can_be_asked_for_without_changing_the_tokenizer():
    stock = metaspace()
    tokenizer = Tokenizer(stock)
    end = tokenizer(["a server", ""], 50, "", Form(end=True, pool_special=False))
    assert [row[-1] for row in end.ids] == [stock.eos_token_id] * 2
    assert pooled_of(end, 0)[0] is False and pooled_of(end, 0)[-1] is True
    plain = tokenizer(["a server"], 50)
    assert end.ids[0].tolist() == [*plain.ids[0], stock.eos_token_id]
    cut = tokenizer(["a small web server"], 4, "", Form(end=True))
    assert cut.lengths == [4] and cut.ids[0][-1] == stock.eos_token_id
    bert = wordpiece()
    assert Tokenizer(bert)(["a"], 9, "", Form(end=True)).ids[0].tolist() == bert("a")["input_ids"]


def test_a_tokenizer_without_an_end_of_text_cannot_echo():
    stock = byte_bpe()
    stock.eos_token = None
    with pytest.raises(ModelError, match="or echo, needs an end-of-text token"):
        Tokenizer(stock)(["a"], 50, "", Form(echo="query"))


@pytest.mark.parametrize("build", EVERY)
@pytest.mark.parametrize("role", ["query", "document"])
@pytest.mark.parametrize("prompt", ["", "find the program"])
def test_echo_repeats_the_same_ids_and_pools_the_second_time(build, role, prompt):  # spec 13
    stock = build()

    def ids(piece: str) -> list[int]:
        return stock(piece, add_special_tokens=False)["input_ids"]

    texts = ["a small  server", "the moon and the rivers"]
    tokens = Tokenizer(stock)(texts, 200, prompt, Form(echo=role))
    name = role.capitalize()
    lead = ids(f"Instruct:{prompt},\n{name}:" if prompt else f"{name}:")
    begin = [1] if build in (metaspace, across_words, trimmed_bpe) else []
    begin = [stock.cls_token_id] if build is wordpiece else begin
    end = stock.sep_token_id if build is wordpiece else stock.eos_token_id
    for row, text in enumerate(texts):
        before = [*begin, *lead, *ids(text), *ids(f"\n{name} again:")]
        assert tokens.ids[row].tolist() == [*before, *ids(text), end]
        assert pooled_of(tokens, row) == [False] * len(before) + [True] * (len(ids(text)) + 1)


def test_echo_cuts_both_copies_alike_and_keeps_the_end():
    stock = metaspace()
    tokenizer, form = Tokenizer(stock), Form(echo="query")
    whole = tokenizer([TEXTS[3]], 200, "", form)
    copy = sum(pooled_of(whole, 0)) - 1
    cut = tokenizer([TEXTS[3]], whole.lengths[0] - 5, "", form)  # room for 2.5 tokens less, twice
    assert cut.truncated == 1 and cut.lengths[0] == whole.lengths[0] - 6
    assert sum(pooled_of(cut, 0)) == copy - 3 + 1
    assert cut.ids[0][-(copy - 2) :].tolist() == [*whole.ids[0][-copy - 1 : -4], stock.eos_token_id]
    tiny = tokenizer([TEXTS[3]], 6, "a long instruction", form)
    assert tiny.truncated == 1 and tiny.lengths == [6] and tiny.ids[0][-1] == stock.eos_token_id


def test_spans_are_the_characters_of_the_text_and_tell_how_much_was_read():
    tokenizer, prompt = Tokenizer(trimmed_bpe()), "find: "
    text = "draw maps"
    form = Form(suffix=" now")
    tokens = tokenizer([text, "", "x"], 200, prompt, form, spans=True)
    of_text = [tuple(span) for span in tokens.spans[0].tolist() if span[1] > 0]
    joined = "".join(text[max(a, 0) : b] for a, b in of_text)
    assert joined == "drawmaps"  # offsets are trimmed
    assert (tokens.spans[0][:3] == -1).all() and (tokens.spans[1] == -1).all()
    assert tokens.read == [len(text), 0, 1]
    whole = tokenizer([text], 200, "", spans=True)
    cut = tokenizer([text], whole.lengths[0] - 1, "", spans=True)
    assert cut.read == [whole.spans[0][-2, 1]]
    assert cut.spans[0].tolist() == whole.spans[0][:-1].tolist()


def test_joined_parts_pack_like_their_texts():
    tokenizer = Tokenizer(wordpiece())
    plain = tokenizer(TEXTS[:2], 50)
    ended = tokenizer(TEXTS[2:], 50, "", Form(suffix=" files"))
    joined = Tokens.join([plain, ended]).pack()
    assert torch.equal(joined.pooled, torch.cat([plain.pack().pooled, ended.pack().pooled]))
    assert not bool(joined.pooled.all())


# ---- MCLS ------------------------------------------------------------------------------------

LONG = " ".join(SENTENCES[:4])


@pytest.mark.parametrize("build", [wordpiece, metaspace])
@pytest.mark.parametrize("every", [1, 4, 7])
def test_a_cls_stands_before_every_n_tokens(build, every):
    """Trap B11 of BGE-M3. B11: places and number of CLS."""
    stock = build()
    tokenizer = Tokenizer(stock)
    cls, tail = tokenizer.around
    for text in [LONG, "x", *SENTENCES]:
        plain = tokenizer([text], 500).ids[0].tolist()
        body = plain[1 : len(plain) - len(tail)]
        parts = [body[i : i + every] for i in range(0, len(body), every)]
        expected = [i for part in parts for i in [*cls, *part]] + tail
        (found,) = tokenizer([text], 500, form=Form(cls_every=every)).ids
        assert found.tolist() == expected
        places = [i for i in range(len(expected) - len(tail)) if i % (every + 1) == 0]
        assert all(expected[i] == cls[0] for i in places) and len(places) == len(parts)


def test_a_text_that_is_short_enough_is_as_without():
    """Trap B11 of BGE-M3. B11: shorter than n tokens, or an empty one."""
    tokenizer = Tokenizer(wordpiece())
    texts = ["", "x", SENTENCES[0]]
    plain, found = tokenizer(texts, 500), tokenizer(texts, 500, form=Form(cls_every=256))
    assert [a.tolist() for a in plain.ids] == [a.tolist() for a in found.ids]
    assert plain.skipped == found.skipped


def test_inserted_tokens_count_towards_the_limit_and_the_end_stays():
    """Trap B11 of BGE-M3. B11: as many tokens of the text as fit."""
    tokenizer, form = Tokenizer(wordpiece()), Form(cls_every=4)
    (whole,) = tokenizer([LONG], 500, form=form).ids
    assert len(whole) > 30
    for limit in range(2, len(whole) + 3):
        found = tokenizer([LONG], limit, form=form)
        (ids,) = found.ids
        kept = min(limit, len(whole))
        if 2 < kept < len(whole) and (kept - 1) % 5 == 1:
            kept -= 1  # a CLS with nothing after it would be the last
        assert ids.tolist() == [*whole[: kept - 1], 2]
        assert found.truncated == (kept < len(whole))


def test_places_in_the_text_and_pooled_tokens_are_kept():
    """Trap B11 of BGE-M3. B11: character spans, a prompt and a suffix."""
    tokenizer = Tokenizer(wordpiece())
    plain = Form(pool_prompt=False, suffix=" the moon", cls_every=None)
    spread = Form(pool_prompt=False, suffix=" the moon", cls_every=3)
    without = tokenizer([LONG], 500, "find mail: ", plain, spans=True)
    found = tokenizer([LONG], 500, "find mail: ", spread, spans=True)
    inserted = np.zeros(len(found.ids[0]), dtype=bool)
    inserted[4:-1:4] = True
    assert inserted.sum() > 5 and (found.ids[0][inserted] == 1).all()
    assert (found.spans[0][inserted] == -1).all()
    assert (found.spans[0][~inserted] == without.spans[0]).all()
    assert found.read == without.read
    kept = ~torch.from_numpy(inserted)
    assert torch.equal(found.pack().pooled[kept], without.pack().pooled)
    assert not without.pack().pooled.all() and found.skipped[0] > without.skipped[0]


def test_a_text_has_the_same_tokens_in_any_batch():
    """Trap B11 of BGE-M3. B11."""
    tokenizer, form = Tokenizer(wordpiece()), Form(cls_every=3)
    together = tokenizer([*SENTENCES, LONG], 30, form=form)
    for number, text in enumerate([*SENTENCES, LONG]):
        assert together.ids[number].tolist() == tokenizer([text], 30, form=form).ids[0].tolist()


def test_cls_every_without_a_cls_token_is_refused():
    with pytest.raises(ModelError, match="this tokenizer puts 0 there"):
        Tokenizer(byte_bpe())(["x"], 30, form=Form(cls_every=3))
    with pytest.raises(RecipeError, match="cls_every must be at least 1, and without echo; got 0"):
        Form(cls_every=0)
    with pytest.raises(RecipeError, match="without echo; got 3 with echo"):
        Form(cls_every=3, echo="query")


def long_texts(random: np.random.Generator) -> list[str]:
    """Long texts of words, of one word, of white space, of other scripts, and of repetitions."""
    words = " ".join(SENTENCES).split()
    ordinary = " ".join(random.choice(words, 2_000))
    huge = " ".join(word * int(times) for word in words for times in random.choice([1, 300], 2))
    return [
        ordinary,
        ordinary.replace(" ", "\n\n  "),
        "a" * 9_000,
        "ab" * 4_500,
        " " * 9_000 + "x",
        "".join(random.choice(list("abc"), 9_000)),
        "".join(random.choice(list("0123456789"), 9_000)),
        "".join(random.choice(["é", "e\u0301", "ﬁ", "😀", " ", "<s>", "</s>", "web"], 5_000)),
        "".join(map(chr, random.integers(0x4E00, 0x9FFF, 9_000))),
        huge[:20_000],
    ]


FORMS = {
    "plain": Form(),
    "suffix": Form(suffix=" file</s>"),
    "prompt left out": Form(pool_prompt=False),
    "echo": Form(echo="query"),
    "cls": Form(cls_every=7),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", EVERY)
def test_a_long_text_that_is_cut_before_it_is_tokenized_has_the_same_tokens(
    build, form, monkeypatch
):
    tokenizer = Tokenizer(build())
    if form == "cls" and len(tokenizer.around[0]) != 1:
        pytest.skip("has no token before a text")
    texts, cuts = long_texts(np.random.default_rng(len(form))), []
    decisive = Tokenizer._decisive

    def counted(self, some, *more):
        found = decisive(self, some, *more)
        cuts.extend(len(part) < len(text) for part, text in zip(found, some, strict=True))
        return found

    def made() -> list[Tokens]:
        return [
            tokenizer(texts, limit, prompt, FORMS[form], spans=bool(prompt))
            for limit, prompt in ((2, ""), (16, "read the mail: "), (60, ""))
        ]

    monkeypatch.setattr(Tokenizer, "_decisive", counted)
    cut = made()
    monkeypatch.setattr(Tokenizer, "_decisive", lambda _, some, *more: some)
    for one, other in zip(cut, made(), strict=True):
        assert [row.tolist() for row in one.ids] == [row.tolist() for row in other.ids]
        assert [x.tolist() for x in one.spans] == [x.tolist() for x in other.spans]
        assert (one.skipped, one.left_out, one.read, one.cuts, one.truncated) == (
            (other.skipped, other.left_out, other.read, other.cuts, other.truncated)
        )
    assert sum(cuts) >= 6  # the ordinary texts at least


def test_texts_of_many_characters_are_tokenized_few_at_a_time(monkeypatch):
    monkeypatch.setattr("tercet.models.tokens._LETTERS_AT_ONCE", 50)
    tokenizer = Tokenizer(wordpiece())
    few = tokenizer(SENTENCES, 32, "read: ")
    monkeypatch.undo()
    assert [row.tolist() for row in few.ids] == [
        row.tolist() for row in tokenizer(SENTENCES, 32, "read: ").ids
    ]
