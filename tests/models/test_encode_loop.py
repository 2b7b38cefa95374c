"""What ``encode`` can be asked for beyond vectors by the model's own settings."""

import logging
import threading

import numpy as np
import pytest
import torch

from tercet.errors import ModelError
from tercet.models import encode_loop
from tercet.models.embedder import Embedder
from tercet.models.network.pooling import POOLINGS
from tercet.models.tokens import Form
from tests.toy import SENTENCES, pack, save_model

TEXTS = [*SENTENCES, "", "x", "7 maps\n of 한국어"]
PROMPTS = {"query": "find: ", "document": "text: "}


@pytest.fixture(scope="module")
def decoder(decoder_folder) -> Embedder:
    return Embedder.load(decoder_folder, prompts=PROMPTS, pool_prompt=False)


def states_of(
    embedder: Embedder, text: str, role, form: Form, attention=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One text alone: its states and which of them are pooled."""
    backbone = embedder.backbone if attention is None else embedder.backbone.turned(attention)
    tokens = embedder.tokenizer([text], 512, embedder.settings.prompt(role), form)
    packed = tokens.pack()
    with torch.no_grad():
        return backbone(packed), packed.pooled


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_each_pooling_and_direction_of_a_call_equals_a_loop(decoder, pooling, attention):  # spec 11
    found = decoder.encode(TEXTS, "query", pooling=pooling, attention=attention)
    form = Form(pool_prompt=False, end=pooling == "last")
    for text, vector in zip(TEXTS, found, strict=True):
        states, pooled = states_of(decoder, text, "query", form, attention)
        states = states[pooled].double()
        place = torch.arange(1, len(states) + 1).double()
        expected = {
            "mean": states.mean(0),
            "weighted_mean": (states * (place / place.sum())[:, None]).sum(0),
            "first": states[0],
            "last": states[-1],
        }[pooling]
        expected = (expected / expected.norm()).float().numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-6)


def test_last_pooling_of_one_call_reads_the_end_of_text_token(decoder):
    stock = decoder.tokenizer.stock
    before = stock("the moon")["input_ids"]
    states, _ = states_of(decoder, "the moon", "query", Form(end=True))
    assert decoder.tokenize(["the moon"], "query").ids[0][-1] != stock.eos_token_id
    raw = Embedder(decoder.backbone, stock, decoder.settings).encode(
        ["the moon"], "query", pooling="last"
    )
    expected = torch.nn.functional.normalize(states[-1:])
    np.testing.assert_allclose(raw, expected, atol=1e-6)
    assert stock("the moon")["input_ids"] == before


def test_the_choices_of_a_call_end_with_it(decoder, encoder_folder):
    before = decoder.encode(TEXTS)
    turned = decoder.encode(TEXTS, attention="bidirectional", pooling="first", echo=True)
    assert np.abs(turned - before).max() > 0.01
    np.testing.assert_array_equal(decoder.encode(TEXTS), before)
    assert (decoder.backbone.attention, decoder.settings.pooling) == ("causal", "mean")
    with pytest.raises(ModelError, match="which is always bidirectional"):
        Embedder.load(encoder_folder).encode(["a"], attention="causal")


def test_a_refused_call_leaves_the_mode_of_training_as_it_was(encoder_folder):
    embedder = Embedder.load(encoder_folder).train()
    with pytest.raises(ModelError):
        embedder.encode(["a"], attention="causal")
    assert embedder.training and embedder.backbone.training


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_token_states_are_those_of_the_pooled_tokens(tmp_path, kind):
    folder = save_model(tmp_path / "model", kind)
    embedder = Embedder.load(folder, prompts=PROMPTS, pool_prompt=False)
    embedder.batch_tokens = 40
    found = embedder.encode(TEXTS, output="tokens")
    assert len(found) == len(TEXTS)
    for text, states in zip(TEXTS, found, strict=True):
        expected, pooled = states_of(embedder, text, "document", Form(pool_prompt=False))
        assert states.dtype == np.float32
        np.testing.assert_allclose(states, expected[pooled], atol=1e-5)
    short = embedder.encode(TEXTS, output="tokens", dims=5)
    np.testing.assert_array_equal(short[0], found[0][:, :5])
    assert embedder.encode([], output="tokens") == []


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_words_of_any_batch_equal_a_loop(tmp_path, kind, predictor):  # spec 12
    embedder = Embedder.load(save_model(tmp_path / "model", kind), prompts=PROMPTS)
    sentences = [text.split() for text in SENTENCES] + [[], ["x"], ["für", "äöü", "7", "한국어"]]
    embedder.batch_tokens = 30
    found = embedder.encode_words(sentences, predictor=predictor)
    stock = embedder.tokenizer.stock
    for words, vectors in zip(sentences, found, strict=True):
        assert vectors.shape == (len(words), 64) and vectors.dtype == np.float32
        if not words:
            continue
        text = " ".join(words)
        spans = stock(text, return_offsets_mapping=True)["offset_mapping"]
        tokens = embedder.tokenizer([text], 512)
        with torch.no_grad():
            states = embedder.backbone(tokens.pack())
        start = 0
        for word, vector in zip(words, vectors, strict=True):
            end = start + len(word)
            own = [p for p, (a, b) in enumerate(spans) if b > start and a < end and b > a]
            chosen = [max(p - 1, 0) if predictor else p for p in own]
            np.testing.assert_allclose(vector, states[chosen].mean(0), atol=1e-5)
            start = end + 1


def test_words_of_a_text_are_read_after_its_prompt_and_not_part_of_it(decoder):
    texts = ["draw  maps\nof rivers", "", "mail"]
    found = decoder.encode(texts, "query", output="words")
    assert [len(vectors) for vectors in found] == [4, 0, 1]
    states, pooled = states_of(decoder, "mail", "query", Form(pool_prompt=False))
    np.testing.assert_allclose(found[2][0], states[pooled].mean(0), atol=1e-5)
    (plain,) = decoder.encode_words([["mail"]])
    assert np.abs(plain - found[2]).max() > 0.01  # without the prompt


def test_words_that_were_cut_off_have_no_vector_and_are_counted(decoder_folder, caplog):
    embedder = Embedder.load(decoder_folder, document_tokens=6)
    sentences = [["draw", "maps", "of", "rivers", "and", "mountains"], ["x"]]
    whole = Embedder.load(decoder_folder).tokenizer([" ".join(sentences[0])], 100, spans=True)
    reach = whole.spans[0][5, 1]  # the last character of the sixth token
    ends = np.cumsum([len(word) + 1 for word in sentences[0]]) - 1
    kept = int((ends <= reach).sum())
    with caplog.at_level(logging.WARNING, logger="tercet"):
        found = embedder.encode_words(sentences)
    assert [len(vectors) for vectors in found] == [kept, 1] and 0 < kept < 6
    assert caplog.messages == [f"{6 - kept} of 7 words were cut off and have no vector"]


@pytest.mark.parametrize("role", ["query", "document"])
def test_echo_of_a_causal_model_pools_the_second_copy(decoder, role):  # spec 13
    texts = ["a small web server", "the moon"]
    found = decoder.encode(texts, role, echo=True, attention="causal")
    last = decoder.encode(texts, role, echo=True, attention="causal", pooling="last")
    stock = decoder.tokenizer.stock
    for row, text in enumerate(texts):
        name, prompt = role.capitalize(), PROMPTS[role]
        pieces = [f"Instruct:{prompt},\n{name}:", text, f"\n{name} again:", text]
        ids = [stock(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
        whole = torch.tensor([i for piece in ids for i in piece] + [stock.eos_token_id])
        with torch.no_grad():
            states = decoder.backbone(pack(whole))
        second = torch.nn.functional.normalize(states[-len(ids[3]) - 1 :].mean(0), dim=0)
        np.testing.assert_allclose(found[row], second, atol=1e-6)
        end = torch.nn.functional.normalize(states[-1], dim=0)
        np.testing.assert_allclose(last[row], end, atol=1e-6)


def test_a_saved_echo_model_echoes_by_itself(decoder_folder, tmp_path):
    embedder = Embedder.load(decoder_folder, echo=True)
    plain = Embedder.load(decoder_folder)
    np.testing.assert_array_equal(embedder.encode(TEXTS), plain.encode(TEXTS, echo=True))
    np.testing.assert_array_equal(embedder.encode(TEXTS, echo=False), plain.encode(TEXTS))
    assert embedder.tokenize(["a b"], "query").lengths > plain.tokenize(["a b"], "query").lengths


def test_a_suffix_is_read_by_role_and_left_out_of_the_vector(decoder_folder):
    embedder = Embedder.load(
        decoder_folder, suffixes={"query": " [end]"}, attention="bidirectional"
    )
    plain = Embedder.load(decoder_folder, attention="bidirectional")
    found = embedder.encode(TEXTS, "query")
    np.testing.assert_array_equal(embedder.encode(TEXTS), plain.encode(TEXTS))
    for text, vector in zip(TEXTS, found, strict=True):
        states, pooled = states_of(embedder, text, "query", Form(suffix=" [end]"))
        expected = torch.nn.functional.normalize(states[pooled].mean(0), dim=0)
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    suffixed = plain.encode([text + " [end]" for text in TEXTS])
    assert np.abs(found - suffixed).max() > 0.01


def threads_ahead() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("output", ["texts", "tokens", "words"])
def test_texts_tokenized_ahead_have_the_same_vectors_to_the_bit(
    decoder, monkeypatch, workers, output
):
    many = [f"{text} {number}" for number in range(4) for text in TEXTS]
    parts = [many[start : start + 7] for start in range(0, len(many), 7)]
    expected = [row for part in parts for row in decoder.encode(part, "query", output=output)]
    monkeypatch.setattr(encode_loop, "_WINDOW_OF_TEXTS", 7)
    monkeypatch.setattr(encode_loop, "usual_workers", lambda device: workers)
    used, tokenize = set(), decoder.tokenizer.__call__

    def noted(*args, **options):
        used.add(threading.current_thread().name.startswith("ahead"))
        return tokenize(*args, **options)

    monkeypatch.setattr(decoder, "tokenizer", noted)
    found = decoder.encode(many, "query", output=output)
    assert used == {bool(workers)}
    assert len(found) == len(many)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not threads_ahead()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vector_that_is_not_finite_ends_the_encoding_and_its_thread(
    decoder, monkeypatch, workers
):
    monkeypatch.setattr(encode_loop, "_WINDOW_OF_TEXTS", 3)
    monkeypatch.setattr(encode_loop, "usual_workers", lambda device: workers)
    pool = encode_loop.Step.__init__

    def broken(self, rows, texts, states, *more):
        states = states.clone()
        if 4 in rows:
            states[:] = torch.nan
        pool(self, rows, texts, states, *more)

    monkeypatch.setattr(encode_loop.Step, "__init__", broken)
    with pytest.raises(ModelError, match=r"the vector of text 4, .* holds NaN or infinity"):
        decoder.encode(TEXTS, "query")
    assert not threads_ahead()


def test_windows_on_a_gpu_begin_small_and_on_a_cpu_are_equal():
    on_gpu = [len(w) for w in encode_loop._windows(200_000, torch.device("cuda"))]
    assert on_gpu[:7] == [2_000, 4_000, 8_000, 16_000, 32_000, 50_000, 50_000]
    assert sum(on_gpu) == 200_000
    on_cpu = [len(w) for w in encode_loop._windows(120_000, torch.device("cpu"))]
    assert on_cpu == [50_000, 50_000, 20_000]
