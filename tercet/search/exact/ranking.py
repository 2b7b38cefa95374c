"""The best rows of queries by any fusion, over segments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isinf

import numpy as np
from jaxtyping import Int64

from tercet.kinds import Kind, Weights
from tercet.search.engine.engine import Fusion, ReciprocalRank
from tercet.search.engine.fusion import proposing, reciprocal_ranks, wanted, weighted_sum
from tercet.search.exact.scanning import Best, Scan, View
from tercet.vectors import Vectors

_ALONE = Weights(1.0, 1.0, 1.0)  # of a kind whose own list is asked for


@dataclass(frozen=True, slots=True)
class Ranked:
    """A row that was found, counted over all segments."""

    row: int
    score: float
    scores: Mapping[Kind, float]


def rank(
    queries: Vectors, views: Sequence[View], fusion: Fusion, kinds: Sequence[Kind], k: int
) -> list[list[Ranked]]:
    """The best ``k`` rows of each query by the kinds that count, best first.

    All kinds of the queries are in the segments.

    Raises:
        RecipeError: when candidates are to be found by dense vectors, and there are none.
    """
    scan = Scan(queries, views)
    proposers = proposing(fusion, queries.kinds)
    if not proposers:
        assert not isinstance(fusion, ReciprocalRank), "one of its kinds counts"
        return _all_ranked(scan.best(fusion.weights, kinds, k))
    lists = [scan.best(_ALONE, (kind,), wanted(fusion, k), nearly=True) for kind in proposers]
    found = []
    for query in range(len(queries)):
        rows = [_rows(best, query) for best in lists]
        candidates = np.unique(np.concatenate(rows))
        scores = scan.pairs(query, candidates, kinds)
        if isinstance(fusion, ReciprocalRank):
            sums = reciprocal_ranks([names.tolist() for names in rows], fusion.k)
        else:
            sums = {row: weighted_sum(parts, fusion.weights) for row, parts in scores.items()}
        best = sorted(sums, key=lambda row: (-sums[row], row))
        ranked = [Ranked(row, sums[row], scores[row]) for row in best if row in scores]
        found.append(ranked[:k])
    return found


def _rows(best: Best, query: int) -> Int64[np.ndarray, "ranks"]:
    """What a list holds for one query, best first."""
    there = ~best.sums[query].isinf()
    return best.rows[query][there].numpy()


def _all_ranked(best: Best) -> list[list[Ranked]]:
    """Every query's list as it was found."""
    parts: dict[Kind, list[list[float]]]
    parts = {kind: part.tolist() for kind, part in best.parts.items()}
    return [
        [
            Ranked(row, score, {kind: parts[kind][query][place] for kind in parts})
            for place, (row, score) in enumerate(zip(rows, scores, strict=True))
            if not isinf(score)
        ]
        for query, (rows, scores) in enumerate(
            zip(best.rows.tolist(), best.sums.tolist(), strict=True)
        )
    ]
