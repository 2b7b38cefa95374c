import subprocess
import sys

import numpy as np
import pytest

from tercet.errors import ModelError
from tercet.rank import exact
from tercet.rank.exact import top_k

BOTH_WAYS = pytest.mark.parametrize("use_faiss", [False, True])


@pytest.fixture
def random():
    return np.random.default_rng(0)


def vectors(random, rows, dim=8):
    return random.standard_normal((rows, dim)).astype(np.float32)


def coarse(random, rows, dim=5):
    """Vectors of small whole numbers: exact in float32, with very many equal scores."""
    return random.integers(-1, 2, (rows, dim)).astype(np.float32)


def by_sorting(queries, docs, k):
    """The obvious slow formula: a stable sort of all scores."""
    scores = (queries @ docs.T).astype(np.float32)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


@BOTH_WAYS
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_top_k_equals_a_full_sort(random, use_faiss, k, block):
    queries, docs = vectors(random, 300), vectors(random, 200)
    hits = top_k(queries, docs, k, block=block, use_faiss=use_faiss)
    scores, rows = by_sorting(queries, docs, k)
    np.testing.assert_array_equal(hits.rows, rows)
    np.testing.assert_allclose(hits.scores, scores, atol=1e-5)


@BOTH_WAYS
@pytest.mark.parametrize("k", [1, 3, 20, 149, 150])
@pytest.mark.parametrize("block", [1, 16, 150])
def test_equal_scores_are_ranked_by_lower_row(random, use_faiss, k, block):
    queries, docs = coarse(random, 20), coarse(random, 150)
    hits = top_k(queries, docs, k, block=block, use_faiss=use_faiss)
    scores, rows = by_sorting(queries, docs, k)
    np.testing.assert_array_equal(hits.rows, rows)
    np.testing.assert_array_equal(hits.scores, scores)


@BOTH_WAYS
def test_more_than_there_are_returns_all_documents(random, use_faiss):
    hits = top_k(vectors(random, 3), vectors(random, 4), 10, use_faiss=use_faiss)
    assert hits.rows.shape == hits.scores.shape == (3, 4)
    assert np.sort(hits.rows).tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize(("queries", "docs", "k"), [(0, 4, 2), (3, 0, 2), (3, 4, 0)])
def test_nothing_to_search_or_to_find_is_no_error(random, queries, docs, k):
    hits = top_k(vectors(random, queries), vectors(random, docs), k)
    assert hits.rows.shape == (queries, min(k, docs))


@pytest.mark.parametrize("use_faiss", [False, True, None])
def test_a_file_of_documents_is_searched_where_it_lies(random, tmp_path, use_faiss):
    docs, queries = vectors(random, 90), vectors(random, 4)
    np.save(tmp_path / "docs.npy", docs)
    mapped = np.load(tmp_path / "docs.npy", mmap_mode="r")
    hits = top_k(queries, mapped, 5, block=32, use_faiss=use_faiss)
    np.testing.assert_array_equal(hits.rows, by_sorting(queries, docs, 5)[1])


def test_half_precision_documents_are_compared_in_float32(random):
    docs, queries = vectors(random, 50).astype(np.float16), vectors(random, 2)
    expected = by_sorting(queries, docs.astype(np.float32), 50)
    np.testing.assert_array_equal(top_k(queries, docs, 50, block=8).rows, expected[1])


def test_faiss_is_chosen_for_few_and_for_many_queries_only(random):
    docs = vectors(random, 10, dim=128)
    chosen = [n for n in (1, 3, 4, 999, 1000, 5000) if exact._faiss_is_faster(n, docs)]
    assert chosen == [1, 3, 1000, 5000]
    assert not exact._faiss_is_faster(1, docs[:, :64])
    assert not exact._faiss_is_faster(1, docs.astype(np.float16))


def test_vectors_of_two_models_are_refused(random):
    with pytest.raises(ModelError) as error:
        top_k(vectors(random, 2, dim=8), vectors(random, 3, dim=9), 1)
    assert str(error.value) == (
        "queries have 8 dimensions and documents 9; "
        "embed both with the same model and the same number of dimensions"
    )


def test_a_query_that_is_not_finite_is_named(random):
    queries = vectors(random, 4)
    queries[2, 5] = np.nan
    with pytest.raises(ModelError, match="the vector of query 2 holds NaN or infinity"):
        top_k(queries, vectors(random, 3), 1)


@BOTH_WAYS
def test_documents_that_are_not_numbers_are_refused(random, use_faiss):
    docs = np.full((3, 8), np.nan, np.float32)
    with pytest.raises(ModelError, match="the documents' vectors hold NaN"):
        top_k(vectors(random, 2), docs, 2, use_faiss=use_faiss)


@pytest.mark.parametrize("first", ["torch", "faiss"])
def test_torch_and_faiss_work_in_one_process(first):
    """Two OpenMP runtimes in a process can abort it or hang it; these two do not."""
    program = f"""
import {first}, numpy, torch, faiss
from tercet.rank.exact import top_k
docs = numpy.eye(600, 256, dtype=numpy.float32)
square = torch.rand(600, 600)
for _ in range(3):
    square = square @ square / 300
    assert (top_k(docs, docs, 2, use_faiss=True).rows[:256, 0] == numpy.arange(256)).all()
    assert (top_k(docs, docs, 2, use_faiss=False).rows[:256, 0] == numpy.arange(256)).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
