import numpy as np
import pytest
import pytrec_eval

from tercet import metrics
from tercet.metrics import Judgements

OURS = {
    "ndcg_cut_10": lambda r, j: metrics.ndcg(r, j, 10),
    "ndcg_cut_5": lambda r, j: metrics.ndcg(r, j, 5),
    "recall_5": lambda r, j: metrics.recall(r, j, 5),
    "recall_100": lambda r, j: metrics.recall(r, j, 100),
    "recip_rank": metrics.reciprocal_rank,
    "map": metrics.average_precision,
    "map_cut_5": lambda r, j: metrics.average_precision(r, j, 5),
    "success_1": metrics.success,
    "success_5": lambda r, j: metrics.success(r, j, 5),
}


def trec_eval(ranking, grades, measure):
    """One number a query, from scores that fall with the rank."""
    qrels = {str(q): {str(d): int(g) for d, g in row.items()} for q, row in enumerate(grades)}
    run = {
        str(q): {str(d): float(-rank) for rank, d in enumerate(row) if d >= 0}
        for q, row in enumerate(ranking)
    }
    name, _, cut = measure.rpartition("_")
    wanted = f"{name}.{cut}" if cut.isdigit() else measure
    scores = pytrec_eval.RelevanceEvaluator(qrels, {wanted}).evaluate(run)
    return np.array([scores[str(q)][measure] for q in range(len(ranking))])


def random_case(seed, queries=40, docs=60, ranks=30):
    """Rankings that end early, grades from -1 to 3, queries without a relevant document."""
    random = np.random.default_rng(seed)
    ranking = np.stack([random.permutation(docs)[:ranks] for _ in range(queries)])
    for row, length in zip(ranking, random.integers(1, ranks + 1, queries), strict=True):
        row[length:] = -1
    grades = []
    for query in range(queries):
        judged = random.choice(docs, random.integers(1, 20), replace=False)
        low, high = (-1, 1) if query % 5 == 0 else (-1, 4)
        values = random.integers(low, high, len(judged))
        grades.append({int(d): int(g) for d, g in zip(judged, values, strict=True)})
    return ranking, grades


@pytest.mark.parametrize("measure", OURS)
@pytest.mark.parametrize("seed", range(4))
def test_every_metric_equals_trec_eval_query_by_query(measure, seed):
    ranking, grades = random_case(seed)
    ours = OURS[measure](ranking, Judgements.of(grades))
    np.testing.assert_allclose(ours, trec_eval(ranking, grades, measure), rtol=0, atol=1e-12)


def test_ndcg_of_a_ranking_worked_by_hand():
    # gains 3, 0, 1 against the ideal 3, 2, 1: (3 + 1/2) / (3 + 2/log2(3) + 1/2)
    judgements = Judgements.of([{0: 3, 1: 2, 2: 1}])
    assert metrics.ndcg(np.array([[0, 9, 2]]), judgements, 3) == pytest.approx(3.5 / 4.76186)


def test_metrics_of_one_ranking_worked_by_hand():
    # Relevant: 4, 5 and 6. Found at ranks 2 and 4: precisions 1/2 and 2/4, the third never.
    ranking, judgements = np.array([[7, 4, 8, 5, -1]]), Judgements.of([{4: 1, 5: 2, 6: 1, 7: 0}])
    assert metrics.reciprocal_rank(ranking, judgements) == 1 / 2
    assert metrics.reciprocal_rank(ranking, judgements, 1) == 0
    assert metrics.average_precision(ranking, judgements) == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert metrics.recall(ranking, judgements, 3) == pytest.approx(1 / 3)
    assert metrics.success(ranking, judgements) == 0
    assert metrics.success(ranking, judgements, 2) == 1


def test_equal_scores_are_ranked_by_lower_row_here_and_by_later_id_in_trec_eval():
    qrels, run = {"q": {"0": 1}}, {"q": {"0": 0.5, "1": 0.5}}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)["q"]["recip_rank"]
    assert theirs == 1 / 2
    assert metrics.reciprocal_rank(np.array([[0, 1]]), Judgements.of([{0: 1}])) == 1


def test_a_query_without_a_relevant_document_scores_zero_and_leaves_its_neighbours_alone():
    judgements = Judgements.of([{}, {3: 1}, {3: 0}])
    ranking = np.array([[3, 1], [3, 1], [3, 1]])
    for metric in OURS.values():
        assert metric(ranking, judgements).tolist() == [0, 1, 0]


def test_no_document_is_not_document_zero():
    judgements = Judgements.of([{0: 1}])
    for metric in OURS.values():
        assert metric(np.array([[-1, -1]]), judgements) == 0


def test_a_document_judged_for_another_query_does_not_count():
    # With row numbers near the width, a careless key would mix query 0 with query 1.
    judgements = Judgements.of([{1: 1}, {0: 1}])
    assert metrics.recall(np.array([[2], [0]]), judgements, 1).tolist() == [0, 1]


def test_no_queries_and_empty_rankings_are_no_error():
    for metric in OURS.values():
        assert metric(np.zeros((0, 3), np.int64), Judgements.of([])).tolist() == []
        assert metric(np.zeros((1, 0), np.int64), Judgements.of([{0: 1}])).tolist() == [0]


def test_judgements_keep_the_rows_and_grades_they_were_given():
    judgements = Judgements.of([{5: 2, 1: 1}, {}, {3: 0}])
    assert judgements.docs.tolist() == [1, 5, 3]
    assert judgements.grades.tolist() == [1, 2, 0]
    assert judgements.offsets.tolist() == [0, 2, 2, 3]
    assert judgements.relevant().tolist() == [2, 0, 0]
