"""Code in a model's folder is never run, and nobody is asked whether to run it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tercet.curate.synthesis.generators import LocalGenerator
from tercet.errors import ModelError, TercetError
from tercet.models.embedder import Embedder
from tercet.models.formats.tercet_folder import load_parts
from tercet.models.network.backbone import Backbone
from tercet.models.tokens import load_tokenizer
from tercet.objectives.token_heads import find_masked_head, load_head
from tests import published, toy

RUN = "from pathlib import Path\nPath({trace!r}).touch()\n"
NEVER = r"names custom code \(.*\), which tercet never runs; use a model whose architecture"


@pytest.fixture(autouse=True)
def trace(tmp_path, monkeypatch):
    """A file that code in a folder would make, and a terminal whose user says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    trace = tmp_path / "trace"
    yield trace
    assert not trace.exists()


def changed(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def hostile(tmp_path, trace, encoder_folder):
    """Make a copy of a model's folder whose config names code."""

    def make(known: bool, base: Path = encoder_folder) -> Path:
        folder = tmp_path / "hostile"
        shutil.copytree(base, folder)
        (folder / "tercet.json").unlink(missing_ok=True)
        code = RUN.format(trace=str(trace))
        code += "from transformers import BertConfig, BertModel\nclass Mine(BertConfig):\n"
        code += "    model_type = 'mine'\nclass Model(BertModel):\n    config_class = Mine\n"
        (folder / "modeling_mine.py").write_text(code)
        names = {"AutoConfig": "Mine", "AutoModel": "Model", "AutoModelForCausalLM": "Model"}
        auto_map = {name: f"modeling_mine.{kind}" for name, kind in names.items()}
        more = {} if known else {"model_type": "mine"}
        changed(folder, "config.json", auto_map=auto_map, **more)
        return folder

    return make


@pytest.mark.parametrize("known", [False, True])
def test_a_folder_whose_config_names_code_is_refused_by_every_way_in(hostile, known):
    folder = hostile(known)
    ways: list[Any] = [Embedder.load, Backbone.load, load_head, find_masked_head]
    ways.append(lambda place: LocalGenerator(str(place)))
    for way in ways:
        with pytest.raises(ModelError, match=NEVER) as refusal:
            way(folder)
        assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_part_of_a_config_that_names_code_is_refused(hostile, encoder_folder):
    folder = hostile(True)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    shutil.copy(encoder_folder / "config.json", folder)
    changed(folder, "config.json", text_config={"model_type": "mine", "auto_map": auto_map})
    with pytest.raises(ModelError, match=NEVER):
        Embedder.load(folder)
    shutil.copy(encoder_folder / "config.json", folder)
    changed(folder, "config.json", _attn_implementation="someone/kernel")
    with pytest.raises(ModelError, match=NEVER):
        Embedder.load(folder)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": [None, "code.Mine"]}, ["code.Mine", None]])
def test_a_tokenizer_that_names_code_is_refused(tmp_path, encoder_folder, trace, auto_map):
    folder = tmp_path / "model"
    shutil.copytree(encoder_folder, folder)
    (folder / "code.py").write_text(RUN.format(trace=str(trace)))
    changed(folder, "tokenizer_config.json", auto_map=auto_map)
    for load in (load_tokenizer, Embedder.load):
        with pytest.raises(ModelError, match="tokenizer_config.json " + NEVER):
            load(folder)


def test_a_folder_that_tercet_wrote_is_loaded_by_transformers_own_code(
    tmp_path, encoder_folder, hostile
):
    """An earlier release read such bases, so its exports may name code; it is still not run."""
    folder = tmp_path / "saved"
    Embedder.load(encoder_folder).save(folder)
    shutil.copy(hostile(True) / "modeling_mine.py", folder)
    auto_map = {"AutoConfig": "modeling_mine.Mine", "AutoModel": "modeling_mine.Model"}
    changed(folder, "config.json", auto_map=auto_map)
    texts = toy.SENTENCES[:3]
    expected = Embedder.load(encoder_folder).encode(texts)
    assert (Embedder.load(folder).encode(texts) == expected).all()


def test_a_published_nv_embed_loads_and_its_code_is_not_run(tmp_path, trace):
    folder = published.publish(tmp_path / "nv")
    (folder / "modeling_nvembed.py").write_text(RUN.format(trace=str(trace)))
    assert load_parts(
        folder, {}, dtype=torch.float32, attention=None, window=None, keep_layers=None
    )


class Pickled:
    """Makes a file when it is read back."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_weights_that_hold_other_objects_are_refused_in_a_line(tmp_path, encoder_folder, trace):
    folder = tmp_path / "model"
    shutil.copytree(encoder_folder, folder)
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    expected = Embedder.load(encoder_folder).encode(["one"])
    assert (Embedder.load(folder).encode(["one"]) == expected).all()
    torch.save({**weights, "more": Pickled(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="could run code, so it is not read; save") as refusal:
        Embedder.load(folder)
    assert "\n" not in str(refusal.value) and "weights_only" not in str(refusal.value)


def test_an_adapter_that_holds_other_objects_is_refused_in_a_line(tmp_path, decoder_folder, trace):
    embedder = Embedder.load(decoder_folder)
    embedder.backbone.add_lora(2, 4, 0.0)
    folder = tmp_path / "adapter"
    embedder.save_adapter(folder, str(decoder_folder))
    assert Embedder.load(folder).dim == embedder.dim
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"more": Pickled(trace)}, folder / "adapter_model.bin")
    with pytest.raises(TercetError, match="could run code") as refusal:
        Embedder.load(folder)
    assert "\n" not in str(refusal.value)
