"""Vectors of every kind drawn at random, and their scores by the slow obvious formulas."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.evaluate.measures.by_kind import KindsResult, feasible, search_kinds
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.metrics import Judgements
from tercet.segments import offsets_of
from tercet.vectors import Terms, TokenRows, Vectors

VOCABULARY = 30


def drawn(texts: int, seed: int, *, dim: int = 8, without_terms: tuple[int, ...] = ()) -> Vectors:
    random = torch.Generator().manual_seed(seed)
    dense = F.normalize(torch.randn(texts, dim, generator=random), dim=1)
    counts = torch.randint(1, 7, (texts,), generator=random)
    counts[list(without_terms)] = 0
    ids = [torch.randperm(VOCABULARY, generator=random)[:n].sort().values for n in counts.tolist()]
    weights = torch.rand(int(counts.sum()), generator=random) + 0.01
    lengths = torch.randint(1, 6, (texts,), generator=random)
    rows = F.normalize(torch.randn(int(lengths.sum()), dim, generator=random), dim=1)
    return Vectors(
        dense,
        Terms(torch.cat(ids), weights, offsets_of(counts)),
        TokenRows(rows, offsets_of(lengths)),
    )


def slow_scores(queries: Vectors, docs: Vectors) -> dict[str, np.ndarray]:
    """A loop over all pairs, in float64."""
    shape = (len(queries), len(docs))
    found = {kind: np.zeros(shape) for kind in ("dense", "sparse", "multi")}
    for i in range(shape[0]):
        for j in range(shape[1]):
            q, d = queries.take([i]), docs.take([j])
            assert q.dense is not None and q.sparse is not None and q.multi is not None
            assert d.dense is not None and d.sparse is not None and d.multi is not None
            found["dense"][i, j] = float(q.dense[0].double() @ d.dense[0].double())
            mine = dict(zip(q.sparse.ids.tolist(), q.sparse.weights.tolist(), strict=True))
            yours = dict(zip(d.sparse.ids.tolist(), d.sparse.weights.tolist(), strict=True))
            found["sparse"][i, j] = sum(mine[t] * yours[t] for t in mine.keys() & yours.keys())
            dots = q.multi.vectors.double() @ d.multi.vectors.double().T
            found["multi"][i, j] = float(dots.max(1).values.mean())
    return found


def judged(queries: int, docs: int, seed: int) -> RetrievalSet:
    """A set whose queries have one to three relevant documents, drawn at random."""
    random = np.random.default_rng(seed)
    grades = [
        dict.fromkeys(random.choice(docs, random.integers(1, 4), replace=False).tolist(), 1)
        for _ in range(queries)
    ]
    return RetrievalSet(
        "drawn",
        tuple(f"query {i}" for i in range(queries)),
        tuple(f"q{i}" for i in range(queries)),
        tuple(f"document {i}" for i in range(docs)),
        tuple(f"d{i}" for i in range(docs)),
        Judgements.of(grades),
    )


@dataclass(frozen=True)
class InMemory:
    """A corpus whose vectors are all in memory, in two blocks."""

    vectors: Vectors

    def blocks(self, kinds, rows: Tensor | None = None):
        chosen = torch.arange(len(self.vectors)) if rows is None else rows
        for part in chosen.split(32):
            if len(part):
                yield part, self.vectors.only(kinds).take(part)

    def terms(self) -> Tensor | None:
        sparse = self.vectors.sparse
        return None if sparse is None else sparse.merged().offsets.diff()


def evaluate_kinds(data, queries, docs, *, weights=None, protocol=None, names=None) -> KindsResult:
    """Search vectors in memory by every kind that both sides have, and by every sum."""
    kinds = tuple(kind for kind in queries.kinds if kind in docs.kinds)
    queries, docs = queries.only(kinds), docs.only(kinds)
    protocol = protocol or feasible(queries, 0 if docs.multi is None else len(docs.multi.vectors))
    corpus = InMemory(docs)
    return search_kinds(data, queries, corpus, weights=weights, protocol=protocol, names=names)
