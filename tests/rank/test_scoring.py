"""Scores of all pairs at once, against one pair at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tercet.kinds import KINDS, Weights
from tercet.rank import scoring
from tercet.rank.scoring import (
    late_interaction,
    lexical_scores,
    paired_scores,
    scores_of,
)
from tercet.segments import offsets_of
from tercet.vectors import Terms, TokenRows, Vectors
from tests.losses.test_unified import leaves, made, slow_scores
from tests.rank.formulas import weighted_scores, with_padded_rows


def rows(*lengths: int, seed: int = 0) -> TokenRows:
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(lengths), 4, dtype=torch.float64, generator=random)
    return TokenRows(F.normalize(vectors, dim=1), offsets_of(torch.tensor(lengths)))


@pytest.fixture(params=["on a CPU", "as on a GPU"])
def form(request, monkeypatch):
    """Both forms of a score, since a GPU takes another one than a CPU."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(scoring, "_is_gpu", lambda values: True)


def test_b4_lexical_scores_equal_those_of_vocabulary_wide_vectors(form):
    queries, docs = leaves(made(5, seed=1)), leaves(made(9, seed=2))
    assert queries.sparse is not None and docs.sparse is not None
    fast = lexical_scores(queries.sparse, docs.sparse)
    wide = []
    for side in (queries.sparse, docs.sparse):
        table = torch.zeros(len(side), 7, dtype=torch.float64)
        row = torch.repeat_interleave(torch.arange(len(side)), side.offsets.diff())
        cells = row * 7 + side.ids
        wide.append(table.view(-1).scatter_reduce(0, cells, side.weights, "amax").view_as(table))
    slow = wide[0] @ wide[1].T
    torch.testing.assert_close(fast, slow)
    seed = torch.randn_like(slow)
    leaf = [queries.sparse.weights, docs.sparse.weights]
    for one, other in zip(
        torch.autograd.grad(fast, leaf, seed), torch.autograd.grad(slow, leaf, seed), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_b4_equal_weights_of_a_token_share_the_gradient(form):
    """``max`` would pick one of them; both are derivatives of the largest weight."""
    twice = torch.tensor([2.0, 2.0], dtype=torch.float64, requires_grad=True)
    text = Terms(torch.tensor([3, 3]), twice, torch.tensor([0, 2]))
    other = Terms(torch.tensor([3]), torch.tensor([1.5], dtype=torch.float64), torch.tensor([0, 1]))
    lexical_scores(text, other).sum().backward()
    assert twice.grad is not None and float(twice.grad.sum()) == pytest.approx(1.5)


def test_a_vocabulary_of_250_thousand_costs_nothing():
    ids = torch.tensor([0, 250_001, 7])
    text = Terms(ids, torch.ones(3), torch.tensor([0, 2, 3]))
    assert lexical_scores(text, text).tolist() == [[2, 0], [0, 1]]


@pytest.mark.parametrize("block", [1, 5, 10_000])
def test_b2_late_interaction_is_that_of_each_pair_alone(form, block: int, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK_TOKENS", block)
    monkeypatch.setattr(scoring, "_BLOCK_PRODUCTS", 20 * block)
    queries, docs = leaves(made(5, seed=3)), leaves(made(8, seed=4))
    assert queries.multi is not None and docs.multi is not None
    fast, slow = late_interaction(queries.multi, docs.multi), slow_scores("multi", queries, docs)
    torch.testing.assert_close(fast, slow)
    seed = torch.randn_like(slow)
    leaf = [queries.multi.vectors, docs.multi.vectors]
    for one, other in zip(
        torch.autograd.grad(fast, leaf, seed), torch.autograd.grad(slow, leaf, seed), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_documents_of_all_lengths_score_alike_on_a_gpu_and_none_has_a_loop(monkeypatch):
    queries, docs = rows(3, 0, 5, seed=1), rows(*[7, 0, 2, 9, 4, 11, 3] * 6, seed=2)
    found = []
    for is_gpu in (False, True):
        monkeypatch.setattr(scoring, "_is_gpu", lambda values, is_gpu=is_gpu: is_gpu)
        sides = [TokenRows(s.vectors.clone().requires_grad_(), s.offsets) for s in (queries, docs)]
        with CountedCalls() as calls:
            scores = late_interaction(*sides)
            (scores * torch.arange(scores.numel()).view_as(scores)).sum().backward()
        found.append((scores.detach(), *(side.vectors.grad for side in sides), calls.count))
    for one, other in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(one, other)
    assert found[1][3] < 140 < 42 * 5 < found[0][3]


class CountedCalls(TorchDispatchMode):
    """Counts the operations of torch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_row_of_zeros_a_document_repeats_the_padding_of_the_reference():
    """A document shorter than the longest cannot score below zero there."""
    queries, docs = rows(2, 1, seed=1), rows(1, 3, seed=2)
    found = late_interaction(queries, with_padded_rows(docs))
    for i, j in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        query = queries.vectors[queries.offsets[i] : queries.offsets[i + 1]]
        doc = docs.vectors[docs.offsets[j] : docs.offsets[j + 1]]
        if len(doc) < 3:
            doc = torch.cat([doc, torch.zeros(1, 4, dtype=torch.float64)])
        torch.testing.assert_close(found[i, j], (query @ doc.T).amax(1).mean())
    assert not torch.equal(found, late_interaction(queries, docs))


def test_b10_a_query_of_one_token_and_texts_without_any():
    queries, docs = rows(1, 0, seed=1), rows(2, 0, seed=2)
    found = late_interaction(queries, docs)
    best = (queries.vectors[:1] @ docs.vectors.T).max()
    torch.testing.assert_close(found, torch.tensor([[best, 0.0], [0.0, 0.0]], dtype=torch.float64))


def test_weighted_scores_sum_the_kinds_that_both_sides_have():
    queries, docs = made(3, seed=1), made(4, seed=2)
    assert queries.dense is not None and docs.dense is not None
    queries = Vectors(F.normalize(queries.dense, dim=1), queries.sparse, queries.multi)
    docs = Vectors(F.normalize(docs.dense, dim=1), docs.sparse)
    found = weighted_scores(queries, docs, Weights(2.0, 0.5, 1.0))
    expected = 2 * slow_scores("dense", queries, docs) + 0.5 * slow_scores("sparse", queries, docs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_pairs_are_the_diagonal_of_those_of_all(kind):
    queries, docs = made(30, seed=1), made(30, seed=2)
    found = paired_scores(kind, queries, docs)
    torch.testing.assert_close(found, scores_of(kind, queries, docs).diagonal())
    assert len(found.unique()) > 3


def test_pairs_with_a_text_of_nothing_score_zero():
    terms = Terms(torch.tensor([5]), torch.tensor([2.0]), torch.tensor([0, 0, 1, 1]))
    tokens = TokenRows(torch.ones(1, 2), torch.tensor([0, 0, 1, 1]))
    other = Vectors(
        sparse=Terms(torch.tensor([5, 5]), torch.tensor([3.0, 4.0]), torch.tensor([0, 1, 1, 2])),
        multi=TokenRows(torch.ones(2, 2), torch.tensor([0, 1, 1, 2])),
    )
    assert paired_scores("sparse", Vectors(sparse=terms), other).tolist() == [0, 0, 0]
    assert paired_scores("multi", Vectors(multi=tokens), other).tolist() == [0, 0, 0]
    nothing = Terms(terms.ids[:0], terms.weights[:0], torch.zeros(4, dtype=torch.int64))
    assert paired_scores("sparse", other, Vectors(sparse=nothing)).tolist() == [0, 0, 0]
