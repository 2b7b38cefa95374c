"""Documents that losses ignore for their scores, against a full square of cosines in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.data.batches.false_negatives import IgnoreRule
from tercet.data.batches.relation import GuideVectors, Relation, relation_of
from tercet.kinds import KINDS
from tercet.losses.info_nce import info_nce, info_nce_losses
from tercet.losses.unified import Mixture, unified_loss
from tercet.types import IGNORED, NEGATIVE, POSITIVE
from tests.losses.test_info_nce import (
    Dense,
    assert_same_loss_and_gradients,
    slow_info_nce,
    slow_matryoshka,
    vectors,
)
from tests.losses.test_unified import SIX, assert_same, leaves, made, slow_loss

RULES = {
    "margin": IgnoreRule(kind="margin", value=0.1),
    "below the positive": IgnoreRule(kind="margin", value=-0.2),
    "percent": IgnoreRule(kind="percent", value=0.9),
    "more than the positive": IgnoreRule(kind="percent", value=1.5),
    "own": IgnoreRule(kind="margin", value=0.0, own=True),
}


def batch(rule: IgnoreRule | None, **how: Any) -> Relation:
    """Six queries with none to two positives and none to two negatives; two ask the same."""
    queries = ["a", "b", "c", "d", "e", "a"]
    positives = [["a1"], ["b1", "b2"], ["c1"], ["d1"], [], ["f1"]]
    negatives = [["x", "y"], [], ["a1"], ["z"], ["c1", "v"], ["w", "u"]]
    policies = ["all", "all", "positives", "none", "all", "all"]
    return relation_of(
        queries, positives, negatives, **{"in_batch": policies, "ignoring": rule} | how
    )


def slow_relation(relation: Relation, scores: Tensor) -> Dense:
    """The whole matrix, in which each negative is compared with the lowest positive of its row."""
    scores, rule, known = scores.detach(), relation.ignoring, relation.rows(0, len(scores))
    assert rule is not None and rule.value is not None
    for i, row in enumerate(known):
        right = scores[i][row == POSITIVE]
        if not len(right):
            continue
        lowest = float(right.min())
        limit = lowest + rule.value
        if rule.kind == "percent":
            limit = lowest * (rule.value if lowest > 0 else 2 - rule.value)
        for j, score in enumerate(scores[i].tolist()):
            is_own = int(relation.owners[j]) == i
            if row[j] == NEGATIVE and score > limit and (rule.own or not is_own):
                row[j] = IGNORED
    return Dense(known)


def share(before: Tensor, after: Tensor) -> float:
    """The mean, over the positives, of how many of the negatives of their query are ignored."""
    every, left = ((known == NEGATIVE).sum(1) for known in (before, after))
    of_row = torch.where(every > 0, (every - left) / every.clamp_min(1), 0)
    return float((of_row * (before == POSITIVE).sum(1)).sum() / (before == POSITIVE).sum())


def sides(relation: Relation, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Some documents near to their queries, so that their positives score above zero or below."""
    return vectors(SIX, 7, seed=seed), vectors(len(relation.owners), 7, seed=seed + 100)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("block", [1, 4, None])
def test_the_loss_and_its_gradients_are_those_of_the_square_without_the_ignored_pairs(
    name: str, block: int | None
):
    relation, ignored = batch(RULES[name]), 0.0
    for seed in range(8):
        queries, docs = sides(relation, seed)
        known = slow_relation(relation, unit(queries) @ unit(docs).T)
        found = info_nce_losses(unit(queries), unit(docs), relation, 0.3, block=block)
        slow = slow_info_nce(unit(queries), unit(docs), known, 0.3)
        assert_same_loss_and_gradients(found["loss"], slow, [queries, docs])
        before = batch(None).rows(0, SIX)
        assert float(found["ignored"]) == pytest.approx(share(before, known.matrix))
        ignored += float(found["ignored"])
    assert ignored > 0.1


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("weights", [{2: 0.5, 7: 2.0}, {2: 0.2, 3: 0.3, 5: 0.5}])
@pytest.mark.parametrize("block", [1, 4, None])
def test_the_longest_prefix_decides_for_all_widths(
    name: str, weights: dict[int, float], block: int | None
):
    relation, longest = batch(RULES[name]), max(weights)
    for seed in range(8):
        queries, docs = sides(relation, seed)
        known = slow_relation(relation, unit(queries[:, :longest]) @ unit(docs[:, :longest]).T)
        fast = info_nce(queries, docs, relation, 0.3, dims=weights, block=block)
        slow = slow_matryoshka(queries, docs, known, 0.3, weights)
        assert_same_loss_and_gradients(fast, slow, [queries, docs])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dims", [(), (3, 8)])
@pytest.mark.parametrize("block", [1, 4, None])
def test_in_the_loss_of_all_kinds_the_dense_scores_decide_for_every_kind(
    name: str, dims: tuple[int, ...], block: int | None
):
    relation, ignored = batch(RULES[name]), 0.0
    mixture = Mixture(temperature=0.3)
    for seed in range(4):
        queries, docs = leaves(made(SIX, seed=seed)), leaves(made(len(relation.owners), seed=9))
        assert queries.dense is not None and docs.dense is not None
        known = slow_relation(relation, unit(queries.dense) @ unit(docs.dense).T)
        how: dict[str, Any] = {"queries_of_all": SIX, "dims": dims, "block": block}
        fast = unified_loss(queries, docs, relation, mixture, **how)
        before = batch(None).rows(0, SIX)
        assert float(fast["ignored"]) == pytest.approx(share(before, known.matrix))
        ignored += float(fast["ignored"])
        if not dims:
            slow = slow_loss(queries, docs, known.matrix, mixture, KINDS)
            assert_same(fast["loss"], slow, [queries, docs])
    assert ignored > 0.1


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("block", [1, 4, None])
def test_a_guides_cosines_decide_in_place_of_the_models(name: str, block: int | None):
    mixture, ignored = Mixture(temperature=0.3), 0.0
    for seed in range(4):
        relation = batch(RULES[name])
        seen = [unit(x.detach()) for x in sides(relation, seed + 50)]
        relation = replace(relation, guide=GuideVectors(*seen))
        known = slow_relation(relation, seen[0] @ seen[1].T)
        queries, docs = sides(relation, seed)
        fast = info_nce(queries, docs, relation, 0.3, dims={2: 0.5, 7: 2.0}, block=block)
        slow = slow_matryoshka(queries, docs, known, 0.3, {2: 0.5, 7: 2.0})
        assert_same_loss_and_gradients(fast, slow, [queries, docs])
        kinds = ("sparse", "multi")  # the model makes no dense vectors
        ours = leaves(made(SIX, seed=seed).only(kinds))
        theirs = leaves(made(len(relation.owners), seed=9).only(kinds))
        found = unified_loss(ours, theirs, relation, mixture, queries_of_all=SIX, block=block)
        expected = slow_loss(ours, theirs, known.matrix, mixture, kinds)
        assert_same(found["loss"], expected, [ours, theirs])
        ignored += float(found["ignored"])
    assert ignored > 0.1


def test_the_temperature_does_not_change_what_is_ignored():
    relation = batch(RULES["percent"])
    queries, docs = map(unit, sides(relation))
    shares = {
        float(info_nce_losses(queries, docs, relation, temperature)["ignored"])
        for temperature in (0.01, 0.3, 7.0)
    }
    assert len(shares) == 1 and shares.pop() > 0


@pytest.mark.parametrize("dims", [None, [2, 3, 7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rule_that_nothing_exceeds_changes_no_bit(dims: list[int] | None, dtype: torch.dtype):
    found = []
    for rule in (None, IgnoreRule(kind="margin", value=2.0)):
        relation = batch(rule)
        queries, docs = (unit(x.detach()).to(dtype).requires_grad_() for x in sides(relation))
        losses = info_nce_losses(queries, docs, relation, 0.05, dims=dims)
        assert losses["ignored"] == 0
        gradients = torch.autograd.grad(losses["loss"], [queries, docs])
        found.append([losses["loss"].detach(), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_no_gradient_flows_through_the_decision():
    """A step that is too small to change a decision changes the loss by the gradient alone."""
    relation = batch(RULES["percent"])
    queries, docs = sides(relation, 3)
    assert torch.autograd.gradcheck(
        lambda q, d: info_nce(q, d, relation, 0.3, dims=[2, 7]), (queries, docs)
    )


def test_pairs_of_the_worked_example():
    """The first query's positive scores 0.5: 0.62 is above 0.5 + 0.1, and 0.58 is not."""
    scores = torch.tensor([[0.5, 0.62, 0.58, 0.7], [0.9, 0.8, 0.3, 0.99]], dtype=torch.float64)
    two = {"queries": ["a", "b"], "positives": [["a1"], ["b1"]]}
    near = relation_of(**two, negatives=[["mined"], ["n"]], ignoring=IgnoreRule())
    assert near.owners.tolist() == [0, 0, 1, 1]
    found = near.false_negatives(0, 2, scores, 1.0)
    assert found is not None
    # 0.62 is of the query's own mined negative; b1 scores 0.3 there, far below 0.8.
    assert found.tolist() == [[False, False, False, True], [True, True, False, False]]
    both = relation_of(**two, negatives=[["mined"], ["n"]], ignoring=IgnoreRule(own=True))
    found = both.false_negatives(0, 2, scores, 1.0)
    assert found is not None
    assert found[:, [1, 3]].tolist() == [[True, True], [True, True]]


def test_equal_texts_are_ignored_whatever_they_score():
    """Trap A16 of Arctic-Embed, with the rule."""
    relation = relation_of(
        ["a", "b"], [["same"], ["same"]], [[], []], ignoring=IgnoreRule(value=1.0)
    )
    queries = torch.eye(2, dtype=torch.float64)
    losses = info_nce_losses(queries, queries.clone(), relation, 0.05)
    assert losses["loss"] == 0 and losses["ignored"] == 0


def test_a_query_without_a_positive_keeps_its_negatives():
    relation = relation_of(
        ["a", "b"], [[], ["b1"]], [["n"], []], ignoring=IgnoreRule(kind="percent", value=1.0)
    )
    found = relation.false_negatives(0, 2, torch.ones(2, 2), 0.1)
    assert found is not None and not found.any()
