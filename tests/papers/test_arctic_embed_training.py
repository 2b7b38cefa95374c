"""Training traps of Arctic-Embed, by their numbers. As a script, this file is one of two processes.

A14, A15 and A19 are looked at elsewhere; A8, A16 and A17 in
``tests/data/batches/test_relation.py`` and ``tests/losses/test_info_nce.py``.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor

from tercet import distributed
from tercet.data.batches.collate import Batch, Collator
from tercet.data.batches.relation import relation_of
from tercet.data.batches.sampler import BatchRows
from tercet.data.files.sources import open_source, write_examples
from tercet.losses.info_nce import info_nce
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.objectives.contrastive import Contrastive, PairWork
from tercet.types import NEGATIVE, POSITIVE, Example
from tests import toy
from tests.losses.test_info_nce import (
    Dense,
    assert_same_loss_and_gradients,
    dense,
    mixed_relation,
    slow_info_nce,
    slow_matryoshka,
    vectors,
)
from tests.processes import run_together
from tests.train import test_two_processes as two

OBJECTIVE = Contrastive(temperature=0.02, dims=(16,))
EVERY = list(range(8))
SHARES = [EVERY[:5], EVERY[5:]]  # unequal rows, and unequal positives in them
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


def step(base: Path, chosen: Sequence[int]) -> dict[str, Any]:
    """This process's share of a step: its loss and gradient, and the gradient of all."""
    embedder, work = at_work(base)
    batch = work.batch(rows(chosen), [0])
    loss = work.backward(batch, SOME_KEPT)["loss"]
    own, everybody = gradient(embedder).clone(), batch.relation.gathered()
    distributed.sum_gradients(embedder.parameters())
    return {
        "loss": loss,
        "own": own,
        "gradient": gradient(embedder),
        "positives": everybody.positives,
        "own positives": batch.relation.positives,
        "documents": len(everybody.owners),
    }


def summed_numbers(folder: Path) -> list[int]:
    """How many numbers each sum over the processes has, in three steps that embed all twice."""
    found: list[int] = []
    add = distributed.dist.all_reduce

    def recorded(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        found.append(tensor.numel())
        return add(tensor, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.dist, "all_reduce", recorded)
        two.trained(folder, "out", two.recipe(folder, steps=3), two.CHUNKED)
    return found


def one_of_two(base: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    facts = step(base, SHARES[distributed.rank()])
    facts["summed"] = summed_numbers(base / "loop")
    torch.save(facts, base / f"{distributed.rank()}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def both(base) -> list[dict[str, Any]]:
    two.prepare(base / "loop")
    run_together(__file__, str(base))
    return [torch.load(base / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(base) -> dict[str, Any]:
    return step(base, EVERY)


# ---- several processes -----------------------------------------------------------------------


def test_a1_two_processes_with_unequal_shares_have_the_gradient_of_one(both, alone):
    assert [facts["own positives"] for facts in both] == [7, 6]
    for facts in both:
        assert two.gap([facts["gradient"]], [alone["gradient"]]) < 1e-12
    mean = both[0]["own"] / 2 + both[1]["own"] / 2
    assert two.gap([mean], [alone["gradient"]]) > 0.4


def test_a2_the_loss_is_divided_by_the_positives_of_all_processes(both, alone):
    assert [facts["positives"] for facts in both] == [13, 13]
    shares = [float(facts["loss"]) for facts in both]
    assert sum(shares) == pytest.approx(float(alone["loss"]), abs=1e-12)
    means = [float(facts["loss"]) * 13 / facts["own positives"] for facts in both]
    assert abs(sum(means) / 2 - float(alone["loss"])) > 1e-3  # a mean of means is another number


def test_a7_gradients_are_summed_once_a_step_however_many_chunks_there_are(base, both):
    weights = Embedder.load(base / "loop" / "base").named_parameters()
    count = sum(p.numel() for name, p in weights if ".pooler." not in name)  # BERT's own, unused
    for facts in both:
        assert facts["summed"].count(count) == 3
        assert max(facts["summed"]) == count


def test_a20_documents_that_do_not_divide_by_the_processes_are_all_used(both, alone):
    assert [facts["documents"] for facts in both] == [alone["documents"]] * 2
    assert alone["documents"] % 2 == 1
    for world in (2, 3, 5):
        shares = [rows(EVERY).share(rank, world).row.tolist() for rank in range(world)]
        assert sorted(row for share in shares for row in share) == EVERY


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


def test_a3_many_positives_have_the_softplus_form_which_is_the_expanded_one():
    relation = mixed_relation()  # 0 to 3 positives a query, rows without negatives
    queries, docs = vectors(13, 7), vectors(19, 7, seed=1)
    for slow in (softplus_form, slow_info_nce):  # the second has a row for each positive
        loss = info_nce(queries, docs, relation, 0.02)
        assert_same_loss_and_gradients(loss, slow(queries, docs, relation, 0.02), [queries, docs])


def test_a3_two_positives_of_one_query_and_none_of_another_are_not_one_each():
    """As many positives as queries: code that matches them by position is silently wrong."""
    relation = relation_of(["a", "b"], [["x", "y"], []], [["z"], ["u"]])
    queries, docs = vectors(2, 5), vectors(4, 5, seed=1)
    matrix = relation.rows(0, 2)
    assert matrix.tolist() == [[1, 1, -1, -1], [-1, -1, -1, -1]]
    expected = softplus_form(queries, docs, Dense(matrix), 0.02)
    assert_same_loss_and_gradients(
        info_nce(queries, docs, relation, 0.02), expected, [queries, docs]
    )
    by_position = dense([1, -1, -1, -1], [-1, 1, -1, -1])
    assert abs(info_nce(queries, docs, by_position, 0.02) - expected) > 0.1


def test_a4_a_batch_without_positives_has_zero_loss_and_gradient_and_says_so():
    relation = relation_of(["a", "b"], [[], []], [["x"], ["y", "z"]])
    batch = Batch(toy.pack(*toy.random_texts(3, 4, 5, 2, 6)), 2, relation, 0)
    made = vectors(5, 32)
    with pytest.warns(UserWarning, match="no query of this batch has a positive"):
        loss = OBJECTIVE(made, batch)["loss"]
    assert loss == 0
    (by_vectors,) = torch.autograd.grad(loss, made)
    assert (by_vectors == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a5_what_is_no_negative_is_masked_in_float32_whatever_comes_in(dtype):
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
def test_a6_chunks_and_matryoshka_together_are_plain_matryoshka(base, chunks):
    embedder, work = at_work(base)
    batch = work.batch(rows(EVERY), [0])
    expected = plain_matryoshka(embedder, batch)
    expected.backward()
    by_formula = gradient(embedder)
    embedder.zero_grad(set_to_none=True)
    found = work.backward(batch, chunks)["loss"]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=0)
    assert two.gap([gradient(embedder)], [by_formula]) < 1e-10


def test_a6_a_cut_vector_is_scaled_to_unit_length_again(base):
    """What is cut off changes the length of the whole vector, and nothing of the short one."""
    embedder, work = at_work(base)
    batch = work.batch(rows(EVERY), [0])
    made = embedder(batch.texts).detach()
    queries, docs = F.normalize(made[:, :16], dim=1).tensor_split([batch.queries])
    short = info_nce(queries, docs, batch.relation, 0.02)
    for rest in (1, 3):
        vector = torch.cat([made[:, :16], rest * made[:, 16:]], dim=1)
        full = replace(OBJECTIVE, dims=())(vector, batch)["loss"]
        torch.testing.assert_close(OBJECTIVE(vector, batch)["loss"], (short + full) / 2)


def test_a7_dropout_drops_the_same_in_both_passes(base):
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


def test_a10_the_first_token_is_pooled_whatever_stands_beside_the_text(base):
    """The stock model pads, on the right or on the left; ours packs."""
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


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
