"""Training rows from pairs of texts with a similarity score."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from tercet.curate.convert.conversion import Conversion, Converted
from tercet.data.files.similarity import SimilaritySet
from tercet.data.files.texts import normal_form
from tercet.errors import RecipeError
from tercet.evaluate.measures.bm25 import bm25_top_k
from tercet.types import Example

ALIKE: Final = 4.0  # lowest score, out of 5, of a pair that becomes rows
UNLIKE: Final = 2.5  # highest known score of a query and its negative
SCALE: Final = 5.0
_ROUNDING: Final = 1e-9  # 3.4 on a scale from 1 to 4 is 4 on ours, and 3.9999999999999996 in floats

_LOW = "score too low"
_EQUAL = "both texts are equal"
_REPEATED = "repeats an earlier pair"
_NO_NEGATIVE = "no negative for either text"


def convert_similarity(
    data: SimilaritySet,
    conversion: Conversion,
    *,
    alike: float | int = ALIKE,
    unlike: float | int = UNLIKE,
    rescale: tuple[float | int, float | int] | None = None,
) -> Converted:
    """Make two rows, (a, b) and (b, a), of each pair with a score of at least ``alike``.

    Negatives are texts of the set by BM25 rank, from rank 2 on: the query itself is nearly always
    the first. Texts whose known score with the query is above ``unlike``, and copies of the query,
    are skipped. A text without negatives gives no row. The prompt precedes both texts.

    Scores lie between 0 and 5, or between the two values of ``rescale``, which map to 0 and 5.

    Raises:
        RecipeError: if the first value of ``rescale`` is not below the second.
        MissingExtraError: if bm25s is not installed.
    """
    scores = _on_scale(data.scores, rescale)
    forms = [normal_form(text) for text in data.texts]
    related: dict[str, set[str]] = defaultdict(set)
    pairs: dict[tuple[int, int], None] = {}
    seen: set[frozenset[str]] = set()
    skipped: Counter[str] = Counter()
    for (first, second), score in zip(data.pairs.tolist(), scores.tolist(), strict=True):
        both = frozenset((forms[first], forms[second]))
        if score > unlike + _ROUNDING:
            related[forms[first]].add(forms[second])
            related[forms[second]].add(forms[first])
        if score < alike - _ROUNDING:
            skipped[_LOW] += 1
        elif len(both) == 1 or both in seen:
            skipped[_EQUAL if len(both) == 1 else _REPEATED] += 1
        else:
            seen.add(both)
            pairs[first, second] = None
    queries = sorted({text for pair in pairs for text in pair})
    negatives = _negatives(data.texts, forms, queries, related, conversion.negatives)
    rows: list[Example] = []
    for pair in pairs:
        made = [
            conversion.row(data.texts[query], data.texts[positive], found, symmetric=True)
            for query, positive in (pair, pair[::-1])
            if (found := negatives[query])
        ]
        skipped[_NO_NEGATIVE] += not made
        rows += made
    reasons = {reason: count for reason, count in skipped.items() if count}
    return Converted(tuple(rows), len(data.pairs), reasons)


def _negatives(
    texts: Sequence[str],
    forms: Sequence[str],
    queries: Sequence[int],
    related: Mapping[str, set[str]],
    count: int,
) -> dict[int, list[str]]:
    """Return the negatives of each query: the first allowed texts by BM25."""
    copies = Counter(forms)
    barred = [{*related[forms[query]], forms[query]} for query in queries]
    # Deep enough to leave ``count`` texts, whichever are not allowed.
    most_barred = max((sum(copies[form] for form in some) for some in barred), default=0)
    depth = 1 + count * max(copies.values()) + most_barred
    hits = bm25_top_k([texts[query] for query in queries], texts, depth)
    ranking: list[list[int]] = hits.rows.tolist()
    found: dict[int, list[str]] = {}
    for query, ranked, some in zip(queries, ranking, barred, strict=True):
        chosen: dict[str, str] = {}
        for row in ranked[1:]:
            if row >= 0 and forms[row] not in some:
                chosen.setdefault(forms[row], texts[row])
        found[query] = list(chosen.values())[:count]
    return found


def _on_scale(scores: np.ndarray, rescale: tuple[float | int, float | int] | None) -> np.ndarray:
    if rescale is None:
        return scores
    low, high = rescale
    if not low < high:
        raise RecipeError(
            f"the scale must be given as lowest, then highest score; got {low:g}, {high:g}"
        )
    return (scores - low) / (high - low) * SCALE
