"""From examples to a batch: texts chosen, prompts put before them, tokenized, related."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tercet.data.batches.relation import Relation, hash_of, relation_of
from tercet.data.batches.shuffling import CutName, shuffled
from tercet.models.tokens import Tokens
from tercet.types import Example, InBatch, Packed, Role

Tokenize = Callable[[Sequence[str], Role, Sequence[str]], Tokens]
"""Texts, their role and their prompts to tokens: an embedder's."""

PromptOf = Callable[[Role, str], str]
"""The prompt that the model uses for a role and a task."""

Policy: TypeAlias = Literal["all", "positives", "none", "per_row"]
"""Who is a negative in a batch: one rule for all, or for each row what its task allows."""

# Keep the choice of texts and their shuffling apart from other uses of the same seed.
_DRAW, _SHUFFLE = 0xD0C, 0x5EC


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step's texts in one packed row, queries first, and what each document is to a query."""

    texts: Packed
    queries: int
    relation: Relation
    truncated: int  # texts that were cut
    teacher: Float[Tensor, "docs"] | None = None  # scores that came with them; NaN: none


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Turns examples into a :class:`Batch`, the same one for the same seed."""

    tokenize: Tokenize
    prompt_of: PromptOf
    positives: int = 1  # at most, of one query; more are drawn from
    negatives: int = 8  # mined ones at most, of one query
    in_batch: Policy = "per_row"  # which documents of other examples are negatives
    mask_duplicates: bool = True  # never take a text that answers the query too for a negative
    shuffle_segments: float = 0.0  # share of the long positives whose thirds change places
    shuffle_at: CutName = "characters"  # where they are cut

    def __call__(self, examples: Sequence[Example], seed: Sequence[int]) -> Batch:
        """Choose each example's documents and lay all texts in a row.

        A choice hangs on the seed and the query, not on the examples beside it: several processes
        that share a batch choose what one would.
        """
        positives: list[tuple[str, ...]] = []
        negatives: list[tuple[str, ...]] = []
        teacher: list[float] = []
        for example in examples:
            rng = np.random.default_rng([_DRAW, *seed, hash_of(example.query) % 2**63])
            right = _drawn(len(example.positives), self.positives, rng)
            wrong = _drawn(len(example.negatives), self.negatives, rng)
            positives.append(tuple(example.positives[i] for i in right))
            negatives.append(tuple(example.negatives[i] for i in wrong))
            teacher += _scores(example.positive_scores, right)
            teacher += _scores(example.negative_scores, wrong)
        queries = [example.query for example in examples]
        shown = [self._shuffled(*pair, seed) for pair in zip(queries, positives, strict=True)]
        documents = [
            text for pair in zip(shown, negatives, strict=True) for side in pair for text in side
        ]
        owners = [
            example
            for example, right, wrong in zip(examples, positives, negatives, strict=True)
            for _ in range(len(right) + len(wrong))
        ]
        query_prompts = [self._prompt(e.query_prompt, "query", e) for e in examples]
        document_prompts = [self._prompt(e.document_prompt, "document", e) for e in owners]
        tokens = Tokens.join(
            [
                self.tokenize(queries, "query", query_prompts),
                self.tokenize(documents, "document", document_prompts),
            ]
        )
        relation = relation_of(
            queries,
            positives,
            negatives,
            in_batch=[self._policy(example) for example in examples],
            mask_duplicates=self.mask_duplicates,
        )
        scores = torch.tensor(teacher, dtype=torch.float32)
        known = None if bool(scores.isnan().all()) else scores
        return Batch(tokens.pack(), len(queries), relation, tokens.truncated, known)

    def _shuffled(self, query: str, texts: Sequence[str], seed: Sequence[int]) -> Sequence[str]:
        """The positives as the model reads them; who is a duplicate hangs on the texts as given."""
        if not self.shuffle_segments:
            return texts
        rng = np.random.default_rng([_SHUFFLE, *seed, hash_of(query) % 2**63])
        hit = rng.random(len(texts)) < self.shuffle_segments
        return [
            shuffled(text, rng, self.shuffle_at) if is_hit else text
            for text, is_hit in zip(texts, hit.tolist(), strict=True)
        ]

    def _policy(self, example: Example) -> InBatch:
        return (example.in_batch or "all") if self.in_batch == "per_row" else self.in_batch

    def _prompt(self, own: str | None, role: Role, example: Example) -> str:
        return self.prompt_of(role, example.task) if own is None else own


def _drawn(count: int, at_most: int, rng: np.random.Generator) -> list[int]:
    if count <= at_most:
        return list(range(count))
    return sorted(rng.choice(count, at_most, replace=False).tolist())


def _scores(given: Sequence[float] | None, chosen: Sequence[int]) -> list[float]:
    return [nan if given is None else given[i] for i in chosen]
