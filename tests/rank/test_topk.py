import numpy as np
import pytest
import torch

from tercet.errors import ModelError
from tercet.rank.topk import TopK, largest, top_k


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
    return sorted_scores((queries @ docs.T).astype(np.float32), k)


def sorted_scores(scores, k):
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_top_k_equals_a_full_sort(random, k, block):
    queries, docs = vectors(random, 300), vectors(random, 200)
    hits = top_k(queries, docs, k, block=block)
    scores, rows = by_sorting(queries, docs, k)
    np.testing.assert_array_equal(hits.rows, rows)
    np.testing.assert_allclose(hits.scores, scores, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 20, 149, 150])
@pytest.mark.parametrize("block", [1, 16, 150])
def test_equal_scores_are_ranked_by_lower_row(random, k, block):
    queries, docs = coarse(random, 20), coarse(random, 150)
    hits = top_k(queries, docs, k, block=block)
    scores, rows = by_sorting(queries, docs, k)
    np.testing.assert_array_equal(hits.rows, rows)
    np.testing.assert_array_equal(hits.scores, scores)


def test_more_than_there_are_returns_all_documents(random):
    hits = top_k(vectors(random, 3), vectors(random, 4), 10)
    assert hits.rows.shape == hits.scores.shape == (3, 4)
    assert np.sort(hits.rows).tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize(("queries", "docs", "k"), [(0, 4, 2), (3, 0, 2), (3, 4, 0)])
def test_nothing_to_search_or_to_find_is_no_error(random, queries, docs, k):
    hits = top_k(vectors(random, queries), vectors(random, docs), k)
    assert hits.rows.shape == (queries, min(k, docs))


def test_a_file_of_documents_is_searched_where_it_lies(random, tmp_path):
    docs, queries = vectors(random, 90), vectors(random, 4)
    np.save(tmp_path / "docs.npy", docs)
    mapped = np.load(tmp_path / "docs.npy", mmap_mode="r")
    hits = top_k(queries, mapped, 5, block=32)
    np.testing.assert_array_equal(hits.rows, by_sorting(queries, docs, 5)[1])


def test_half_precision_documents_are_compared_in_float32(random):
    docs, queries = vectors(random, 50).astype(np.float16), vectors(random, 2)
    expected = by_sorting(queries, docs.astype(np.float32), 50)
    np.testing.assert_array_equal(top_k(queries, docs, 50, block=8).rows, expected[1])


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


def test_documents_that_are_not_numbers_are_refused(random):
    docs = np.full((3, 8), np.nan, np.float32)
    with pytest.raises(ModelError, match="the documents' vectors hold NaN"):
        top_k(vectors(random, 2), docs, 2)


def in_blocks(scores, k, block, first=0):
    best = TopK(len(scores), k, scores.dtype.type)
    for start in range(0, scores.shape[1], block):
        best.add(np.ascontiguousarray(scores[:, start : start + block]), first + start)
    return best.hits()


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10, 100, 400])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_the_best_are_those_of_a_full_sort_whatever_the_blocks(random, block, k, levels):
    scores = (random.integers(-levels, levels, (30, 400)) / levels).astype(np.float32)
    found, rows = in_blocks(scores, k, block)
    expected = sorted_scores(scores, k)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_array_equal(found, expected[0])


@pytest.mark.parametrize("block", [50, 1000])
def test_documents_that_come_by_rising_score_need_more_room_and_get_it(block):
    scores = np.arange(3000, dtype=np.float32)[None].repeat(2, axis=0)
    assert in_blocks(scores, 5, block)[1].tolist() == [[2999, 2998, 2997, 2996, 2995]] * 2


def test_zero_and_minus_zero_are_equal_and_infinities_have_their_place():
    scores = np.array([[-0.0, 0.0, -np.inf, np.inf, -1e-45, 1e-45, -0.0]], np.float32)
    for block in (1, 3, 7):
        assert in_blocks(scores, 7, block)[1].tolist() == [[3, 5, 0, 1, 6, 4, 2]]


def test_rows_beyond_two_to_the_31_are_found():
    scores = np.array([[0.1, 0.3, 0.2]], np.float32)
    assert in_blocks(scores, 2, 2, first=2**31 + 5)[1].tolist() == [[2**31 + 6, 2**31 + 7]]


@pytest.mark.parametrize("k", [1, 5, 40])
def test_whole_numbers_are_ranked_like_others(random, k):
    scores = random.integers(-(2**31), 2**31, (6, 40)).astype(np.int32)
    scores[:, ::3] = scores[:, :1]
    found, rows = in_blocks(scores, k, 7)
    expected = np.argsort(-scores.astype(np.int64), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(scores, expected, axis=1))


@pytest.mark.parametrize("k", [1, 4, 30, 50])
def test_the_largest_of_a_matrix_are_those_of_a_full_sort(random, k):
    scores = random.integers(-3, 3, (8, 30)).astype(np.float32)
    scores[2] = -np.inf
    values, columns = largest(torch.from_numpy(scores), k)
    expected = sorted_scores(scores, k)
    np.testing.assert_array_equal(values.numpy(), expected[0])
    np.testing.assert_array_equal(columns.numpy(), expected[1])


def test_a_matrix_without_columns_has_nothing_largest():
    values, columns = largest(torch.zeros(3, 0), 5)
    assert values.shape == columns.shape == (3, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_comes_first_where_it_is_looked_for(sign):
    scores = torch.tensor([[1.0, sign * torch.nan, torch.inf, 2.0]])
    assert largest(scores, 2)[1].tolist() == [[1, 2]]
