from dataclasses import replace

import numpy as np
import pytest
import torch

from tercet.errors import RecipeError
from tercet.evaluate.measures import by_kind as module
from tercet.evaluate.measures.by_kind import TermCounts, feasible, sums_of
from tercet.evaluate.measures.retrieval import evaluate_hits
from tercet.kinds import Weights
from tercet.rank.topk import Hits
from tercet.vectors import Terms, TokenRows, Vectors
from tests.evaluate.kinds import drawn, evaluate_kinds, judged, slow_scores

QUERIES, DOCS, DATA = drawn(9, 1), drawn(50, 2, without_terms=(0, 5)), judged(9, 50, 3)
SLOW = slow_scores(QUERIES, DOCS)
SEVEN = [
    *("dense", "sparse", "multi", "dense+sparse", "dense+multi", "sparse+multi"),
    "dense+sparse+multi",
]


def total(name, weights, scores=SLOW):
    parts = name.split("+")
    weighed = [scores[k] * (weights.of(k) if len(parts) > 1 else 1.0) for k in parts]
    return np.sum(weighed, axis=0)


def first(scores, depth, among=None):
    """The best rows of each query, -1 where there is none left."""
    scores = scores if among is None else np.where(among, scores, -np.inf)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return np.where(np.isneginf(np.take_along_axis(scores, rows, axis=1)), -1, rows)


def chosen(scores, depth):
    found = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(found, first(scores, depth), True, axis=1)
    return found


@pytest.mark.parametrize("weights", [Weights(), Weights(0.15, 0.5, 0.35)])
def test_all_seven_kinds_and_sums_rank_by_the_true_scores_of_all_documents(weights):
    found = evaluate_kinds(DATA, QUERIES, DOCS, weights=weights, names=["ndcg@10", "recall@20"])
    assert (list(found.results), found.protocol) == (SEVEN, "exact")
    for name, result in found.results.items():
        rows = first(total(name, weights), 20, SLOW["sparse"] > 0 if name == "sparse" else None)
        np.testing.assert_array_equal(result.hits.rows, rows)
        expected = evaluate_hits(
            DATA, Hits(np.zeros(rows.shape, np.float32), rows), names=["ndcg@10", "recall@20"]
        )
        for metric, scores in expected.scores.items():
            np.testing.assert_array_equal(result.scores[metric], scores)
    gain = found.results[found.total].minus(found.results["dense"], "ndcg@10")
    means = [found.results[name].mean("ndcg@10") for name in (SEVEN[-1], "dense")]
    assert gain.mean == pytest.approx(means[0] - means[1])


def test_a_document_missing_in_one_list_gets_its_true_score(monkeypatch):
    """B20."""
    monkeypatch.setattr(module, "DEPTH", 6)
    monkeypatch.setattr(module, "RERANKED", 10)
    found = evaluate_kinds(DATA, QUERIES, DOCS, protocol="paper", names=["ndcg@10"])
    union = chosen(SLOW["dense"], 6) | chosen(SLOW["sparse"], 6) & (SLOW["sparse"] > 0)
    missing = union & ~(chosen(SLOW["dense"], 6) & chosen(SLOW["sparse"], 6))
    assert missing.sum() > 20
    alone = found.results["dense"].hits.rows
    np.testing.assert_array_equal(alone, first(SLOW["dense"], 6))
    rows = found.results["dense+sparse"].hits.rows
    np.testing.assert_array_equal(rows, first(total("dense+sparse", Weights()), 10, union))
    for query, row in zip(*missing.nonzero(), strict=True):
        (place,) = (rows[query] == row).nonzero()
        for score in found.results["dense+sparse"].hits.scores[query, place]:
            assert score == pytest.approx(total("dense+sparse", Weights())[query, row], abs=1e-5)


def test_in_the_papers_protocol_token_vectors_rank_the_best_of_dense_anew(monkeypatch):
    monkeypatch.setattr(module, "RERANKED", 7)
    found = evaluate_kinds(DATA, QUERIES, DOCS, protocol="paper", names=["ndcg@10"])
    few = chosen(SLOW["dense"], 7)
    for name in SEVEN:
        if "multi" in name:
            rows = first(total(name, Weights()), 10, few)
            np.testing.assert_array_equal(found.results[name].hits.rows[:, :7], rows[:, :7])
            assert (found.results[name].hits.rows[:, 7:] == -1).all()
    assert "best 7 of dense" in found.how()


def test_documents_of_equal_sums_are_ranked_by_lower_row_in_every_protocol():
    def of(numbers):
        rows = torch.tensor([[number, 0.0] for number in numbers])
        return TokenRows(rows, torch.arange(len(numbers) + 1))

    asked = Vectors(torch.tensor([[1.0, 0.0]]), multi=of([1.0]))
    docs = Vectors(torch.tensor([[0.25, 0.0], [0.75, 0.0]]), multi=of([0.75, 0.25]))
    data = judged(1, 4, 0)
    data = replace(data, documents=data.documents[:2], document_ids=data.document_ids[:2])
    for protocol in ("exact", "paper", "reference"):
        found = evaluate_kinds(data, asked, docs, protocol=protocol).results
        rows = {name: result.hits.rows.tolist() for name, result in found.items()}
        assert rows == {"dense": [[1, 0]], "multi": [[0, 1]], "dense+multi": [[0, 1]]}


def test_the_reference_way_gives_nothing_for_a_list_that_a_document_is_not_in(monkeypatch):
    monkeypatch.setattr(module, "DEPTH", 6)
    monkeypatch.setattr(module, "RERANKED", 6)
    found = evaluate_kinds(DATA, QUERIES, DOCS, protocol="reference", names=["ndcg@10"])

    def hundredths(vectors):
        assert vectors.sparse is not None
        weights = torch.ceil(100 * vectors.sparse.weights) / 100
        return replace(vectors, sparse=replace(vectors.sparse, weights=weights))

    scores = slow_scores(hundredths(QUERIES), hundredths(DOCS))
    lists = {kind: chosen(scores[kind], 6) for kind in ("dense", "sparse")}
    lists["sparse"] &= scores["sparse"] > 0
    kept = {kind: scores[kind] * lists[kind] for kind in lists} | {"multi": scores["multi"]}
    union = lists["dense"] | lists["sparse"]
    expected = {
        "sparse": first(scores["sparse"], 6, lists["sparse"]),
        "dense+sparse": first(total("dense+sparse", Weights(), kept), 10, union),
        "dense+sparse+multi": first(total(SEVEN[-1], Weights(), kept), 6, lists["dense"]),
    }
    for name, rows in expected.items():
        width = rows.shape[1]
        np.testing.assert_array_equal(found.results[name].hits.rows[:, :width], rows)


def test_fewer_kinds_have_fewer_sums_and_a_kind_without_weight_is_in_none():
    assert list(sums_of(("dense", "multi"), Weights())) == ["dense", "multi", "dense+multi"]
    two = Weights(1.0, 0.3, 0.0)
    assert list(sums_of(("dense", "sparse", "multi"), two)) == SEVEN[:4]
    found = evaluate_kinds(DATA, QUERIES, DOCS, weights=two)
    assert found.total == "dense+sparse"
    assert evaluate_kinds(DATA, QUERIES, DOCS, weights=Weights(0.0, 0.0, 1.0)).total == "multi"
    alone = evaluate_kinds(DATA, QUERIES.only(["multi"]), DOCS, protocol="paper")
    assert (alone.protocol, list(alone.results), alone.terms) == ("exact", ["multi"], {})
    without = evaluate_kinds(DATA, QUERIES, DOCS.only(["sparse", "multi"]), protocol="paper")
    assert list(without.results) == ["sparse", "multi", "sparse+multi"]


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(RecipeError, match="one of dense must have a weight"):
        evaluate_kinds(DATA, QUERIES.only(["dense"]), DOCS, weights=Weights(0.0, 0.3, 1.0))
    with pytest.raises(RecipeError, match="have no kind of vectors in common"):
        evaluate_kinds(DATA, QUERIES.only(["dense"]), DOCS.only(["multi"]))


def test_comparing_all_tokens_is_the_usual_way_until_it_takes_long(monkeypatch):
    assert feasible(QUERIES, 10**6) == "exact"
    assert feasible(QUERIES, 10**13) == "paper"
    assert feasible(QUERIES.only(["dense", "sparse"]), 10**13) == "exact"
    monkeypatch.setattr(module, "EXACT_WORK", 0)
    assert evaluate_kinds(DATA, QUERIES, DOCS).protocol == "paper"


def test_texts_without_a_term_are_counted_and_warned_of(caplog):
    """B18."""
    found = evaluate_kinds(DATA, QUERIES, DOCS)
    assert DOCS.sparse is not None
    assert found.terms["document"] == TermCounts(50, 2 / 50, len(DOCS.sparse.ids) / 50)
    assert found.terms["query"].empty == 0 and not caplog.messages
    dying = drawn(50, 2, without_terms=tuple(range(0, 50, 2)))
    evaluate_kinds(DATA, QUERIES, dying)
    assert len(caplog.messages) == 1
    assert "50.0 % of document texts have no sparse term" in caplog.text
    assert str(TermCounts(50, 0.04, 3.5)) == "3.5 terms each, 4.0% of 50 have none"


def test_a_term_of_weight_zero_is_no_term():
    terms = Terms(torch.tensor([1, 2]), torch.tensor([0.0, 0.5]), torch.tensor([0, 1, 2]))
    two = replace(DOCS.take([0, 1]), sparse=terms)
    data = replace(DATA, documents=("a", "b"), document_ids=("d0", "d1"))
    found = evaluate_kinds(data, QUERIES, two)
    assert found.terms["document"] == TermCounts(2, 0.5, 0.5)
