import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tercet.data.batches.collate import Collator
from tercet.data.batches.token_cache import CachedTokens, stored_tokens
from tercet.data.files.folders import open_sources
from tercet.data.files.sources import write_examples
from tercet.models.tokens import Form, Tokenizer
from tercet.types import Example
from tests.toy import SENTENCES, wordpiece


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    rows = [
        Example(text, (f"{text} again", text[:9]), (SENTENCES[i - 1],), lang="de" if i % 2 else "")
        for i, text in enumerate(SENTENCES)
    ]
    rows.append(Example("music", (SENTENCES[0],), query_prompt="find ", document_prompt="a "))
    write_examples(tmp_path / "s" / "nq.jsonl", rows)
    return open_sources(tmp_path / "s")


def tokenizer(max_tokens=6, form=None):
    own = Tokenizer(wordpiece())
    calls = []

    def tokenize(texts, role, prompts):
        calls.append(len(texts))
        return own(texts, max_tokens, prompts, form or Form())

    return tokenize, calls


def prompt_of(role, task):
    return {"query": "play ", "document": ""}[role]


def made_with(role):
    return f"toy {role}"


@pytest.mark.parametrize(
    "form", [Form(), Form(pool_prompt=False), Form(suffix=" now", pool_special=False)]
)
def test_batches_are_those_of_tokenizing_on_the_fly(sources, form):
    tokenize, _ = tokenizer(form=form)
    stored = stored_tokens(sources, made_with, tokenize, prompt_of)
    cached = CachedTokens(tokenize, stored)
    plain, quick = (
        Collator(tokenize=each, prompt_of=prompt_of, negatives=1) for each in (tokenize, cached)
    )
    for step in range(3):
        for source in sources:
            examples = source.examples(
                np.random.default_rng(step).permutation(len(source)).tolist()
            )
            one, other = plain(examples, [step]), quick(examples, [step])
            assert torch.equal(one.texts.ids, other.texts.ids)
            assert one.texts.ids.dtype == other.texts.ids.dtype
            assert torch.equal(one.texts.offsets, other.texts.offsets)
            assert torch.equal(one.texts.pooled, other.texts.pooled)
            assert one.truncated == other.truncated > 0
    assert cached.missed == 0


def test_tokens_are_made_once_and_mapped(sources):
    tokenize, calls = tokenizer()
    stored_tokens(sources, made_with, tokenize, prompt_of)
    made = len(calls)
    stored = stored_tokens(sources, made_with, tokenize, prompt_of)
    assert made == 4 and len(calls) == made  # two languages, two roles
    tokens = stored["document"][0]
    assert isinstance(tokens.ids, np.memmap) and tokens.ids.dtype == np.uint32
    assert tokens.offsets.dtype == np.int64 and len(tokens.ids) == tokens.offsets[-1]


def test_a_text_that_is_not_there_is_tokenized(sources):
    tokenize, calls = tokenizer()
    cached = CachedTokens(tokenize, stored_tokens(sources, made_with, tokenize, prompt_of))
    texts, prompts = ["mined since", SENTENCES[2], SENTENCES[2]], ["", "", "other "]
    calls.clear()
    found, right = cached(texts, "document", prompts), tokenize(texts, "document", prompts)
    assert [ids.tolist() for ids in found.ids] == [ids.tolist() for ids in right.ids]
    assert cached.missed == 2 and calls == [2, 3]
    assert len(cached([], "query", [])) == 0


def test_a_prompt_is_not_mixed_up_with_the_begin_of_a_text(sources):
    tokenize, _ = tokenizer()
    cached = CachedTokens(tokenize, stored_tokens(sources, made_with, tokenize, prompt_of))
    cached(["lay " + SENTENCES[0]], "query", ["p"])
    assert cached.missed == 1


def folders():
    return sorted((Path(os.environ["TERCET_CACHE"]) / "tokens").iterdir())


def test_other_data_prompts_tokenizers_and_roles_have_their_own_folders(sources):
    tokenize, _ = tokenizer()
    for made in ("a", "b"):
        for prompt in ("", "x "):
            stored_tokens(
                sources, lambda _, it=made: it, tokenize, lambda role, task, it=prompt: it
            )
    assert len(folders()) == 16  # two each of sources, roles, tokenizers and prompts


def test_a_folder_that_lacks_a_file_is_made_again(sources):
    tokenize, calls = tokenizer()
    stored_tokens(sources, made_with, tokenize, prompt_of)
    (folders()[0] / "keys.npy").unlink()
    (folders()[1] / "ids.npy").write_bytes(b"")
    calls.clear()
    stored_tokens(sources, made_with, tokenize, prompt_of)
    assert len(calls) == 2
    assert all((folder / "keys.npy").exists() for folder in folders())


def test_what_was_killed_half_way_is_made_again(sources):
    tokenize, calls = tokenizer()

    def killed(texts, role, prompts):
        if role == "document":
            raise KeyboardInterrupt
        return tokenize(texts, role, prompts)

    with pytest.raises(KeyboardInterrupt):
        stored_tokens(sources, made_with, killed, prompt_of)
    assert len(calls) == 2
    assert len(stored_tokens(sources, made_with, tokenize, prompt_of)["document"]) == 2
    assert len(calls) == 4
