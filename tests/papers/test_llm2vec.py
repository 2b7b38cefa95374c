"""LLM2Vec (arXiv 2404.05961), tests 2 and 10 to 17: saving, encoding, looking, merging, exporting.

Tests 1, 3 and 4 are in test_llm2vec_probe.py, and 5 to 9 in test_llm2vec_training.py.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tercet.data.batches.masking import mask_id
from tercet.errors import ModelError
from tercet.evaluate.insight.lookahead import direction_map, prefix_sensitivity, read_triples
from tercet.models.embedder import Embedder, Settings
from tercet.models.formats.llm2vec import read_llm2vec
from tercet.models.merge import lineage, load_adapters
from tercet.models.network.backbone import Backbone
from tercet.models.network.pooling import POOLINGS
from tercet.models.network.words import Words, word_means
from tercet.models.tokens import Form, Tokenizer
from tests.oracles import Llm2VecEncoder
from tests.toy import DECODERS, SENTENCES, byte_bpe, pack, random_model, random_texts

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llm2vec"
PROMPT = "find it: "
HARD = ("7 days", "\nline", "für äöü", "한국어 文字", "a small server")  # after a prompt


def sentencepiece() -> t.PreTrainedTokenizerFast:
    """As SentencePiece cuts: a token begins with the space before it; BOS before a text."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    fast.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    fast.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<unk>", "<s>", "</s>"]
    lines = [*SENTENCES, *HARD, *[f"{PROMPT}_"] * 9]
    fast.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=290, special_tokens=special))
    fast.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def with_adapter(base: str | Path, seed: int, **settings: Any) -> Embedder:
    """An embedder with a random LoRA on top, not merged."""
    embedder = Embedder.load(base, **settings)
    embedder.backbone.add_lora(rank=3, alpha=6, dropout=0.0)
    torch.manual_seed(seed)
    for name, weight in embedder.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return embedder


def opened(base: Path, folder: Path) -> Path:
    """The base with its direction written into its config, as a first stage leaves it."""
    Embedder.load(base, attention="bidirectional").save(folder)
    return folder


# ---- 2: saving -------------------------------------------------------------------------------


def test_a_merged_model_and_an_adapter_reload_both_ways_without_a_difference(
    decoder_folder, tmp_path
):
    """Test 2 of LLM2Vec."""
    flagged = opened(decoder_folder, tmp_path / "flagged")
    embedder = with_adapter(flagged, 1)
    embedder.save_adapter(tmp_path / "adapter", str(flagged))
    embedder.save(tmp_path / "merged")  # merges
    expected = embedder.encode(SENTENCES)
    assert np.abs(expected - embedder.encode(SENTENCES, attention="causal")).max() > 0.01
    for folder in ("merged", "adapter"):
        reloaded = Embedder.load(tmp_path / folder)
        assert reloaded.backbone.attention == "bidirectional"
        np.testing.assert_array_equal(reloaded.encode(SENTENCES), expected)


def test_an_adapter_that_would_silently_be_causal_again_is_refused(decoder_folder, tmp_path):
    """Test 2 of LLM2Vec."""
    embedder = with_adapter(decoder_folder, 1, attention="bidirectional")
    with pytest.raises(ModelError, match="must say that it is bidirectional"):
        embedder.save_adapter(tmp_path / "adapter", str(decoder_folder))
    embedder.backbone.model.save_pretrained(tmp_path / "peft alone")
    with pytest.raises(ModelError, match="the direction of its attention is unknown"):
        Embedder.load(tmp_path / "peft alone")
    with pytest.raises(ModelError, match="records no direction of attention"):
        load_adapters([tmp_path / "peft alone"], base=decoder_folder)


# ---- 6: the token in a gap --------------------------------------------------------------------


def test_the_gap_is_the_bare_underscore_whatever_encoding_it_gives():
    """Test 6 of LLM2Vec."""
    tokenizer = sentencepiece()  # encodes "_" with a space before it
    gap = mask_id(tokenizer, "blank")
    assert tokenizer.convert_ids_to_tokens(gap) == "_"
    assert gap not in tokenizer("_")["input_ids"]


# ---- 10 and 11: pooling ----------------------------------------------------------------------


@pytest.mark.parametrize("build", [sentencepiece, byte_bpe])
@pytest.mark.parametrize("text", HARD)
def test_a_prompt_is_never_pooled_and_its_text_always_is(build, text):
    """Test 10 of LLM2Vec."""
    stock = build()
    tokens = Tokenizer(stock)([text], 200, PROMPT, Form(pool_prompt=False))
    ids, pooled = torch.from_numpy(tokens.ids[0]), tokens.pack().pooled
    assert stock.decode(ids[pooled]).strip(" ") == text
    assert stock.decode(ids[~pooled], skip_special_tokens=True).strip() == PROMPT.strip()


@pytest.mark.parametrize("build", [sentencepiece, byte_bpe])
def test_an_over_long_text_is_cut_and_its_prompt_is_not(build):
    """Test 10 of LLM2Vec."""
    stock, form = build(), Form(pool_prompt=False)
    whole = Tokenizer(stock)([SENTENCES[0]], 200, PROMPT, form)
    prompt = whole.skipped[0]
    cut = Tokenizer(stock)([SENTENCES[0] * 9], prompt + 3, PROMPT, form)
    assert cut.ids[0].tolist() == whole.ids[0][: prompt + 3].tolist()
    assert cut.pack().pooled.tolist() == [False] * prompt + [True] * 3


def test_an_empty_text_after_a_prompt_has_one_vector_alone_and_in_company(decoder_folder):
    """Test 10 of LLM2Vec."""
    embedder = Embedder.load(decoder_folder, prompts={"query": PROMPT}, pool_prompt=False)
    alone, among = embedder.encode([""], "query"), embedder.encode(["", *SENTENCES], "query")
    np.testing.assert_allclose(among[0], alone[0], atol=1e-6)
    packed = embedder.tokenize(["", "x"], "query").pack()
    with torch.no_grad():
        states = embedder.backbone(packed)[: packed.lengths[0]]
    np.testing.assert_allclose(alone[0], F.normalize(states.mean(0), dim=0), atol=1e-6)


def test_a_weighted_mean_equals_a_loop_over_the_pooled_tokens():
    """Test 11 of LLM2Vec."""
    texts = pack(*random_texts(6, 1, 9))
    texts.pooled[[0, 1, 8]] = False
    hidden = torch.randn(16, 5)
    found = POOLINGS["weighted_mean"](hidden, texts)
    bounds = texts.offsets.tolist()
    for row, (start, stop) in enumerate(pairwise(bounds)):
        total, weights, j = torch.zeros(5), 0, 0
        for i in range(start, stop):
            if texts.pooled[i]:
                j += 1
                total += j * hidden[i]
                weights += j
        torch.testing.assert_close(found[row], total / weights)
        assert weights == j * (j + 1) / 2


@torch.no_grad()
def test_the_last_token_is_that_of_a_row_padded_on_either_side(decoder_folder):
    """Test 11 of LLM2Vec."""
    embedder = Embedder.load(decoder_folder, attention="causal", pooling="last", normalize=False)
    stock, model = embedder.tokenizer.stock, t.AutoModel.from_pretrained(decoder_folder).eval()
    expected = embedder.encode(SENTENCES)
    for side in ("left", "right"):
        stock.padding_side, stock.pad_token = side, "<pad>"
        out = stock(list(SENTENCES), padding=True, return_tensors="pt")
        mask = out["attention_mask"]
        states = model(
            out["input_ids"], mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).last_hidden_state
        place = -torch.ones(len(mask), dtype=torch.long) if side == "left" else mask.sum(1) - 1
        found = states[torch.arange(len(mask)), place]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_states_of_16_bits_are_summed_in_32(pooling):
    """Test 11 of LLM2Vec."""
    hidden = torch.randn(700, 4).to(torch.bfloat16)
    weights = torch.ones(700) if pooling == "mean" else torch.arange(1, 701.0)
    exact = (hidden.double() * weights[:, None]).sum(0) / weights.sum()
    (found,) = POOLINGS[pooling](hidden, pack(torch.arange(700)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


# ---- 12 and 13: words, echo ------------------------------------------------------------------


def letters() -> t.PreTrainedTokenizerFast:
    """A token a letter, and BOS before a text."""
    pieces = ["<unk>", "<s>", "</s>", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    fast = FastTokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    fast.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_the_words_of_the_papers_example_in_both_modes():
    """Test 12 of LLM2Vec."""
    model = Backbone(random_model(DECODERS["llama"]), attention="bidirectional")
    embedder = Embedder(model, letters(), Settings())
    packed = embedder.tokenizer(["ab cde f"], 20).pack()  # BOS t11 t12 t21 t22 t23 t31
    assert packed.lengths == [7]
    with torch.no_grad():
        bos, t11, t12, t21, t22, t23, t31 = model(packed)
    expected = {
        False: [(t11 + t12) / 2, (t21 + t22 + t23) / 3, t31],
        True: [(bos + t11) / 2, (t12 + t21 + t22) / 3, t23],
    }
    for predictor, words in expected.items():
        (found,) = embedder.encode_words([["ab", "cde", "f"]], predictor=predictor)
        np.testing.assert_allclose(found, torch.stack(words), atol=1e-5)


@pytest.mark.parametrize("predictor", [False, True])
def test_words_of_many_texts_equal_a_loop(predictor):
    """Test 12 of LLM2Vec."""
    rng = np.random.default_rng(4)
    sentences = [["x" * n for n in rng.integers(1, 6, count)] for count in (3, 1, 7, 0, 4)]
    words = [Words.joined(sentence) for sentence in sentences]
    spans = []
    for sentence in sentences:
        length = len(" ".join(sentence))
        inner = np.flatnonzero(rng.random(max(length - 1, 0)) < 0.5) + 1
        cuts = np.array([0, *inner, length])  # tokens may hold a space, or two words
        spans.append(np.stack([np.r_[-1, cuts[:-1]], np.r_[-1, cuts[1:]]], axis=1))
    states = torch.randn(sum(map(len, spans)), 6)
    found = word_means(states, spans, words, predictor=predictor)
    start = 0
    for text_spans, text_words, vectors in zip(spans, words, found, strict=True):
        assert len(vectors) == len(text_words)
        for begin, end, vector in zip(text_words.starts, text_words.ends, vectors, strict=True):
            own = [p for p, (a, b) in enumerate(text_spans) if a < end and b > begin]
            chosen = [start + (max(p - 1, 0) if predictor else p) for p in own]
            torch.testing.assert_close(vector, states[chosen].mean(0))
        start += len(text_spans)


@torch.no_grad()
def test_echo_pools_the_second_copy_of_the_same_ids_in_a_causal_model(decoder_folder):
    """Test 13 of LLM2Vec."""
    embedder = Embedder.load(decoder_folder, attention="causal", echo=True)
    model = t.AutoModel.from_pretrained(decoder_folder, attn_implementation="eager").eval()
    for text, vector in zip(SENTENCES, embedder.encode(SENTENCES), strict=True):
        packed = embedder.tokenize([text], "document").pack()
        *second, end = packed.ids[packed.pooled].tolist()
        assert second == embedder.tokenizer.stock(text)["input_ids"]
        assert end == embedder.tokenizer.stock.eos_token_id
        whole = packed.ids.tolist()
        copies = [i for i in range(len(whole)) if whole[i : i + len(second)] == second]
        assert len(copies) == 2 and copies[1] == len(whole) - len(second) - 1
        states = model(packed.ids[None]).last_hidden_state[0, copies[1] :]
        np.testing.assert_allclose(vector, F.normalize(states.mean(0), dim=0), atol=1e-5)


# ---- 14: diagnostics -------------------------------------------------------------------------


def test_a_causal_prefix_has_cosine_1_and_maps_begin_with_1(decoder_folder):
    """Test 14 of LLM2Vec."""
    embedder = Embedder.load(decoder_folder, attention="bidirectional")
    triples = read_triples()[:9]
    control = prefix_sensitivity(embedder, triples, attention="causal")
    np.testing.assert_allclose([control.positive, control.negative], 1, atol=1e-5)
    turned = prefix_sensitivity(embedder, triples)
    assert max(turned.positive.max(), turned.negative.max()) < 0.999
    cosines = direction_map(embedder, SENTENCES[5]).cosines
    np.testing.assert_allclose(cosines[0], 1, atol=1e-9)
    assert cosines[1, -1] == pytest.approx(1, abs=1e-6)
    assert cosines[1, :-1].max() < 0.9999


# ---- 15 to 17: merging, parity, export -------------------------------------------------------


def test_merged_adapters_equal_the_stages_in_turn_and_the_manifest_lists_both(
    decoder_folder, tmp_path
):
    """Test 15 of LLM2Vec."""
    first = opened(decoder_folder, tmp_path / "opened")
    one = with_adapter(first, 1)
    one.save_adapter(tmp_path / "1", str(first))
    one.save(tmp_path / "after 1")  # LoRA 1 merged
    two = with_adapter(tmp_path / "after 1", 2)
    two.save_adapter(tmp_path / "2", str(tmp_path / "after 1"))
    adapters = [tmp_path / "1", tmp_path / "2"]
    merged = load_adapters(adapters)
    np.testing.assert_allclose(merged.encode(SENTENCES), two.encode(SENTENCES), atol=1e-5)
    assert np.abs(merged.encode(SENTENCES) - one.encode(SENTENCES)).max() > 0.01
    merged.save(tmp_path / "model", about=lineage(str(first), adapters))
    about = json.loads((tmp_path / "model" / "tercet.json").read_text())["about"]
    assert about["base"] == str(first)
    assert [part["adapter"] for part in about["merged"]] == [str(path) for path in adapters]
    assert len({part["sha256"] for part in about["merged"]}) == 2


def test_vectors_are_those_of_llm2vec_0_2_3():
    """Test 16 of LLM2Vec."""
    folders = [FIXTURE / "mntp", FIXTURE / "simcse"]
    recorded = np.load(FIXTURE / "vectors.npz")
    asked = json.loads((FIXTURE / "recorded.json").read_text(encoding="utf-8"))["pairs"]
    pairs = [(instruction, text) for instruction, text in asked]
    assert len(pairs) > 40
    for count, name in ((1, "mntp/mean"), (2, "simcse/weighted_mean")):
        merged = load_adapters(folders[:count], base=FIXTURE / "base", compat="llm2vec")
        found = Llm2VecEncoder(merged.backbone, read_llm2vec(folders[:count])).encode(pairs)
        np.testing.assert_allclose(found, recorded[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_sentence_transformers_reads_an_export_alike_with_its_own_modules(
    decoder_folder, tmp_path, pooling
):
    """Test 17 of LLM2Vec."""
    embedder = with_adapter(decoder_folder, 1, attention="bidirectional", pooling=pooling)
    embedder.save(tmp_path / "model")
    modules = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert not list((tmp_path / "model").rglob("*.py"))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["is_causal"] is False
    peer = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(peer.encode(list(SENTENCES)), embedder.encode(SENTENCES), atol=1e-5)
