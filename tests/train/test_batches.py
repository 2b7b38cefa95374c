from dataclasses import replace

import numpy as np
import pytest

from tercet.data.sources import open_source, write_examples
from tercet.nn.embedder import Embedder
from tercet.objectives.contrastive import Contrastive
from tercet.train.batches import bytes_per_token, sampler_of
from tercet.train.recipe import Stage
from tercet.types import Example

STAGE = Stage(name="toy", objective=Contrastive(), batch_size=32)


@pytest.fixture(scope="module")
def embedder(encoder_folder):
    return Embedder.load(encoder_folder, query_tokens=64, document_tokens=64)


@pytest.fixture
def source(tmp_path):
    """A hundred texts of 8 to 11 words; "editor" is one token of the tokenizer."""
    examples = [Example(f"query {i}", ("editor " * (8 + i % 4),)) for i in range(100)]
    write_examples(tmp_path / "pairs.jsonl", examples)
    return open_source(tmp_path / "pairs.jsonl")


def sizes_of_batches(sampler) -> list[int]:
    sizes = []
    while (rows := sampler.next_batch()) is not None:
        sizes.append(len(rows))
    return sizes


def test_bytes_per_token_are_those_of_the_longest_texts(source, embedder):
    # 7 bytes a word; 8 to 11 words and two special tokens: 9.5 words of 11.5 tokens on average
    assert bytes_per_token([source], embedder) == pytest.approx(7 * 9.5 / 11.5, rel=0.02)


def test_a_token_budget_alone_counts_tokens_and_not_bytes(source, embedder):
    # The longest text has 13 tokens: 10 of them are 130 tokens, or 770 bytes.
    sizes = sizes_of_batches(sampler_of(replace(STAGE, token_budget=130), [source], 0, embedder))
    assert max(sizes) in (9, 10)


def test_length_edges_are_in_tokens_too(source, embedder):
    sampler = sampler_of(replace(STAGE, length_edges=(12,), batch_size=10), [source], 0, embedder)
    sides = []
    while (rows := sampler.next_batch()) is not None:
        words = source.sizes[rows.row] // 7
        sides.append((words.max() <= 9, words.min() >= 10))
    assert all(short or long for short, long in sides)  # 9 words and 2 special tokens: 11


def test_edges_that_are_the_same_in_bytes_are_one(source, embedder):
    tiny = replace(source, sizes=np.ones_like(source.sizes))
    stage = replace(STAGE, length_edges=(1, 2, 3))
    assert sum(sizes_of_batches(sampler_of(stage, [tiny], 0, embedder))) == 100


def test_a_text_that_will_be_cut_is_counted_as_long_as_it_is_then(tmp_path, embedder):
    examples = [Example(f"query {i}", ("editor " * 60,)) for i in range(100)]
    examples[7] = replace(examples[7], positives=("editor " * 20_000,))
    write_examples(tmp_path / "pairs.jsonl", examples)
    source = open_source(tmp_path / "pairs.jsonl")
    sampler = sampler_of(replace(STAGE, token_budget=64 * 16), [source], 0, embedder)
    assert max(sizes_of_batches(sampler)) >= 15
