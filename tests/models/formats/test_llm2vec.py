"""Parity with llm2vec 0.2.3: what it gave for a tiny Llama is in tests/fixtures."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tercet.models.formats.llm2vec import Llm2VecEncoder
from tercet.models.formats.llm2vec_files import POOLINGS, TEMPLATES, read_llm2vec
from tercet.models.formats.lora_adapters import merge_adapter
from tercet.models.network.backbone import Backbone
from tercet.models.tokens import Form, Tokenizer

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
