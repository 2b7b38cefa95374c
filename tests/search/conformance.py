"""The engines under test, what they are filled with, and what they should find, worked out slowly.

An engine joins by a function that opens it in a folder and a line in ``STORES``. The function is
named rather than passed where another process has to call it, so it is at the top of a module.
``test_conformance.py`` and ``test_durability.py`` run against each of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from tercet.kinds import KINDS, Kind, Weights
from tercet.rank.quantized import Ranges, Stored, codes_of
from tercet.search.engine.engine import (
    Engine,
    Fusion,
    Hit,
    ReciprocalRank,
    Record,
    Rerank,
    Weighted,
)
from tercet.search.exact.exact_engine import ExactEngine
from tercet.segments import offsets_of
from tercet.vectors import Terms, TokenRows, Vectors

VOCABULARY: Final = 250_002
DIM, WIDTH = 8, 6
RECORDS, QUERIES = 40, 5
WITHOUT_TERMS, WITHOUT_ROWS, WITHOUT_BOTH = 7, 11, 23  # records that lack a kind
QUERY_WITHOUT_TERMS, QUERY_WITHOUT_ROWS = 3, 4
RANGES: Final = Ranges((0.01, -0.02, *(0.0,) * (DIM - 2)), int8=2.1, int4=2.1, binary=0.8)


@dataclass(frozen=True)
class Store:
    """An engine under test. Opening a folder again opens what was flushed there."""

    name: str
    opened: Callable[[Path], Engine]
    needs: str | None = None  # a package without which it is skipped
    durable: bool = True  # false: gone with the process, or on the disk as another one is
    tolerance: float = 1e-4  # of scores
    stored: Stored = "float32"  # dense vectors

    def held(self, docs: Vectors) -> Vectors:
        """What it keeps of these."""
        if self.stored == "float32" or docs.dense is None:
            return docs
        finest = RANGES.quantizer(codes_of(self.stored)[-1])
        return replace(docs, dense=torch.from_numpy(finest.codes(docs.dense.numpy()).decoded()))


def exact(folder: Path) -> Engine:
    return ExactEngine(folder, precision="float32")


def exact_half(folder: Path) -> Engine:
    return ExactEngine(folder)


def exact_int8(folder: Path) -> Engine:
    return _coded(folder, "int8")


def exact_int4(folder: Path) -> Engine:
    return _coded(folder, "int4")


def exact_bits(folder: Path) -> Engine:
    return _coded(folder, "binary+int8")


def _coded(folder: Path, stored: Stored) -> Engine:
    engine = ExactEngine(folder, precision="float32", stored=stored)
    engine.settle(RANGES)
    return engine


def qdrant_edge(folder: Path) -> Engine:
    from tercet.search.qdrant.edge import EdgeStore
    from tercet.search.qdrant.qdrant_engine import QdrantEngine

    return QdrantEngine(EdgeStore(folder, threads=1))


def qdrant_edge_coded(folder: Path) -> Engine:  # which scores by what was given to it
    from tercet.search.qdrant.edge import EdgeStore
    from tercet.search.qdrant.qdrant_engine import QdrantEngine

    return QdrantEngine(EdgeStore(folder, threads=1, stored="int4"))


def qdrant_client(folder: Path) -> Engine:  # its local mode, in memory, stands in for a server
    from qdrant_client import QdrantClient

    from tercet.search.qdrant.qdrant_engine import QdrantEngine
    from tercet.search.qdrant.server import ClusterStore

    return QdrantEngine(ClusterStore(QdrantClient(":memory:"), folder.name))


STORES: Final = (
    Store("exact", exact),
    Store("exact, halves", exact_half, durable=False),
    Store("exact, int8", exact_int8, durable=False, stored="int8"),
    Store("exact, int4", exact_int4, durable=False, stored="int4"),
    Store("exact, bits", exact_bits, stored="binary+int8"),
    Store("qdrant edge", qdrant_edge, needs="qdrant_edge"),
    Store("qdrant edge, int4", qdrant_edge_coded, needs="qdrant_edge", durable=False),
    Store("qdrant client", qdrant_client, needs="qdrant_client", durable=False),
)


# ---- what goes in ------------------------------------------------------------------------------


def names(count: int = RECORDS) -> list[str]:
    """Ids of all sorts, each its own."""
    odd = ["", " ", "a b", "a\nb", "한국어", "\N{SNOWMAN}" * 9, "x" * 5000, "../../etc", "0", "7"]
    odd += ['quote"', "it's", "emoji \N{GRINNING FACE}", "UPPER", "upper", "%s", "null", "\u0301"]
    return (odd + [f"id{i}" for i in range(count)])[:count]


def records(count: int = RECORDS) -> list[Record]:
    return [
        Record(
            id=name,
            text=f"text {i} \N{HANGUL SYLLABLE GA}",
            title=f"title {i}" if i % 3 else "",
            fields={
                "section": ("web", "sound", "games")[i % 3],
                "year": 2000 + i % 4,
                "free": i % 2 == 0,
                "rating": i % 5 / 2,
                "tags": ["even" if i % 2 == 0 else "odd", f"t{i % 7}"],
            }
            if i != 5
            else {},
        )
        for i, name in enumerate(names(count))
    ]


def vectors(count: int, *, seed: int = 0, without: Mapping[str, Sequence[int]] | None = None):
    """Vectors of all kinds, of whole 256ths: halves store them, and products of them add exactly.

    ``without`` names texts that have no terms ("sparse"), or no rows ("multi").
    """
    random = torch.Generator().manual_seed(seed)
    lacking = without or {}
    terms = torch.randint(1, 6, (count,), generator=random)
    terms[list(lacking.get("sparse", ()))] = 0
    rows = torch.randint(1, 5, (count,), generator=random)
    rows[list(lacking.get("multi", ()))] = 0
    # Few tokens, far apart: texts share some of them, and some occur twice in a text.
    ids = torch.randint(0, 12, (int(terms.sum()),), generator=random) * (VOCABULARY // 12)
    weights = torch.randint(1, 512, (len(ids),), generator=random) / 256
    return Vectors(
        _grid(count, DIM, random),
        Terms(ids, weights, offsets_of(terms)),
        TokenRows(_grid(int(rows.sum()), WIDTH, random), offsets_of(rows)),
    )


def _grid(rows: int, width: int, random: torch.Generator) -> torch.Tensor:
    values = torch.randn(rows, width, generator=random)
    return (values * 256).round().clamp(-512, 512) / 256


DOCUMENTS: Final = vectors(
    RECORDS,
    without={"sparse": [WITHOUT_TERMS, WITHOUT_BOTH], "multi": [WITHOUT_ROWS, WITHOUT_BOTH]},
)
QUESTIONS: Final = vectors(
    QUERIES, seed=1, without={"sparse": [QUERY_WITHOUT_TERMS], "multi": [QUERY_WITHOUT_ROWS]}
)


# ---- what comes out, by the formulas as they stand in the paper --------------------------------


def score(kind: Kind, queries: Vectors, query: int, docs: Vectors, doc: int) -> float:
    """The score of one pair, in float64."""
    if kind == "dense":
        assert queries.dense is not None and docs.dense is not None
        return float(queries.dense[query].double() @ docs.dense[doc].double())
    if kind == "sparse":
        assert queries.sparse is not None and docs.sparse is not None
        left, right = _largest(queries.sparse, query), _largest(docs.sparse, doc)
        return sum(weight * right[token] for token, weight in left.items() if token in right)
    assert queries.multi is not None and docs.multi is not None
    left, right = _rows(queries.multi, query), _rows(docs.multi, doc)
    if not len(left) or not len(right):
        return 0.0
    return sum(max(float(a @ b) for b in right) for a in left) / len(left)


def matches(kind: Kind, queries: Vectors, query: int, docs: Vectors, doc: int) -> bool:
    """Whether the document is in this kind's list at all."""
    if kind == "dense":
        return True
    if kind == "sparse":
        return score(kind, queries, query, docs, doc) > 0
    assert queries.multi is not None and docs.multi is not None
    return len(_rows(queries.multi, query)) > 0 and len(_rows(docs.multi, doc)) > 0


def _largest(terms: Terms, text: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for place in range(int(terms.offsets[text]), int(terms.offsets[text + 1])):
        token = int(terms.ids[place])
        found[token] = max(found.get(token, 0.0), float(terms.weights[place]))
    return found


def _rows(multi: TokenRows, text: int) -> torch.Tensor:
    return multi.vectors[int(multi.offsets[text]) : int(multi.offsets[text + 1])].double()


def ranking(
    kind: Kind, queries: Vectors, query: int, docs: Vectors, allowed: Sequence[int]
) -> list[int]:
    """The documents of one kind's list, best first; earlier ones first among equals."""
    found = [doc for doc in allowed if matches(kind, queries, query, docs, doc)]
    return sorted(found, key=lambda doc: -score(kind, queries, query, docs, doc))


def expected(
    queries: Vectors,
    query: int,
    docs: Vectors,
    fusion: Fusion,
    *,
    k: int,
    allowed: Sequence[int] | None = None,
) -> dict[int, float]:
    """The score of each document that a fusion may return among the best ``k``."""
    chosen = list(range(len(docs))) if allowed is None else list(allowed)
    both: list[Kind] = [kind for kind in KINDS if kind in queries.kinds and kind in docs.kinds]

    def best(kind: Kind, count: int) -> list[int]:
        return ranking(kind, queries, query, docs, chosen)[:count]

    if isinstance(fusion, ReciprocalRank):
        sums: dict[int, float] = {}
        for kind in fusion.kinds:
            for rank, doc in enumerate(best(kind, max(k, fusion.candidates)), start=1):
                sums[doc] = sums.get(doc, 0.0) + 1 / (fusion.k + rank)
        return sums
    if isinstance(fusion, Rerank):
        chosen = best("dense", max(k, fusion.candidates))
    elif fusion.candidates is not None and both != ["multi"]:
        count = max(k, fusion.candidates)
        lists = [best(kind, count) for kind in both if kind != "multi"]
        chosen = sorted({doc for found in lists for doc in found})
    counting: list[Kind] = [kind for kind in both if fusion.weights.of(kind)]
    return {
        doc: sum(
            fusion.weights.of(kind) * score(kind, queries, query, docs, doc) for kind in counting
        )
        for doc in chosen
        if any(matches(kind, queries, query, docs, doc) for kind in counting)
    }


def agree(found: Sequence[Hit], wanted: Mapping[str, float], k: int, tolerance: float) -> None:
    """Check that the hits are the best ``k`` of these scores by id; equal ones in any order."""
    ids = [hit.record.id for hit in found]
    assert len(set(ids)) == len(ids)
    best = sorted(wanted.values(), reverse=True)[:k]
    assert len(found) == len(best), (ids, len(best))
    for hit, score_at_rank in zip(found, best, strict=True):
        assert math.isclose(hit.score, wanted[hit.record.id], abs_tol=tolerance), hit
        assert math.isclose(hit.score, score_at_rank, abs_tol=tolerance), hit


EXHAUSTIVE: Final = Weighted(candidates=None)
FUSIONS: Final = {
    "exhaustive": EXHAUSTIVE,
    "exhaustive, other weights": Weighted(weights=Weights(0.2, 0.8, 0.5), candidates=None),
    "dense": Weighted(weights=Weights(1.0, 0.0, 0.0), candidates=None),
    "sparse": Weighted(weights=Weights(0.0, 1.0, 0.0), candidates=None),
    "multi": Weighted(weights=Weights(0.0, 0.0, 1.0), candidates=None),
    "dense and sparse": Weighted(weights=Weights(1.0, 0.3, 0.0), candidates=None),
    "candidates": Weighted(candidates=10),
    "candidates for token vectors alone": Weighted(weights=Weights(0.0, 0.0, 1.0), candidates=10),
    "reciprocal ranks": ReciprocalRank(candidates=12),
    "reciprocal ranks of three": ReciprocalRank(kinds=KINDS, k=3, candidates=12),
    "rerank": Rerank(candidates=12),
}
