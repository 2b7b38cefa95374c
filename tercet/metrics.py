"""Ranking metrics as trec_eval computes them, for all queries at once.

A ranking is an array with one row per query: document rows, best first, each at most once, and -1
after the end of the list. Every metric returns one number in [0, 1] per query, so that intervals
and paired tests can be taken over queries; the mean of the array is the published figure.

A document is relevant when its grade is above zero. A query without a relevant document scores 0.
trec_eval sorts a run by score itself and puts the *later* document id first among equal scores;
here the given order counts, and our searches put the *lower* row first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int


@dataclass(frozen=True, slots=True)
class Judgements:
    """Relevance judgements of each query's documents: rows and grades, end to end.

    Those of query ``i`` are ``docs[offsets[i]:offsets[i + 1]]``, in rising order of row.
    """

    docs: Int[np.ndarray, "judged"]
    grades: Int[np.ndarray, "judged"]
    offsets: Int[np.ndarray, "bounds"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, queries: Sequence[Mapping[int, int]]) -> "Judgements":
        """Make judgements from one mapping of document row to grade per query."""
        pairs = [sorted(grades.items()) for grades in queries]
        flat = np.array([pair for row in pairs for pair in row], dtype=np.int64).reshape(-1, 2)
        lengths = np.array([len(row) for row in pairs], dtype=np.int64)
        bounds = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        return cls(flat[:, 0].copy(), flat[:, 1].copy(), bounds)

    def query_of(self) -> Int[np.ndarray, "judged"]:
        """Return the query that each judgement belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def relevant(self) -> Int[np.ndarray, "queries"]:
        """Return the number of relevant documents of each query."""
        return np.bincount(self.query_of()[self.grades > 0], minlength=len(self))

    def grades_of(
        self, ranking: Int[np.ndarray, "queries ranks"]
    ) -> Int[np.ndarray, "queries ranks"]:
        """Return the grade at each place of a ranking, 0 without a document or judgement."""
        assert len(ranking) == len(self), f"{len(ranking)} rankings for {len(self)} queries"
        if not len(self.docs):
            return np.zeros(ranking.shape, np.int64)
        # Each pair of query and document is one number, so that one binary search finds all pairs.
        width = 1 + max(int(self.docs.max()), int(ranking.max(initial=0)))
        judged = self.query_of() * width + self.docs
        wanted = np.arange(len(ranking))[:, None] * width + np.maximum(ranking, 0)
        place = np.searchsorted(judged, wanted).clip(max=len(judged) - 1)
        found = (judged[place] == wanted) & (ranking >= 0)
        return np.where(found, self.grades[place], 0)


def ndcg(
    ranking: Int[np.ndarray, "queries ranks"], judgements: Judgements, k: int
) -> Float64[np.ndarray, "queries"]:
    """Return nDCG at ``k``, normalised discounted cumulative gain with linear gain.

    See Järvelin and Kekäläinen 2002. Linear gain is what BEIR and MTEB report; Burges et al.
    2005 take ``2**grade - 1``, which differs if there are more than two grades. Grades below zero
    gain nothing.
    """
    gains = np.maximum(judgements.grades_of(ranking[:, :k]), 0)
    return _share(gains @ _discount(np.arange(gains.shape[1])), _ideal_dcg(judgements, k))


def recall(
    ranking: Int[np.ndarray, "queries ranks"], judgements: Judgements, k: int
) -> Float64[np.ndarray, "queries"]:
    """Return the share of the relevant documents that are among the first ``k``."""
    found = (judgements.grades_of(ranking[:, :k]) > 0).sum(axis=1)
    return _share(found, judgements.relevant())


def reciprocal_rank(
    ranking: Int[np.ndarray, "queries ranks"], judgements: Judgements, k: int | None = None
) -> Float64[np.ndarray, "queries"]:
    """Return 1 / rank of the first relevant document, 0 if none is among the first ``k``: MRR."""
    relevant = judgements.grades_of(ranking[:, :k]) > 0
    if not relevant.shape[1]:
        return np.zeros(len(ranking))
    first = relevant.argmax(axis=1)  # 0 if there is none
    return np.divide(relevant.any(axis=1), 1 + first)


def average_precision(
    ranking: Int[np.ndarray, "queries ranks"], judgements: Judgements, k: int | None = None
) -> Float64[np.ndarray, "queries"]:
    """Return the mean precision at the ranks of all relevant documents.

    A relevant document that is not found counts as 0. Its mean over queries is MAP.
    """
    relevant = judgements.grades_of(ranking[:, :k]) > 0
    precision = relevant.cumsum(axis=1) / np.arange(1, relevant.shape[1] + 1)
    return _share((precision * relevant).sum(axis=1), judgements.relevant())


def success(
    ranking: Int[np.ndarray, "queries ranks"], judgements: Judgements, k: int = 1
) -> Float64[np.ndarray, "queries"]:
    """Return 1 where a relevant document is among the first ``k``, else 0."""
    relevant = judgements.grades_of(ranking[:, :k]) > 0
    return np.any(relevant, axis=1).astype(np.float64)


def _discount(place: Int[np.ndarray, "places"]) -> Float64[np.ndarray, "places"]:
    return np.reciprocal(np.log2(place + 2))  # the first place is 0


def _ideal_dcg(judgements: Judgements, k: int) -> Float64[np.ndarray, "queries"]:
    """Return the gain of the best possible ranking of each query's judged documents."""
    query = judgements.query_of()
    best_first = np.lexsort((-judgements.grades, query))  # by query, then by falling grade
    gains = np.maximum(judgements.grades[best_first], 0)
    place = np.arange(len(query)) - judgements.offsets[query]
    weighed = np.where(place < k, gains * _discount(place), 0.0)
    return np.bincount(query, weights=weighed, minlength=len(judgements)).astype(np.float64)


def _share(part: np.ndarray, whole: np.ndarray) -> Float64[np.ndarray, "queries"]:
    """Return part / whole, and 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
