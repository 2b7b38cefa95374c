"""Weights of the kinds of vectors, found on a dev set, and what they are worth on other queries.

The scores of the kinds differ in scale, so weights are searched in units of the standard deviation
of a kind's scores among the candidates of a query. Two methods propose weights: a grid, of which
the best by the metric is taken, and a conditional logistic regression (McFadden 1974),

    p(document | query) = softmax over the query's candidates of sum_k w_k * score_k

which does not depend on a metric. The gain of the better one is measured on held-out queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tercet.errors import RecipeError
from tercet.evaluate.measures.by_kind import DEPTH, Corpus, CorpusEncoder
from tercet.evaluate.measures.prompts import known_task, warn_unprompted
from tercet.evaluate.measures.retrieval import depth_of, evaluate_hits
from tercet.evaluate.report.intervals import Interval, interval, paired_difference
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.progress import bar
from tercet.kinds import KINDS, Kind, Weights
from tercet.models.embedder import Embedder
from tercet.models.settings import keep, require_settings
from tercet.rank.hybrid import HybridHits, each_alone, ranked
from tercet.vectors import Vectors

TuningMethod: TypeAlias = Literal["usual", "grid", "logistic"]

PARTS: Final = 20  # of the grid: shares of the kinds in steps of one twentieth
FOLDS: Final = 5
_RIDGE: Final = 1e-3  # keeps weights finite if scores separate relevant from other documents
_STEPS: Final = 100  # of Newton at most; about ten are usual


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """Weights chosen on all queries of a dev set, and their metric on held-out queries."""

    weights: Weights
    method: TuningMethod
    metric: str
    kinds: tuple[Kind, ...]
    folds: tuple[Weights, ...]  # used for each fold of the queries, chosen on the others
    fitted: float  # the metric on the same queries that chose the weights: biased upwards
    scores: Mapping[str, Float64[np.ndarray, "queries"]]  # "tuned" on held-out queries; "usual", ..

    def interval(self, name: str, seed: int = 0) -> Interval:
        """Return the mean with its bootstrap interval over queries."""
        return interval(self.scores[name], seed=seed)

    def gain(self, over: str, seed: int = 0) -> Interval:
        """Return what tuned weights gain over others, on held-out queries, the weights fixed."""
        return paired_difference(self.scores["tuned"], self.scores[over], seed=seed)


def candidates(queries: Vectors, corpus: Corpus, *, depth: int = DEPTH) -> HybridHits:
    """Return each query's best documents by each kind and by the usual sum, with all scores.

    A document outside of these lists, worse than ``depth`` others by every kind, is never ranked.
    """
    sums = {**each_alone(queries.kinds), "usual": Weights()}
    return HybridHits.union(ranked(queries, corpus.blocks(queries.kinds), sums, depth).values())


def dev_candidates(
    embedder: Embedder,
    data: RetrievalSet,
    *,
    tasks: Sequence[str],
    kinds: Sequence[Kind],
    depth: int,
    progress: bool = False,
) -> HybridHits:
    """Encode a dev set and return the candidates of each query, with their scores by every kind.

    The prompts are those of the first task that the model knows, or the default ones.
    """
    task = known_task(embedder.settings, tasks)
    warn_unprompted(embedder.settings, "query", task)
    queries = embedder.encode_vectors(data.queries, "query", kinds=kinds, task=task)
    with bar("search", len(data.documents), shown=progress) as advance:
        corpus = CorpusEncoder(embedder, data.documents, advance, task)
        return candidates(queries, corpus, depth=depth)


def tune(
    data: RetrievalSet,
    found: HybridHits,
    *,
    metric: str = "ndcg@10",
    folds: int = FOLDS,
    seed: int = 0,
) -> Tuned:
    """Find the weights that rank the candidates best, and what they gain over the usual ones.

    Raises:
        RecipeError: for fewer than two kinds, fewer queries than folds, no relevant candidate, or
            an unknown metric.
    """
    found = _without_own(data, found)
    relevant = torch.from_numpy(data.judgements.grades_of(found.rows.numpy()) > 0)
    _check(found, relevant, folds)
    depth = depth_of(metric)

    def values(weights: Weights) -> Float64[np.ndarray, "queries"]:
        hits = found.hits(weights, depth)
        return np.asarray(evaluate_hits(data, hits, names=[metric]).scores[metric])

    spread = spreads(found)
    grid: dict[Weights, np.ndarray] = {w: values(w) for w in _grid(found.kinds, spread)}
    table = np.stack(list(grid.values()))  # [weights, queries]
    fold_of = np.random.default_rng(seed).permutation(np.arange(len(relevant))) % folds
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


def _without_own(data: RetrievalSet, found: HybridHits) -> HybridHits:
    """Return the candidates without the documents that have their query's own id."""
    if data.own_rows is None:
        return found
    own = torch.from_numpy(data.own_rows)[:, None]
    return replace(found, rows=found.rows.masked_fill(found.rows == own, -1))


def spreads(found: HybridHits) -> dict[Kind, float]:
    """Return the standard deviation of each kind's scores within a query's candidates; 1 for 0."""
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
    """Fit a conditional logistic regression (McFadden 1974) on some queries, without signs below 0.

    A kind whose weight would be negative is left out, and the others are fitted again. If no
    candidate of these queries is relevant, the usual weights are returned.
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
    """Maximise the mean log-probability of relevant candidates by damped Newton steps."""
    target = right.double() / right.sum()  # every relevant pair has equal weight
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
    """Return the usual weights, then all shares of the kinds in units of their spread."""
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
    """Scale the largest weight to 1 and round to three digits, which people can read."""
    most = max(weights.values())
    return Weights(*(float(f"{weights.get(kind, 0.0) / most:.3g}") for kind in KINDS))


def _check(found: HybridHits, relevant: Tensor, folds: int) -> None:
    if len(found.kinds) < 2:
        raise RecipeError(
            f"the model makes only {' and '.join(found.kinds)} vectors, so there are no weights to "
            "tune; train one with several kinds (tercet train bge-m3)"
        )
    if folds < 2 or len(relevant) < folds:
        raise RecipeError(
            f"folds must be between 2 and the number of queries, {len(relevant)}; got {folds}"
        )
    if not bool(relevant.any()):
        raise RecipeError(
            "no query has a relevant document among its candidates, so all weights are equally "
            "good; check that this dev set fits the model"
        )


def save_weights(folder: Path | str, weights: Weights, task: str = "") -> None:
    """Write weights into a saved model's settings, for a task or as its usual ones.

    Nothing else in the folder changes, and vectors stay the same, so indexes stay valid.

    Raises:
        ModelError: if the folder has no settings of tercet, or they are damaged.
        StorageError: if the disk refuses.
    """
    require_settings(folder)
    keep(folder, "weights", {task: asdict(weights)})
