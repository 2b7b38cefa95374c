"""Vectors of folders of many kinds, against sentence-transformers, which loads each one here.

Only what a folder says counts: end tokens, special tokens, padding and truncation sides, prompts,
pooling, lengths, lower case, types, shards and adapters.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from peft import LoraConfig
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tercet.errors import ModelError
from tercet.models.embedder import Embedder
from tercet.models.formats.manifest import manifest
from tercet.models.merge import load_adapters
from tests.toy import DECODERS, ENCODERS, SENTENCES, random_model, wordpiece

TEXTS = [
    *SENTENCES,
    "A Small WEB Server, für Straße İstanbul ΣΑΣ",
    "  spaces before and behind \n",
    "",
    " ".join(SENTENCES),  # longer than every limit here
    "<|endoftext|> inside a text [SEP] and after it </s>",
    "日本語の文章 한국어 العربية 🎵",
]
POOLINGS = {
    "first": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class Dense:
    """What the files of a dense module say."""

    width: int
    activation: str | None = "torch.nn.modules.linear.Identity"
    bias: bool = True
    more: dict[str, Any] = field(default_factory=dict)  # of its config.json
    pickled: bool = False

    def write(self, path: Path, inner: int) -> None:
        """Write the files, without any code of tercet."""
        config = {"in_features": inner, "out_features": self.width, "bias": self.bias, **self.more}
        if self.activation is not None:
            config["activation_function"] = self.activation
        weights = {"linear.weight": torch.randn(self.width, inner) / 4}
        if self.bias:
            weights["linear.bias"] = torch.randn(self.width)
        if self.more.get("use_residual") and self.width != inner:
            weights["residual.weight"] = torch.randn(self.width, inner) / 4
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        if self.pickled:
            torch.save(weights, path / "pytorch_model.bin")
        else:
            save_file(weights, path / "model.safetensors")


TANH = "torch.nn.modules.activation.Tanh"


@dataclass(frozen=True)
class Folder:
    """What the files of a model folder say."""

    network: str = "bert"
    pooling: str = "mean"
    normalize: bool = True
    include_prompt: bool = True
    prompts: dict[str, str | None] = field(default_factory=dict)
    default: str | None = None
    limit: int | None = 40
    reading: dict[str, Any] = field(default_factory=dict)  # more of sentence_bert_config.json
    tokenizer: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard_size: str = "5GB"
    dense: tuple["Dense", ...] = ()

    @property
    def texts(self) -> list[str]:
        """The texts; a model that gets no token at all fails in sentence-transformers."""
        return [text for text in TEXTS if text or self.tokenizer.get("template") != "$A"]

    @property
    def unnamed(self) -> bool:
        """Whether a text without a role is read alike: ours is a document by default."""
        documents = self.prompts.get("document") or self.reading.get("query_length")
        return self.default is not None or not documents

    def write(self, path: Path) -> Path:
        """Write the folder."""
        config = {**ENCODERS, **DECODERS}[self.network]
        model = random_model(config).to(self.dtype)
        model.save_pretrained(path, max_shard_size=self.shard_size)
        made = bytes_of if self.network in DECODERS else wordpiece
        made(**self.tokenizer).save_pretrained(path)
        write_modules(path, self)
        return path


def write_modules(path: Path, folder: Folder) -> None:
    """Write the files of sentence-transformers, without any code of tercet."""
    kinds = ["Transformer", "Pooling", *(["Dense"] * len(folder.dense))]
    kinds += ["Normalize"] if folder.normalize else []
    places = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], start=1))]
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    widths = [64, *(each.width for each in folder.dense)]
    for each, inner, place in zip(folder.dense, widths, places[2:], strict=False):
        each.write(path / place, inner)
    for module in modules:
        (path / module["path"]).mkdir(exist_ok=True)
    pooling = {
        "word_embedding_dimension": 64,
        **{flag: name == folder.pooling for name, flag in POOLINGS.items()},
        "include_prompt": folder.include_prompt,
    }
    reading = {"max_seq_length": folder.limit, "do_lower_case": False, **folder.reading}
    named = {"prompts": folder.prompts, "default_prompt_name": folder.default}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {k: v for k, v in reading.items() if v is not None},
        "config_sentence_transformers.json": {"__version__": {}, **named},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))


def bytes_of(
    *,
    template: str = "$A <|endoftext|>",
    eos: str = "<|im_end|>",
    pad: str | None = "<|endoftext|>",
    **sides: str,
) -> t.PreTrainedTokenizerFast:
    """A byte-level tokenizer whose template may end texts with another token than its EOS."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    fast = Tokenizer(models.BPE(vocabulary, []))
    fast.add_special_tokens(special)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    fast.decoder = decoders.ByteLevel()  # pyright: ignore
    used = [token for token in special if token in template]
    fast.post_processor = processors.Sequence(  # pyright: ignore
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=template, special_tokens=[(token, vocabulary[token]) for token in used]
            ),
        ]
    )
    return t.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=eos, pad_token=pad, **sides)


VECTOR = "sentence_embedding"
PROMPTS: dict[str, str | None] = {"query": "find: ", "document": "read: ", "s2p": "about: "}
FOLDERS = {
    **{f"encoder, {name}": Folder(pooling=name) for name in POOLINGS},
    **{f"decoder, {name}": Folder(network="qwen3", pooling=name) for name in POOLINGS},
    **{
        f"{network}, {name}, prompts left out": Folder(
            network=network, pooling=name, prompts=PROMPTS, default="s2p", include_prompt=False
        )
        for network in ("bert", "llama")
        for name in POOLINGS
    },
    "not normalized": Folder(normalize=False),
    "XLM-RoBERTa": Folder(network="xlm-roberta", tokenizer={"padding": 1}),
    "ModernBERT": Folder(network="modernbert"),
    "Gemma 3 both ways": Folder(network="gemma3 both ways", tokenizer={}),
    "Mistral": Folder(network="mistral", pooling="last"),
    "end is EOS": Folder(network="qwen3", pooling="last", tokenizer={"template": "$A <|im_end|>"}),
    "no end token": Folder(network="qwen3", pooling="last", tokenizer={"template": "$A"}),
    "a start token": Folder(
        network="qwen3", pooling="first", tokenizer={"template": "<|im_start|> $A"}
    ),
    "start and end": Folder(
        network="llama", tokenizer={"template": "<|im_start|> $A <|im_end|> <|endoftext|>"}
    ),
    "no padding token": Folder(network="llama", pooling="last", tokenizer={"pad": "<|im_end|>"}),
    "padding on the left": Folder(
        network="qwen3", pooling="last", tokenizer={"padding_side": "left"}
    ),
    "padding on the right": Folder(
        network="qwen3", pooling="last", tokenizer={"padding_side": "right"}
    ),
    "cut on the left": Folder(
        network="qwen3", pooling="last", tokenizer={"truncation_side": "left"}, prompts=PROMPTS
    ),
    "prompt by default": Folder(prompts={"s2p": "about: "}, default="s2p"),
    "query by default": Folder(prompts={"query": "find: "}, default="query"),
    "empty by default": Folder(prompts={**PROMPTS, "none": ""}, default="none"),
    "default by default": Folder(
        prompts={"default": "about: ", "docs": "read: "}, default="default"
    ),
    "docs by default": Folder(prompts={"docs": "about: "}, default="docs"),
    "prompts": Folder(prompts=PROMPTS),
    "a prompt that is null": Folder(prompts={"query": "find: ", "document": None}),
    "no limit": Folder(limit=None),
    "limit of one token": Folder(limit=3),
    "lower case": Folder(network="llama", reading={"do_lower_case": True}),
    "lower case, left out": Folder(
        network="llama",
        reading={"do_lower_case": True},
        prompts={"s2p": "ABOUT: "},
        default="s2p",
        include_prompt=False,
    ),
    "lengths by role": Folder(reading={"query_length": 8, "document_length": 20}),
    "float16": Folder(dtype=torch.float16),
    "bfloat16": Folder(network="llama", dtype=torch.bfloat16),
    "shards": Folder(shard_size="100KB"),
    "options of no effect": Folder(
        reading={"model_args": {"attn_implementation": "eager"}, "tokenizer_args": {"use_fast": 1}}
    ),
}
GEMMA = Folder(  # as EmbeddingGemma
    network="gemma3 both ways",
    tokenizer={},
    dense=(Dense(192, bias=False), Dense(64, bias=False)),
)
LABSE = Folder(pooling="first", dense=(Dense(64, TANH, pickled=True),))  # as LaBSE
DISTILUSE = Folder(normalize=False, dense=(Dense(40, TANH),))  # as distiluse
FOLDERS |= {
    "two dense layers": GEMMA,
    "a dense layer, pickled": LABSE,
    "a dense layer, not normalized": DISTILUSE,
    "a dense layer with prompts": Folder(
        network="llama",
        pooling="last",
        prompts=PROMPTS,
        include_prompt=False,
        dense=(Dense(96, "torch.nn.GELU"),),
    ),
    "a dense layer of the usual function": Folder(dense=(Dense(24, None),)),
    "dense layers with residuals": Folder(
        dense=(
            Dense(64, more={"use_residual": True}),
            Dense(80, "torch.nn.ReLU", bias=False, more={"use_residual": True}),
        ),
    ),
    "a dense layer that names its input": Folder(
        dense=(Dense(64, more=dict.fromkeys(("module_input_name", "module_output_name"), VECTOR)),)
    ),
    "a dense layer, bfloat16": Folder(dtype=torch.bfloat16, dense=(Dense(64, TANH),)),
}
HALF = (torch.float16, torch.bfloat16)


def alone(encode: Callable[..., Any], texts: list[str], **how: Any) -> np.ndarray:
    """Each text alone, so that no padding is involved."""
    return np.concatenate([encode([text], **how) for text in texts])


def assert_alike(found: np.ndarray, expected: np.ndarray, folder: Folder) -> None:
    if folder.dtype in HALF:  # their arithmetic has 16 bits, ours 32
        cosines = torch.nn.functional.cosine_similarity(
            torch.tensor(found), torch.tensor(expected).float()
        )
        assert cosines.min() > 0.99
    else:
        length = np.linalg.norm(expected, axis=1, keepdims=True) if folder.dense else 1
        limit = 1e-6 if folder.dense else 2e-5
        np.testing.assert_allclose(found / length, expected / length, atol=limit)


@pytest.mark.parametrize("kind", FOLDERS)
def test_vectors_are_those_of_sentence_transformers(tmp_path, kind):
    folder = FOLDERS[kind]
    path = folder.write(tmp_path / "model")
    ours, peer = Embedder.load(path), SentenceTransformer(str(path), device="cpu")
    texts, saved = folder.texts, tmp_path / "saved"
    ours.save(saved)
    for embedder in (ours, Embedder.load(saved)):
        if folder.unnamed:
            assert_alike(embedder.encode(texts), alone(peer.encode, texts), folder)
        roles = {"query": peer.encode_query, "document": peer.encode_document}
        for role, encode in roles.items():
            if folder.prompts.get(role) is None and folder.default not in (None, "query"):
                continue  # our roles fall back to the default prompt, theirs to none
            assert_alike(embedder.encode(texts, role), alone(encode, texts), folder)
        for name in (name for name, text in folder.prompts.items() if text is not None):
            expected = alone(peer.encode, texts, prompt_name=name)
            assert_alike(embedder.encode(texts, task=name), expected, folder)
    if "query_length" not in folder.reading:
        again = SentenceTransformer(str(saved), device="cpu", model_kwargs={"dtype": "float32"})
        assert again.default_prompt_name == folder.default
        assert_alike(alone(again.encode, texts), alone(peer.encode, texts), folder)


@pytest.mark.parametrize("network", ["bert", "qwen3"])
@pytest.mark.parametrize("pooling", ["first", "last"])
def test_an_adapter_has_the_pooling_prompts_and_lengths_of_its_folder(tmp_path, network, pooling):
    folder = Folder(network=network, pooling=pooling, prompts=PROMPTS, default="s2p", limit=20)
    peer = SentenceTransformer(str(folder.write(tmp_path / "base")), device="cpu")
    names = ["query", "value"] if network == "bert" else ["q_proj", "v_proj"]
    peer.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=names))
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            if "lora" in name:
                weight.normal_(std=0.3)
    peer.save_pretrained(str(tmp_path / "adapter"))
    loaded = SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    merged = load_adapters([tmp_path / "adapter"])
    merged.save(tmp_path / "merged")
    for embedder in (
        merged,
        Embedder.load(tmp_path / "adapter"),
        Embedder.load(tmp_path / "merged"),
    ):
        assert_alike(embedder.encode(TEXTS), alone(loaded.encode, TEXTS), folder)
        for prompt in PROMPTS:
            expected = alone(loaded.encode, TEXTS, prompt_name=prompt)
            assert_alike(embedder.encode(TEXTS, task=prompt), expected, folder)


def test_an_adapter_without_settings_takes_those_of_its_base(tmp_path):
    folder = Folder(pooling="first", prompts=PROMPTS)
    path = folder.write(tmp_path / "base")
    peer = SentenceTransformer(str(path), device="cpu")
    peer.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query"]))
    network: Any = peer[0]
    network.auto_model.save_pretrained(tmp_path / "adapter")
    merged = load_adapters([tmp_path / "adapter"], base=path, attention="bidirectional")
    expected = alone(peer.encode, TEXTS, prompt_name="query")
    assert_alike(merged.encode(TEXTS, "query"), expected, folder)


def test_another_pooling_keeps_the_tokenizer_of_a_folder_with_one(tmp_path):
    path = Folder(network="qwen3", tokenizer={"template": "$A"}).write(tmp_path / "model")
    for embedder in (Embedder.load(path, pooling="last"), Embedder.load(path)):
        tokens = embedder.tokenize(["music"], "document").ids[0]
        assert len(tokens) == len("music")
        expected = Embedder.load(path).encode(["music"], output="tokens")[0][-1:]
        np.testing.assert_allclose(
            embedder.encode(["music"], pooling="last"),
            expected / np.linalg.norm(expected),
            atol=1e-6,
        )


@pytest.mark.parametrize(
    "kind",
    ["WordEmbeddings", "Router", "LayerNorm", "Dropout", "WeightedLayerPooling", "CNN", "LSTM"],
)
def test_folders_with_other_modules_are_refused_in_one_line(tmp_path, kind):
    path = Folder().write(tmp_path / "model")
    modules = json.loads((path / "modules.json").read_text())
    more = {"idx": 3, "name": "3", "path": "3", "type": f"sentence_transformers.models.{kind}"}
    (path / "modules.json").write_text(json.dumps([*modules, more]))
    with pytest.raises(ModelError, match=f'has the module ".*{kind}", which tercet lacks') as error:
        Embedder.load(path)
    assert "\n" not in str(error.value)
    said = manifest(str(path))
    assert said["cannot be loaded"] == str(error.value) and said["architecture"] == "BertModel"


def test_a_default_prompt_that_is_not_there_is_refused(tmp_path):
    path = Folder(prompts=PROMPTS, default="sp2").write(tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"default_prompt_name must be one of query, .*; got 'sp2'"
    ):
        Embedder.load(path)


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"module_output_name": "sentence_embedding"}, 'module_output_name is "sentence_embeddi'),
        (
            {"modality_config": {"text": {"method": "get_text_features"}}},
            'method of text is "get_text_features"',
        ),
        (
            {"modality_config": {"text": {"method_output_name": "pooler_output"}}},
            'method_output_name of text is "pooler_output"',
        ),
        ({"modality_config": [1]}, "must hold a JSON object; got list"),
    ],
)
def test_a_folder_that_pools_another_output_of_the_network_is_refused(tmp_path, reading, message):
    path = Folder(reading=reading).write(tmp_path / "model")
    with pytest.raises(ModelError, match=message):
        Embedder.load(path)


def test_a_folder_of_the_newest_release_names_the_usual_output(tmp_path):
    folder = Folder(dense=(Dense(40, TANH),), prompts=PROMPTS)
    path = folder.write(tmp_path / "model")
    peer = SentenceTransformer(str(path), device="cpu")
    peer.save_pretrained(str(tmp_path / "again"))
    assert "last_hidden_state" in (tmp_path / "again" / "sentence_bert_config.json").read_text()
    found = Embedder.load(tmp_path / "again").encode(TEXTS, "query")
    assert_alike(found, alone(peer.encode_query, TEXTS), folder)


@pytest.mark.parametrize(
    ("similarity", "normalize", "said"),
    [
        (None, False, "similarity is cosine, .* inner products; load it with normalize=True"),
        ("euclidean", False, "similarity is euclidean, while tercet ranks by inner products$"),
        ("dot", False, ""),
        ("cosine", True, ""),
        ("euclidean", True, ""),
        ("manhattan", True, "similarity is manhattan"),
    ],
)
def test_a_folder_that_ranks_otherwise_than_inner_products_is_warned_of(
    tmp_path, caplog, similarity, normalize, said
):
    path = Folder(normalize=normalize).write(tmp_path / "model")
    if similarity is not None:
        named = path / "config_sentence_transformers.json"
        config = json.loads(named.read_text())
        named.write_text(json.dumps({**config, "similarity_fn_name": similarity}))
    Embedder.load(path)
    assert re.search(said, caplog.text.strip()) if said else caplog.text == ""
    caplog.clear()
    Embedder.load(path, normalize=True).save(tmp_path / "saved")
    caplog.clear()
    Embedder.load(tmp_path / "saved")
    assert caplog.text == ""


def with_adapter(tmp_path: Path, folder: Folder) -> tuple[Any, Path]:
    """A model with an adapter, and a folder that holds both it and its base."""
    path = folder.write(tmp_path / "base")
    peer = SentenceTransformer(str(path), device="cpu")
    peer.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query"]))
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            if "lora" in name:
                weight.normal_(std=0.3)
    network: Any = peer[0]
    network.auto_model.save_pretrained(tmp_path / "adapter")
    both = shutil.copytree(path, tmp_path / "both")
    for file in (tmp_path / "adapter").glob("adapter*"):
        shutil.copy(file, both)
    return peer, both


def test_a_folder_with_a_model_and_an_adapter_is_read_and_saved_with_both(tmp_path):
    folder = Folder(pooling="first")
    peer, both = with_adapter(tmp_path, folder)
    embedder = Embedder.load(both)
    embedder.save(tmp_path / "saved")
    for found in (embedder, Embedder.load(tmp_path / "saved")):
        assert_alike(found.encode(TEXTS), alone(peer.encode, TEXTS), folder)


def test_an_adapter_that_is_its_own_base_is_refused(tmp_path):
    _, both = with_adapter(tmp_path, Folder())
    config = json.loads((both / "adapter_config.json").read_text())
    named = {**config, "base_model_name_or_path": str(both)}
    (both / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(ModelError, match="names its own folder as its base; move"):
        Embedder.load(both)
