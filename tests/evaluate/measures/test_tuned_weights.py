import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tercet.errors import ModelError, RecipeError
from tercet.evaluate.measures.retrieval import evaluate_hits
from tercet.evaluate.measures.tuned_weights import candidates, logistic, save_weights, spreads, tune
from tercet.kinds import KINDS, Weights
from tercet.metrics import Judgements
from tercet.models.embedder import Embedder
from tercet.rank.hybrid import HybridHits
from tests.evaluate.kinds import InMemory, drawn, evaluate_kinds, judged

QUERIES, DOCS, DATA = drawn(40, 1, without_terms=(2,)), drawn(60, 2), judged(40, 60, 3)
EVERYBODY = np.ones(40, np.bool_)


@pytest.fixture(scope="module")
def found():
    return candidates(QUERIES, InMemory(DOCS))


def relevant_of(data, found):
    return torch.from_numpy(data.judgements.grades_of(found.rows.numpy()) > 0)


def metric_of(data, found, weights, metric="ndcg@10"):
    return evaluate_hits(data, found.hits(weights, 10), names=[metric]).scores[metric]


def answered_by(weights, found, seed=0, sharpness=40.0):
    """A set whose relevant documents are drawn by the weighted sum of scores."""
    random = torch.Generator().manual_seed(seed)
    chances = (sharpness * found.sums(weights)).softmax(dim=1)
    places = torch.multinomial(chances, 1, generator=random)
    rows = found.rows.gather(1, places).ravel().tolist()
    return replace(DATA, judgements=Judgements.of([{row: 1} for row in rows]))


def test_candidates_of_a_small_corpus_rank_as_all_of_its_documents_do(found):
    weights = Weights(0.2, 0.7, 1.0)
    rows = found.hits(weights, 10).rows
    whole = evaluate_kinds(DATA, QUERIES, DOCS, weights=weights)
    np.testing.assert_array_equal(rows, whole.results[whole.total].hits.rows[:, :10])
    few = candidates(QUERIES, InMemory(DOCS), depth=5)
    assert few.rows.shape[1] <= 20
    for name in (*KINDS, "dense+sparse+multi"):
        for query, rows in enumerate(evaluate_kinds(DATA, QUERIES, DOCS).results[name].hits.rows):
            assert {*rows[:5].tolist()} - {-1} <= {*few.rows[query].tolist()}


def test_logistic_weights_make_the_relevant_candidates_as_likely_as_can_be(found):
    data = answered_by(Weights(1.0, 0.5, 0.7), found)
    right, spread = relevant_of(data, found), spreads(found)
    fitted = logistic(found, right, spread, EVERYBODY)

    def best_scale(weights):
        """The largest sum of log softmax; weights say nothing of the scale, so any may be."""
        sums = sum(weights.of(kind) * found.parts[i].double() for i, kind in enumerate(found.kinds))
        assert isinstance(sums, torch.Tensor)
        rows = [
            (sums[query][found.rows[query] >= 0], right[query][found.rows[query] >= 0])
            for query in range(40)
        ]
        return max(
            sum(float((scale * each).log_softmax(0)[mine].sum()) for each, mine in rows)
            for scale in range(5, 80, 2)
        )

    most = best_scale(fitted)
    for kind in KINDS:
        for factor in (0.85, 1.15):
            other = replace(fitted, **{kind: fitted.of(kind) * factor})
            assert best_scale(other) < most + 0.05, (kind, factor)
        assert best_scale(replace(fitted, **{kind: fitted.of(kind) * 3})) < most - 0.5


def test_a_kind_that_misleads_gets_no_weight_rather_than_a_negative_one(found):
    turned = HybridHits(
        found.kinds, found.rows, found.parts * torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    )
    data = answered_by(Weights(), found)
    fitted = logistic(turned, relevant_of(data, turned), spreads(turned), EVERYBODY)
    assert fitted.sparse == 0 and fitted.dense > 0 and fitted.multi > 0
    without = HybridHits(("dense", "multi"), found.rows, found.parts[[0, 2]])
    again = logistic(without, relevant_of(data, found), spreads(without), EVERYBODY)
    assert fitted == again, "the others are fitted anew"
    none = torch.zeros(found.rows.shape, dtype=torch.bool)
    assert logistic(found, none, spreads(found), EVERYBODY) == Weights()


def test_weights_follow_the_scale_of_the_scores(found):
    """A kind whose scores are ten times as large gets a tenth of the weight, in both ways."""
    data = answered_by(Weights(1.0, 0.5, 0.7), found)
    larger = torch.tensor([1.0, 10.0, 1.0])[:, None, None]
    scaled = HybridHits(found.kinds, found.rows, found.parts * larger)
    one, ten = (
        logistic(each, relevant_of(data, each), spreads(each), EVERYBODY)
        for each in (found, scaled)
    )
    assert ten.sparse / ten.dense == pytest.approx(one.sparse / one.dense / 10, rel=0.02)
    np.testing.assert_allclose(
        tune(data, scaled).scores["sparse"], tune(data, found).scores["sparse"]
    )


def test_weights_are_found_where_only_they_tell_which_document_is_right(found):
    data = answered_by(Weights(0.0, 1.0, 0.1), found, sharpness=400.0)
    told = tune(data, found)
    assert told.weights.sparse == 1 and told.weights.dense < 0.15
    assert told.gain("usual").low > 0 and told.gain("dense").low > 0
    assert told.interval("tuned").mean > told.interval("dense").mean + 0.3
    assert told.fitted == pytest.approx(metric_of(data, found, told.weights).mean())


def test_no_query_is_measured_with_weights_that_it_helped_to_choose(found):
    told = tune(DATA, found, folds=4, seed=5)
    fold_of = np.random.default_rng(5).permutation(40) % 4
    for fold, weights in enumerate(told.folds):
        values = metric_of(DATA, found, weights)
        np.testing.assert_array_equal(
            told.scores["tuned"][fold_of == fold], values[fold_of == fold]
        )
    other = judged(40, 60, 99).judgements  # what its own queries ask for changes nothing
    grades = [
        {int(d): 1 for d in j.docs[j.offsets[q] : j.offsets[q + 1]]}
        for q in range(40)
        for j in [other if fold_of[q] == 0 else DATA.judgements]
    ]
    changed = tune(replace(DATA, judgements=Judgements.of(grades)), found, folds=4, seed=5)
    assert changed.folds[0] == told.folds[0] and changed.folds != told.folds


def test_nor_with_a_logistic_regression_that_has_seen_it(found):
    data = answered_by(Weights(1.0, 0.5, 0.7), found, sharpness=10.0)
    told = tune(data, found, folds=2)
    fold_of = np.random.default_rng(0).permutation(40) % 2
    seen = []
    for fold in range(2):
        test, rest = fold_of == fold, fold_of != fold
        right, spread = relevant_of(data, found), spreads(found)
        unseen = metric_of(data, found, logistic(found, right, spread, rest))
        np.testing.assert_array_equal(told.scores["logistic"][test], unseen[test])
        everybody = metric_of(data, found, logistic(found, right, spread, EVERYBODY))
        seen.append((everybody[test] != unseen[test]).any())
    assert any(seen), "or the test could not fail"


def test_what_chose_the_weights_looks_better_than_what_did_not(found):
    """Judgements drawn at random: there is nothing to find, and the fit finds something."""
    told = tune(DATA, found)
    assert told.fitted > told.interval("tuned").mean
    assert not told.gain("usual").low > 0
    assert told.fitted >= told.interval("usual").mean


def test_the_usual_weights_stay_where_nothing_is_better(found):
    rows = found.hits(Weights(), 1).rows[:, 0]
    data = replace(DATA, judgements=Judgements.of([{int(row): 1} for row in rows]))
    told = tune(data, found, metric="mrr@10")
    assert (told.weights, told.method, told.fitted) == (Weights(), "usual", 1.0)
    assert told.gain("usual").mean == 0


def test_what_cannot_be_tuned_is_refused(found):
    single = candidates(QUERIES.only(["dense"]), InMemory(DOCS.only(["dense"])))
    with pytest.raises(RecipeError, match="makes only dense vectors"):
        tune(DATA, single)
    with pytest.raises(RecipeError, match=r"folds must be between .*40; got 41"):
        tune(DATA, found, folds=41)
    nothing = replace(DATA, judgements=Judgements.of([{}] * 40))
    with pytest.raises(RecipeError, match="no query has a relevant document"):
        tune(nothing, found)
    with pytest.raises(RecipeError, match='no metric "good@1"'):
        tune(DATA, found, metric="good@1")


def test_weights_are_kept_with_the_model_and_change_nothing_else(encoder_folder, tmp_path):
    folder = tmp_path / "model"
    Embedder.load(encoder_folder, kinds=KINDS).save(folder, about={"seed": 3})
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    fingerprint = Embedder.load(folder).fingerprint()
    save_weights(folder, Weights(0.5, 1.0, 0.25), "manuals")
    save_weights(folder, Weights(1.0, 0.1, 0.2))
    read = Embedder.load(folder)
    assert read.settings.weights == {
        "manuals": Weights(0.5, 1.0, 0.25),
        "": Weights(1.0, 0.1, 0.2),
    }
    assert read.fingerprint() == fingerprint, "an index made before stays valid"
    after = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {name for name in before | after if before.get(name) != after.get(name)} == {
        "tercet.json"
    }
    assert json.loads(after["tercet.json"])["about"] == {"seed": 3}


def test_weights_are_not_kept_where_a_model_has_no_settings_of_ours(encoder_folder, tmp_path):
    with pytest.raises(ModelError, match=r"has no tercet\.json"):
        save_weights(encoder_folder, Weights())
    with pytest.raises(ModelError, match=r"has no tercet\.json"):
        save_weights(tmp_path / "lost", Weights())
