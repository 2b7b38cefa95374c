"""Training traps of Arctic-Embed, by their numbers.

A1, A7 and A20 in several processes are in ``tests/training/test_two_processes.py``, A2 to A5, A8,
A16 and A17 in ``tests/losses/test_info_nce.py`` and ``tests/data/batches/test_relation.py``.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor

from tercet.data.batches.collate import Batch, Collator
from tercet.data.batches.relation import relation_of
from tercet.data.batches.sampler import BatchRows
from tercet.data.files.sources import open_source, write_examples
from tercet.losses.info_nce import info_nce
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.objectives.contrastive import Contrastive, PairWork
from tercet.types import NEGATIVE, POSITIVE, Example
from tercet.vectors import Vectors
from tests import toy
from tests.losses.test_info_nce import (
    Dense,
    assert_same_loss_and_gradients,
    mixed_relation,
    slow_info_nce,
    slow_matryoshka,
    vectors,
)
from tests.training import test_two_processes as two

OBJECTIVE = Contrastive(temperature=0.02, dims=(16,))
EVERY = list(range(8))
ALL = Chunks(10_000)
SOME_KEPT = Chunks(40, graph_tokens=60)
TWICE = Chunks(25, graph_tokens=0, seed=3)  # every chunk is embedded a second time


def examples() -> list[Example]:
    """One to three positives each, 13 in all, and 8 negatives: an odd number of documents."""
    text = toy.SENTENCES
    counts = zip([1, 2, 1, 1, 2, 1, 3, 2], [0, 1, 2, 1, 0, 2, 0, 2], strict=True)
    return [
        Example(
            query=text[i].split()[-1],
            positives=tuple(f"{text[i]} {j}" for j in range(right)),
            negatives=tuple(text[(i + j) % 12] for j in range(3, 3 + wrong)),
        )
        for i, (right, wrong) in enumerate(counts)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny BERT, which drops out in training, and data."""
    folder = toy.save_model(tmp_path_factory.mktemp("base"), "bert")
    write_examples(folder / "pairs.jsonl", examples())
    return folder


def at_work(base: Path) -> tuple[Embedder, PairWork]:
    """In float64 and without dropout."""
    embedder = Embedder.load(base, pooling="first").double().eval()
    collate = Collator(
        tokenize=embedder.tokenize, prompt_of=lambda role, task: f"{role}: ", positives=3
    )
    return embedder, OBJECTIVE.start(embedder, [open_source(base / "pairs.jsonl")], collate)


def rows(chosen: Sequence[int]) -> BatchRows:
    return BatchRows(np.zeros(len(chosen), np.int16), np.array(chosen))


def gradient(embedder: Embedder) -> Tensor:
    return torch.cat([p.grad.flatten() for p in embedder.parameters() if p.grad is not None])


# ---- the loss --------------------------------------------------------------------------------


def softplus_form(queries: Tensor, docs: Tensor, relation: Dense, temperature: float) -> Tensor:
    """Section 7.3 of the specification, with a guard where a query has no negatives."""
    logits = queries @ docs.T / temperature
    hidden = logits.masked_fill(relation.matrix != NEGATIVE, -torch.inf)
    terms = [
        F.softplus(hidden[i].logsumexp(0) - logits[i, j], threshold=1e9)
        for i, j in (relation.matrix == POSITIVE).nonzero().tolist()
        if (relation.matrix[i] == NEGATIVE).any()
    ]
    return torch.stack(terms).sum() / relation.positives


def test_many_positives_have_the_softplus_form_which_is_the_expanded_one():
    """Trap A3 of Arctic-Embed."""
    relation = mixed_relation()  # 0 to 3 positives a query, rows without negatives
    queries, docs = vectors(13, 7), vectors(19, 7, seed=1)
    for slow in (softplus_form, slow_info_nce):  # the second has a row for each positive
        loss = info_nce(queries, docs, relation, 0.02)
        assert_same_loss_and_gradients(loss, slow(queries, docs, relation, 0.02), [queries, docs])


def test_a_batch_without_positives_has_zero_loss_and_gradient_and_says_so():
    """Trap A4 of Arctic-Embed."""
    relation = relation_of(["a", "b"], [[], []], [["x"], ["y", "z"]])
    batch = Batch(toy.pack(*toy.random_texts(3, 4, 5, 2, 6)), 2, relation, 0)
    made = vectors(5, 32)
    with pytest.warns(UserWarning, match="no query of this batch has a positive"):
        loss = OBJECTIVE.loss(Vectors(made), batch)["loss"]
    assert loss == 0
    (by_vectors,) = torch.autograd.grad(loss, made)
    assert (by_vectors == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_no_negative_is_masked_in_float32_whatever_comes_in(dtype):
    """Trap A5 of Arctic-Embed."""
    if dtype == torch.float16:  # the reference's way
        with pytest.raises(RuntimeError, match="overflow"):
            torch.zeros(2, dtype=dtype).masked_fill(torch.tensor([True, False]), -1e12)
    relation = mixed_relation()
    queries, docs = vectors(13, 32, dtype=dtype), vectors(19, 32, seed=1, dtype=dtype)
    loss = info_nce(queries, docs, relation, 0.02, dims=(16, 32))
    assert loss.dtype == torch.float32
    weights = {16: 0.5, 32: 0.5}  # of the same rounded vectors: what differs is the arithmetic
    exact = slow_matryoshka(queries.double(), docs.double(), relation, 0.02, weights)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, [queries, docs]))


# ---- chunks, dropout, pooling ----------------------------------------------------------------


def plain_matryoshka(embedder: Embedder, batch: Batch) -> Tensor:
    """All texts at once; vectors cut, scaled, and contrasted as the formula says."""
    queries, docs = embedder(batch.texts).tensor_split([batch.queries])
    relation = Dense(batch.relation.rows(0, batch.queries))
    return slow_matryoshka(queries, docs, relation, 0.02, {16: 0.5, embedder.dim: 0.5})


@pytest.mark.parametrize("chunks", [ALL, SOME_KEPT, TWICE])
def test_chunks_and_matryoshka_together_are_plain_matryoshka(base, chunks):
    """Trap A6 of Arctic-Embed."""
    embedder, work = at_work(base)
    batch = work.batch(rows(EVERY), [0])
    expected = plain_matryoshka(embedder, batch)
    expected.backward()
    by_formula = gradient(embedder)
    embedder.zero_grad(set_to_none=True)
    found = work.backward(batch, chunks)["loss"]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=0)
    assert two.gap([gradient(embedder)], [by_formula]) < 1e-10


def test_a_cut_vector_is_scaled_to_unit_length_again(base):
    """Trap A6 of Arctic-Embed.

    What is cut off changes the length of the whole vector, and nothing of the short one.
    """
    embedder, work = at_work(base)
    batch = work.batch(rows(EVERY), [0])
    made = embedder(batch.texts).detach()
    queries, docs = F.normalize(made[:, :16], dim=1).tensor_split([batch.queries])
    short = info_nce(queries, docs, batch.relation, 0.02)
    for rest in (1, 3):
        vector = torch.cat([made[:, :16], rest * made[:, 16:]], dim=1)
        full = replace(OBJECTIVE, dims=()).loss(Vectors(vector), batch)["loss"]
        both = OBJECTIVE.loss(Vectors(vector), batch)["loss"]
        torch.testing.assert_close(both, (short + full) / 2)


def test_dropout_drops_the_same_in_both_passes(base):
    """Trap A7 of Arctic-Embed."""
    embedder, work = at_work(base)
    seen: list[Tensor] = []
    embedder.train()
    embedder.backbone.register_forward_hook(lambda _, __, states: seen.append(states.detach()))
    batch = work.batch(rows(EVERY), [0])
    work.backward(batch, TWICE)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) > 3
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(second), strict=True))
    work.backward(batch, replace(TWICE, seed=4))
    assert not torch.equal(first[0], seen[2 * len(first)])  # something was dropped


def test_the_first_token_is_pooled_whatever_stands_beside_the_text(base):
    """Trap A10 of Arctic-Embed: the stock model pads, on the right or on the left; ours packs."""
    embedder, _ = at_work(base)
    texts = toy.random_texts(1, 7, 3, 1, 5)
    found = embedder(toy.pack(*texts))
    alone = torch.cat([embedder(toy.pack(text)) for text in texts])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)
    stock = t.AutoModel.from_pretrained(base, attn_implementation="eager").double().eval()
    for side in ("right", "left"):
        ids, mask = torch.zeros(5, 7, dtype=torch.int64), torch.zeros(5, 7, dtype=torch.int64)
        for row, text in enumerate(texts):
            place = slice(0, len(text)) if side == "right" else slice(7 - len(text), 7)
            ids[row, place], mask[row, place] = text, 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        states = stock(ids, attention_mask=mask, position_ids=positions).last_hidden_state
        first = states[torch.arange(5), mask.argmax(1)]
        torch.testing.assert_close(found, first, rtol=0, atol=1e-10)
