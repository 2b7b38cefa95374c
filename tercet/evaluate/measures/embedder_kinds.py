"""Measure an embedder on a retrieval set by every kind of its vectors and by their sums."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from tercet.evaluate.measures.by_kind import KindsResult, ProtocolName, feasible, search_kinds
from tercet.evaluate.measures.prompts import known_task, warn_unprompted
from tercet.evaluate.measures.retrieval import encode_both, evaluate_retrieval
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.progress import Advance, bar
from tercet.kinds import Kind, Weights
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings
from tercet.segments import batches_within
from tercet.vectors import Vectors

_BLOCK_LETTERS: Final = 200_000  # of documents whose token vectors are in memory together
_SAMPLE: Final = 100  # documents whose tokens are counted, to estimate the total


def measure_kinds(  # noqa: PLR0913 (independent choices, each with a default)
    embedder: Embedder,
    data: RetrievalSet,
    *,
    task: str | None = None,
    kinds: Sequence[Kind] | None = None,
    weights: Weights | None = None,
    protocol: ProtocolName | None = None,
    dims: int | None = None,
    names: Sequence[str] | None = None,
    progress: bool = False,
) -> KindsResult:
    """Encode both sides, and measure every kind of vectors and every sum of their scores.

    Documents are encoded block by block, so that their token vectors are never in memory together.
    ``weights`` default to those that the model was tuned to for the task, or its usual ones;
    ``protocol`` to *exact*, unless comparing all tokens takes very long.

    Raises:
        RecipeError: if the model has no prompts for the task, or does not make a kind.
    """
    warn_unprompted(embedder.settings, "query", task)
    weights = weights or tuned_weights(embedder.settings, (task or data.name, data.name))
    queries = embedder.encode_vectors(
        data.queries, "query", kinds=tuple(kinds or embedder.kinds), task=task, dims=dims
    )
    with bar("search", len(data.documents), shown=progress) as advance:
        corpus = CorpusEncoder(embedder, data.documents, advance, task, dims)
        protocol = protocol or feasible(queries, corpus.tokens())
        return search_kinds(data, queries, corpus, weights=weights, protocol=protocol, names=names)


@dataclass(slots=True, eq=False)
class CorpusEncoder:
    """Documents that are encoded block by block, each time that their vectors are needed."""

    embedder: Embedder
    texts: Sequence[str]
    advance: Advance
    task: str | None = None
    dims: int | None = None
    counts: list[Tensor] = field(default_factory=list)

    def blocks(
        self, kinds: Sequence[Kind], rows: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Vectors]]:
        """Yield vectors of these kinds, of the documents ``rows`` or of all."""
        chosen = range(len(self.texts)) if rows is None else rows.tolist()
        limit = 8 * self.embedder.settings.document_tokens  # longer documents are truncated anyway
        for block in batches_within(
            chosen, _BLOCK_LETTERS, lambda row: min(len(self.texts[row]), limit), overshoot=True
        ):
            texts = [self.texts[row] for row in block]
            found = self.embedder.encode_vectors(
                texts, "document", kinds=kinds, task=self.task, dims=self.dims
            )
            if found.sparse is not None and rows is None:
                self.counts.append(found.sparse.offsets.diff())
            yield torch.tensor(block), found
            if rows is None:
                self.advance(len(block))

    def terms(self) -> Tensor | None:
        """Return the number of terms of each document that was encoded."""
        return torch.cat(self.counts) if self.counts else None

    def tokens(self) -> int:
        """Estimate how many tokens all documents have together."""
        some = self.texts[:: max(1, len(self.texts) // _SAMPLE)]
        lengths = self.embedder.tokenize(some, "document").lengths
        return sum(lengths) * len(self.texts) // max(len(some), 1)


def tuned_weights(settings: Settings, tasks: Sequence[str]) -> Weights:
    """Return the weights tuned for the first task that has some, or the model's usual ones."""
    known = (settings.weights[name] for name in (*tasks, "") if name in settings.weights)
    return next(known, Weights())


def dev_score(
    data: RetrievalSet, task: str | None = None
) -> Callable[[Embedder], float | Mapping[str, float]]:
    """Return a function that computes nDCG@10 on a dev set, for training to select weights by.

    The prompts are those of the ``task``, or of the set's name, or the default ones. For a model
    with several kinds of vectors ``dev_score`` is that of their weighted sum; beside it are those
    of each kind, and how many texts have no sparse term.
    """

    def score(embedder: Embedder) -> float | Mapping[str, float]:
        known = known_task(embedder.settings, (task or "", data.name))
        if embedder.kinds != ("dense",):
            return _by_name(measure_kinds(embedder, data, task=known, names=("ndcg@10",)))
        sides = encode_both(embedder, data, task=known)
        return evaluate_retrieval(data, *sides, names=("ndcg@10",)).mean("ndcg@10")

    return score


def _by_name(found: KindsResult) -> dict[str, float]:
    """Return the figures of a dev set under the names that a training log uses."""
    figures = {"dev_score": found.results[found.total].mean("ndcg@10")}
    figures |= {f"dev_{k}": r.mean("ndcg@10") for k, r in found.results.items()}
    for role, counts in found.terms.items():
        figures |= {f"dev_{role}_terms": counts.mean, f"dev_{role}_empty": counts.empty}
    return figures
