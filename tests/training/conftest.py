"""Data and a recipe of six steps that tests of the loop share."""

import pytest

from tercet.data.files.sources import open_source, write_examples
from tercet.recipes.finetune import finetune
from tercet.types import Example
from tests.toy import SENTENCES


@pytest.fixture
def data(tmp_path):
    examples = [
        Example(text.split()[-1] + f" {i}", (f"{text} number {i}",), (SENTENCES[(i + 1) % 12],))
        for i in range(4)
        for text in SENTENCES
    ]
    write_examples(tmp_path / "pairs.jsonl", examples)
    return open_source(tmp_path / "pairs.jsonl")


@pytest.fixture
def recipe(encoder_folder):
    return finetune(model=str(encoder_folder), batch_size=8, learning_rate=1e-3)  # 6 steps
