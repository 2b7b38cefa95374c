from dataclasses import replace

import numpy as np
import pytest

from tercet import metrics
from tercet.data.files.sources import write_examples
from tercet.errors import DataError, ModelError, RecipeError
from tercet.evaluate.measures.bm25 import bm25_top_k
from tercet.evaluate.measures.retrieval import evaluate_hits, evaluate_retrieval, pair_scores
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.metrics import Judgements
from tercet.rank.topk import Hits
from tercet.types import Example

EXAMPLES = [
    Example("read png", ("a library", "a reader"), negatives=("a game",)),
    Example("play", ("a game",)),
    Example("read png", ("a third",), negatives=("a library", "a toy")),
]


def small_set(queries, documents, grades, document_ids=None):
    return RetrievalSet(
        name="small",
        queries=tuple(queries),
        query_ids=tuple(f"q{i}" for i in range(len(queries))),
        documents=tuple(documents),
        document_ids=tuple(document_ids or (f"d{i}" for i in range(len(documents)))),
        judgements=Judgements.of(grades),
    )


def test_examples_give_each_text_once_and_merge_equal_queries():
    data = RetrievalSet.from_examples(EXAMPLES)
    assert data.queries == ("read png", "play")
    assert data.documents == ("a library", "a reader", "a game", "a third", "a toy")
    assert data.judgements.docs.tolist() == [0, 1, 3, 2]
    assert data.judgements.offsets.tolist() == [0, 3, 4]
    assert data.query_ids == ("q1", "q2")
    assert data.document_ids == ("d1", "d2", "d3", "d4", "d5")


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.parquet"])
def test_a_file_gives_the_set_of_its_examples_and_its_name(tmp_path, name):
    write_examples(tmp_path / name, EXAMPLES)
    data, same = RetrievalSet.from_examples(tmp_path / name), RetrievalSet.from_examples(EXAMPLES)
    assert data.name == "mine"
    assert (data.queries, data.documents) == (same.queries, same.documents)


def test_a_bad_line_of_a_file_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"query": "a", "positives": ["b"]}\n{"query": "a"}\n')
    with pytest.raises(DataError, match=r"mine.jsonl:2: \"positives\" is missing"):
        RetrievalSet.from_examples(path)


def test_vectors_are_scored_as_their_full_ranking():
    random = np.random.default_rng(0)
    queries = random.standard_normal((6, 4)).astype(np.float32)
    docs = random.standard_normal((40, 4)).astype(np.float32)
    grades = [{int(d): 1 for d in random.choice(40, 3, replace=False)} for _ in range(6)]
    data = small_set("abcdef", [f"t{i}" for i in range(40)], grades)
    result = evaluate_retrieval(data, queries, docs, names=("ndcg@10", "map@40", "success@1"))
    ranking = np.argsort(-queries @ docs.T, axis=1, kind="stable")
    expected = metrics.ndcg(ranking, data.judgements, 10)
    np.testing.assert_allclose(result.scores["ndcg@10"], expected)
    assert result.mean("ndcg@10") == pytest.approx(expected.mean())
    full = metrics.average_precision(ranking, data.judgements)
    assert result.mean("map@40") == pytest.approx(full.mean())
    assert result.hits.rows.shape == (6, 40)
    found = result.interval("ndcg@10")
    assert found.low <= result.mean("ndcg@10") == found.mean <= found.high


def test_a_ranking_of_words_is_scored_the_same_way():
    data = small_set(["png", "game"], ["a png", "a game", "png png"], [{0: 1}, {1: 1}])
    result = evaluate_hits(data, bm25_top_k(data.queries, data.documents, 100))
    assert result.scores["mrr@10"].tolist() == [1 / 2, 1]
    assert result.scores["recall@100"].tolist() == [1, 1]


def test_the_document_with_the_querys_own_id_is_left_out_of_its_ranking():
    data = small_set("ab", "xyz", [{1: 1}, {2: 1}], document_ids=("q0", "d1", "q1"))
    queries, docs = np.eye(3, dtype=np.float32)[:2], np.eye(3, dtype=np.float32)
    docs[1] = [0.5, 0.1, 0]
    assert data.size == (
        "2 queries, 3 documents; the document of the same id is left out of 2 rankings"
    )
    other = replace(data, document_ids=("x", "y", "z"))
    assert other.size == "2 queries, 3 documents"
    kept = evaluate_retrieval(other, queries, docs, names=("mrr@2",))
    assert kept.scores["mrr@2"].tolist() == [1 / 2, 0]
    left_out = evaluate_retrieval(data, queries, docs, names=("mrr@2",))
    assert left_out.hits.rows.tolist() == [[1, 2, -1], [1, 0, -1]]
    assert left_out.scores["mrr@2"].tolist() == [1, 0]
    np.testing.assert_allclose(left_out.hits.scores, [[0.5, 0, 0], [0.1, 0, 0]])


def test_excluding_leaves_the_end_of_a_ranking_alone():
    # Row -1 is the end of a ranking, and also "no such document": they must not be mixed up.
    data = small_set("ab", "xy", [{0: 1}, {0: 1}], document_ids=("d0", "q1"))
    hits = Hits(np.ones((2, 3), np.float32), np.array([[-1, 0, -1]] * 2))
    result = evaluate_hits(data, hits, names=("mrr@3",))
    assert result.hits.rows.tolist() == [[-1, 0, -1]] * 2


def test_pair_scores_are_of_relevant_pairs_and_of_pairs_that_are_not():
    data = small_set("abc", "wxyz", [{0: 1, 3: 0}, {1: 2}, {0: 1, 1: 1, 2: 1, 3: 1}])
    queries = np.array([[1, 0], [0, 1], [2, 2]], np.float32)
    docs = np.array([[1, 0], [0, 1], [4, 4], [8, 8]], np.float32)
    positives, negatives = pair_scores(data, queries, docs, seed=1)
    assert positives.tolist() == [1, 1, 2, 2, 16, 32]
    assert 0 < len(negatives) <= 2  # the third query has no document that is not relevant
    for seed in range(20):
        assert set(pair_scores(data, queries, docs, seed=seed)[1].tolist()) <= {0, 4, 8}
    assert len(pair_scores(data, queries, docs, pairs=3)[0]) == 3


def test_pair_scores_of_nothing_are_empty():
    data = small_set("a", "x", [{}])
    positives, negatives = pair_scores(data, np.ones((1, 2)), np.ones((1, 2)))
    assert len(positives) == len(negatives) == 0


@pytest.mark.parametrize("name", ["ndcg", "ndcg@0", "bleu@4", "ndcg@ten"])
def test_a_metric_that_does_not_exist_is_named(name):
    data = small_set("a", "x", [{0: 1}])
    with pytest.raises(RecipeError, match=f'there is no metric "{name}"; choose from ndcg@K'):
        evaluate_retrieval(data, np.ones((1, 2)), np.ones((1, 2)), names=(name,))


def test_vectors_of_two_models_are_refused():
    data = small_set("a", "x", [{0: 1}])
    with pytest.raises(ModelError, match="embed both with the same model"):
        evaluate_retrieval(data, np.ones((1, 2)), np.ones((1, 3)))
