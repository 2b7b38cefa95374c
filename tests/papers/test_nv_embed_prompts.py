"""NV-Embed (arXiv 2405.17428), test 6: which tokens are pooled, with instructions and without.

The oracle knows neither our tokenizer class nor any offsets: it adds up how many bytes each token
of the stock tokenizer stands for, and so tells which part of prompt and text it covers.
"""

from itertools import product

import numpy as np
import pytest
import torch.nn.functional as F
import transformers as t
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tercet.models.embedder import Embedder, Settings
from tercet.models.network.backbone import Backbone
from tercet.models.settings import as_prompt
from tercet.models.tokens import Form, Tokenizer
from tests.toy import DECODERS, SENTENCES, byte_bpe, random_model

SPACED = as_prompt("find the package")  # the published form: its end is a space
PROMPTS = (SPACED, SPACED.rstrip(), "Query:\n", "find it: ", "find it:")
TEXTS = ("a small server", "7 days", "42", "\nline", "  two spaces", "für äöü", "한국어 文字", "x")
FORM = Form(pool_prompt=False, end=True)


def bytes_with_bos() -> t.PreTrainedTokenizerFast:
    """The byte-level tokenizer with BOS before every text, as Llama 3 has it."""
    stock = byte_bpe()
    stock.backend_tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return stock


def pieces() -> t.PreTrainedTokenizerFast:
    """As SentencePiece cuts: a token begins with the space before it."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    fast.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    fast.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<unk>", "<s>", "</s>"]
    lines = [*SENTENCES, *TEXTS, *PROMPTS, *["Q:a"] * 9]
    fast.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    return t.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def pieces_with_bos() -> t.PreTrainedTokenizerFast:
    """The same with BOS before every text, as Mistral's has it."""
    stock = pieces()
    stock.backend_tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return stock


BUILDS = (byte_bpe, bytes_with_bos, pieces, pieces_with_bos)


def bytes_of(stock: t.PreTrainedTokenizerFast, token: int) -> int:
    """How many bytes of a text a token stands for."""
    piece = stock.convert_ids_to_tokens([token])[0]
    if "▁" in stock.get_vocab():
        return len(piece.replace("▁", " ").encode())
    return len(piece)  # of the byte-level alphabet, a character is a byte


def expected(stock, prompt: str, text: str) -> tuple[list[int], list[bool]]:
    """Ids with BOS and EOS, and which are pooled: those that cover a byte of the text, and EOS."""
    body = stock(prompt + text, add_special_tokens=False)["input_ids"]
    # SentencePiece puts a space before a text that has none.
    added = "▁" in stock.get_vocab() and not (prompt + text).startswith(" ")
    place, border, pooled = -int(added), len(prompt.encode()), []
    for token in body:
        place += bytes_of(stock, token)
        pooled.append(place > border)
    assert place == len((prompt + text).encode())
    head = [1] if stock("a")["input_ids"][0] == 1 else []
    return [*head, *body, 2], [*(not prompt for _ in head), *pooled, True]


def test_the_oracle_tells_what_a_token_covers():
    """Test 6 of NV-Embed."""
    stock = pieces_with_bos()
    ids, pooled = expected(stock, "find it: ", "7 days")
    assert stock.decode(ids[1:-1]) == "find it: 7 days"
    assert len(ids) == len(pooled) and pooled[0] is False and pooled[-1] is True
    kept = [i for i, one in zip(ids, pooled, strict=True) if one]
    assert str(stock.decode(kept, skip_special_tokens=True)).strip() == "7 days"


@pytest.mark.parametrize("build", BUILDS)
def test_the_text_and_eos_are_pooled_and_bos_and_prompt_are_not(build):
    """Test 6 of NV-Embed."""
    stock = build()
    known = list(product(PROMPTS, TEXTS))
    wanted = [expected(stock, prompt, text) for prompt, text in known]
    tokenize = Tokenizer(build(), append_end=True)
    for (prompt, text), (ids, pooled) in zip(known, wanted, strict=True):
        packed = tokenize([text], 200, prompt, FORM).pack()
        assert packed.ids.tolist() == ids
        assert packed.pooled.tolist() == pooled, (prompt, text)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("text", TEXTS)
def test_bos_is_pooled_where_there_is_no_prompt(build, text):
    """Test 6 of NV-Embed."""
    ids, pooled = expected(build(), "", text)
    packed = Tokenizer(build(), append_end=True)([text], 200, "", FORM).pack()
    assert packed.ids.tolist() == ids
    assert packed.pooled.tolist() == pooled
    assert all(pooled)


@pytest.mark.parametrize("build", BUILDS)
def test_each_row_has_its_own_prompt_and_what_is_pooled_of_it_is_the_same_alone(build):
    """Test 6 of NV-Embed."""
    prompts = [SPACED, "", "find it: ", SPACED.rstrip(), "", "Query:\n"]
    texts = [TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[5], TEXTS[6], TEXTS[2]]
    tokenize = Tokenizer(build(), append_end=True)
    packed = tokenize(texts, 200, prompts, FORM).pack()
    rows = [expected(build(), *row) for row in zip(prompts, texts, strict=True)]
    assert packed.lengths == [len(ids) for ids, _ in rows]
    assert packed.ids.tolist() == [i for ids, _ in rows for i in ids]
    assert packed.pooled.tolist() == [one for _, pooled in rows for one in pooled]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("prompt", ["", *PROMPTS])
def test_a_cut_text_keeps_its_prompt_and_its_eos(build, prompt):
    """Test 6 of NV-Embed."""
    ids, pooled = expected(build(), prompt, SENTENCES[0] * 9)
    tokenize = Tokenizer(build(), append_end=True)
    begins = pooled.index(True) if prompt else 0
    for room in (begins + 2, begins + 5, len(ids) - 1):
        tokens = tokenize([SENTENCES[0] * 9], room, prompt, FORM)
        packed = tokens.pack()
        assert packed.ids.tolist() == [*ids[: room - 1], 2]
        assert packed.pooled.tolist() == [*pooled[: room - 1], True]
        assert tokens.truncated == 1
    assert tokenize([SENTENCES[0] * 9], len(ids), prompt, FORM).truncated == 0


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_of_an_empty_text_after_a_prompt_eos_alone_is_pooled(build, prompt):
    """Test 6 of NV-Embed."""
    packed = Tokenizer(build(), append_end=True)([""], 200, prompt, FORM).pack()
    assert packed.ids[-1] == 2
    assert packed.pooled.tolist() == [False] * (len(packed.ids) - 1) + [True]


@pytest.mark.parametrize("build", BUILDS)
def test_a_prompt_that_fills_the_window_leaves_eos_to_pool(build):
    """Test 6 of NV-Embed."""
    packed = Tokenizer(build(), append_end=True)(["text"], 6, SPACED * 3, FORM).pack()
    assert packed.lengths == [6]
    assert packed.pooled.tolist() == [False] * 5 + [True]


def test_bos_is_not_pooled_where_prompt_and_text_are_one_token():
    """Test 6 of NV-Embed."""
    ids, pooled = expected(pieces_with_bos(), "Q:", "a")
    assert (len(ids), pooled) == (3, [False, True, True])
    packed = Tokenizer(pieces_with_bos(), append_end=True)(["a"], 200, "Q:", FORM).pack()
    assert (packed.ids.tolist(), packed.pooled.tolist()) == (ids, pooled)


@pytest.mark.parametrize("build", BUILDS)
def test_eos_as_a_text_after_the_text_is_pooled_alike(build):
    """Test 6 of NV-Embed."""
    tokenize = Tokenizer(build())
    form = Form(pool_prompt=False, suffix="</s>", pool_suffix=True)
    for prompt, text in product(("", *PROMPTS), TEXTS):
        ids, pooled = expected(build(), prompt, text)
        packed = tokenize([text], 200, prompt, form).pack()
        assert (packed.ids.tolist(), packed.pooled.tolist()) == (ids, pooled)
    ids, pooled = expected(build(), SPACED, SENTENCES[0] * 9)
    room = pooled.index(True) + 4
    cut = tokenize([SENTENCES[0] * 9], room, SPACED, form).pack()
    assert cut.ids.tolist() == [*ids[: room - 1], 2]
    assert cut.pooled.tolist() == [*pooled[: room - 1], True]


@pytest.mark.parametrize("build", BUILDS)
def test_an_embedder_takes_the_mean_of_just_these_tokens(build):
    """Test 6 of NV-Embed."""
    model = Backbone(random_model(DECODERS["llama"]), attention="bidirectional")
    prompts = {"query": SPACED}
    settings = Settings(pooling="mean", prompts=prompts, pool_prompt=False, append_end=True)
    embedder = Embedder(model, build(), settings)
    texts = [text for text in TEXTS if max(expected(build(), SPACED, text)[0]) < 300]
    assert len(texts) > 1
    for role in ("query", "document"):
        for text, vector in zip(texts, embedder.encode(texts, role), strict=True):
            prompt = prompts.get(role, "")
            ids, pooled = expected(build(), prompt, text)
            packed = Tokenizer(build(), append_end=True)([text], 200, prompt, FORM).pack()
            states = model(packed).detach()
            mean = states[np.array(pooled)].mean(0)
            assert packed.ids.tolist() == ids
            np.testing.assert_allclose(vector, F.normalize(mean, dim=0), atol=1e-5)
