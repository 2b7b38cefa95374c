import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tercet.errors import ModelError
from tercet.models.choices import LayerSettings
from tercet.models.formats.sentence_transformers import (
    LAYER,
    POOLINGS,
    read_modules,
    write_modules,
)
from tercet.models.settings import Settings
from tercet.models.zoo import zoo

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", ":", "passage"]
WORDS = [*SPECIALS, "red", "green", "blue", "sk", "##y", "old", "tree", "##s"]
TEXTS = ["red sky", "green trees blue sky old red tree", "old", "blue trees old sky"]
PROMPTS = {"query": "query: ", "document": "passage: "}
DIM = 24
POOLING_NAMES = [ours for ours, _ in POOLINGS.values() if ours]


def settings(*, max_tokens: int = 16, **changes: Any) -> Settings:
    lengths = {"query_tokens": max_tokens, "document_tokens": max_tokens}
    return replace(Settings(prompts=PROMPTS, rules="sentence_transformers"), **lengths, **changes)


def save_tokenizer(folder: Path, **kwargs: Any) -> None:
    """WordPiece of a few words, in the manner of BERT."""
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **kwargs).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=20,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def llama(folder: Path, is_causal: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=20,
        initializer_range=0.5,
    )
    config.is_causal = is_causal
    LlamaForCausalLM(config).save_pretrained(folder)


def slow_embed(folder: Path, text: str, st: Settings, *, prompt: str = "") -> torch.Tensor:
    """One text alone, so nothing is padded; pooling written out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(
        prompt + text, return_tensors="pt", truncation=True, max_length=st.document_tokens
    )
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0]
    excluded = 0
    if prompt and not st.pool_prompt:
        excluded = 1 + len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    positions = torch.arange(1, len(states) + 1, dtype=torch.float32)[excluded:]
    states = states[excluded:]
    vector = {
        "mean": states.mean(dim=0),
        "weighted_mean": positions @ states / positions.sum(),  # a position counts the prompt
        "first": states[0],
        "last": states[-1],
    }[st.pooling]
    return F.normalize(vector, dim=0) if st.normalize else vector


def load(folder: Path) -> Any:
    """The folder as sentence-transformers opens it: no flags."""
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(folder), device="cpu")


def copy(source: Path, target: Path) -> Path:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_sentence_transformers_gives_the_vectors_of_the_slow_formula(
    bert, tmp_path, pooling, include_prompt
):
    folder = copy(bert, tmp_path)
    st = settings(pooling=pooling, pool_prompt=include_prompt)
    write_modules(folder, st, DIM)
    model = load(folder)
    assert model.max_seq_length == st.document_tokens
    for prompt, vectors in [
        ("", model.encode(TEXTS)),
        (PROMPTS["query"], model.encode_query(TEXTS)),
        (PROMPTS["document"], model.encode_document(TEXTS)),
        (PROMPTS["document"], model.encode(TEXTS, prompt_name="document")),
    ]:
        expected = torch.stack([slow_embed(folder, text, st, prompt=prompt) for text in TEXTS])
        torch.testing.assert_close(torch.tensor(vectors), expected, atol=1e-5, rtol=0)


def test_vectors_keep_their_length_where_normalize_is_off(bert, tmp_path):
    folder = copy(bert, tmp_path)
    st = settings(normalize=False)
    write_modules(folder, st, DIM)
    expected = slow_embed(folder, TEXTS[0], st)
    assert expected.norm() > 1.5
    torch.testing.assert_close(torch.tensor(load(folder).encode(TEXTS)[0]), expected)


def test_a_longer_text_is_cut_at_max_tokens(bert, tmp_path):
    folder = copy(bert, tmp_path)
    st = settings(max_tokens=5, prompts={})
    write_modules(folder, st, DIM)
    model = load(folder)
    assert model.tokenize(TEXTS)["input_ids"].shape == (4, 5)
    expected = torch.stack([slow_embed(folder, text, st) for text in TEXTS])
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pooling", ["last", "weighted_mean"])
def test_a_decoder_attends_as_its_config_says_and_padding_has_no_side(
    tmp_path, side, is_causal, pooling
):
    llama(tmp_path, is_causal)
    save_tokenizer(tmp_path, padding_side=side)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] == is_causal
    st = settings(pooling=pooling, pool_prompt=False)
    write_modules(tmp_path, st, DIM)
    model = load(tmp_path)
    assert model.tokenizer.padding_side == side
    expected = torch.stack([slow_embed(tmp_path, t, st, prompt="query: ") for t in TEXTS])
    vectors = torch.tensor(model.encode_query(TEXTS))
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)

    states = AutoModel.from_pretrained(tmp_path)(torch.tensor([[7, 8, 9], [7, 8, 12]]))[0]
    assert torch.equal(states[0, 0], states[1, 0]) == is_causal


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_what_is_written_is_read(tmp_path, pooling, normalize, include_prompt, layer):
    save_tokenizer(tmp_path)
    trained = LayerSettings() if layer else None
    st = settings(pooling=pooling, normalize=normalize, pool_prompt=include_prompt, layer=trained)
    write_modules(tmp_path, st, DIM)
    assert read_modules(tmp_path) == st
    assert (tmp_path / "tercet_layer.py").exists() == layer


def test_writing_again_over_a_folder_leaves_what_was_written_last(tmp_path):
    write_modules(tmp_path, settings(), DIM)
    write_modules(tmp_path, settings(normalize=False, prompts={"query": "질문: "}), DIM)
    assert read_modules(tmp_path) == settings(normalize=False, prompts={"query": "질문: "})
    assert "질문: " in (tmp_path / "config_sentence_transformers.json").read_text("utf-8")


@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_a_folder_that_release_6_saves_is_read(bert, tmp_path, pooling):
    old = tmp_path / "old"
    old.mkdir()
    st = settings(pooling=pooling, pool_prompt=False)
    write_modules(copy(bert, old), st, DIM)
    load(old).save(str(tmp_path / "new"), create_model_card=False)
    assert "pooling_mode_mean_tokens" not in (tmp_path / "new/1_Pooling/config.json").read_text()
    assert read_modules(tmp_path / "new") == st


def test_opening_a_folder_gives_no_warning(bert, tmp_path, caplog):
    folder = copy(bert, tmp_path)
    write_modules(folder, settings(), DIM)
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert caplog.records == []


@pytest.mark.skipif(not zoo.installed("minilm"), reason="minilm is not installed")
def test_minilm_says_mean_of_at_most_256_tokens_without_prompts():
    folder = zoo.resolve("minilm")
    assert isinstance(folder, Path)
    assert read_modules(folder) == settings(max_tokens=256, prompts={})


def test_a_folder_of_transformers_alone_says_nothing(bert):
    assert read_modules(bert) is None


def test_a_layer_is_told_the_prompts_that_it_leaves_out(bert, tmp_path):
    folder = copy(bert, tmp_path)
    write_modules(folder, settings(layer=LayerSettings()), DIM)
    known = folder / "1_Layer" / "prompts.json"
    assert json.loads(known.read_text()) == []
    same = {"query": "query: ", "again": "query: ", "empty": "", "document": "passage: "}
    write_modules(folder, settings(layer=LayerSettings(), pool_prompt=False, prompts=same), DIM)
    cls, query, colon, passage = (WORDS.index(w) for w in ("[CLS]", "query", ":", "passage"))
    assert json.loads(known.read_text()) == [[cls, query, colon], [cls, passage, colon]]


@pytest.mark.parametrize("named", ["", ', "pad_token": "<pad>"'])
def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path, named):
    config = tmp_path / "tokenizer_config.json"
    config.write_text(f'{{"eos_token": "</s>"{named}}}')
    write_modules(tmp_path, settings(), DIM)
    assert json.loads(config.read_text())["pad_token"] == ("<pad>" if named else "</s>")


# --- reading ---------------------------------------------------------------------------------


def change(path: Path, **changes: Any) -> None:
    """Set these keys of a JSON object; None takes one away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture
def written(tmp_path):
    write_modules(tmp_path, settings(), DIM)
    return tmp_path


@pytest.mark.parametrize("name", ["passage", "corpus"])
def test_a_prompt_called_passage_or_corpus_is_that_of_documents(written, name):
    config = written / "config_sentence_transformers.json"
    change(config, prompts={"query": "q: ", "document": "", name: "d: "})
    assert read_modules(written) == settings(
        prompts={"query": "q: ", "document": "d: ", name: "d: "}
    )
    change(config, prompts={"document": "own: ", name: "d: ", "other": None})
    read = read_modules(written)
    assert read and read.prompts == {"document": "own: ", name: "d: ", "other": ""}


def test_without_a_set_length_the_shorter_of_tokenizer_and_model_counts(written):
    change(written / "sentence_bert_config.json", max_seq_length=None)
    (written / "config.json").write_text('{"max_position_embeddings": 514}')
    assert read_modules(written) == settings(max_tokens=514)
    (written / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert read_modules(written) == settings(max_tokens=512)
    (written / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert read_modules(written) == settings(max_tokens=514)


def test_the_length_may_be_in_a_file_named_for_the_architecture(written):
    path = written / "sentence_bert_config.json"
    path.rename(written / "sentence_roberta_config.json")
    assert read_modules(written) == settings()


def test_a_folder_without_prompts_or_pooling_flags_has_the_defaults(written):
    (written / "config_sentence_transformers.json").unlink()
    (written / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 24}')
    assert read_modules(written) == settings(prompts={})


def modules_of(*kinds: str) -> str:
    return json.dumps([{"type": k, "path": "" if i == 0 else str(i)} for i, k in enumerate(kinds)])


ST = "sentence_transformers.models."
STOCK = modules_of(f"{ST}Transformer", f"{ST}Pooling")
SQRT = '{"word_embedding_dimension": 8, "pooling_mode_mean_sqrt_len_tokens": true}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            modules_of(f"{ST}Transformer", f"{ST}Pooling", f"{ST}LayerNorm"),
            f'has the module "{ST}LayerNorm"',
        ),
        (STOCK.replace(f"{ST}T", "own_code.T"), 'has the module "own_code.Transformer"'),
        (modules_of(f"{ST}Transformer"), "has the modules Transformer; tercet reads"),
        (modules_of(f"{ST}Pooling", f"{ST}Transformer"), "Normalize in this order"),
        (
            modules_of(f"{ST}Transformer", f"{ST}Layer", f"{ST}Pooling"),
            f'has the module "{ST}Layer"',
        ),
        (modules_of(f"{ST}Transformer", f"{ST}Pooling", LAYER), "Normalize in this order"),
        (
            modules_of(f"{ST}Transformer", LAYER, f"{ST}Pooling").replace('"1"', '"1_Own"'),
            'keeps the layer in "1_Own"; tercet reads "1_Layer": rename it',
        ),
        (STOCK.replace('""', '"0_BERT"'), "the subfolder 0_BERT"),
        ("[]", r"has the modules \(none\)"),
        ("[1]", "must be a list of modules"),
        ("[", "is not JSON .*is the download complete"),
    ],
)
def test_a_module_that_tercet_has_not_is_an_error_that_names_it(written, content, message):
    (written / "modules.json").write_text(content)
    with pytest.raises(ModelError, match=f"modules.json: .*{message}"):
        read_modules(written)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"embedding_dimension": 8, "pooling_mode": "max"}',
            'pooling must be one of cls, mean, .*; got "max"',
        ),
        (
            '{"embedding_dimension": 8, "pooling_mode": ["cls", "mean"]}',
            r'pooling must be .*; got "cls \+ mean"',
        ),
        (SQRT, 'pooling must be .*; got "mean_sqrt_len_tokens"'),
        ("{}", "has no embedding_dimension"),
        ("[]", "must hold a JSON object"),
        (None, "is missing; is the download complete"),
    ],
)
def test_a_pooling_that_tercet_has_not_is_an_error_that_names_it(written, content, message):
    path = written / "1_Pooling" / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ModelError, match=f"1_Pooling.config.json: {message}"):
        read_modules(written)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"processor_kwargs": {"split": 1}}', 'sets "split" in "processor_kwargs", which tercet'),
        ('{"query_expansion": {"length": 32}}', 'sets "query_expansion", which tercet does not'),
        ('{"transformer_task": "fill-mask"}', 'transformer_task must be .*; got "fill-mask"'),
        ("{}", 'longest text is unknown; set "max_seq_length" in sentence_bert_config.json'),
    ],
)
def test_a_transformer_used_in_another_way_is_an_error(written, content, message):
    (written / "sentence_bert_config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        read_modules(written)
