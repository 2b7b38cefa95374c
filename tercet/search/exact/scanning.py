"""Scores of queries with everything in some segments, kind by kind and block by block.

Equal scores are ranked by earlier row, and rows are in the order in which records came.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from tercet.kinds import Kind, Weights
from tercet.rank.topk import Hits, largest, top_k
from tercet.search.exact.coding import Coded, Dense
from tercet.search.exact.segment import Rows, Segment
from tercet.segments import maximum, total
from tercet.vectors import Vectors

DOCS_AT_ONCE: Final = 16_384
TOKENS_AT_ONCE: Final = 32_768  # rows of token vectors
SCORES_AT_ONCE: Final = 1 << 24  # queries times records whose terms are compared


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A segment, which of its rows may be found (None: all), and the number of its first row."""

    segment: Segment
    allowed: Bool[np.ndarray, "docs"] | None
    begin: int


@dataclass(frozen=True, slots=True, eq=False)
class Best:
    """The best rows of each query with their sums and parts; minus infinity where none is left."""

    sums: Float32[Tensor, "queries ranks"]
    rows: Int64[Tensor, "queries ranks"]
    parts: Mapping[Kind, Float32[Tensor, "queries ranks"]]


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """Some queries, with weighted terms merged, and what they are compared with."""

    queries: Vectors
    views: Sequence[View]
    _lexical: dict[int, Float32[np.ndarray, "queries docs"]] = field(default_factory=dict)

    def best(
        self, weights: Weights, kinds: Sequence[Kind], k: int, *, nearly: bool = False
    ) -> Best:
        """The ``k`` best rows by the weighted sum of these kinds, of those that one of them finds.

        The kinds are present in queries and segments. Dense vectors in codes are all scored, or
        ``nearly`` all: candidates are found by whole numbers, and these are scored.
        """
        count = len(self.queries)
        none = torch.zeros(count, 0)
        found = Best(none, none.long(), dict.fromkeys(kinds, none))
        for view in self.views:
            alone = tuple(kinds) == ("dense",) and weights.dense == 1
            hits = self._nearest(view, k, nearly) if alone else None
            if hits is not None:
                scores = torch.from_numpy(hits.scores)
                rows = torch.from_numpy(hits.rows) + view.begin
                found = _merged(found, Best(scores, rows, {"dense": scores}), k)
                continue
            for block in self._blocks_of(view, weights, kinds, k):
                found = _merged(found, block, k)
        return found

    def _nearest(self, view: View, k: int, nearly: bool) -> Hits | None:
        """The best by dense vectors alone, where there is a faster way than by blocks."""
        assert self.queries.dense is not None and view.segment.dense is not None
        queries, docs = self.queries.dense.numpy(), view.segment.dense
        if isinstance(docs, Coded):
            return docs.nearest(queries, k, view.allowed) if nearly else None
        return top_k(queries, docs, k) if view.allowed is None else None

    def _blocks_of(
        self, view: View, weights: Weights, kinds: Sequence[Kind], k: int
    ) -> Iterator[Best]:
        """The best of each block of a segment."""
        for start, stop in _bounds(view.segment, "multi" in kinds):
            if view.allowed is not None and not view.allowed[start:stop].any():
                continue
            parts: dict[Kind, Tensor]
            parts = {kind: self._scores(kind, view, start, stop) for kind in kinds}
            sums = torch.stack([weights.of(kind) * part for kind, part in parts.items()]).sum(0)
            hidden = ~_found(parts, self.queries, view.segment, slice(start, stop))
            if view.allowed is not None:
                hidden |= torch.from_numpy(~view.allowed[start:stop])
            sums, columns = largest(sums.masked_fill(hidden, -inf), k)
            yield Best(
                sums,
                columns + (view.begin + start),
                {kind: part.gather(1, columns) for kind, part in parts.items()},
            )

    def _scores(
        self, kind: Kind, view: View, start: int, stop: int
    ) -> Float32[Tensor, "queries docs"]:
        """The scores of a block by one kind."""
        segment = view.segment
        if kind == "dense":
            assert self.queries.dense is not None and segment.dense is not None
            return torch.from_numpy(
                _products(self.queries.dense.numpy(), segment.dense, slice(start, stop))
            )
        if kind == "sparse":
            return torch.from_numpy(self.lexical(view)[:, start:stop])
        assert self.queries.multi is not None and segment.multi is not None
        offsets = segment.multi.offsets[start : stop + 1]
        vectors = segment.multi.vectors[offsets[0] : offsets[-1]]
        return _late(self.queries, vectors, offsets - offsets[0])

    def lexical(self, view: View) -> Float32[np.ndarray, "queries docs"]:
        """The scores by terms with all rows of a segment, worked out once."""
        if view.begin not in self._lexical:
            terms, lists = self.queries.sparse, view.segment.sparse
            assert terms is not None and lists is not None
            bounds = terms.offsets.tolist()
            ids, weights = terms.ids.numpy(), terms.weights.numpy()
            self._lexical[view.begin] = np.stack(
                [
                    lists.scores(ids[low:high], weights[low:high], len(view.segment))
                    for low, high in pairwise(bounds)
                ]
            )
        return self._lexical[view.begin]

    def pairs(
        self, query: int, rows: Int64[np.ndarray, "rows"], kinds: Sequence[Kind]
    ) -> dict[int, dict[Kind, float]]:
        """The true scores of one query with some rows, ascending, by each of the kinds.

        Without rows that none of the kinds finds.
        """
        asked = self.queries.take([query])
        scores: dict[int, dict[Kind, float]] = {}
        for view in self.views:
            low, high = np.searchsorted(rows, [view.begin, view.begin + len(view.segment)])
            inside = rows[low:high] - view.begin
            if not len(inside):
                continue
            parts: dict[Kind, Tensor]
            parts = {kind: self._pair(kind, query, asked, view, inside)[None] for kind in kinds}
            found = _found(parts, asked, view.segment, inside)[0].tolist()
            values = {kind: part[0].tolist() for kind, part in parts.items()}
            for place, row in enumerate(rows[low:high].tolist()):
                if found[place]:
                    scores[row] = {kind: values[kind][place] for kind in kinds}
        return scores

    def _pair(
        self, kind: Kind, query: int, asked: Vectors, view: View, rows: Int64[np.ndarray, "rows"]
    ) -> Float32[Tensor, "rows"]:
        """The scores of one query with rows of one segment by one kind."""
        if kind == "sparse":
            return torch.from_numpy(self.lexical(view)[query][rows])
        if kind == "dense":
            assert asked.dense is not None and view.segment.dense is not None
            return torch.from_numpy(_products(asked.dense.numpy(), view.segment.dense, rows)[0])
        assert view.segment.multi is not None
        return _late(asked, *_taken(view.segment.multi, rows))[0]


def _products(
    queries: Float32[np.ndarray, "queries dim"],
    docs: Dense,
    rows: slice | Int64[np.ndarray, "rows"],
) -> Float32[np.ndarray, "queries rows"]:
    """The inner products of all queries with some documents."""
    return docs.scores(queries, rows) if isinstance(docs, Coded) else (docs[rows] @ queries.T).T


def _found(
    parts: Mapping[Kind, Float32[Tensor, "queries docs"]],
    queries: Vectors,
    segment: Segment,
    rows: slice | Int64[np.ndarray, "docs"],
) -> Bool[Tensor, "queries docs"]:
    """Which pairs one of the kinds finds; ``tercet.search.engine.engine`` says when it does."""
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


def blocks_of_queries(queries: Vectors, views: Sequence[View]) -> Iterator[slice]:
    """Runs of queries whose scores by terms with all records fit in memory."""
    docs = sum(len(view.segment) for view in views)
    size = 64 if queries.multi is not None else 256
    size = max(1, min(size, SCORES_AT_ONCE // max(docs, 1)))
    for start in range(0, len(queries), size):
        yield slice(start, start + size)


def _taken(
    multi: Rows, rows: Int64[np.ndarray, "rows"]
) -> tuple[Float[np.ndarray, "tokens width"], Int64[np.ndarray, "bounds"]]:
    """The token vectors of these records end to end."""
    begins = multi.offsets[rows]
    lengths = multi.offsets[rows + 1] - begins
    offsets = np.concatenate([[0], lengths.cumsum()])
    places = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], lengths)
    return multi.vectors[places], offsets


def _late(
    queries: Vectors,
    vectors: Float[np.ndarray, "tokens width"],
    offsets: Int64[np.ndarray, "bounds"],
) -> Float32[Tensor, "queries docs"]:
    """The mean over a query's tokens of their largest dot product; zero without tokens.

    As :func:`tercet.rank.scoring.late_interaction`, without what a gradient needs.
    """
    asked = queries.multi
    assert asked is not None
    dots = torch.from_numpy(vectors.astype(np.float32, copy=False) @ asked.vectors.numpy().T)
    best = maximum(dots, torch.from_numpy(np.ascontiguousarray(offsets)))
    best = best.masked_fill(best == -inf, 0)  # [docs, query tokens]
    return total(best.T, asked.offsets) / asked.offsets.diff().clamp_min(1)[:, None]


def _bounds(segment: Segment, by_tokens: bool) -> Iterator[tuple[int, int]]:
    """Blocks of rows, of so many token vectors at most where these are compared."""
    count, start = len(segment), 0
    while start < count:
        stop = min(start + DOCS_AT_ONCE, count)
        if by_tokens and segment.multi is not None:
            offsets = segment.multi.offsets
            full = np.searchsorted(offsets, offsets[start] + TOKENS_AT_ONCE, side="right") - 1
            stop = max(start + 1, min(stop, int(full)))
        yield start, stop
        start = stop


def _merged(first: Best, second: Best, k: int) -> Best:
    """The best of both; at equal sums those of the first, whose rows are lower."""
    sums, columns = largest(torch.cat([first.sums, second.sums], dim=1), k)
    return Best(
        sums,
        torch.cat([first.rows, second.rows], dim=1).gather(1, columns),
        {
            kind: torch.cat([first.parts[kind], second.parts[kind]], dim=1).gather(1, columns)
            for kind in first.parts
        },
    )
