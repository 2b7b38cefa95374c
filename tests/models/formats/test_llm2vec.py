"""Parity with llm2vec 0.2.3: what it gave for a tiny Llama is in tests/fixtures."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tercet.errors import ModelError
from tercet.models.formats.llm2vec import (
    POOLINGS,
    SEPARATOR,
    TEMPLATES,
    adapter_folder,
    read_llm2vec,
)
from tercet.models.formats.lora_adapters import merge_adapter
from tercet.models.network.backbone import Backbone
from tercet.models.tokens import Form, Tokenizer
from tests.oracles import Llm2VecEncoder

FIXTURE = Path(__file__).parents[2] / "fixtures" / "llm2vec"
MNTP, SIMCSE = FIXTURE / "mntp", FIXTURE / "simcse"
RECORDED = np.load(FIXTURE / "vectors.npz")
TEXTS = json.loads((FIXTURE / "recorded.json").read_text(encoding="utf-8"))


def pairs(name: str = "pairs") -> list[tuple[str, str]]:
    return [(instruction, text) for instruction, text in TEXTS[name]]


@cache
def backbone(*adapters: Path) -> Backbone:
    loaded = Backbone.load(FIXTURE / "base", attention="bidirectional")
    for adapter in adapters:
        merge_adapter(loaded, adapter)
    return loaded


def gap(found: np.ndarray, name: str) -> float:
    return float(np.abs(found - RECORDED[name]).max())


def test_vectors_of_a_base_equal_the_peers():
    encoder = Llm2VecEncoder(backbone(), read_llm2vec([MNTP]))
    assert gap(encoder.encode(pairs()), "base/mean") < 1e-5


@pytest.mark.parametrize("mode", list(POOLINGS))
def test_vectors_with_a_merged_adapter_equal_the_peers_for_every_pooling(mode):
    said = replace(
        read_llm2vec([MNTP]),
        pooling=POOLINGS[mode],
        after=" </s>" if mode == "eos_token" else "",
        pool_instruction=mode == "bos_token",
    )
    assert gap(Llm2VecEncoder(backbone(MNTP), said).encode(pairs()), f"mntp/{mode}") < 1e-5


def test_vectors_with_two_adapters_and_shorter_limits_equal_the_peers():
    encoder = Llm2VecEncoder(backbone(MNTP, SIMCSE), read_llm2vec([MNTP, SIMCSE]))
    assert gap(encoder.encode(pairs()), "simcse/weighted_mean") < 1e-5


@pytest.mark.parametrize("base", [*TEMPLATES, "meta-llama/Meta-Llama-3-8B"])
def test_vectors_with_the_template_of_a_base_equal_the_peers(base):
    before, after = TEMPLATES.get(base, ("", ""))
    said = replace(read_llm2vec([MNTP]), before=before, after=after)
    assert gap(Llm2VecEncoder(backbone(MNTP), said).encode(pairs("few")), f"{base}/mean") < 1e-5
    end = {
        "meta-llama/Meta-Llama-3-8B-Instruct": "",
        "meta-llama/Meta-Llama-3-8B": "<|end_of_text|>",
    }
    said = replace(said, after=after + end.get(base, " </s>"), pooling="last")
    found = Llm2VecEncoder(backbone(MNTP), said).encode(pairs("few"))
    assert gap(found, f"{base}/eos_token") < 1e-5


def test_vectors_with_the_instruction_pooled_equal_the_peers():
    said = replace(read_llm2vec([MNTP]), pool_instruction=True)
    found = Llm2VecEncoder(backbone(MNTP), said).encode(pairs())
    assert gap(found, "instruction pooled/mean") < 1e-5


def test_a_text_of_nothing_is_pooled_as_if_it_were_alone():
    encoder = Llm2VecEncoder(backbone(MNTP), read_llm2vec([MNTP]))
    assert gap(encoder.encode(pairs("alone")), "alone/mean") < 1e-5
    among = encoder.encode([*pairs("alone"), *pairs()])[:3]
    assert gap(among, "alone/mean") < 1e-5


def test_borders_by_count_and_by_offsets_differ_so_that_the_switch_is_needed():
    said = read_llm2vec([MNTP])
    short = [(instruction, text) for instruction, text in pairs("few") if instruction]
    counted = Llm2VecEncoder(backbone(MNTP), said).tokenize(short)
    exact = Tokenizer(AutoTokenizer.from_pretrained(MNTP))(
        [text for _, text in short],
        said.max_tokens,
        [f"{instruction.strip()} " for instruction, _ in short],
        Form(pool_prompt=False),
    ).pack()
    assert exact.ids.tolist() == counted.ids.tolist()
    differ = [
        bool((counted.take([i]).pooled != exact.take([i]).pooled).any()) for i in range(len(short))
    ]
    assert 0 < sum(differ) < len(short)


def test_no_texts_give_no_vectors():
    found = Llm2VecEncoder(backbone(), read_llm2vec([MNTP])).encode([])
    assert found.shape == (0, 32)


LLAMA3 = "meta-llama/Meta-Llama-3-8B-Instruct"


def publish(folder: Path, *, base: str = "", **settings) -> list[Path]:
    """The fixture's two folders, with another name of the base and other settings."""
    folders = [folder / "mntp", folder / "simcse"]
    for place in folders:
        shutil.copytree(FIXTURE / place.name, place)
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps(config | {"_name_or_path": base}))
    (folders[1] / "llm2vec_config.json").write_text(json.dumps(settings))
    return folders


def test_what_the_last_folder_says_counts_and_the_rest_takes_the_packages_defaults(tmp_path):
    said = read_llm2vec([FIXTURE / "mntp", FIXTURE / "simcse"])
    assert (said.pooling, said.max_tokens, said.text_tokens) == ("weighted_mean", 96, 60)
    assert said.tokenizer == FIXTURE / "mntp"
    assert said.base == "base"
    usual = read_llm2vec([FIXTURE / "mntp"])
    assert (usual.pooling, usual.max_tokens, usual.text_tokens) == ("mean", 512, 400)
    assert not usual.pool_instruction
    pooled = read_llm2vec(publish(tmp_path, skip_instruction=False, max_length=77))
    assert pooled.pool_instruction
    assert (pooled.max_tokens, pooled.text_tokens) == (77, 400)
    # The first token stands before the text, so no border may hide it.
    first = read_llm2vec(publish(tmp_path / "first", pooling_mode="bos_token"))
    assert (first.pooling, first.pool_instruction) == ("first", True)


def test_a_text_stands_after_its_instruction_and_one_space():
    said = read_llm2vec([FIXTURE / "mntp"])
    assert said.joined(" Find it: ", " a ") == f"Find it: {SEPARATOR} a "
    assert said.joined("", " a ") == f"{SEPARATOR} a "


@pytest.mark.parametrize(
    ("base", "pooling", "expected"),
    [
        ("somebody/else", "mean", f"Find: {SEPARATOR} a "),
        ("somebody/else", "eos_token", f"Find: {SEPARATOR} a </s>"),
        ("meta-llama/Meta-Llama-3-8B", "eos_token", f"Find: {SEPARATOR} a<|end_of_text|>"),
        ("meta-llama/Llama-2-7b-chat-hf", "mean", f"[INST] Find: {SEPARATOR} a [/INST]"),
        (
            LLAMA3,
            "eos_token",
            f"<|start_header_id|>user<|end_header_id|>\n\nFind: {SEPARATOR} a<|eot_id|>",
        ),
    ],
)
def test_the_template_hangs_on_the_name_of_the_base(tmp_path, base, pooling, expected):
    said = read_llm2vec(publish(tmp_path, base=base, pooling_mode=pooling))
    assert said.joined("Find:", " a ") == expected


def test_the_name_in_the_adapter_counts_where_the_config_has_none(tmp_path):
    folders = publish(tmp_path)
    adapter = json.loads((folders[0] / "adapter_config.json").read_text())
    changed = adapter | {"base_model_name_or_path": "Qwen/Qwen2-7B-Instruct"}
    (folders[0] / "adapter_config.json").write_text(json.dumps(changed))
    said = read_llm2vec(folders)
    assert (said.base, said.after) == ("Qwen/Qwen2-7B-Instruct", "<|im_end|>")


def test_every_pooling_of_the_package_is_known():
    recorded = np.load(FIXTURE / "vectors.npz")
    stage = {name.partition("/")[2] for name in recorded if name.startswith("mntp/")}
    assert stage == set(POOLINGS)


def test_damaged_files_are_named(tmp_path):
    folders = publish(tmp_path, pooling_mode="max")
    path = folders[1] / "llm2vec_config.json"
    with pytest.raises(ModelError) as error:
        read_llm2vec(folders)
    assert str(error.value) == (
        f"{path}: pooling_mode must be one of mean, weighted_mean, eos_token, last_token, "
        'bos_token; got "max"'
    )
    path.write_text('{"max_length": "long"}')
    with pytest.raises(ModelError, match='"max_length" must be like 512; got'):
        read_llm2vec(folders)
    path.write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        read_llm2vec(folders)
    path.write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_llm2vec(folders)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        adapter_folder(tmp_path / "nothing")
    with pytest.raises(ModelError) as error:
        adapter_folder(FIXTURE / "base")
    assert str(error.value) == (
        f"{FIXTURE / 'base'}: has no adapter_config.json, so it is not an adapter; "
        "a whole model is given as the base"
    )
    with pytest.raises(ModelError, match="somebody/adapter: is no local folder, and could not be"):
        adapter_folder("somebody/adapter")  # tests are offline
    assert adapter_folder(FIXTURE / "mntp") == FIXTURE / "mntp"
