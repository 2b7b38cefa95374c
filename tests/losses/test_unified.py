"""The loss over all kinds of vectors, against the equations written out."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.data.batches.relation import Relation, relation_of
from tercet.kinds import KINDS, Kind, Weights
from tercet.losses.listwise import margin_mse
from tercet.losses.unified import Mixture, unified_loss
from tercet.segments import offsets_of
from tercet.types import IGNORED, NEGATIVE, POSITIVE, Distillation, InBatch
from tercet.vectors import Terms, TokenRows, Vectors

TEMPERATURE = 0.3
SIX = 6  # queries


def made(texts: int, *, seed: int, dim: int = 8, dtype: torch.dtype = torch.float64) -> Vectors:
    """Of all kinds: texts of 0 to 5 terms and 1 to 6 token rows; ids repeat in a text."""
    random = torch.Generator().manual_seed(seed)
    terms = torch.randint(0, 6, (texts,), generator=random)
    tokens = torch.randint(1, 7, (texts,), generator=random)
    count, rows = int(terms.sum()), int(tokens.sum())
    # Weights that differ, so that no two are the largest at once.
    weights = torch.rand(count, generator=random, dtype=torch.float64)
    vectors = torch.randn(rows, 5, generator=random, dtype=torch.float64)
    return Vectors(
        torch.randn(texts, dim, generator=random, dtype=torch.float64).to(dtype),
        Terms(
            torch.randint(0, 7, (count,), generator=random), weights.to(dtype), offsets_of(terms)
        ),
        TokenRows(F.normalize(vectors, dim=1).to(dtype), offsets_of(tokens)),
    )


def leaves(vectors: Vectors) -> Vectors:
    return vectors.with_tensors([t.detach().requires_grad_() for t in vectors.tensors()])


def examples(*, shared: bool = True) -> Relation:
    """Six queries with one to two positives and none to two negatives; two ask the same."""
    queries = ["a", "b", "c", "d", "e", "a" if shared else "f"]
    positives = [["a1"], ["b1", "b2"], ["c1"], ["d1"], ["e1"], ["f1"]]
    negatives = [["x", "y"], [], ["a1"], ["z"], ["e1", "v"], ["w", "u"]]
    policies: list[InBatch] = ["all", "all", "positives", "none", "all", "all"]
    return relation_of(queries, positives, negatives, in_batch=policies)


def matrix(relation: Relation) -> Tensor:
    return relation.rows(0, SIX)


def slow_scores(kind: Kind, queries: Vectors, docs: Vectors) -> Tensor:
    """One pair at a time, as the equations say."""
    pairs = product(range(len(queries)), range(len(docs)))
    flat = [_slow_score(kind, queries.take([i]), docs.take([j])) for i, j in pairs]
    return torch.stack(flat).view(len(queries), len(docs))


def _slow_score(kind: Kind, query: Vectors, doc: Vectors) -> Tensor:
    if kind == "dense":
        assert query.dense is not None and doc.dense is not None
        return F.cosine_similarity(query.dense[0], doc.dense[0], dim=0)
    if kind == "sparse":
        assert query.sparse is not None and doc.sparse is not None
        total = query.sparse.weights.new_zeros(())
        for term in set(query.sparse.ids.tolist()) & set(doc.sparse.ids.tolist()):
            ours = query.sparse.weights[query.sparse.ids == term].max()
            total = total + ours * doc.sparse.weights[doc.sparse.ids == term].max()
        return total
    assert query.multi is not None and doc.multi is not None
    return (query.multi.vectors @ doc.multi.vectors.T).amax(1).mean()


def slow_info_nce(logits: Tensor, relation: Tensor) -> Tensor:
    terms = [
        torch.cat([logits[i, j, None], logits[i][relation[i] == NEGATIVE]]).logsumexp(0)
        - logits[i, j]
        for i, j in (relation == POSITIVE).nonzero().tolist()
    ]
    return torch.stack(terms).mean()


def slow_distillation(target: Tensor, logits: Tensor, relation: Tensor) -> Tensor:
    terms = []
    for taught, row, known in zip(target, logits, relation, strict=True):
        some = known != IGNORED
        terms.append(-(taught[some].softmax(0).detach() * row[some].log_softmax(0)).sum())
    return torch.stack(terms).mean()


def slow_loss(
    queries: Vectors, docs: Vectors, relation: Tensor, mixture: Mixture, kinds: Sequence[Kind]
) -> Tensor:
    """Equations 1 to 6 of the paper."""
    logits = {k: slow_scores(k, queries, docs) / mixture.temperature for k in kinds}
    hard = [mixture.in_loss.of(k) * slow_info_nce(logits[k], relation) for k in kinds]
    if len(kinds) == 1:
        return hard[0]
    together = torch.stack([mixture.in_sum.of(k) * logits[k] for k in kinds]).sum(0)
    hard.append(mixture.of_sum * slow_info_nce(together, relation))
    first = torch.stack(hard).sum() / len(hard)
    taught = mixture.in_distilled or mixture.in_loss
    soft = [taught.of(k) * slow_distillation(together, logits[k], relation) for k in kinds]
    second = torch.stack(soft).sum() / len(soft)
    return (first + mixture.distilled * second) / (1 + mixture.distilled)


def assert_same(fast: Tensor, slow: Tensor, sides: Sequence[Vectors], rtol: float = 1e-9) -> None:
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=rtol)
    tensors = [tensor for side in sides for tensor in side.tensors()]
    ours = torch.autograd.grad(fast, tensors, allow_unused=True)
    theirs = torch.autograd.grad(slow, tensors, allow_unused=True)
    some = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if other is None:  # such as a kind that only teaches
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)
            some = max(some, float(other.abs().max()))
    assert some > 1e-6


@pytest.mark.parametrize("block", [1, 4, None])
@pytest.mark.parametrize(
    "kinds",
    [KINDS, ("dense", "sparse"), ("sparse", "multi"), ("dense",), ("sparse",), ("multi",)],
)
def test_loss_and_gradients_are_those_of_the_equations(kinds: tuple[Kind, ...], block: int | None):
    """Trap B1 of BGE-M3."""
    relation = examples()
    queries = leaves(made(SIX, seed=1).only(kinds))
    docs = leaves(made(len(relation.owners), seed=2).only(kinds))
    mixture = Mixture(temperature=TEMPERATURE)
    fast = unified_loss(queries, docs, relation, mixture, queries_of_all=SIX, block=block)
    slow = slow_loss(queries, docs, matrix(relation), mixture, kinds)
    assert_same(fast["loss"], slow, [queries, docs])


@pytest.mark.parametrize(
    "mixture",
    [
        Mixture(temperature=0.1, distilled=0.0),
        Mixture(temperature=0.1, of_sum=0.0),
        Mixture(temperature=0.1, distilled=3.0, in_sum=Weights(0.5, 2.0, 0.1)),
        Mixture(temperature=0.1, in_loss=Weights(0.0, 1.0, 0.0), of_sum=0.0),
        Mixture(temperature=0.1, in_distilled=Weights(0.0, 3.0, 0.5)),
    ],
)
def test_every_part_has_a_weight_of_its_own(mixture: Mixture):
    relation = examples()
    queries, docs = leaves(made(SIX, seed=1)), leaves(made(len(relation.owners), seed=2))
    fast = unified_loss(queries, docs, relation, mixture, queries_of_all=SIX)
    slow = slow_loss(queries, docs, matrix(relation), mixture, KINDS)
    assert_same(fast["loss"], slow, [queries, docs])


def test_parts_are_the_losses_without_weights():
    relation = examples()
    queries, docs = made(SIX, seed=1), made(len(relation.owners), seed=2)
    mixture = Mixture(temperature=TEMPERATURE)
    found = unified_loss(queries, docs, relation, mixture, queries_of_all=SIX)
    known = matrix(relation)
    logits = {k: slow_scores(k, queries, docs) / TEMPERATURE for k in KINDS}
    together = torch.stack([mixture.in_sum.of(k) * logits[k] for k in KINDS]).sum(0)
    for kind in KINDS:
        torch.testing.assert_close(found[kind], slow_info_nce(logits[kind], known))
        expected = slow_distillation(together, logits[kind], known)
        torch.testing.assert_close(found[f"{kind}_distilled"], expected)
    torch.testing.assert_close(found["sum"], slow_info_nce(together, known))


def test_matryoshka_is_the_mean_over_prefixes_of_the_dense_losses():
    relation = examples()
    queries, docs = leaves(made(SIX, seed=1)), leaves(made(len(relation.owners), seed=2))
    mixture = Mixture(temperature=TEMPERATURE)
    fast = unified_loss(queries, docs, relation, mixture, queries_of_all=SIX, dims=(3, 8))
    known = matrix(relation)
    logits = {k: slow_scores(k, queries, docs) / TEMPERATURE for k in KINDS}
    together = torch.stack([mixture.in_sum.of(k) * logits[k] for k in KINDS]).sum(0)
    assert queries.dense is not None and docs.dense is not None
    short = slow_scores("dense", Vectors(queries.dense[:, :3]), Vectors(docs.dense[:, :3]))
    short = short / TEMPERATURE
    hard, soft = [slow_info_nce(together, known)], []
    for kind in KINDS:
        weight, every = mixture.in_loss.of(kind), [logits[kind]]
        every += [short] if kind == "dense" else []
        hard.append(weight * torch.stack([slow_info_nce(x, known) for x in every]).mean())
        soft.append(
            weight * torch.stack([slow_distillation(together, x, known) for x in every]).mean()
        )
    slow = (torch.stack(hard).sum() / 4 + torch.stack(soft).sum() / 3) / 2
    assert_same(fast["loss"], slow, [queries, docs])


def test_the_target_is_constant_and_self_distillation_is_its_divergence():
    """Trap B7 of BGE-M3.

    No gradient flows through the sum; minus its entropy, self-distillation is the KL divergence.
    """
    relation = examples()
    queries, docs = leaves(made(SIX, seed=1)), leaves(made(len(relation.owners), seed=2))
    only_distilled = Mixture(temperature=TEMPERATURE, of_sum=0.0, distilled=1e12)
    fast = unified_loss(queries, docs, relation, only_distilled, queries_of_all=SIX)
    known = matrix(relation)
    logits = {k: slow_scores(k, queries, docs) / TEMPERATURE for k in KINDS}
    together = torch.stack([only_distilled.in_sum.of(k) * logits[k] for k in KINDS]).sum(0).detach()
    divergence, entropy = [], 0.0
    for kind in KINDS:
        for taught, row, kept in zip(together, logits[kind], known != IGNORED, strict=True):
            target, learned = taught[kept].softmax(0), row[kept].log_softmax(0)
            weight = only_distilled.in_loss.of(kind) / (3 * SIX)
            divergence.append(weight * F.kl_div(learned, target, reduction="sum"))
            entropy -= float(weight * (target * target.log()).sum())
    kl = torch.stack(divergence).sum()
    assert_same(fast["loss"] - entropy, kl, [queries, docs], rtol=1e-8)


def test_a_row_without_candidates_or_positives_counts_for_nothing():
    relation = relation_of(["a", "b"], [["a1"], []], [[], []], in_batch="none")
    queries, docs = leaves(made(2, seed=1)), leaves(made(1, seed=2))
    found = unified_loss(queries, docs, relation, Mixture(), queries_of_all=2)
    found["loss"].backward()
    assert found["loss"] == 0
    for tensor in queries.tensors() + docs.tensors():
        assert tensor.grad is None or not tensor.grad.any()


@pytest.mark.parametrize("distil", ["none", "kl", "listwise", "margin-mse"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype: torch.dtype, distil: Distillation):
    """Trap B9 of BGE-M3.

    A score of 1 over a temperature of 0.02 is 50, and e^50 overflows float16.
    """
    relation = examples()
    queries, docs = made(SIX, seed=1), made(len(relation.owners), seed=2)
    low = [side.with_tensors([t.to(dtype) for t in side.tensors()]) for side in (queries, docs)]
    sides = [leaves(side) for side in low]
    mixture, teacher = Mixture(distil=distil), torch.linspace(-1, 1, len(docs))
    how: dict[str, Any] = {"queries_of_all": SIX, "teacher": teacher}
    found = unified_loss(sides[0], sides[1], relation, mixture, **how)["loss"]
    wide = [leaves(side.with_tensors([t.double() for t in side.tensors()])) for side in low]
    expected = unified_loss(wide[0], wide[1], relation, mixture, **how)["loss"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    found.backward()
    for side in sides:
        for tensor in side.tensors():
            assert tensor.grad is not None and tensor.grad.dtype == dtype
            assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("distil", ["kl", "listwise", "margin-mse"])
@pytest.mark.parametrize("unjudged", [[], [1, 4], [0, 1, 2, 3, 4, 5]])
def test_an_outside_teacher(distil: Distillation, unjudged: list[int]):
    """``kl`` adds to every InfoNCE, that of the sum too; ``listwise`` takes their place.

    Queries without any score learn by InfoNCE alone.
    """
    relation = examples()
    queries, docs = leaves(made(SIX, seed=1)), leaves(made(len(relation.owners), seed=2))
    teacher = torch.randn(
        len(docs), dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    teacher[1] = torch.nan
    teacher[torch.isin(relation.owners, torch.tensor(unjudged))] = torch.nan
    mixture = Mixture(temperature=TEMPERATURE, distil=distil)
    fast = unified_loss(queries, docs, relation, mixture, queries_of_all=SIX, teacher=teacher)
    known = matrix(relation)
    logits = {k: slow_scores(k, queries, docs) / TEMPERATURE for k in KINDS}
    together = torch.stack([mixture.in_sum.of(k) * logits[k] for k in KINDS]).sum(0)
    slow = {"kl": slow_kl, "listwise": slow_listwise, "margin-mse": slow_margin_mse}[distil]
    weights = [*(mixture.in_loss.of(k) for k in KINDS), 1.0]
    hard = [
        weight * slow(x, teacher, relation, known)
        for weight, x in zip(weights, [*logits.values(), together], strict=True)
    ]
    soft = [mixture.in_loss.of(k) * slow_distillation(together, logits[k], known) for k in KINDS]
    expected = (torch.stack(hard).sum() / 4 + torch.stack(soft).sum() / 3) / 2
    assert_same(fast["loss"], expected, [queries, docs])
    by_labels = slow_info_nce(logits["dense"], known)
    if distil == "listwise":
        by_labels = slow_unjudged(logits["dense"], teacher, relation, known)
    torch.testing.assert_close(fast["dense"], by_labels)
    torch.testing.assert_close(fast["dense"] + fast["dense_taught"], hard[0])


def judged(row: int, teacher: Tensor, relation: Relation, known: Tensor) -> list[int]:
    own = (relation.owners == row).nonzero().squeeze(1).tolist()
    return [j for j in own if not teacher[j].isnan() and known[row, j] != IGNORED]


def slow_kl(logits: Tensor, teacher: Tensor, relation: Relation, known: Tensor) -> Tensor:
    terms = []
    for row in range(SIX):
        own = judged(row, teacher, relation, known)
        if not own:
            terms.append(logits.new_zeros(()))
            continue
        terms.append(-(teacher[own].softmax(0) * logits[row, own].log_softmax(0)).sum())
    return slow_info_nce(logits, known) + torch.stack(terms).mean()


def slow_unjudged(logits: Tensor, teacher: Tensor, relation: Relation, known: Tensor) -> Tensor:
    """InfoNCE of the queries without a score; the mean counts the positives of all queries."""
    bare = [i for i in range(SIX) if not judged(i, teacher, relation, known)]
    if not bare:
        return logits.new_zeros(())
    share = int((known[bare] == POSITIVE).sum()) / int((known == POSITIVE).sum())
    return slow_info_nce(logits[bare], known[bare]) * share


def slow_listwise(logits: Tensor, teacher: Tensor, relation: Relation, known: Tensor) -> Tensor:
    terms = [logits.new_zeros(())]
    for row in range(SIX):
        own = sorted(judged(row, teacher, relation, known), key=lambda j: -float(teacher[j]))
        candidates = (known[row] != IGNORED).nonzero().squeeze(1).tolist()
        share = teacher[own].softmax(0)
        for i, j in enumerate(own):
            left = [k for k in candidates if k not in own[:i]]
            terms.append(share[i] * (logits[row, left].logsumexp(0) - logits[row, j]))
    by_labels = slow_unjudged(logits, teacher, relation, known)
    return torch.stack(terms).sum() / SIX + by_labels


def slow_margins(logits: Tensor, teacher: Tensor, relation: Relation, known: Tensor) -> Tensor:
    """The mean over all queries; those without a scored positive and negative count as zero."""
    terms = [logits.new_zeros(())]
    for row in range(SIX):
        own = judged(row, teacher, relation, known)
        right = [j for j in own if known[row, j] == POSITIVE]
        wrong = [j for j in own if known[row, j] == NEGATIVE]
        squares = [
            ((logits[row, p] - logits[row, n]) - (teacher[p] - teacher[n])) ** 2
            for p in right
            for n in wrong
        ]
        if squares:
            terms.append(torch.stack(squares).mean())
    return torch.stack(terms).sum() / SIX


def slow_margin_mse(logits: Tensor, teacher: Tensor, relation: Relation, known: Tensor) -> Tensor:
    return slow_info_nce(logits, known) + slow_margins(logits, teacher, relation, known)


@pytest.mark.parametrize("distil", ["kl", "listwise", "margin-mse"])
def test_weight_and_temperature_of_a_lesson(distil: Distillation):
    """The weight scales the lesson alone; the temperature divides the teacher's scores."""
    relation = examples()
    queries, docs = made(SIX, seed=1), made(len(relation.owners), seed=2)
    teacher = torch.linspace(-3, 5, len(docs), dtype=torch.float64)
    how: dict[str, Any] = {"queries_of_all": SIX}
    plain = Mixture(temperature=TEMPERATURE, distil=distil)
    divided = unified_loss(queries, docs, relation, plain, teacher=teacher / 4, **how)
    mixture = replace(plain, teacher_temperature=4.0, distil_weight=0.5)
    found = unified_loss(queries, docs, relation, mixture, teacher=teacher, **how)
    torch.testing.assert_close(found["dense_taught"], divided["dense_taught"])
    bare = unified_loss(
        queries, docs, relation, replace(mixture, distil_weight=0.0), teacher=teacher, **how
    )
    torch.testing.assert_close(2 * (found["loss"] - bare["loss"]), divided["loss"] - bare["loss"])


def test_margins_by_hand():
    """A positive at 3 and negatives at 1 and 2, by the teacher 5, 4 and 0: (2 - 1)^2, (1 - 5)^2."""
    logits = torch.tensor([[3.0, 1.0, 2.0, 9.0]])
    scores = torch.tensor([[5.0, 4.0, 0.0, torch.nan]])
    positive = torch.tensor([[True, False, False, False]])
    loss, slope = margin_mse(logits, scores, positive, torch.ones(1, 4, dtype=torch.bool))
    assert float(loss) == pytest.approx((1 + 16) / 2)
    torch.testing.assert_close(slope, torch.tensor([[1.0 - 4.0, -1.0, 4.0, 0.0]]))


@pytest.mark.parametrize("distil", ["kl", "listwise", "margin-mse"])
def test_the_order_of_passages_does_not_matter(distil: Distillation):
    """Trap B13 of BGE-M3."""
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    docs, queries = made(5, seed=2), made(1, seed=1)
    mixture = Mixture(temperature=TEMPERATURE, distil=distil, distilled=0.0)
    found = []
    for order in ([0, 1, 2, 3, 4], [0, 4, 2, 1, 3]):
        relation = relation_of(["q"], [["t0"]], [[f"t{i}" for i in order[1:]]])
        losses = unified_loss(
            queries,
            docs.take(order),
            relation,
            mixture,
            queries_of_all=1,
            teacher=scores[order],
        )
        found.append(losses["loss"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert found[0] > 0


def test_memory_does_not_grow_with_the_square_of_the_batch():
    """Blocks of one query and of all give the same; the largest tensor is one block's scores."""
    relation = examples()
    queries, docs = leaves(made(SIX, seed=1)), leaves(made(len(relation.owners), seed=2))
    one = unified_loss(queries, docs, relation, Mixture(), queries_of_all=SIX, block=1)
    every = unified_loss(queries, docs, relation, Mixture(), queries_of_all=SIX, block=SIX)
    assert_same(one["loss"], every["loss"], [queries, docs], rtol=1e-10)
