from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tercet.data.batches.collate import Collator
from tercet.data.batches.relation import hash_of
from tercet.data.batches.shuffling import shuffled
from tercet.models.tokens import Tokens
from tercet.types import NEGATIVE, POSITIVE, Example
from tests.toy import SENTENCES

WANTED = 3  # mined negatives of a query, at most


class Read:
    """A tokenizer that remembers what it was given, and makes one token of a text."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}

    def __call__(self, texts: Any, role: Any, prompts: Any) -> Tokens:
        self.texts[role] = list(texts)
        return Tokens([np.array([7], np.int32)] * len(texts), [0] * len(texts), 0)


def collator(**changes: Any) -> tuple[Collator, Read]:
    read = Read()
    made = Collator(tokenize=read, prompt_of=lambda role, task: "", negatives=WANTED)
    return replace(made, **changes), read


def row(number: int, negatives: int, positive: str = "") -> Example:
    return Example(
        f"query {number}",
        (positive or f"positive {number}",),
        tuple(f"negative {number} {i}" for i in range(negatives)),
    )


def test_a_row_takes_the_negatives_that_it_has_up_to_those_asked_for():
    """Trap B17 of BGE-M3: none is repeated to fill a group."""
    examples = [row(i, count) for i, count in enumerate((0, 1, WANTED, 9))]
    collate, read = collator()
    batch = collate(examples, [0, 5])
    own = [(batch.relation.owners == i) & (batch.relation.own == NEGATIVE) for i in range(4)]
    assert [int(mask.sum()) for mask in own] == [0, 1, WANTED, WANTED]
    assert [int((batch.relation.owners == i).sum()) for i in range(4)] == [1, 2, 4, 4]
    assert len(set(read.texts["document"])) == len(read.texts["document"]) == 11
    assert batch.relation.positives == 4
    rows = batch.relation.rows(0, 4)
    assert torch.equal((rows == POSITIVE).sum(1), torch.ones(4, dtype=torch.int64))
    assert torch.equal((rows == NEGATIVE).sum(1), torch.full((4,), 10))  # all of the others


def test_a_batch_of_rows_without_any_negative_has_those_of_the_others():
    """Trap B17 of BGE-M3."""
    collate, _ = collator()
    rows = collate([row(i, 0) for i in range(3)], [0, 5]).relation.rows(0, 3)
    assert torch.equal(rows, torch.eye(3, dtype=torch.int8) * 2 - 1)


LONG = " and ".join(SENTENCES)


def test_a_share_of_the_long_positives_is_read_with_its_thirds_in_another_order():
    examples = [row(i, 2, f"{LONG} {i}") for i in range(2000)]
    collate, read = collator(shuffle_segments=0.1)
    collate(examples, [0, 5])
    positives = read.texts["document"][::3]
    changed = [i for i, text in enumerate(positives) if text != f"{LONG} {i}"]
    assert len(changed) == pytest.approx(200, abs=45)  # three standard deviations are 40
    for i in changed:
        assert sorted(positives[i].split()) != [] and len(positives[i]) <= len(LONG) + 8
        assert set("".join(positives[i].split())) == set("".join(f"{LONG} {i}".split()))
    assert not any(text != text.strip() for text in positives)


def test_queries_and_negatives_are_never_shuffled():
    example = Example(f"{LONG} ?", (LONG,), (f"{LONG} no",))
    collate, read = collator(shuffle_segments=1.0)
    collate([example], [0, 5])
    assert read.texts["query"] == [f"{LONG} ?"]
    assert read.texts["document"][0] != LONG and read.texts["document"][1] == f"{LONG} no"


def test_shuffling_depends_on_seed_and_query_and_not_on_other_rows():
    examples = [row(i, 2, f"{LONG} {i}") for i in range(20)]
    collate, read = collator(shuffle_segments=0.5)
    collate(examples, [0, 5])
    together = read.texts["document"][::3]
    alone = []
    for example in reversed(examples):
        collate([example], [0, 5])
        alone.append(read.texts["document"][0])
    assert together == alone[::-1]
    collate(examples, [0, 6])
    assert read.texts["document"][::3] != together


def test_shuffling_leaves_the_draw_of_documents_and_their_hashes_alone():
    examples = [
        Example(f"q {i}", tuple(f"{LONG} {i} {j}" for j in range(3)), tuple(SENTENCES))
        for i in range(5)
    ]
    plain, shuffling = collator(positives=2)[0], collator(positives=2, shuffle_segments=1.0)
    one, other = plain(examples, [0, 5]), shuffling[0](examples, [0, 5])
    assert torch.equal(one.relation.texts, other.relation.texts)
    assert torch.equal(one.relation.rows(0, 5), other.relation.rows(0, 5))
    read = set(shuffling[1].texts["document"])
    assert not read & {text for example in examples for text in example.positives}


def test_words_and_sentences_are_places_to_cut_as_well():
    collate, read = collator(shuffle_segments=1.0, shuffle_at="words")
    collate([Example("q", (LONG,))], [0, 5])
    rng = np.random.default_rng([0x5EC, 0, 5, hash_of("q") % 2**63])
    rng.random(1)
    assert read.texts["document"] == [shuffled(LONG, rng, "words")]
    assert sorted(read.texts["document"][0].split()) == sorted(LONG.split())
