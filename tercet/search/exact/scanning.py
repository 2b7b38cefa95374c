"""Scores of queries with all records of some segments, by kind and block by block.

Equal scores are ranked by earlier row, and rows are in the order in which records came.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from tercet.kinds import Kind, Weights
from tercet.rank.hybrid import BestBySum, HybridHits
from tercet.rank.scoring import late_interaction_of_dots
from tercet.rank.topk import Hits, top_k
from tercet.search.exact.segment import CodedVectors, DenseVectors, Segment
from tercet.segments import ragged_places, runs_within
from tercet.vectors import Vectors

DOCS_AT_ONCE: Final = 16_384
TOKENS_AT_ONCE: Final = 32_768  # rows of token vectors
SCORES_AT_ONCE: Final = 1 << 24  # queries times records whose terms are compared


@dataclass(frozen=True, slots=True, eq=False)
class SegmentView:
    """A segment, a mask of the rows that may be found, and the number of its first row."""

    segment: Segment
    allowed: Bool[np.ndarray, "docs"] | None
    begin: int


@dataclass(frozen=True, slots=True, eq=False)
class SegmentScan:
    """Queries with merged terms, and the segments that they are compared with."""

    queries: Vectors
    views: Sequence[SegmentView]
    _lexical: dict[int, Float32[np.ndarray, "queries docs"]] = field(default_factory=dict)

    def best(
        self, weights: Weights, kinds: Sequence[Kind], k: int, *, approximate: bool = False
    ) -> HybridHits:
        """Return the ``k`` best rows by the weighted sum of these kinds, if any of them finds them.

        Queries and segments have the kinds. Dense vectors in codes are all scored exactly, or with
        ``approximate`` only the best by whole numbers.
        """
        best = BestBySum(len(self.queries), k, tuple(kinds), weights)
        for view in self.views:
            alone = tuple(kinds) == ("dense",) and weights.dense == 1
            hits = self._nearest(view, k, approximate=approximate) if alone else None
            if hits is not None:
                rows = torch.from_numpy(hits.rows) + view.begin
                best.add(rows, torch.from_numpy(hits.scores)[None])
                continue
            for start, stop in _blocks(view.segment, by_tokens="multi" in kinds):
                if view.allowed is None or view.allowed[start:stop].any():
                    self._add_block(best, view, start, stop)
        return best.found

    def _nearest(self, view: SegmentView, k: int, *, approximate: bool) -> Hits | None:
        """Return the best by dense vectors alone, where there is a faster way than by blocks."""
        assert self.queries.dense is not None and view.segment.dense is not None
        queries, docs = self.queries.dense.numpy(), view.segment.dense
        if isinstance(docs, CodedVectors):
            return docs.nearest(queries, k, view.allowed) if approximate else None
        return top_k(queries, docs, k) if view.allowed is None else None

    def _add_block(self, best: BestBySum, view: SegmentView, start: int, stop: int) -> None:
        """Add the scores of a block of a segment by all kinds."""
        parts: dict[Kind, Tensor]
        parts = {kind: self._scores(kind, view, slice(start, stop)) for kind in best.kinds}
        excluded = ~_found(parts, self.queries, view.segment, slice(start, stop))
        if view.allowed is not None:
            excluded |= torch.from_numpy(~view.allowed[start:stop])
        rows = torch.arange(view.begin + start, view.begin + stop).expand(len(self.queries), -1)
        best.add(rows, torch.stack(list(parts.values())), excluded)

    def _scores(
        self,
        kind: Kind,
        view: SegmentView,
        rows: slice | Int64[np.ndarray, "docs"],
        asked: slice = slice(None),
    ) -> Float32[Tensor, "queries docs"]:
        """Return the scores of all or some queries with rows of a segment by one kind."""
        if kind == "sparse":
            return torch.from_numpy(self.lexical(view)[asked][:, rows])
        queries, segment = self.queries.only([kind]).take(asked), view.segment
        if kind == "dense":
            assert queries.dense is not None and segment.dense is not None
            return torch.from_numpy(_products(queries.dense.numpy(), segment.dense, rows))
        assert segment.multi is not None
        offsets, vectors = segment.multi.offsets, segment.multi.vectors
        if isinstance(rows, slice):
            offsets = offsets[rows.start : rows.stop + 1]
            part = vectors[offsets[0] : offsets[-1]]
            return _late(queries, part, torch.from_numpy(offsets - offsets[0]))
        begins, ends = (torch.from_numpy(offsets[each]) for each in (rows, rows + 1))
        places, bounds = ragged_places(begins, ends)
        return _late(queries, vectors[places.numpy()], bounds)

    def lexical(self, view: SegmentView) -> Float32[np.ndarray, "queries docs"]:
        """Return the scores by terms with all rows of a segment, computed once."""
        if view.begin not in self._lexical:
            terms, lists = self.queries.sparse, view.segment.sparse
            assert terms is not None and lists is not None
            ids, weights = terms.ids.numpy(), terms.weights.numpy()
            self._lexical[view.begin] = np.stack(
                [
                    lists.scores(ids[low:high], weights[low:high], len(view.segment))
                    for low, high in pairwise(terms.offsets.tolist())
                ]
            )
        return self._lexical[view.begin]

    def pairs(
        self, query: int, rows: Int64[np.ndarray, "rows"], kinds: Sequence[Kind]
    ) -> dict[int, dict[Kind, float]]:
        """Return the true scores of one query with some rows, ascending, by each of the kinds.

        Rows that none of the kinds finds are left out.
        """
        asked = slice(query, query + 1)
        scores: dict[int, dict[Kind, float]] = {}
        for view in self.views:
            low, high = np.searchsorted(rows, [view.begin, view.begin + len(view.segment)])
            inside = rows[low:high] - view.begin
            if not len(inside):
                continue
            parts: dict[Kind, Tensor]
            parts = {kind: self._scores(kind, view, inside, asked) for kind in kinds}
            found = _found(parts, self.queries.take(asked), view.segment, inside)[0].tolist()
            values = {kind: part[0].tolist() for kind, part in parts.items()}
            for place, row in enumerate(rows[low:high].tolist()):
                if found[place]:
                    scores[row] = {kind: values[kind][place] for kind in kinds}
        return scores


def blocks_of_queries(queries: Vectors, views: Sequence[SegmentView]) -> Iterator[slice]:
    """Yield runs of queries whose scores by terms with all records fit into memory."""
    docs = sum(len(view.segment) for view in views)
    size = 64 if queries.multi is not None else 256
    size = max(1, min(size, SCORES_AT_ONCE // max(docs, 1)))
    for start in range(0, len(queries), size):
        yield slice(start, start + size)


def _products(
    queries: Float32[np.ndarray, "queries dim"],
    docs: DenseVectors,
    rows: slice | Int64[np.ndarray, "rows"],
) -> Float32[np.ndarray, "queries rows"]:
    """Return the inner products of all queries with some documents."""
    if isinstance(docs, CodedVectors):
        return docs.scores(queries, rows)
    return (docs[rows] @ queries.T).T


def _late(
    queries: Vectors,
    vectors: Float[np.ndarray, "tokens width"],
    offsets: Int64[Tensor, "bounds"],
) -> Float32[Tensor, "queries docs"]:
    """Return the late interaction of all queries with records whose token vectors are these."""
    asked = queries.multi
    assert asked is not None
    dots = torch.from_numpy(vectors.astype(np.float32, copy=False) @ asked.vectors.numpy().T)
    return late_interaction_of_dots(dots, offsets, asked.offsets)


def _found(
    parts: Mapping[Kind, Float32[Tensor, "queries docs"]],
    queries: Vectors,
    segment: Segment,
    rows: slice | Int64[np.ndarray, "docs"],
) -> Bool[Tensor, "queries docs"]:
    """Return which pairs one of the kinds finds, as ``tercet.search.engine.engine`` defines it."""
    found = torch.zeros(next(iter(parts.values())).shape, dtype=torch.bool)
    if "dense" in parts:
        return ~found
    if "sparse" in parts:
        found |= parts["sparse"] > 0
    if "multi" in parts:
        assert queries.multi is not None and segment.multi is not None
        asked = queries.multi.offsets.diff() > 0
        there = np.diff(segment.multi.offsets)[rows] > 0
        found |= asked[:, None] & torch.from_numpy(there)
    return found


def _blocks(segment: Segment, *, by_tokens: bool) -> Iterator[tuple[int, int]]:
    """Yield blocks of rows, with a limit on their token vectors where these are compared."""
    if by_tokens and segment.multi is not None:
        offsets = segment.multi.offsets.tolist()
        yield from runs_within(offsets, TOKENS_AT_ONCE, most=DOCS_AT_ONCE)
        return
    for start in range(0, len(segment), DOCS_AT_ONCE):
        yield start, min(start + DOCS_AT_ONCE, len(segment))
