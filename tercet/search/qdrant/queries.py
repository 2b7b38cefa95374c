"""Searches of both Qdrant engines.

A first request finds the best points, fused inside the engine from one list per kind over the same
candidates, so that each has its true score by every kind. A second one gets their scores by kind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar
from uuid import UUID

import numpy as np

from tercet.kinds import Kind, Weights
from tercet.search.engine.checks import Widths, check_queries
from tercet.search.engine.engine import (
    Fusion,
    Hit,
    ReciprocalRank,
    Record,
    Weighted,
    Where,
    counted,
)
from tercet.search.engine.fusion import proposing, wanted, weighted_sum
from tercet.search.qdrant.points import Facts, PointVector, PointVectors, facts_of, parts_of
from tercet.vectors import Vectors

ASKED_TOGETHER: Final = 32  # queries of one call into the engine
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Prefetch:
    """A search for the best points by one kind, among all or those of other stages."""

    kind: Kind
    query: PointVector
    limit: int
    exact: bool = False
    among: tuple["Prefetch", ...] = ()


@dataclass(frozen=True, slots=True)
class SumFusion:
    """Rank by a weighted sum of the stages' scores; a point that is missing in one scores zero.

    That is its true score if every stage scores all candidates.
    """

    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RankFusion:
    """Rank by the sum of 1 / (k + rank) over the stages, where ranks begin with 1."""

    k: int


@dataclass(frozen=True, slots=True)
class PointQuery:
    """One search of the engine: stages and how they are fused; None for a single one."""

    stages: tuple[Prefetch, ...]
    limit: int
    fuse: SumFusion | RankFusion | None = None
    facts: Facts = ()
    only: frozenset[UUID] | None = None
    with_payload: bool = False


@dataclass(frozen=True, slots=True)
class ScoredPoint:
    """A point with its score."""

    id: UUID
    score: float
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RequestMaker:
    """Makes the requests of one client library of Qdrant from its classes."""

    request: Callable[..., Any]
    prefetch: Callable[..., Any]
    nearest: Callable[[Prefetch], Mapping[str, Any]]  # keywords of a request or prefetch
    params: Callable[[Prefetch], Any]
    rank_fusion: Callable[[int], Any]
    weighted_sum: Callable[[Mapping[str, float]], Any]  # weights of variables
    any_fact: Callable[[list[str]], Any]
    any_id: Callable[[frozenset[UUID]], Any]
    all_of: Callable[[list[Any]], Any]

    def request_of(self, ask: PointQuery) -> Any:
        """Return the request of one search."""
        if ask.fuse is None:
            (stage,) = ask.stages
            return self.request(**self._stage(stage, ask), with_payload=ask.with_payload)
        if isinstance(ask.fuse, RankFusion):
            query = self.rank_fusion(ask.fuse.k + 1)  # Qdrant's ranks begin with 0
        else:
            weights = enumerate(ask.fuse.weights)
            query = self.weighted_sum({f"$score[{n}]": weight for n, weight in weights})
        return self.request(
            query=query,
            prefetch=self._prefetches(ask.stages, ask),
            limit=ask.limit,
            with_payload=ask.with_payload,
        )

    def filter_of(self, facts: Facts, only: frozenset[UUID] | None = None) -> Any:
        """Return a filter of facts and ids; None if all points match."""
        conditions = [self.any_fact(list(group)) for group in facts]
        if only is not None:
            conditions.append(self.any_id(only))
        return self.all_of(conditions) if conditions else None

    def _stage(self, stage: Prefetch, ask: PointQuery) -> dict[str, Any]:
        """Return the keywords of a stage; the first stages apply the filter."""
        return {
            **self.nearest(stage),
            "prefetch": self._prefetches(stage.among, ask) or None,
            "filter": None if stage.among else self.filter_of(ask.facts, ask.only),
            "params": self.params(stage),
            "limit": stage.limit,
        }

    def _prefetches(self, stages: Sequence[Prefetch], ask: PointQuery) -> list[Any]:
        return [self.prefetch(**self._stage(stage, ask)) for stage in stages]


RunQueries: TypeAlias = Callable[[Sequence[PointQuery]], list[list[ScoredPoint]]]
RecordOf: TypeAlias = Callable[[Mapping[str, Any]], Record]


def search(  # noqa: PLR0913 (a search, and where it takes place)
    asking: RunQueries,
    queries: Vectors,
    widths: Widths,
    *,
    records: int,
    k: int,
    fusion: Fusion | None,
    where: Where | None,
    record_of: RecordOf,
) -> list[list[Hit]]:
    """Return the best records of each query, with their scores by each kind that counts.

    ``record_of`` makes a record of a point's payload.

    Raises:
        ModelError: when the queries' vectors are of other widths than the store's, or NaN.
        RecipeError: when no kind counts.
    """
    fusion = fusion or Weighted()
    present: tuple[Kind, ...] = tuple(kind for kind in queries.kinds if kind in widths)
    check_queries(queries.only(present), widths)
    kinds = counted(fusion, present)
    by = proposing(fusion, present)
    if not records or k < 1:
        return [[] for _ in range(len(queries))]
    planner = _Planner(fusion, kinds, by, records, facts_of(where))
    found: list[list[Hit]] = []
    for several in batched(parts_of(queries.only(present)), ASKED_TOGETHER):
        found += _search_several(asking, several, planner, min(k, records), record_of)
    return found


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield runs of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


@dataclass(frozen=True, slots=True)
class _Planner:
    """Turns the vectors of a query into a search of the engine."""

    fusion: Fusion
    kinds: tuple[Kind, ...]  # that count
    by: tuple[Kind, ...]  # that propose candidates; if empty, all records
    records: int
    facts: Facts

    def __call__(self, parts: PointVectors, k: int) -> PointQuery | None:
        """Return the search of one query; None without vectors that propose candidates."""
        limit = min(wanted(self.fusion, k), self.records)
        proposed = tuple(Prefetch(kind, parts[kind], limit) for kind in self.by if kind in parts)
        if self.by and not proposed:
            return None
        if isinstance(self.fusion, ReciprocalRank):
            return PointQuery(proposed, k, RankFusion(self.fusion.k), self.facts, with_payload=True)
        over = min(limit * len(proposed), self.records) if self.by else self.records
        stages = tuple(
            Prefetch(kind, parts[kind], over, exact=True, among=proposed)
            for kind in self.kinds
            if kind in parts
        )
        weights = tuple(weight_of(stage, self.fusion.weights) for stage in stages)
        return (
            PointQuery(stages, k, SumFusion(weights), self.facts, with_payload=True)
            if stages
            else None
        )


def weight_of(stage: Prefetch, weights: Weights) -> float:
    """Return the weight of a stage's score; for token vectors Qdrant sums where we average."""
    return weights.of(stage.kind) / _terms(stage.kind, stage.query)


def _terms(kind: Kind, query: PointVector) -> int:
    """Return the factor between the engine's score and ours: the tokens of the query."""
    return len(query) if kind == "multi" and isinstance(query, np.ndarray) else 1


def _search_several(
    asking: RunQueries,
    several: Sequence[PointVectors],
    planner: _Planner,
    k: int,
    record_of: RecordOf,
) -> list[list[Hit]]:
    asks = [planner(parts, k) for parts in several]
    answers = iter(asking([ask for ask in asks if ask is not None]))
    found = [next(answers) if ask is not None else [] for ask in asks]
    scores = _scores_by_kind(asking, several, found, planner.kinds)
    return [
        _hits(points, by_kind, planner.fusion, record_of)
        for points, by_kind in zip(found, scores, strict=True)
    ]


def _scores_by_kind(
    asking: RunQueries,
    several: Sequence[PointVectors],
    found: Sequence[Sequence[ScoredPoint]],
    kinds: tuple[Kind, ...],
) -> list[dict[Kind, dict[UUID, float]]]:
    """Return the scores of the found points by each kind, query by query."""
    scores: list[dict[Kind, dict[UUID, float]]] = [{kind: {} for kind in kinds} for _ in several]
    places: list[tuple[int, Kind]] = [
        (number, kind)
        for number, parts in enumerate(several)
        for kind in kinds
        if kind in parts and found[number]
    ]
    asks = [
        PointQuery(
            (Prefetch(kind, several[number][kind], len(found[number]), exact=True),),
            len(found[number]),
            only=frozenset(point.id for point in found[number]),
        )
        for number, kind in places
    ]
    for (number, kind), points in zip(places, asking(asks), strict=True):
        scale = _terms(kind, several[number][kind])
        scores[number][kind] = {point.id: point.score / scale for point in points}
    return scores


def _hits(
    points: Sequence[ScoredPoint],
    by_kind: Mapping[Kind, Mapping[UUID, float]],
    fusion: Fusion,
    record_of: RecordOf,
) -> list[Hit]:
    hits: list[Hit] = []
    for point in points:
        scores: dict[Kind, float] = {
            kind: found.get(point.id, 0.0) for kind, found in by_kind.items()
        }
        total = point.score
        if not isinstance(fusion, ReciprocalRank):
            total = weighted_sum(scores, fusion.weights)
        hits.append(Hit(record_of(point.payload), total, scores))
    return sorted(hits, key=lambda hit: -hit.score)  # stable
