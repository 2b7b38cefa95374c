"""The exact engine, which scores every record and builds nothing before a search.

It suits up to some ten thousand records, and is the reference for the other engines. Vectors are
mapped into memory and records are read for hits only, so an index may be larger than memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from threading import RLock
from typing import Final

import numpy as np
from jaxtyping import Int64

from tercet.errors import IndexFolderError, ModelError, RecipeError
from tercet.files.atomic import sole_writer
from tercet.kinds import KINDS, Kind, Weights
from tercet.rank.hybrid import HybridHits, each_alone
from tercet.rank.quantized import Ranges, Stored
from tercet.search.engine.checks import check_queries, check_records, require_same, widths_of
from tercet.search.engine.engine import (
    Fusion,
    Hit,
    ReciprocalRank,
    Record,
    Stats,
    Weighted,
    Where,
    counted,
)
from tercet.search.engine.fusion import proposing, reciprocal_ranks, wanted, weighted_sum
from tercet.search.exact import manifest as manifests
from tercet.search.exact.ids import IdRows, keys_of
from tercet.search.exact.manifest import Manifest, TokenPrecision
from tercet.search.exact.merging import (
    LivePart,
    merged_in_memory,
    part_of,
    segment_of,
    write_merged,
)
from tercet.search.exact.scanning import SegmentScan, SegmentView, blocks_of_queries
from tercet.search.exact.segment import Segment, damaged
from tercet.vectors import Vectors

MEMORY: Final = 256 << 20  # bytes of vectors that wait for a flush in memory; more wait on the disk
MERGED: Final = 65_536  # records of a segment that a flush leaves alone
_ATTEMPTS: Final = 5  # to open for reading while another process writes


class ExactEngine:
    """Records and vectors in a folder, all scored; see :class:`tercet.search.engine.engine.Engine`.

    ``precision`` is that of token vectors; half precision changes a score of unit vectors by less
    than 0.001. Dense vectors may be ``stored`` in codes of 8, 4 or 1 bits, whose ranges are learned
    from the first documents unless ``settle`` sets them; they are scored by their finest codes.
    Both are fixed when the folder is made. With ``read_only`` any number of processes may search
    what was flushed before they opened it.

    Several threads may search at once. Equal scores are ranked by order of upserting.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        precision: TokenPrecision | None = None,
        stored: Stored | None = None,
        read_only: bool = False,
        like: "ExactEngine | None" = None,
    ) -> None:
        """Open a folder, or make one.

        ``like`` is an open engine of the same folder: files that both have are not read again.

        Raises:
            IndexFolderError: when the folder is damaged, holds other files, or is missing with
                ``read_only``.
            RecipeError: when another process writes in it, or it has other precisions.
        """
        self.folder = Path(folder)
        self.read_only = read_only
        self._open = ExitStack()
        self._lock = RLock()  # guards the attributes below
        self._ids: dict[LivePart, IdRows] = {}  # of parts where ids were looked up
        self._changed = False  # since the last commit
        if read_only:
            self._read(like)
        else:
            made = Manifest(precision=precision or "float16", stored=stored or "float32")
            self._start(made, like)
        try:
            require_same(self.folder, "multi", self._manifest.precision, precision)
            require_same(self.folder, "dense", self._manifest.stored, stored)
        except RecipeError:
            self._open.close()
            raise
        # Names count up from here: segments may be ahead of the commits, and are never overwritten.
        self._written = max(
            [self._manifest.number, *map(manifests.number_of, self._manifest.names)]
        )

    def _read(self, like: "ExactEngine | None") -> None:
        """Open the last commit; another process may replace it meanwhile."""
        for _ in range(_ATTEMPTS):
            found = manifests.read(self.folder)
            if found is None:
                what = "is not an index" if self.folder.exists() else "no such folder"
                raise IndexFolderError(f"{self.folder}: {what}; build one with: tercet index")
            try:
                self._open_parts(found, like)
                return
            except IndexFolderError:
                if manifests.read(self.folder) == found:
                    raise
        raise IndexFolderError(f"{self.folder}: changes while it is read; try again in a moment")

    def _open_parts(self, found: Manifest, like: "ExactEngine | None") -> None:
        """Open the segments of a commit, apart from those that another engine has open."""
        known, ids = ({}, {}) if like is None else like._of_segments(found)
        self._manifest = found
        self._parts = manifests.open_parts(self.folder, found, known)
        for part in self._parts:
            if part.folder is not None and part.folder.name in ids:
                self._ids[part] = ids[part.folder.name]

    def _of_segments(self, other: Manifest) -> tuple[dict[str, Segment], dict[str, IdRows]]:
        """Return those segments of another commit that are open here, and rows by id, by name."""
        with self._lock:
            same = manifests.same_segments(other, self._manifest)
            parts = {p.folder.name: p for p in self._parts if p.folder and p.folder.name in same}
            known = {name: part.segment for name, part in parts.items()}
            ids = {name: self._ids[part] for name, part in parts.items() if part in self._ids}
            return known, ids

    def _start(self, made: Manifest, like: "ExactEngine | None") -> None:
        """Open for writing, and delete what a killed writer left."""
        if manifests.read(self.folder) is None:
            manifests.check_place(self.folder)
        self._open.enter_context(sole_writer(self.folder))
        try:
            found = manifests.read(self.folder)
            if found is None:
                found = manifests.commit(self.folder, made, [])
            manifests.sweep(self.folder, found)
            self._open_parts(found, like)
        except BaseException:
            self._open.close()
            raise

    @property
    def widths(self) -> dict[Kind, int]:
        """The kinds of vectors with their widths; 0 for terms."""
        widths = self._manifest.widths
        return {kind: widths[kind] for kind in KINDS if kind in widths}

    @property
    def is_settled(self) -> bool:
        """Whether the ranges of codes are known; float32 needs none."""
        return self._manifest.stored == "float32" or self._manifest.ranges is not None

    @property
    def is_sealed(self) -> bool:
        """Whether all of its files had checksums: not those of earlier versions."""
        return manifests.is_sealed(self._manifest)

    # ---- what changes it -------------------------------------------------------------------------

    def settle(self, ranges: Ranges) -> None:
        """Set the ranges of dense codes, unless they are set already."""
        self._writing()
        with self._lock:
            if not self.is_settled:
                self._manifest = replace(self._manifest, ranges=ranges)
                self._changed = True

    def upsert(self, records: Sequence[Record], vectors: Vectors) -> None:
        """Add records, or replace those of the same ids; see :class:`Engine`.

        They wait in memory for ``flush``, and many of them on the disk.
        """
        self._writing()
        vectors = vectors.to("cpu")
        with self._lock:
            check_records(records, vectors, self._manifest.widths)
            if not records:
                return
            found = self._manifest
            widths = found.widths or widths_of(vectors)
            found = replace(found, widths=widths, ranges=self._ranges_for(vectors))
            part = part_of(segment_of(records, vectors, found.precision, found.coding))
            self._manifest = found
            self._forget([record.id for record in records])
            self._parts.append(part)
            self._changed = True
            self._settle()

    def _ranges_for(self, vectors: Vectors) -> Ranges | None:
        """Return the ranges of codes: settled ones, or learned from the first vectors."""
        settled, dense = self._manifest.ranges, vectors.dense
        if dense is None or self._manifest.stored == "float32":
            return settled
        if settled is None:
            return Ranges.learned(dense.detach().float().numpy())
        if len(settled.centre) != dense.shape[1]:
            raise ModelError(
                f"codes are settled for {len(settled.centre)} dimensions, and these vectors have "
                f"{dense.shape[1]}; encode with as many, or settle them for these"
            )
        return settled

    def delete(self, ids: Sequence[str]) -> int:
        """Remove records and return how many of them existed."""
        self._writing()
        with self._lock:
            return self._forget(ids)

    def flush(self) -> None:
        """Commit: small segments become larger ones, and one rename makes all of it count."""
        self._writing()
        with self._lock:
            if not self._changed:
                return
            first = next((i for i, p in enumerate(self._parts) if p.folder is None), None)
            if first is not None:
                self._write(self._tail(first))
            self._commit()

    def optimize(self) -> None:
        """Merge all segments into one without deleted records, and commit it."""
        self._writing()
        with self._lock:
            untidy = any(part.folder is None or not part.alive.all() for part in self._parts)
            if untidy or len(self._parts) > 1:
                self._ids.clear()  # to be read again if they are needed, rather than merged
                self._write(0)
            if self._changed:
                self._commit()

    def close(self) -> None:
        """Flush, and let another process open it."""
        with self._lock:
            try:
                if not self.read_only:
                    self.flush()
            finally:
                self._open.close()
                self.read_only, self._parts, self._ids = True, [], {}

    def __enter__(self) -> "ExactEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _writing(self) -> None:
        if self.read_only:
            raise RecipeError(f"{self.folder}: is closed or read-only; open it for writing")

    def _found(self, ids: Sequence[str]) -> Iterator[tuple[str, LivePart, int]]:
        """Yield those ids that are there, each with its part and row."""
        keys = keys_of(ids)
        for part in self._parts:
            if part not in self._ids:
                self._ids[part] = IdRows.of(part.segment.documents)
            rows = self._ids[part].find(keys)
            for place in np.flatnonzero(rows >= 0).tolist():
                if part.alive[rows[place]]:
                    yield ids[place], part, int(rows[place])

    def _forget(self, ids: Sequence[str]) -> int:
        gone = 0
        for _, part, row in self._found(ids):
            part.alive[row] = False
            gone += 1
        self._changed = self._changed or gone > 0
        return gone

    def _settle(self) -> None:
        """Keep few segments in memory, and none that are large."""
        waiting = [part for part in self._parts if part.folder is None]
        if sum(part.segment.bytes for part in waiting) > MEMORY:
            self._write(self._parts.index(waiting[0]))  # counts from the next commit on
        elif len(waiting) > 1:
            start = self._tail(len(self._parts) - 1, self._parts.index(waiting[0]))
            if start < len(self._parts) - 1:  # the last one was just made: something is alive
                self._replace(start, part_of(merged_in_memory(self._parts[start:])))

    def _tail(self, start: int, lowest: int = 0) -> int:
        """Return where to begin, so that a segment is copied only into one twice as large."""
        size = sum(map(len, self._parts[start:]))
        while start > lowest and len(self._parts[start - 1]) <= min(size, MERGED):
            start -= 1
            size += len(self._parts[start])
        return start

    def _write(self, start: int) -> None:
        """Merge the parts from ``start`` on into one segment on the disk."""
        if not any(map(len, self._parts[start:])):
            self._replace(start, None)
            return
        self._written += 1
        folder = self.folder / f"segment-{self._written}"
        self._replace(start, part_of(write_merged(folder, self._parts[start:]), folder))

    def _replace(self, start: int, part: LivePart | None) -> None:
        old = self._parts[start:]
        self._parts[start:] = [] if part is None else [part]
        if part is not None and all(each in self._ids for each in old):
            self._ids[part] = IdRows.merged([(self._ids[each], each.alive) for each in old])
        for each in old:
            self._ids.pop(each, None)
        self._changed = True

    def _commit(self) -> None:
        self._manifest = manifests.commit(self.folder, self._manifest, self._parts)
        self._written = max(self._written, self._manifest.number)
        self._changed = False
        manifests.sweep(self.folder, self._manifest)

    # ---- what reads it ---------------------------------------------------------------------------

    def search(
        self, queries: Vectors, k: int, *, fusion: Fusion | None = None, where: Where | None = None
    ) -> list[list[Hit]]:
        """Return the best records of each query, best first; see :class:`Engine`."""
        fusion = Weighted() if fusion is None else fusion
        queries = queries.to("cpu")
        with self._lock:
            check_queries(queries, self._manifest.widths)
            views = self._views(where or {})
        if not views or k < 1:
            return [[] for _ in range(len(queries))]
        present: list[Kind] = [kind for kind in queries.kinds if kind in self._manifest.widths]
        kinds = counted(fusion, present)
        found: list[list[RankedRow]] = []
        queries = _as_compared(queries.only(present))
        for block in blocks_of_queries(queries, views):
            found += _ranked(SegmentScan(queries.take(block), views), fusion, kinds, k)
        rows = np.unique(np.array([hit.row for hits in found for hit in hits], np.int64))
        records = dict(zip(rows.tolist(), _records(views, rows), strict=True))
        if not all(isfinite(hit.score) for hits in found for hit in hits):
            # Stored vectors and queries were finite, so files must have changed.
            raise damaged(self.folder, "its vectors hold NaN or infinity")
        return [[Hit(records[hit.row], hit.score, hit.scores) for hit in hits] for hits in found]

    def fetch(self, ids: Sequence[str]) -> list[Record | None]:
        """Return the records of these ids; None for an unknown id."""
        with self._lock:
            views = self._views({})
            begins = {id(view.segment): view.begin for view in views}
            rows = {name: begins[id(part.segment)] + row for name, part, row in self._found(ids)}
        wanted = np.unique(np.array(list(rows.values()), np.int64))
        records = dict(zip(wanted.tolist(), _records(views, wanted), strict=True))
        return [records[rows[name]] if name in rows else None for name in ids]

    def term_weights(self, ids: Sequence[str], tokens: Sequence[int]) -> list[dict[int, float]]:
        """Return for each id the weights of those of some tokens that its record has."""
        with self._lock:
            rows = {name: (part.segment.sparse, row) for name, part, row in self._found(ids)}
        found: list[dict[int, float]] = []
        for name in ids:
            lists, row = rows.get(name, (None, 0))
            found.append({} if lists is None else lists.weights_in(row, tokens))
        return found

    def scan(self, where: Where | None = None) -> Iterator[Record]:
        """Yield all records as of now, in order of upserting."""
        with self._lock:
            views = self._views(where or {})
        for view in views:
            start = 0
            for table in view.segment.documents.blocks():
                records = view.segment.documents.records_of(table)
                for row, record in enumerate(records, start):
                    if view.allowed is None or view.allowed[row]:
                        yield record
                start += len(table)

    def stats(self) -> Stats:
        """Return what the engine holds."""
        with self._lock:
            parts = self._parts
            size = sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())
            return Stats(
                records=sum(map(len, parts)),
                kinds=tuple(self.widths),
                disk_bytes=size,
                pending=sum(len(p) for i, p in enumerate(parts) if i or p.folder is None),
            )

    def _views(self, where: Where) -> list[SegmentView]:
        """Return the segments and which of their rows may be found, unaffected by later changes."""
        views, begin = [], 0
        for part in self._parts:
            allowed = None if part.alive.all() else part.alive.copy()
            if where:
                allowed = part.alive & part.segment.fulfilling(where)
            views.append(SegmentView(part.segment, allowed, begin))
            begin += len(part.segment)
        return views


@dataclass(frozen=True, slots=True)
class RankedRow:
    """A row that was found, counted over all segments."""

    row: int
    score: float
    scores: Mapping[Kind, float]


def _ranked(
    scan: SegmentScan, fusion: Fusion, kinds: Sequence[Kind], k: int
) -> list[list[RankedRow]]:
    """Return the best ``k`` rows of each query by the kinds that count, best first.

    Raises:
        RecipeError: when candidates must come from dense vectors, and the queries have none.
    """
    proposers = proposing(fusion, scan.queries.kinds)
    if not proposers:
        assert not isinstance(fusion, ReciprocalRank), "one of its kinds counts"
        return _rows_of(scan.best(fusion.weights, kinds, k), fusion.weights)
    alone = each_alone(proposers)
    lists = [
        scan.best(alone[kind], (kind,), wanted(fusion, k), approximate=True) for kind in proposers
    ]
    found = []
    for query in range(len(scan.queries)):
        rows = [row[row >= 0].numpy() for row in (each.rows[query] for each in lists)]
        scores = scan.pairs(query, np.unique(np.concatenate(rows)), kinds)
        if isinstance(fusion, ReciprocalRank):
            sums = reciprocal_ranks([names.tolist() for names in rows], fusion.k)
        else:
            sums = {row: weighted_sum(parts, fusion.weights) for row, parts in scores.items()}
        best = sorted(sums, key=lambda row: (-sums[row], row))
        found.append([RankedRow(row, sums[row], scores[row]) for row in best if row in scores][:k])
    return found


def _rows_of(found: HybridHits, weights: Weights) -> list[list[RankedRow]]:
    """Return the rows of each query's list, with their sums and scores."""
    sums, parts = found.sums(weights).tolist(), found.parts.tolist()
    return [
        [
            RankedRow(
                row,
                sums[query][place],
                {kind: part[query][place] for kind, part in zip(found.kinds, parts, strict=True)},
            )
            for place, row in enumerate(rows)
            if row >= 0
        ]
        for query, rows in enumerate(found.rows.tolist())
    ]


def _as_compared(queries: Vectors) -> Vectors:
    """Return the queries in float32, with each term of a text once."""
    queries = queries.with_tensors([tensor.detach().float() for tensor in queries.tensors()])
    return queries if queries.sparse is None else replace(queries, sparse=queries.sparse.merged())


def _records(views: Sequence[SegmentView], rows: Int64[np.ndarray, "rows"]) -> list[Record]:
    """Return the records of these rows, which ascend."""
    found = []
    for view in views:
        low, high = np.searchsorted(rows, [view.begin, view.begin + len(view.segment)])
        if low < high:
            found += view.segment.documents.read(rows[low:high] - view.begin)
    return found
