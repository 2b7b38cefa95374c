import numpy as np
import pytest
import torch

from tercet.errors import ModelError
from tercet.kinds import Weights
from tercet.rank import hybrid as module
from tercet.rank.hybrid import HybridHits, kind_scores, ranked
from tercet.rank.scoring import (
    late_interaction,
    lexical_scores,
    lexical_sums,
    listed_late_interaction,
)
from tercet.vectors import Terms, Vectors
from tests.evaluate.kinds import drawn, slow_scores

QUERIES, DOCS = drawn(7, 1, without_terms=(2,)), drawn(40, 2, without_terms=(0, 5))


def blocks(docs, *sizes):
    start = 0
    for size in sizes:
        rows = torch.arange(start, start + size)
        yield rows, docs.take(rows)
        start += size


@pytest.mark.parametrize("terms_at_once", [1, 9, 4_096])
def test_scores_by_every_kind_equal_the_loop_over_pairs(monkeypatch, terms_at_once):
    monkeypatch.setattr(module, "QUERY_TERMS", terms_at_once)
    slow = slow_scores(QUERIES, DOCS)
    for kind, part in zip(QUERIES.kinds, kind_scores(QUERIES, DOCS), strict=True):
        np.testing.assert_allclose(part.numpy(), slow[kind], atol=1e-6)


def test_inverted_lists_equal_the_scores_that_training_has():
    assert QUERIES.sparse is not None and DOCS.sparse is not None
    torch.testing.assert_close(
        lexical_sums(QUERIES.sparse, DOCS.sparse), lexical_scores(QUERIES.sparse, DOCS.sparse)
    )


def test_a_term_that_stands_twice_counts_by_its_largest_weight():
    twice = Terms(torch.tensor([3, 3]), torch.tensor([0.5, 2.0]), torch.tensor([0, 2]))
    (part,) = kind_scores(Vectors(sparse=twice), Vectors(sparse=twice))
    assert part.tolist() == [[4.0]]


@pytest.mark.parametrize("sizes", [(40,), (1, 30, 9), (13, 13, 14)])
@pytest.mark.parametrize("weights", [Weights(), Weights(1.0, 0.0, 0.0), Weights(0.2, 0.8, 0.5)])
def test_rankings_are_those_of_all_scores_however_documents_are_cut(sizes, weights):
    slow = slow_scores(QUERIES, DOCS)
    total = sum(weights.of(kind) * slow[kind] for kind in QUERIES.kinds)
    found = ranked(QUERIES, blocks(DOCS, *sizes), {"it": weights}, 6)["it"]
    np.testing.assert_array_equal(found.rows.numpy(), np.argsort(-total, axis=1)[:, :6])
    for kind, part in zip(found.kinds, found.parts, strict=True):
        true = np.take_along_axis(slow[kind], found.rows.numpy(), axis=1)
        np.testing.assert_allclose(part.numpy(), true, atol=1e-6)


def test_equal_scores_are_ranked_by_lower_row_in_any_block():
    dense = torch.ones(9, 2)
    found = ranked(
        Vectors(dense[:1]), blocks(Vectors(dense), 2, 4, 3), {"it": Weights(1.0, 0.0, 0.0)}, 5
    )
    assert found["it"].rows.tolist() == [[0, 1, 2, 3, 4]]


def test_what_shares_no_term_is_not_found_by_terms():
    found = ranked(QUERIES, blocks(DOCS, 20, 20), {"it": Weights(0.0, 1.0, 0.0)}, 40)["it"]
    listed = (found.rows >= 0).sum(dim=1).tolist()
    assert listed == (slow_scores(QUERIES, DOCS)["sparse"] > 0).sum(axis=1).tolist()
    assert listed[2] == 0, "a query without terms"
    hits = found.hits(Weights(0.0, 1.0, 0.0), 40)
    assert (hits.scores[hits.rows < 0] == 0).all() and (hits.scores[hits.rows >= 0] > 0).all()


def test_a_union_has_each_document_once():
    sums = {"dense": Weights(1.0, 0.0, 0.0), "sparse": Weights(0.0, 1.0, 0.0)}
    lists = ranked(QUERIES, blocks(DOCS, 40), sums, 5)
    union = HybridHits.union(list(lists.values()))
    for query, rows in enumerate(union.rows.tolist()):
        inside = {row for each in lists.values() for row in each.rows[query].tolist()} - {-1}
        assert sorted(inside) == [row for row in rows if row >= 0]
    assert union.rows.shape[1] == int((union.rows >= 0).sum(dim=1).max())
    for each in lists.values():
        assert each.among(union)[each.rows >= 0].all()
    by_terms = union.hits(sums["sparse"], 99).rows >= 0
    assert by_terms.sum() == int(((union.rows >= 0) & (union.parts[1] > 0)).sum())
    assert by_terms.sum() < int((union.rows >= 0).sum()), "some share no term"
    inside = union.among(lists["sparse"])
    assert (inside.sum(dim=1) == (lists["sparse"].rows >= 0).sum(dim=1)).all()


def test_pairs_are_scored_like_all_of_them():
    assert QUERIES.multi is not None and DOCS.multi is not None
    wanted = torch.stack([torch.randperm(40)[:9] for _ in range(7)])
    wanted[3, 4:] = -1
    everything = late_interaction(QUERIES.multi, DOCS.multi)
    found = torch.zeros(wanted.shape)
    for some in (torch.arange(0, 40, 2), torch.arange(1, 40, 2)):
        found += listed_late_interaction(QUERIES.multi, DOCS.multi.take(some), some, wanted)
    expected = everything.gather(1, wanted.clamp_min(0)).masked_fill(wanted < 0, 0)
    torch.testing.assert_close(found, expected)


def test_a_vector_that_is_not_a_number_is_refused():
    broken = Vectors(torch.full((1, 8), torch.nan), DOCS.take([0]).sparse, DOCS.take([0]).multi)
    with pytest.raises(ModelError, match="NaN or infinity"):
        kind_scores(QUERIES, broken)
