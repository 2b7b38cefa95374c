"""A guide's stored vectors of the texts of examples."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tercet.curate.mining.guide import Guide, texts_of
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.models.embedder import Embedder
from tercet.types import Example
from tests.toy import SENTENCES

EXAMPLES = [
    Example(
        query=f"question {i % 5}",
        positives=(SENTENCES[i % 4],),
        negatives=(SENTENCES[4 + i % 3], SENTENCES[(i + 1) % 4]),
        document_prompt="passage: " if i % 2 else None,
        task="one" if i < 6 else "two",
    )
    for i in range(12)
]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    write_examples(tmp_path / "rows.jsonl", EXAMPLES)
    return open_source(tmp_path / "rows.jsonl")


@pytest.fixture
def model(encoder_folder: Path) -> Embedder:
    embedder = Embedder.load(str(encoder_folder))
    prompts = {"query": "query: ", "document": ""}
    embedder.settings = replace(
        embedder.settings, prompts=prompts, task_prompts={"two": {"query": "two: "}}
    )
    return embedder


def slow(model: Embedder, example: Example, text: str, role: str) -> np.ndarray:
    """One text with its prompt in front of it."""
    known = "two: " if example.task == "two" else "query: "
    prompt = known if role == "query" else example.document_prompt or ""
    settings = model.settings
    model.settings = replace(settings, prompts={role: prompt}, task_prompts={})
    try:
        return model.encode([text], role)[0]
    finally:
        model.settings = settings


def test_each_text_has_the_vector_that_the_guide_gives_it_after_its_prompt(model, source, tmp_path):
    guide = Guide(model, [source], tmp_path / "guide")
    for role in ("query", "document"):
        pairs = [(text, example) for example in EXAMPLES for text in texts_of(example, role)]
        pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
        found = guide([text for text, _ in pairs], role, [example for _, example in pairs])
        expected = [slow(model, example, text, role) for text, example in pairs]
        torch.testing.assert_close(found, torch.from_numpy(np.stack(expected)), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(pairs)))
        assert guide([], role, []).shape == (0, model.dim)


@pytest.mark.parametrize("prompt", [None, "only blank ones: "])
def test_a_blank_negative_has_a_vector_of_zeros(model, tmp_path, prompt):
    rows = [
        Example("a", ("b",), negatives=("", " \n", "c")),
        Example("d", ("e",), negatives=("",), document_prompt=prompt),
    ]
    write_examples(tmp_path / "rows.jsonl", rows)
    guide = Guide(model, [open_source(tmp_path / "rows.jsonl")], tmp_path / "guide")
    found = guide(["", " \n", "c", ""], "document", [rows[0], rows[0], rows[0], rows[1]])
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([0.0, 0.0, 1.0, 0.0]))


def test_each_distinct_text_is_encoded_once_and_never_again(model, source, tmp_path, monkeypatch):
    encoded: list[str] = []
    encode = Embedder.encode

    def counted(self, texts, role, *more, **options):
        encoded.extend(texts)
        return encode(self, texts, role, *more, **options)

    monkeypatch.setattr(Embedder, "encode", counted)
    first = Guide(model, [source], tmp_path / "guide")
    distinct = {(e.document_prompt, text) for e in EXAMPLES for text in texts_of(e, "document")}
    asked = {(e.task, e.query) for e in EXAMPLES}
    assert len(encoded) == len(distinct) + len(asked)
    second = Guide(model, [source], tmp_path / "guide")
    assert len(encoded) == len(distinct) + len(asked)
    texts = [example.query for example in EXAMPLES]
    assert torch.equal(first(texts, "query", EXAMPLES), second(texts, "query", EXAMPLES))


def test_threads_read_the_same_vectors(model, source, tmp_path):
    guide = Guide(model, [source], tmp_path / "guide")
    texts = [example.query for example in EXAMPLES]
    expected = guide(texts, "query", EXAMPLES)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: guide(texts, "query", EXAMPLES), range(20)):
            assert torch.equal(found, expected)
