"""Scores of pairs of texts, by each kind of vectors of a model and by every sum of them."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from tercet.errors import DataError
from tercet.kinds import KINDS, Kind, Weights
from tercet.models.embedder import Embedder
from tercet.models.texts import checked_texts
from tercet.rank.scoring import paired_scores
from tercet.types import Role, Texts
from tercet.vectors import Vectors

PAIRS_AT_ONCE: Final = 256  # since token vectors of long texts are large


def score_pairs(
    embedder: Embedder,
    queries: Texts,
    documents: Texts,
    *,
    weights: Weights | None = None,
    task: str | None = None,
    divided: bool = False,
) -> dict[str, Float[Tensor, "pairs"]]:
    """Return the score of each query with the document at its position, by kind.

    One entry for each kind that the model makes, and one for the weighted sum of every two or more
    kinds that have a weight, such as ``dense+sparse`` and ``dense+sparse+multi``. Scores are on the
    CPU in float32.

    Args:
        embedder: the model.
        queries: texts, each with its document at the same position.
        documents: texts, as many as queries.
        weights: of the kinds in a sum; None takes those tuned for the task or the model.
        task: the task whose prompts and weights are used.
        divided: divide each sum by the sum of its weights, as FlagEmbedding's ``compute_score``
            does; it calls them ``sparse+dense`` and ``colbert+sparse+dense``.

    Raises:
        DataError: if the numbers of queries and documents differ.
        RecipeError: for an unknown task.
        TextError: if either is not a list of strings of valid Unicode; it names the row.

    Examples:
        >>> score_pairs(embedder, ["web server"], ["nginx serves files"])["dense"].shape
        torch.Size([1])
    """
    queries = checked_texts(queries, "query")
    documents = checked_texts(documents, "document")
    if len(queries) != len(documents):
        raise DataError(
            "pairs",
            None,
            f"the numbers of queries and documents must be equal; got {len(queries)} and "
            f"{len(documents)}",
        )
    tuned = embedder.settings.weights
    weights = weights or tuned.get(task or "", tuned.get("", Weights()))
    parts: list[dict[str, Tensor]] = []
    for start in range(0, max(len(queries), 1), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        both = (
            _encoded(embedder, queries[part], "query", task),
            _encoded(embedder, documents[part], "document", task),
        )
        parts.append({kind: paired_scores(kind, *both) for kind in embedder.kinds})
    found = {kind: torch.cat([part[kind] for part in parts]) for kind in embedder.kinds}
    return {**found, **_sums(found, weights, divided=divided)}


def _encoded(embedder: Embedder, texts: Sequence[str], role: Role, task: str | None) -> Vectors:
    """Return the vectors of texts; a repeated text, such as a query of many pairs, is read once."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    vectors = embedder.encode_vectors(list(places), role, task=task)
    return vectors.take([places[text] for text in texts])


def _sums(scores: Mapping[str, Tensor], weights: Weights, *, divided: bool) -> dict[str, Tensor]:
    """Return the weighted sums of every two or more kinds that have a weight."""
    counted: list[Kind] = [kind for kind in KINDS if kind in scores and weights.of(kind)]
    return {
        "+".join(some): torch.stack([scores[kind] * weights.of(kind) for kind in some]).sum(0)
        / (sum(map(weights.of, some)) if divided else 1)
        for size in range(2, len(counted) + 1)
        for some in combinations(counted, size)
    }
