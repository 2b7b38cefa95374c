"""NV-Embed (arXiv 2405.17428), tests 7, 16 and 17: published folders, and exported ones."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tercet.models.choices import LayerSettings
from tercet.models.embedder import Embedder, Settings
from tercet.models.formats.nv_embed import published_name
from tercet.models.network.backbone import Backbone
from tercet.models.settings import as_prompt
from tests.oracles import NvEmbedEncoder
from tests.published import (
    CONFIG,
    INSTRUCTION,
    TEXTS,
    publish,
    published_weights,
    random_weights,
    sentencepiece,
)
from tests.toy import DECODERS, SENTENCES, byte_bpe, random_model

# ---- 7: the reference's mask -----------------------------------------------------------------

WORDS = ("maps", "the editor for programs", "read mail in a terminal", "music")
INSTRUCTIONS = (INSTRUCTION, as_prompt("play music"), as_prompt("count the words of a file"))


def reading(*, bos: bool = True) -> NvEmbedEncoder:
    settings = Settings(append_end=True, pool_prompt=False)
    backbone = Backbone(random_model(DECODERS["mistral"]), attention="bidirectional")
    return NvEmbedEncoder(Embedder(backbone, sentencepiece(bos=bos), settings))


def tokens_and_pooled(encoder: NvEmbedEncoder, text: str, instruction: str) -> tuple[list, list]:
    """The tokens as texts, checked against the stock tokenizer, and which are pooled."""
    stock: Any = encoder.embedder.tokenizer.stock
    packed = encoder.tokenize([text], instruction)
    tokens = stock.convert_ids_to_tokens(packed.ids.tolist())
    expected = sentencepiece().tokenize(f"{instruction}{text}</s>")
    assert tokens[-len(expected) :] == expected
    return tokens, packed.pooled.tolist()


def border(instruction: str) -> int:
    """Where the text begins, the token before every text counted."""
    return 1 + len(sentencepiece().tokenize(instruction.rstrip(" ")))


def test_with_a_final_space_the_lone_token_makes_up_for_the_one_before_every_text():
    """Test 7 of NV-Embed."""
    encoder = reading()
    for instruction in INSTRUCTIONS:
        for text in WORDS:
            tokens, pooled = tokens_and_pooled(encoder, text, instruction)
            assert tokens[0] == "<s>"
            assert pooled == [i >= border(instruction) for i in range(len(tokens))]


def test_without_a_final_space_the_last_token_of_the_instruction_is_pooled():
    """Test 7 of NV-Embed."""
    encoder = reading()
    for instruction in INSTRUCTIONS:
        for text in WORDS:
            tokens, pooled = tokens_and_pooled(encoder, text, instruction.rstrip(" "))
            first = border(instruction) - 1
            assert tokens[first] == ":"
            assert pooled == [i >= first for i in range(len(tokens))]


@pytest.mark.parametrize("text", ["7 days", "\nline"])
def test_before_a_digit_or_a_newline_the_space_is_a_token_and_pooled(text):
    """Test 7 of NV-Embed."""
    tokens, pooled = tokens_and_pooled(reading(), text, INSTRUCTION)
    first = border(INSTRUCTION)
    assert tokens[first] == "▁"
    assert pooled == [i >= first for i in range(len(tokens))]


def test_without_a_token_before_every_text_the_first_of_the_text_is_lost():
    """Test 7 of NV-Embed."""
    encoder = reading(bos=False)
    for text in WORDS:
        tokens, pooled = tokens_and_pooled(encoder, text, INSTRUCTION)
        first = border(INSTRUCTION) - 1
        assert tokens[first] in (f"▁{text}", *(f"▁{word}" for word in text.split()))
        assert pooled == [i > first for i in range(len(tokens))]


def test_a_document_is_pooled_from_its_first_token_to_its_end():
    """Test 7 of NV-Embed."""
    for text in WORDS:
        tokens, pooled = tokens_and_pooled(reading(), text, "")
        assert (tokens[0], tokens[-1]) == ("<s>", "</s>")
        assert all(pooled)


def test_an_instruction_that_fills_the_window_leaves_nothing_to_pool():
    """Test 7 of NV-Embed."""
    limit = border(INSTRUCTION) - 1
    texts = reading().tokenize(WORDS, INSTRUCTION, limit)
    assert texts.lengths == [limit] * len(WORDS)
    assert not texts.pooled.any()


def test_the_exact_mask_has_none_of_these_faults():
    """Test 7 of NV-Embed."""
    for encoder in (reading(), reading(bos=False)):
        encoder.count_mask = False
        for instruction in (INSTRUCTION, INSTRUCTION.rstrip(" ")):
            for text in WORDS:
                tokens, pooled = tokens_and_pooled(encoder, text, instruction)
                first = border(instruction) - (tokens[0] != "<s>")
                assert pooled == [i >= first for i in range(len(tokens))]


# ---- 16: names of weights --------------------------------------------------------------------


def test_all_published_weights_arrive_under_our_names(tmp_path):
    """Test 16 of NV-Embed."""
    embedder = Embedder.load(publish(tmp_path))
    assert embedder.layer is not None
    network = embedder.backbone.model.state_dict()
    ours = {published_name("backbone", name): weight for name, weight in network.items()}
    layer = embedder.layer.state_dict()
    ours |= {published_name("layer", name): weight for name, weight in layer.items()}
    theirs = published_weights(tmp_path)
    assert ours.keys() == theirs.keys() == random_weights().keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0)


# ---- 17: exported folders --------------------------------------------------------------------

ASKED = [*SENTENCES, "7 days", "\nline", "maps " * 60]
WITHOUT_TERCET = """
import sys
sys.modules["tercet"] = None  # any import of it fails
import json
import numpy as np
from sentence_transformers import SentenceTransformer
for folder in sys.argv[2:]:
    for number in ("1", "2"):
        model = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
        texts = json.loads(sys.argv[1])
        vectors = [model.encode(texts, prompt_name="query"), model.encode(texts)]
        folder = folder + number
        np.save(folder, np.stack(vectors))
        model.save(folder, create_model_card=False)
assert not any(name.startswith("tercet.") for name in sys.modules)
"""


def exported(kind: Any, tokenizer: Any, folder: Any) -> Embedder:
    """A model of both ways with a layer, an end token and a prompt that is left out, saved."""
    settings = Settings(
        layer=LayerSettings(kind=kind, latents=5, heads=2, head_size=12),
        append_end=True,
        prompts={"query": INSTRUCTION},
        task_prompts={"Sections": {"query": as_prompt("name the section")}},
        pool_prompt=False,
    )
    backbone = Backbone(random_model(DECODERS["mistral"]), attention="bidirectional")
    embedder = Embedder(backbone, tokenizer, settings).eval()
    embedder.save(folder)
    return embedder


@pytest.mark.parametrize("build", [sentencepiece, byte_bpe])
@pytest.mark.parametrize("kind", ["latent", "self_attention"])
def test_an_export_gives_the_same_vectors_after_every_save(kind, build, tmp_path):
    """Test 17 of NV-Embed."""
    embedder = exported(kind, build(), tmp_path / "0")
    for number in range(3):
        model = SentenceTransformer(
            str(tmp_path / str(number)), device="cpu", trust_remote_code=True
        )
        for name, task in (("query", None), ("Sections-query", "Sections")):
            expected = embedder.encode(ASKED, "query", task=task)
            np.testing.assert_allclose(model.encode(ASKED, prompt_name=name), expected, atol=1e-5)
        np.testing.assert_allclose(model.encode(ASKED), embedder.encode(ASKED), atol=1e-5)
        own = Embedder.load(tmp_path / str(number))
        assert own.settings.layer == embedder.settings.layer
        np.testing.assert_allclose(own.encode(ASKED), embedder.encode(ASKED), atol=1e-5)
        model.save(str(tmp_path / str(number + 1)), create_model_card=False)


def test_an_export_and_its_copy_load_where_tercet_is_not_installed(tmp_path):
    """Test 17 of NV-Embed."""
    kinds = ("latent", "self_attention")
    models = {kind: exported(kind, sentencepiece(), tmp_path / kind) for kind in kinds}
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TERCET, json.dumps(ASKED), *(tmp_path / k for k in kinds)],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    for kind, embedder in models.items():
        expected = np.stack([embedder.encode(ASKED, "query"), embedder.encode(ASKED)])
        for number in ("1", "12"):  # of the export, and of what was saved from it
            found = np.load(tmp_path / f"{kind}{number}.npy")
            np.testing.assert_allclose(found, expected, atol=1e-5)
        files = {path.name for path in (tmp_path / f"{kind}12").iterdir()}
        assert {"tercet_layer.py", "1_Layer", "2_Pooling", "3_Normalize"} <= files


def test_a_published_model_is_exported_with_its_end_token_and_prompts(tmp_path):
    """Test 17 of NV-Embed."""
    sizes = {**CONFIG["latent_attention_config"], "output_normalize": False}
    published = publish(tmp_path / "published", latent_attention_config=sizes)
    embedder = Embedder.load(published)
    embedder.save(tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    texts = [text for text in TEXTS if text]
    expected = embedder.encode(texts, "query", task="Programs")
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).min() > 0.1  # not scaled
    found = model.encode(texts, prompt_name="Programs-query")
    np.testing.assert_allclose(found, expected, atol=1e-5)
