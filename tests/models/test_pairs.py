"""Scores of pairs of texts: the obvious formula, and FlagEmbedding 1.4.2's ``compute_score``."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tercet.errors import DataError, RecipeError
from tercet.kinds import KINDS, Weights
from tercet.models import pairs
from tercet.models.embedder import Embedder
from tercet.models.pairs import score_pairs
from tests.evaluate.kinds import slow_scores
from tests.toy import SENTENCES

FIXTURE = Path(__file__).parents[1] / "fixtures/flagembedding"
RECORD = json.loads((FIXTURE / "recorded.json").read_text(encoding="utf-8"))
OURS = {
    "dense": "dense",
    "sparse": "sparse",
    "multi": "colbert",
    "dense+sparse": "sparse+dense",
    "dense+sparse+multi": "colbert+sparse+dense",
}
TUNED = {"": Weights(0.5, 0.25, 2.0), "web": Weights(1.0, 0.0, 1.0)}


@pytest.fixture(scope="module")
def embedder(encoder_folder) -> Embedder:
    prompts = {"query": "read "}
    known = {"web": {"query": "draw "}}
    how = {"kinds": KINDS, "multi_dim": 8, "weights": TUNED, "prompts": prompts}
    return Embedder.load(encoder_folder, **how, task_prompts=known)


QUERIES = [SENTENCES[i][:20] for i in (0, 1, 1, 2, 1, 5, 0)]
DOCUMENTS = [SENTENCES[i] for i in (0, 1, 3, 2, 4, 4, 9)]


@pytest.mark.parametrize("at_once", [2, 256])
def test_each_kind_and_every_sum_equal_the_formula_pair_by_pair(embedder, monkeypatch, at_once):
    monkeypatch.setattr(pairs, "PAIRS_AT_ONCE", at_once)
    found = score_pairs(embedder, QUERIES, DOCUMENTS, weights=Weights(1.0, 0.3, 0.7))
    sides = embedder.encode_vectors(QUERIES, "query"), embedder.encode_vectors(DOCUMENTS)
    expected = {kind: scores.diagonal() for kind, scores in slow_scores(*sides).items()}
    dense, sparse, multi = (expected[kind] for kind in KINDS)
    expected |= {
        "dense+sparse": dense + 0.3 * sparse,
        "dense+multi": dense + 0.7 * multi,
        "sparse+multi": 0.3 * sparse + 0.7 * multi,
        "dense+sparse+multi": dense + 0.3 * sparse + 0.7 * multi,
    }
    assert set(found) == set(expected) and len(set(sparse.tolist())) > 3
    for name, scores in expected.items():
        assert found[name].dtype == torch.float32
        np.testing.assert_allclose(found[name], scores, atol=2e-6)


def test_scores_are_the_references_once_divided_by_their_weights():
    limit = RECORD["max_tokens"]
    model = Embedder.load(FIXTURE / "model", query_tokens=limit, document_tokens=limit)
    first, second = (
        [RECORD["texts"][i] for i in side] for side in zip(*RECORD["pairs"], strict=True)
    )
    weights = Weights(*RECORD["weights"])
    found = score_pairs(model, first, second, weights=weights, divided=True)
    for ours, theirs in OURS.items():
        expected = [scores[theirs][0] for scores in RECORD["scores_alone"]]
        np.testing.assert_allclose(found[ours], expected, atol=1e-5)


def test_weights_are_those_of_the_task_or_the_model_where_none_are_given(embedder):
    given = [score_pairs(embedder, QUERIES, DOCUMENTS, weights=TUNED[t], task=t or None)
             for t in TUNED]  # fmt: skip
    for task, expected in zip((None, "web"), given, strict=True):
        found = score_pairs(embedder, QUERIES, DOCUMENTS, task=task)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert "dense+sparse" in given[0] and set(given[1]) == {*KINDS, "dense+multi"}
    assert not torch.equal(given[0]["dense"], given[1]["dense"])  # another prompt of queries


def test_no_pairs_have_no_scores_and_a_dense_model_has_one_kind(encoder_folder, embedder):
    found = score_pairs(embedder, [], [])
    assert {tuple(scores.shape) for scores in found.values()} == {(0,)} and len(found) == 7
    alone = score_pairs(Embedder.load(encoder_folder), ["music"], ["mail"])
    assert set(alone) == {"dense"}


def test_lists_of_other_lengths_one_text_or_an_unknown_task_are_refused(embedder):
    with pytest.raises(DataError, match="must be equal; got 2 and 1"):
        score_pairs(embedder, ["a", "b"], ["c"])
    with pytest.raises(RecipeError, match="no prompt for the task"):
        score_pairs(embedder, ["a"], ["c"], task="nq")
