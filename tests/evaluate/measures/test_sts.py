import numpy as np
import pytest
from scipy import stats

from tercet.data.files.similarity import SimilaritySet
from tercet.errors import ModelError
from tercet.evaluate.measures import sts
from tercet.evaluate.measures.sts import (
    SimilarityResult,
    evaluate_similarity,
    measure_overlap,
    measure_similarity,
)
from tercet.models.embedder import Embedder
from tests import toy

SLOW = {
    "spearman": lambda x, y: stats.spearmanr(x, y)[0],
    "pearson": lambda x, y: stats.pearsonr(x, y)[0],
}


@pytest.fixture
def random():
    return np.random.default_rng(0)


def result_of(cosines, scores, pairs=None):
    """Cosines and scores of pairs; without ``pairs``, every text stands in one of them."""
    count = len(cosines)
    pairs = np.arange(2 * count).reshape(count, 2) if pairs is None else np.array(pairs)
    texts = tuple(f"t{row}" for row in range(int(pairs.max(initial=-1)) + 1))
    data = SimilaritySet("toy", texts, pairs, np.array(scores, dtype=np.float64))
    return SimilarityResult(data, np.array(cosines, dtype=np.float64))


def random_result(random, *, pairs=40, texts=12):
    """Pairs with many ties on both sides, that share their texts."""
    scores = random.integers(0, 6, pairs)
    cosines = (scores + random.integers(-3, 4, pairs)) / 10
    ends = [random.choice(texts, 2, replace=False) for _ in range(pairs)]
    return result_of(cosines, scores, ends)


def test_spearman_worked_by_hand():
    # Ranks of the cosines 1 2 3 4, of the scores 2.5 1 2.5 4; less 2.5: -1.5 -0.5 0.5 1.5 and
    # 0 -1.5 0 1.5. Products 0 + 0.75 + 0 + 2.25 = 3; squares 5 and 4.5; 3 / sqrt(22.5).
    found = result_of([0.1, 0.2, 0.3, 0.9], [3, 1, 3, 5])
    assert found.correlation() == pytest.approx(3 / np.sqrt(22.5))


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_correlations_are_those_of_scipy_with_ties_or_without(random, metric):
    for found in (
        random_result(random),
        result_of(random.standard_normal(30), random.standard_normal(30)),
    ):
        expected = SLOW[metric](found.cosines, found.data.scores)
        assert found.correlation(metric) == pytest.approx(expected, abs=1e-12)


def test_spearman_asks_for_the_order_and_pearson_for_a_line():
    found = result_of([0.1, 0.2, 0.3, 0.4], [1, 2, 3, 100])
    assert found.correlation("spearman") == pytest.approx(1)
    assert found.correlation("pearson") < 0.9
    assert result_of([0.4, 0.3, 0.1], [1, 2, 3]).correlation() == pytest.approx(-1)


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_vectors_that_are_all_equal_have_no_correlation(metric):
    # 0.1 added up seven times is not 7 times 0.1: the rounding must not correlate.
    found = result_of([0.1] * 7, range(7))
    assert np.isnan(found.correlation(metric))
    assert np.isnan([found.interval(metric).low, found.interval(metric).high]).all()
    assert not found.interval(metric).excludes_zero()


def test_the_cosine_is_of_vectors_of_any_length():
    data = SimilaritySet.of("s", [("a", "b", 1), ("a", "c", 2), ("b", "b", 3)])
    vectors = np.array([[3, 0], [4, 4], [0, 0.1]], np.float32)
    cosines = evaluate_similarity(data, vectors).cosines
    np.testing.assert_allclose(cosines, [np.sqrt(0.5), 0, 1], atol=1e-12)
    assert np.isfinite(evaluate_similarity(data, 0 * vectors).cosines).all()


def test_a_vector_that_is_not_finite_is_named():
    data = SimilaritySet.of("s", [("a", "b", 1), ("a", "c", 2)])
    vectors = np.ones((3, 2), np.float32)
    vectors[1, 0] = np.nan
    with pytest.raises(ModelError, match="the vector of text 1 contains NaN"):
        evaluate_similarity(data, vectors)


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_draws_of_pairs_equal_the_slow_bootstrap(random, metric):
    result = random_result(random)
    weights = sts._drawn(result.data, "pairs", 25, np.random.default_rng(3))
    assert (weights.sum(axis=1) == 40).all()
    lists = [np.repeat(np.arange(40), times) for times in weights]
    expected = [SLOW[metric](result.cosines[rows], result.data.scores[rows]) for rows in lists]
    found = sts._resampled(result, metric, "pairs", 25, seed=3)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_draws_of_texts_equal_the_slow_bootstrap(random, metric):
    result = random_result(random)
    times = sts._times(12, 25, np.random.default_rng(3))
    assert (times.sum(axis=1) == 12).all()
    expected = []
    for drawn in (np.repeat(np.arange(12), each) for each in times):
        # Every two places of the drawn list whose texts are a pair of the set.
        rows = [
            row
            for row, (first, second) in enumerate(result.data.pairs)
            for one in drawn
            for other in drawn
            if (one, other) == (first, second)
        ]
        expected.append(SLOW[metric](result.cosines[rows], result.data.scores[rows]))
    found = sts._resampled(result, metric, "texts", 25, seed=3)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_text_drawn_twice_makes_no_pair_with_itself(random):
    data = SimilaritySet.of("s", [("a", "b", 1), ("b", "c", 2), ("a", "a", 5)])
    weights = sts._drawn(data, "texts", 200, np.random.default_rng(1))
    times = sts._times(3, 200, np.random.default_rng(1))
    assert weights.shape == (200, 3)  # as many columns as pairs: no pair is added
    only_b = (times == [0, 3, 0]).all(axis=1)
    assert only_b.any()
    assert (weights[only_b] == 0).all()
    # A pair whose texts are equal is as often there as its text.
    np.testing.assert_array_equal(weights[:, 2], times[:, 0])


def test_intervals_hold_the_true_correlation_about_as_often_as_they_say():
    # Of two normal variables with r = 0.6, Pearson's is 0.6. 95 % of 200 is 190, deviation 3.1.
    held = 0
    for trial in range(200):
        random = np.random.default_rng(trial)
        x, noise = random.standard_normal((2, 60))
        found = result_of(x, 0.6 * x + 0.8 * noise).interval("pearson", resamples=300, seed=trial)
        held += found.low <= 0.6 <= found.high
    assert 178 <= held <= 197


def test_an_interval_is_as_wide_as_the_normal_approximation(random):
    x, noise = random.standard_normal((2, 2000))
    found = result_of(x, 0.6 * x + 0.8 * noise).interval("pearson", resamples=4000)
    half = 1.96 * (1 - found.mean**2) / np.sqrt(2000)
    assert found.low == pytest.approx(found.mean - half, abs=half / 8)
    assert found.high == pytest.approx(found.mean + half, abs=half / 8)


def test_pairs_that_share_texts_are_less_sure_than_their_number_says(random):
    # Each text has an error of its own that spoils all its pairs.
    first, second = np.triu_indices(30, 1)
    truth, error = random.standard_normal(435), random.standard_normal(30)
    result = result_of(truth + error[first] + error[second], truth, np.stack([first, second], 1))
    by_text, by_pair = result.interval(), result.interval(unit="pairs")
    assert (by_text.queries, by_pair.queries) == (30, 435)
    assert by_text.mean == by_pair.mean
    assert by_text.high - by_text.low > 1.3 * (by_pair.high - by_pair.low)


@pytest.mark.parametrize("unit", ["pairs", "texts"])
def test_a_difference_is_taken_of_the_same_draws(random, unit):
    before = random_result(random, pairs=200, texts=30)
    after = SimilarityResult(before.data, before.cosines + 0.05 * before.data.scores)
    found = after.minus(before, unit=unit, resamples=500)
    assert found.mean == pytest.approx(after.correlation() - before.correlation())
    assert found.low > 0
    one, other = (each.interval(unit=unit, resamples=500) for each in (after, before))
    assert found.high - found.low < 0.7 * (one.high - other.low - (one.low - other.high))
    same = before.minus(before, unit=unit, resamples=500)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_the_seed_alone_decides_an_interval_and_blocks_do_not(random, monkeypatch):
    result = random_result(random)
    found = result.interval(resamples=99, seed=4)
    assert found == result.interval(resamples=99, seed=4)
    assert found.low != result.interval(resamples=99, seed=5).low
    assert (found.resamples, found.seed, found.level) == (99, 4, 0.95)
    monkeypatch.setattr(sts, "_CELLS", 40 * 7)
    assert result.interval(resamples=99, seed=4) == found


def test_the_overlap_of_words_is_the_cosine_of_their_sets():
    data = SimilaritySet.of(
        "s", [("A small editor", "the small EDITOR for mail", 1), ("?", "b", 2)]
    )
    # Two words shared, of three and five: 2 / sqrt(15). A text without a word shares none.
    np.testing.assert_allclose(measure_overlap(data).cosines, [2 / np.sqrt(15), 0])


def test_a_model_reads_each_text_once_and_as_one_role(encoder_folder, monkeypatch):
    embedder = Embedder.load(encoder_folder, prompts={"query": "ask: ", "document": "tell: "})
    seen = []
    encode = embedder.encode

    def counted(texts, role, **options):
        seen.append((tuple(texts), role))
        return encode(texts, role, **options)

    monkeypatch.setattr(embedder, "encode", counted)
    one, two, three = toy.SENTENCES[:3]
    data = SimilaritySet.of("s", [(one, two, 1), (two, three, 2), (one, three, 3), (one, one, 4)])
    found = measure_similarity(embedder, data, dims=8)
    assert seen == [((one, two, three), "query")]
    vectors = embedder.encode([one, two, three], "query", dims=8).astype(np.float64)
    expected = [vectors[0] @ vectors[1], vectors[1] @ vectors[2], vectors[0] @ vectors[2], 1]
    np.testing.assert_allclose(found.cosines, expected, atol=1e-6)
    as_documents = measure_similarity(embedder, data, role="document", dims=8)
    assert not np.allclose(as_documents.cosines, found.cosines)


def test_a_model_reads_with_the_prompt_of_the_task_and_says_where_it_has_none(
    encoder_folder, caplog
):
    data = SimilaritySet.of("s", [(*toy.SENTENCES[:2], 1), (*toy.SENTENCES[2:4], 2)])
    tasks = {"alike": {"query": "find the same: "}}
    embedder = Embedder.load(encoder_folder, task_prompts=tasks)
    found = measure_similarity(embedder, data, task="alike")
    vectors = embedder.encode(data.texts, "query", task="alike")
    np.testing.assert_array_equal(found.cosines, evaluate_similarity(data, vectors).cosines)
    assert not caplog.messages
    plain = measure_similarity(embedder, data)
    assert "alike-query 'find the same:'" in caplog.text
    assert not np.allclose(plain.cosines, found.cosines)
