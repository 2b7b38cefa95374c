"""From examples to a batch: texts chosen, prompts put before them, tokenized, related."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from tercet.data.relation import Relation, hash_of, relation_of
from tercet.data.tokens import Tokens
from tercet.types import Example, InBatch, Packed, Role

Tokenize = Callable[[Sequence[str], Role, Sequence[str]], Tokens]
"""Texts, their role and their prompts to tokens: an embedder's."""

PromptOf = Callable[[Role, str], str]
"""The prompt that the model uses for a role and a task."""

Policy: TypeAlias = Literal["all", "positives", "none", "per_row"]
"""Who is a negative in a batch: one rule for all, or for each row what its task allows."""

_DRAW: Final = 0xD0C  # keeps the choice of texts apart from other uses of the same seed


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step's texts in one packed row, queries first, and what each document is to a query."""

    texts: Packed
    queries: int
    relation: Relation
    truncated: int  # texts that were cut


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Turns examples into a :class:`Batch`, the same one for the same seed."""

    tokenize: Tokenize
    prompt_of: PromptOf
    positives: int = 1  # at most, of one query; more are drawn from
    negatives: int = 8  # mined ones at most, of one query
    in_batch: Policy = "per_row"  # which documents of other examples are negatives
    mask_duplicates: bool = True  # never take a text that answers the query too for a negative

    def __call__(self, examples: Sequence[Example], seed: Sequence[int]) -> Batch:
        """Choose each example's documents and lay all texts in a row.

        A choice hangs on the seed and the query, not on the examples beside it: several processes
        that share a batch choose what one would.
        """
        positives: list[tuple[str, ...]] = []
        negatives: list[tuple[str, ...]] = []
        for example in examples:
            rng = np.random.default_rng([_DRAW, *seed, hash_of(example.query) % 2**63])
            positives.append(_drawn(example.positives, self.positives, rng))
            negatives.append(_drawn(example.negatives, self.negatives, rng))
        queries = [example.query for example in examples]
        documents = [
            text
            for pair in zip(positives, negatives, strict=True)
            for side in pair
            for text in side
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
        return Batch(tokens.pack(), len(queries), relation, tokens.truncated)

    def _policy(self, example: Example) -> InBatch:
        return (example.in_batch or "all") if self.in_batch == "per_row" else self.in_batch

    def _prompt(self, own: str | None, role: Role, example: Example) -> str:
        return self.prompt_of(role, example.task) if own is None else own


def _drawn(texts: Sequence[str], at_most: int, rng: np.random.Generator) -> tuple[str, ...]:
    if len(texts) <= at_most:
        return tuple(texts)
    chosen: list[int] = sorted(rng.choice(len(texts), at_most, replace=False).tolist())
    return tuple(texts[i] for i in chosen)
