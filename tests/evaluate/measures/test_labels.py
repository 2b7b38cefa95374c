import json
import sys
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, v_measure_score

from tercet.errors import DataError, MissingExtraError, ModelError, RecipeError
from tercet.evaluate.measures import labels as labels_module
from tercet.evaluate.measures.labels import (
    ClassificationResult,
    ClusteringResult,
    evaluate_classification,
    evaluate_clustering,
    measure_classification,
    measure_classification_by_words,
    measure_clustering,
    measure_clustering_by_words,
)
from tercet.evaluate.sets.label_sets import (
    ClassificationSet,
    ClusteringSet,
    LabelledRows,
    read_label_set,
)
from tercet.models.embedder import Embedder
from tests import toy

TASKS = {"toy": {"query": "tell: ", "document": "file: "}}


@pytest.fixture
def random():
    return np.random.default_rng(0)


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def rows_of(labels, texts=None):
    labels = np.array(labels, dtype=np.int64)
    return LabelledRows(tuple(texts or (f"t{row}" for row in range(len(labels)))), labels)


def classified(train, test, *, names="abcdefgh"):
    return ClassificationSet("toy", tuple(names), rows_of(train), rows_of(test))


def told(random, *, texts=70, kinds=5, right=0.6):
    """A result on labels of which one is told though nobody has it, and one is never told."""
    truth = random.integers(0, kinds, texts)
    guess = random.choice([0, 1, 2, kinds], texts)
    predicted = np.where(random.random(texts) < right, truth, guess)
    predicted[predicted == kinds - 1] = 0
    return ClassificationResult(classified([0, 1], truth), predicted)


def grouped(random, *, texts=60, labels=4, groups=5, runs=3, pure=0.5):
    truth = random.integers(0, labels, texts)
    clusters = np.stack(
        [
            np.where(random.random(texts) < pure, truth, random.integers(0, groups, texts))
            for _ in range(runs)
        ]
    )
    return ClusteringResult(ClusteringSet("toy", tuple("abcd"), rows_of(truth)), clusters)


def macro_f1(truth, predicted, labels):
    undefined: Any = 0  # its annotation knows texts only
    return f1_score(truth, predicted, labels=labels, average="macro", zero_division=undefined)


def slow_macro_f1(truth, predicted):
    return macro_f1(truth, predicted, np.unique(truth))


SLOW = {"accuracy": accuracy_score, "macro F1": slow_macro_f1}


# ---- files -----------------------------------------------------------------------------------


def test_a_file_without_splits_is_to_be_grouped_by_the_first_label_of_each_text(tmp_path):
    path = write(
        tmp_path / "uses.jsonl",
        {"text": "one", "label": "b"},
        {"text": "two", "labels": ["a", "b"]},
        {"text": "none", "labels": []},
        {"text": "three", "label": 3},
        {"text": "four", "label": "b"},
    )
    data = read_label_set(path)
    assert isinstance(data, ClusteringSet)
    assert (data.name, data.labels) == ("uses", ("b", "a", "3"))
    assert data.rows.texts == ("one", "two", "three", "four")
    assert data.rows.labels.tolist() == [0, 1, 2, 0]


def test_a_file_with_splits_is_to_be_learned_and_told(tmp_path, caplog):
    path = write(
        tmp_path / "topics.jsonl",
        {"text": "one", "label": "b", "split": "test"},
        {"text": "two", "label": "a", "split": "train"},
        {"text": "three", "label": "c", "split": "dev"},
        {"text": "four", "label": "b", "split": "train"},
        {"text": "five", "label": "d", "split": "test"},
    )
    data = read_label_set(path)
    assert isinstance(data, ClassificationSet)
    assert data.labels == ("a", "b", "d")
    assert (data.train.texts, data.train.labels.tolist()) == (("two", "four"), [0, 1])
    assert (data.test.texts, data.test.labels.tolist()) == (("one", "five"), [1, 2])
    assert not caplog.records


def test_a_test_text_that_is_learned_from_is_counted(tmp_path, caplog):
    records = [{"text": t, "label": t[0], "split": "train"} for t in ("a", "b", "c")]
    again = [{"text": t, "label": t[0], "split": "test"} for t in ("a", "b", "d")]
    path = write(tmp_path / "t.jsonl", *records, *again)
    read_label_set(path)
    assert caplog.messages == [f"{path}: 2 test texts are also train texts"]


@pytest.mark.parametrize(
    ("splits", "labels", "message"),
    [
        (
            (None, None),
            "aa",
            r"t.jsonl: the texts have only one label, 'a'; at least two are needed",
        ),
        (("train", None), "ab", r'some records have a "split" and others do not; add it to all'),
        (("train", "train"), "ab", r'has no record whose "split" is "test"; add some'),
        (("dev", "test"), "ab", r'has no record whose "split" is "train"; add some'),
        (
            ("train", "test"),
            "ab",
            r"the train texts have only one label, 'a'; at least two",
        ),
    ],
)
def test_what_a_file_of_labels_lacks_is_named(tmp_path, splits, labels, message):
    pairs = enumerate(zip(splits, labels, strict=True))
    records = [{"text": f"t{i}", "label": label, "split": split} for i, (split, label) in pairs]
    with pytest.raises(DataError, match=message):
        read_label_set(write(tmp_path / "t.jsonl", *records))


def test_a_file_whose_texts_have_no_labels_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", {"text": "a", "labels": []})
    with pytest.raises(DataError, match=r"the texts have no label; at least two are needed"):
        read_label_set(path)


def test_a_sample_has_so_many_of_each_label_and_hangs_on_the_seed(random):
    data = classified(random.integers(0, 4, 90), [0, 1, 2])
    few = data.sampled(7, seed=3)
    assert np.bincount(few.train.labels).tolist() == [7, 7, 7, 7]
    known = dict(zip(data.train.texts, data.train.labels, strict=True))
    assert all(known[t] == i for t, i in zip(few.train.texts, few.train.labels, strict=True))
    assert len(set(few.train.texts)) == 28
    assert few.train.texts == data.sampled(7, seed=3).train.texts != data.sampled(7).train.texts
    assert few.test is data.test
    assert len(data.sampled(most=11).train.texts) == 11
    assert data.sampled().train.texts == data.train.texts
    capped = data.sampled(7, most=20).train.labels
    assert len(capped) == 20 and len(np.unique(capped)) == 4  # no label is cut off whole
    # A label with fewer texts gives all of them.
    assert np.bincount(classified([0, 1, 1, 1], [0]).sampled(2).train.labels).tolist() == [1, 2]


# ---- classification --------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "macro F1"])
def test_scores_are_those_of_sklearn(random, metric):
    result = told(random)
    assert not set(result.predicted) <= set(result.data.test.labels)
    expected = SLOW[metric](result.data.test.labels, result.predicted)
    assert result.score(metric) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "macro F1"])
def test_draws_of_test_texts_equal_the_slow_bootstrap(random, metric):
    result = told(random)
    other = ClassificationResult(result.data, told(random).predicted)
    truth, used = result.data.test.labels, np.unique(result.data.test.labels)

    def slow(predicted, rows):
        if metric == "accuracy":
            return accuracy_score(truth[rows], predicted[rows])
        # Of the labels of the set, those that a draw has, in truth or told.
        here = [u for u in used if u in truth[rows] or u in predicted[rows]]
        return macro_f1(truth[rows], predicted[rows], here)

    drawn = np.random.default_rng(3).integers(0, 70, (40, 70))
    one, two = (
        np.array([slow(each.predicted, rows) for rows in drawn]) for each in (result, other)
    )
    for found, figures in (
        (result.interval(metric, resamples=40, seed=3), one),
        (result.minus(other, metric, resamples=40, seed=3), one - two),
    ):
        low, high = np.quantile(figures, [0.025, 0.975])
        np.testing.assert_allclose([found.low, found.high], [low, high], atol=1e-12)
        assert (found.queries, found.resamples, found.seed) == (70, 40, 3)
    difference = result.score(metric) - other.score(metric)
    assert result.minus(other, metric, resamples=2).mean == pytest.approx(difference)


def test_labels_that_vectors_tell_apart_are_learned_at_any_scale(random):
    centres = random.standard_normal((3, 16))
    train, test = random.integers(0, 3, 60), random.integers(0, 3, 31)
    data = classified(train, test)
    vectors = [
        1e-3 * (centres[labels] + 0.1 * random.standard_normal((len(labels), 16)))
        for labels in (train, test)
    ]
    result = evaluate_classification(data, *vectors)
    assert result.score() == result.score("macro F1") == 1
    wrong = evaluate_classification(data, vectors[0], random.standard_normal((31, 16)))
    assert wrong.score() < 0.7


def test_a_label_that_nobody_learned_is_a_mistake():
    data = classified([0, 1, 0, 1], [0, 1, 2])
    vectors = np.array([[0.0, 1], [1, 0], [0, 1.1], [1.1, 0]])
    result = evaluate_classification(data, vectors, vectors[:3])
    assert result.predicted.tolist() == [0, 1, 0]
    # F1: 2 / (1 + 2) of the first, 1 of the second, 0 of the third.
    assert result.score("macro F1") == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_labels_cannot_be_learned_of_one_label_or_broken_vectors(random):
    vectors = random.standard_normal((3, 4))
    with pytest.raises(RecipeError, match="the train texts have only one label"):
        evaluate_classification(classified([1, 1, 1], [0]), vectors, vectors[:1])
    vectors[1, 2] = np.inf
    with pytest.raises(ModelError, match="the vector of text 1 contains NaN or infinity"):
        evaluate_classification(classified([1, 0, 1], [0]), vectors, vectors[:1])


def test_words_alone_tell_labels_that_hang_on_words():
    kinds = ("a red cat", "a blue dog", "the green fish")
    texts = [f"{kind} {n}" for n in range(6) for kind in kinds]
    rows = LabelledRows(tuple(texts), np.arange(18) % 3)
    data = ClassificationSet("s", tuple("abc"), rows, rows.take(np.array([5, 3])))
    assert measure_classification_by_words(data).predicted.tolist() == [2, 0]
    silent = LabelledRows(("?", "!"), np.array([0, 1]))
    with pytest.raises(RecipeError, match=r"no text contains a word; .*--no-bm25"):
        measure_classification_by_words(ClassificationSet("s", ("a", "b"), silent, silent))


# ---- clustering ------------------------------------------------------------------------------


def test_v_measure_worked_by_hand():
    # Labels a a b b in groups 0 0 0 1. H(labels) = ln 2; of the groups, 3/4 and 1/4,
    # 2 ln 2 - 3/4 ln 3; of both, 2/4 1/4 1/4, 3/2 ln 2. Shared is what both have too much.
    data = ClusteringSet("s", ("a", "b"), rows_of([0, 0, 1, 1]))
    groups = 2 * np.log(2) - 0.75 * np.log(3)
    shared = 1.5 * np.log(2) - 0.75 * np.log(3)
    found = ClusteringResult(data, np.array([[0, 0, 0, 1]]))
    assert found.score() == pytest.approx(2 * shared / (np.log(2) + groups))
    assert ClusteringResult(data, np.array([[1, 1, 0, 0]])).score() == pytest.approx(1)
    assert ClusteringResult(data, np.array([[0, 0, 0, 0]])).score() == pytest.approx(0, abs=1e-12)


def test_a_draw_of_one_label_in_one_group_is_as_good_as_can_be():
    two = ClusteringResult(ClusteringSet("s", ("a", "b"), rows_of([0, 1])), np.array([[1, 0]]))
    found = two.interval(resamples=30)  # half of the draws have one text twice
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))
    assert v_measure_score([0, 0], [1, 1]) == 1


def test_v_measure_is_that_of_sklearn_and_the_score_is_the_mean_of_the_runs(random):
    result = grouped(random)
    expected = [v_measure_score(result.data.rows.labels, each) for each in result.clusters]
    np.testing.assert_allclose(result.runs, expected, atol=1e-12)
    assert result.score() == pytest.approx(np.mean(expected))
    assert len(set(expected)) == 3


def test_draws_of_grouped_texts_equal_the_slow_bootstrap_about_the_score(random):
    result = grouped(random)
    other = ClusteringResult(result.data, grouped(random, runs=2, groups=3).clusters)
    truth = result.data.rows.labels
    drawn = np.random.default_rng(3).integers(0, 60, (40, 60))
    one, two = (
        np.array(
            [
                np.mean([v_measure_score(truth[rows], run[rows]) for run in each.clusters])
                for rows in drawn
            ]
        )
        for each in (result, other)
    )
    for found, figures in (
        (result.interval(resamples=40, seed=3), one),
        (result.minus(other, resamples=40, seed=3), one - two),
    ):
        low, high = np.quantile(figures, [0.025, 0.975]) - figures.mean()
        np.testing.assert_allclose(
            [found.low, found.high], [found.mean + low, found.mean + high], atol=1e-12
        )
    assert one.mean() > result.score() + 0.02  # why draws are moved
    difference = result.score() - other.score()
    assert result.minus(other, resamples=2).mean == pytest.approx(difference)
    same = result.minus(result, resamples=9)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_intervals_hold_the_v_measure_of_other_texts_about_as_often_as_they_say():
    # Texts are drawn from one table of labels and groups; what is to be held is the mean v-measure
    # of sets of that size. 95 % of 120 is 114, deviation 2.4; without moving draws it is 25.
    table = (np.eye(12) * 9 + 1).ravel()
    table /= table.sum()

    def drawn(seed):
        cells = np.random.default_rng(seed).choice(144, 300, p=table)
        data = ClusteringSet("s", tuple("abcdefghijkl"), rows_of(cells // 12))
        return ClusteringResult(data, (cells % 12)[None])

    expected = np.mean([drawn(1000 + seed).score() for seed in range(300)])
    found = [drawn(seed).interval(resamples=200) for seed in range(120)]
    assert 104 <= sum(it.low <= expected <= it.high for it in found) <= 119


def test_blocks_of_draws_do_not_change_an_interval(random, monkeypatch):
    group, label = grouped(random), told(random)
    found = group.interval(resamples=50), label.interval("macro F1", resamples=50)
    monkeypatch.setattr(labels_module, "_CELLS", 7 * 70)
    assert (group.interval(resamples=50), label.interval("macro F1", resamples=50)) == found
    assert group.interval(resamples=50, seed=1).low != found[0].low


def test_groups_that_lie_apart_are_found(random):
    labels = random.integers(0, 3, 50)
    data = ClusteringSet("s", tuple("abc"), rows_of(labels))
    vectors = 9 * np.eye(3, 8)[labels] + 0.1 * random.standard_normal((50, 8))
    found = evaluate_clustering(data, vectors.astype(np.float32))
    assert len(found.runs) == 5 and max(found.runs) == pytest.approx(1)
    noise = random.standard_normal((50, 8))
    blurred = evaluate_clustering(data, noise, runs=3)
    assert blurred.score() < 0.4
    assert len(set(blurred.runs)) > 1  # each run begins elsewhere
    assert evaluate_clustering(data, noise, runs=2, seed=1).runs == blurred.runs[1:]
    assert evaluate_clustering(data, np.ones((50, 8)), runs=1).score() == pytest.approx(0, abs=1e-9)
    vectors[4] = np.nan
    with pytest.raises(ModelError, match="the vector of text 4 contains NaN"):
        evaluate_clustering(data, vectors)


def test_words_alone_find_groups_that_hang_on_words():
    kinds = ("red cat", "blue dog", "green fish", "old bird")
    texts = tuple(f"{kind} {n}" for n in range(5) for kind in kinds)
    data = ClusteringSet("s", tuple("abcd"), LabelledRows(texts, np.arange(20) % 4))
    assert measure_clustering_by_words(data).score() > 0.8


# ---- with a model ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "toy"])
def test_a_model_reads_all_texts_with_the_prompt_of_queries(encoder_folder, monkeypatch, task):
    embedder = Embedder.load(encoder_folder, prompts={"query": "ask: "}, task_prompts=TASKS)
    texts = toy.SENTENCES
    vectors = embedder.encode(texts, "query", task=task, dims=9)
    rows = LabelledRows(texts, np.arange(12) % 3)
    data = ClassificationSet(
        "s", tuple("abc"), rows.take(np.arange(8)), rows.take(np.arange(7, 12))
    )
    found = measure_classification(embedder, data, task=task, dims=9)
    expected = evaluate_classification(data, vectors[:8], vectors[7:])
    assert found.predicted.tolist() == expected.predicted.tolist()
    groups = ClusteringSet("s", tuple("abc"), rows)
    found = measure_clustering(embedder, groups, task=task, dims=9)
    np.testing.assert_array_equal(found.clusters, evaluate_clustering(groups, vectors).clusters)


@pytest.mark.parametrize("module", ["sklearn.linear_model", "sklearn.cluster"])
def test_a_missing_package_is_named_before_the_model_works(encoder_folder, monkeypatch, module):
    embedder, rows = Embedder.load(encoder_folder), rows_of([0, 1, 0])
    monkeypatch.setattr(embedder, "encode", None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tercet\[probe\]'"):
        if module == "sklearn.cluster":
            measure_clustering(embedder, ClusteringSet("s", ("a", "b"), rows))
        else:
            measure_classification(embedder, ClassificationSet("s", ("a", "b"), rows, rows))
