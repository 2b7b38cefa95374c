import numpy as np
import pytest

from tercet.errors import ModelError
from tercet.rank import coded
from tercet.rank.coded import rescored, top_k_coded
from tercet.rank.quantized import PRECISIONS, Quantizer
from tercet.rank.topk import top_k
from tests.rank.test_quantized import unit


def codes_of(precision, docs):
    return Quantizer.learned(docs, precision).codes(docs)


def slow_scores(queries, codes):
    """By every document, in float64: <q, x>, or of signs <q - m, x - m> + <q, m>."""
    queries, docs = queries.astype(np.float64), codes.decoded().astype(np.float64)
    centre = codes.quantizer.centre.astype(np.float64)
    if codes.quantizer.precision == "binary":
        return (queries - centre) @ (docs - centre).T + (queries @ centre)[:, None]
    return queries @ docs.T


@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_all_documents_as_candidates_it_is_a_search_of_what_codes_stand_for(precision):
    queries, docs = unit(5, 33), unit(300, 33, seed=1) + 0.1
    docs[250:] = docs[:50]  # equal ones, of which the lower row is the better
    codes = codes_of(precision, docs)
    found, exact = top_k_coded(queries, codes, 10, factor=30), slow_scores(queries, codes)
    for query, rows in enumerate(found.rows):
        best = np.sort(exact[query])[::-1][:10]
        assert found.scores[query] == pytest.approx(best, abs=1e-6)
        assert exact[query, rows] == pytest.approx(best, abs=1e-6) and len(set(rows)) == 10
        equal = np.diff(found.scores[query]) == 0
        assert (np.diff(found.scores[query]) <= 0).all() and (np.diff(rows)[equal] > 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_few_candidates_lose_next_to_nothing(precision):
    queries, docs = unit(40, 64), unit(2_000, 64, seed=1) + 0.1
    codes = codes_of(precision, docs)
    slow = np.argsort(-slow_scores(queries, codes), axis=1, kind="stable")[:, :10]
    assert (top_k_coded(queries, codes, 10).rows == slow).mean() > 0.99


@pytest.mark.parametrize("count", [1, 3, 50])
def test_candidates_do_not_hang_on_blocks(monkeypatch, count):
    """Whole numbers have many ties, which blocks must not decide."""
    random = np.random.default_rng(0)
    whole = random.integers(-2, 3, (3, 5)).astype(np.int8)
    docs = random.standard_normal((101, 5)).round(1)
    codes = Quantizer("int4", 3.0).codes(docs)
    scores = whole.astype(np.int64) @ codes.integers().astype(np.int64).T
    slow = [sorted(range(101), key=lambda doc: (-row[doc], doc))[:count] for row in scores]
    for size in (1, 7, 60, 101, 1_000):
        monkeypatch.setattr(coded, "_SCORES", size * 3)
        found = coded._candidates(whole, codes, count)
        assert np.sort(found, axis=1).tolist() == [sorted(rows) for rows in slow], size


def test_signs_find_candidates_by_hamming_distance():
    queries, docs = unit(4, 40), unit(200, 40, seed=1)
    codes = Quantizer("binary", 0.1).codes(docs)
    far = ((queries[:, None] > 0) != (docs > 0)).sum(2)
    slow = [sorted(range(200), key=lambda doc: (row[doc], doc))[:7] for row in far]
    found = top_k_coded(queries, codes, 7, factor=1, signs=True)
    assert np.sort(found.rows, axis=1).tolist() == [sorted(rows) for rows in slow]
    true = np.take_along_axis(queries @ codes.decoded().T, found.rows, axis=1)
    assert found.scores == pytest.approx(true, abs=1e-6), "by the query as it is"


def test_candidates_are_scored_again_by_finer_vectors():
    queries, docs = unit(6, 48), unit(500, 48, seed=1)
    bits, finer = codes_of("binary", docs), codes_of("int8", docs)
    found = top_k_coded(queries, bits, 5, factor=100, finer=finer)
    assert (found.rows == top_k(queries, finer.decoded(), 5).rows).all()
    exact = top_k_coded(queries, bits, 5, factor=100, finer=docs)
    assert exact.scores == pytest.approx(top_k(queries, docs, 5).scores, abs=1e-6)
    few = top_k_coded(queries, bits, 5, factor=10, finer=docs)
    bits_alone = top_k_coded(queries, bits, 5)
    best = top_k(queries, docs, 5).rows

    def shared(hits):
        return np.mean([len(set(a) & set(b)) for a, b in zip(hits.rows, best, strict=True)])

    assert shared(few) > shared(bits_alone)


def test_candidates_are_scored_in_blocks(monkeypatch):
    queries, docs = unit(7, 12), unit(90, 12, seed=1)
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(90), (7, 1)), axis=1)[:, :30]
    whole = rescored(queries, docs, rows, 4)
    monkeypatch.setattr(coded, "_AGAIN", 2 * 30 * 12)
    parts = rescored(queries, docs, rows, 4)
    assert (whole.rows == parts.rows).all() and (whole.scores == parts.scores).all()
    scores = np.take_along_axis(queries @ docs.T, rows, axis=1)
    assert whole.scores[:, 0] == pytest.approx(scores.max(axis=1), abs=1e-6)


def test_corners():
    docs = unit(3, 8)
    codes = codes_of("int4", docs)
    assert top_k_coded(unit(2, 8), codes, 10).rows.shape == (2, 3)
    assert top_k_coded(unit(2, 8)[:0], codes, 10).rows.shape == (0, 3)
    assert top_k_coded(unit(2, 8), codes.take(slice(0)), 10).rows.shape == (2, 0)
    assert top_k_coded(np.zeros((1, 8), np.float32), codes, 2).rows.tolist() == [[0, 1]]
    with pytest.raises(ModelError, match="queries have 7 dimensions and documents 8"):
        top_k_coded(unit(2, 7), codes, 1)
    broken = unit(2, 8)
    broken[1, 3] = np.nan
    with pytest.raises(ModelError, match="the vector of query 1 holds NaN"):
        top_k_coded(broken, codes, 1)
