"""Weights of the kinds of vectors, found on a dev set, and what they are worth on other queries.

The scores of the kinds are of different sizes, so a weight is looked for in units of how far a
kind's scores spread among the candidates of a query. Two ways propose weights: a grid, of which
the best by the metric is taken, and a conditional logistic regression (McFadden 1974),

    p(document | query) = softmax over the query's candidates of sum_k w_k * score_k

which knows no metric. What the better of both gains is measured on queries that had no part in
choosing it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tercet.errors import RecipeError
from tercet.evaluate.measures.by_kind import DEPTH, Corpus
from tercet.evaluate.report.intervals import Interval, interval, paired_difference
from tercet.evaluate.sets.retrieval_set import RetrievalSet, depth_of, evaluate_hits
from tercet.models.kept import keep, require_settings
from tercet.rank.hybrid import HybridHits, each_alone, ranked
from tercet.vectors import KINDS, Kind, Vectors, Weights

Method: TypeAlias = Literal["usual", "grid", "logistic"]

PARTS: Final = 20  # of the grid: shares of the kinds in steps of one twentieth
FOLDS: Final = 5
_RIDGE: Final = 1e-3  # keeps weights finite where scores tell right from wrong without fail
_STEPS: Final = 100  # of Newton at most; some ten are usual

Metric: TypeAlias = Callable[[Weights], Float64[np.ndarray, "queries"]]


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """Weights that all queries of the dev set chose, and how such weights do on other queries."""

    weights: Weights
    method: Method
    metric: str
    kinds: tuple[Kind, ...]
    folds: tuple[Weights, ...]  # what each part of the queries was measured with
    fitted: float  # the metric on the very queries that chose the weights: too good to be true
    scores: Mapping[
        str, Float64[np.ndarray, "queries"]
    ]  # "tuned" on held-out queries; "usual", ...

    def interval(self, name: str, seed: int = 0) -> Interval:
        """The mean with its bootstrap interval over queries."""
        return interval(self.scores[name], seed=seed)

    def gain(self, over: str, seed: int = 0) -> Interval:
        """What tuned weights gain over others, on queries that had no part in choosing them.

        The weights of each fold are taken as given: that other queries would have chosen others
        is in the mean, but not in the width of the interval.
        """
        return paired_difference(self.scores["tuned"], self.scores[over], seed=seed)


def candidates(queries: Vectors, corpus: Corpus, *, depth: int = DEPTH) -> HybridHits:
    """The best documents of each query by each kind and by the usual sum, each with all scores.

    A document outside of all these lists cannot be ranked, whatever the weights: one that is
    worse than ``depth`` others by every kind.
    """
    sums = {**each_alone(queries.kinds), "usual": Weights()}
    return HybridHits.union(ranked(queries, corpus.blocks(queries.kinds), sums, depth).values())


def tune(
    data: RetrievalSet,
    found: HybridHits,
    *,
    metric: str = "ndcg@10",
    folds: int = FOLDS,
    seed: int = 0,
) -> Tuned:
    """The weights that rank the candidates best, and what they gain over the usual ones.

    Raises:
        RecipeError: where there are fewer kinds than two or fewer queries than folds, or no
            candidate is relevant; or for a metric that does not exist.
    """
    relevant = torch.from_numpy(data.judgements.grades_of(found.rows.numpy()) > 0)
    _refuse(found, relevant, folds)
    values = _measuring(data, found, metric)
    spread = spreads(found)
    grid: dict[Weights, np.ndarray] = {w: values(w) for w in _grid(found.kinds, spread)}
    table = np.stack(list(grid.values()))  # [weights, queries]
    everybody = np.arange(len(relevant))
    fold_of = np.random.default_rng(seed).permutation(everybody) % folds
    held_out = {name: np.zeros(len(relevant)) for name in ("tuned", "grid", "logistic")}
    chosen = []
    for fold in range(folds):
        test, rest = (fold_of == fold), (fold_of != fold)
        fitted = logistic(found, relevant, spread, rest)
        learned = values(fitted)
        best = int(table[:, rest].mean(axis=1).argmax())  # the first of equals: the usual weights
        grid_won = table[best][rest].mean() >= learned[rest].mean()
        held_out["grid"][test] = table[best][test]
        held_out["logistic"][test] = learned[test]
        held_out["tuned"][test] = (table[best] if grid_won else learned)[test]
        chosen.append(list(grid)[best] if grid_won else fitted)
    fitted = logistic(found, relevant, spread, np.ones(len(relevant), np.bool_))
    learned, best = values(fitted), int(table.mean(axis=1).argmax())
    if table[best].mean() >= learned.mean():
        weights, method, top = list(grid)[best], "grid" if best else "usual", table[best].mean()
    else:
        weights, method, top = fitted, "logistic", learned.mean()
    alone = {kind: values(weights) for kind, weights in each_alone(found.kinds).items()}
    scores = {**held_out, "usual": table[0], **alone}
    return Tuned(weights, method, metric, found.kinds, tuple(chosen), float(top), scores)


def spreads(found: HybridHits) -> dict[Kind, float]:
    """How far a kind's scores spread among the candidates of a query; 1 where not at all."""
    here = found.rows >= 0
    count = here.sum(dim=1, keepdim=True).clamp_min(1)
    spread: dict[Kind, float] = {}
    for kind, part in zip(found.kinds, found.parts.double(), strict=True):
        off = (part - (part * here).sum(dim=1, keepdim=True) / count) * here
        deviation = float((off.square().sum() / here.sum().clamp_min(1)).sqrt())
        spread[kind] = deviation if deviation > 0 else 1.0
    return spread


def logistic(
    found: HybridHits,
    relevant: Bool[Tensor, "queries ranks"],
    spread: Mapping[Kind, float],
    chosen: Bool[np.ndarray, "queries"],
) -> Weights:
    """The weights of a conditional logistic regression on some queries; none is negative.

    A kind whose weight would be negative is left out, and the others are fitted again. Where no
    candidate of these queries is relevant, the usual weights.
    """
    some = torch.from_numpy(chosen) & relevant.any(dim=1)
    if not bool(some.any()):
        return Weights()
    here, right = found.rows[some] >= 0, relevant[some]
    left = list(found.kinds)
    while True:
        parts = [
            found.parts[found.kinds.index(kind)][some].double() / spread[kind] for kind in left
        ]
        fitted = dict(zip(left, _newton(torch.stack(parts), here, right).tolist(), strict=True))
        worst = min(left, key=lambda kind: fitted[kind])
        if fitted[worst] >= 0 or len(left) == 1:
            break
        left.remove(worst)
    if max(fitted.values()) <= 0:
        return Weights()
    return _scaled({kind: max(0.0, weight) / spread[kind] for kind, weight in fitted.items()})


def _newton(
    parts: Float[Tensor, "kinds queries ranks"],
    here: Bool[Tensor, "queries ranks"],
    right: Bool[Tensor, "queries ranks"],
) -> Float[Tensor, "kinds"]:
    """Where the mean log-probability of relevant candidates is largest, by damped Newton steps."""
    target = right.double() / right.sum()  # every relevant pair counts the same
    share = target.sum(dim=1)  # of each query

    def objective(weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("k,kqd->qd", weights, parts).masked_fill(~here, -torch.inf)
        logs = logits.log_softmax(dim=1)
        gained = (target * logs.masked_fill(~right, 0)).sum()
        return gained - _RIDGE / 2 * weights.square().sum(), logs.exp()

    weights = parts.new_zeros(len(parts))
    value, likely = objective(weights)
    for _ in range(_STEPS):
        expected = torch.einsum("qd,kqd->qk", likely, parts)
        gradient = torch.einsum("qd,kqd->k", target, parts) - share @ expected - _RIDGE * weights
        if float(gradient.abs().max()) < 1e-9:
            break
        weighed = likely * share[:, None]
        second = torch.einsum("qd,kqd,lqd->kl", weighed, parts, parts)
        second = second - torch.einsum("q,qk,ql->kl", share, expected, expected)
        step = torch.linalg.solve(second + _RIDGE * torch.eye(len(parts)).to(second), gradient)
        for _ in range(30):  # halve a step that goes too far
            better, there = objective(weights + step)
            if better >= value:
                break
            step = step / 2
        else:
            break
        weights, value, likely = weights + step, better, there
    return weights


def _grid(kinds: Sequence[Kind], spread: Mapping[Kind, float]) -> list[Weights]:
    """The usual weights, then all shares of the kinds in units of their spread."""
    shares = [
        (*first, PARTS - sum(first))
        for first in product(range(PARTS + 1), repeat=len(kinds) - 1)
        if sum(first) <= PARTS
    ]
    scaled = [
        _scaled({k: s / spread[k] for k, s in zip(kinds, each, strict=True)}) for each in shares
    ]
    return list(dict.fromkeys([Weights().only(kinds), *scaled]))


def _scaled(weights: Mapping[Kind, float]) -> Weights:
    """The largest is 1; three digits are enough, and people can read them."""
    most = max(weights.values())
    return Weights(*(float(f"{weights.get(kind, 0.0) / most:.3g}") for kind in KINDS))


def _measuring(data: RetrievalSet, found: HybridHits, metric: str) -> Metric:
    """The metric of each query by weights."""
    depth = depth_of(metric)

    def values(weights: Weights) -> np.ndarray:
        hits = found.hits(weights, depth)
        return np.asarray(evaluate_hits(data, hits, names=[metric]).scores[metric])

    return values


def _refuse(found: HybridHits, relevant: Tensor, folds: int) -> None:
    if len(found.kinds) < 2:
        raise RecipeError(
            f"the model makes {' and '.join(found.kinds)} vectors only, so there is nothing to "
            "weigh; train one with several kinds (tercet train bge-m3)"
        )
    if folds < 2 or len(relevant) < folds:
        raise RecipeError(
            f"{len(relevant)} queries cannot be parted into {folds} folds; give more queries, or "
            "from 2 to as many folds as there are queries"
        )
    if not bool(relevant.any()):
        raise RecipeError(
            "no relevant document is among the candidates of any query, so no weights are better "
            "than others; is this the right dev set for the model?"
        )


def save_weights(folder: Path | str, weights: Weights, task: str = "") -> None:
    """Write weights into a saved model's settings, for a task or as its usual ones.

    Nothing else of the folder is touched, and vectors do not change: indexes stay valid.

    Raises:
        ModelError: when the folder has no settings of ours, or they are damaged.
        StorageError: when the disk refuses.
    """
    require_settings(folder)
    keep(folder, "weights", {task: asdict(weights)})
