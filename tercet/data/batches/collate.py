"""Make batches of examples: choose texts, add prompts, tokenize, and relate them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tercet.data.batches.false_negatives import IgnoreRule
from tercet.data.batches.relation import GuideVectors, Relation, hash_of, relation_of
from tercet.data.batches.shuffling import CutName, shuffled
from tercet.models.tokens import Tokens
from tercet.segments import Packed
from tercet.types import Example, InBatch, Policy, Role

Tokenize = Callable[[Sequence[str], Role, Sequence[str]], Tokens]
"""A function from texts, their role and their prompts to tokens: an embedder's."""

PromptOf = Callable[[Role, str], str]
"""A function from role and task to the prompt that the model uses."""


GuideOf = Callable[[Sequence[str], Role, Sequence[Example]], Float[Tensor, "texts dim"]]
"""A function from texts, their role and the examples that they are of to a guide's vectors."""


# Separate the random draws of texts and of their shuffling from other uses of the same seed.
_DRAW, _SHUFFLE = 0xD0C, 0x5EC


@dataclass(frozen=True, slots=True, eq=False)
class ScoredPairs:
    """Similarity scores of pairs of texts."""

    scores: Float64[Tensor, "pairs"]
    scales: Int[Tensor, "pairs"]  # hash of each task: only scores of the same task are comparable

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "ScoredPairs":
        """Return the scores of examples that have one."""
        return cls(
            torch.tensor([example.score for example in examples], dtype=torch.float64),
            torch.tensor([hash_of(example.task) for example in examples], dtype=torch.int64),
        )


NO_PAIRS: Final = ScoredPairs.of(())


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The texts of a step in one packed row, queries first, and the relation between them.

    After the queries come their documents, then the first texts of ``pairs``, then the second ones.
    """

    texts: Packed
    queries: int
    relation: Relation
    truncated: int  # number of texts that were truncated
    teacher: Float[Tensor, "docs"] | None = None  # scores given with the documents; NaN: unknown
    pairs: ScoredPairs = NO_PAIRS


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Turns examples into a :class:`Batch`, always the same one for the same seed."""

    tokenize: Tokenize
    prompt_of: PromptOf
    positives: int = 1  # of a query, at most: drawn at random if there are more
    negatives: int = 8  # mined ones of a query, at most
    in_batch: Policy = "per_row"  # which documents of other examples are negatives
    mask_duplicates: bool = True  # a text that is a positive of the query is never a negative
    ignoring: IgnoreRule | None = None  # which negatives score so high that losses ignore them
    guide: GuideOf | None = None  # whose scores decide that; None: those of the model in training
    shuffle_segments: float = 0.0  # share of the long positives whose thirds are reordered
    shuffle_at: CutName = "characters"  # where they are cut

    def __call__(self, examples: Sequence[Example], seed: Sequence[int]) -> Batch:
        """Choose each example's documents and pack all texts.

        A choice depends on the seed and the query, not on the other examples: several processes
        that share a batch choose the same texts as a single one. Both texts of a pair with a
        similarity score are read as queries, since neither answers the other.
        """
        scored = [example for example in examples if example.score is not None]
        examples = [example for example in examples if example.score is None]
        positives: list[tuple[str, ...]] = []
        negatives: list[tuple[str, ...]] = []
        owners: list[Example] = []  # the example of each document
        teacher: list[float] = []
        for example in examples:
            rng = np.random.default_rng([_DRAW, *seed, hash_of(example.query) % 2**63])
            right = _drawn(len(example.positives), self.positives, rng)
            wrong = _drawn(len(example.negatives), self.negatives, rng)
            positives.append(tuple(example.positives[i] for i in right))
            negatives.append(tuple(example.negatives[i] for i in wrong))
            owners += [example] * (len(right) + len(wrong))
            teacher += _scores(example.positive_scores, right)
            teacher += _scores(example.negative_scores, wrong)
        queries = [example.query for example in examples]
        shown = [self._shuffled(*pair, seed) for pair in zip(queries, positives, strict=True)]
        documents = [
            text for pair in zip(shown, negatives, strict=True) for side in pair for text in side
        ]
        query_prompts = [example_prompt(e, "query", self.prompt_of) for e in examples]
        document_prompts = [example_prompt(e, "document", self.prompt_of) for e in owners]
        tokens = [
            self.tokenize(queries, "query", query_prompts),
            self.tokenize(documents, "document", document_prompts),
        ]
        if scored:
            pairs = [e.query for e in scored] + [e.positives[0] for e in scored]
            prompts = [example_prompt(e, "query", self.prompt_of) for e in scored]
            tokens.append(self.tokenize(pairs, "query", prompts * 2))
        joined = Tokens.join(tokens)
        relation = relation_of(
            queries,
            positives,
            negatives,
            in_batch=[self._policy(example) for example in examples],
            mask_duplicates=self.mask_duplicates,
            ignoring=self.ignoring,
        )
        if self.guide is not None:
            given = [
                text
                for pair in zip(positives, negatives, strict=True)
                for text in (*pair[0], *pair[1])
            ]
            vectors = GuideVectors(
                self.guide(queries, "query", examples), self.guide(given, "document", owners)
            )
            relation = replace(relation, guide=vectors)
        scores = torch.tensor(teacher, dtype=torch.float32)
        known = None if bool(scores.isnan().all()) else scores
        return Batch(
            joined.pack(),
            len(queries),
            relation,
            joined.truncated,
            known,
            ScoredPairs.of(scored) if scored else NO_PAIRS,
        )

    def _shuffled(self, query: str, texts: Sequence[str], seed: Sequence[int]) -> Sequence[str]:
        """Reorder some positives; duplicates are found among the texts before that."""
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


def example_prompt(example: Example, role: Role, prompt_of: PromptOf) -> str:
    """Return the prompt of an example's texts of a role: its own, or that of its task."""
    own = example.query_prompt if role == "query" else example.document_prompt
    return prompt_of(role, example.task) if own is None else own


def _drawn(count: int, at_most: int, rng: np.random.Generator) -> list[int]:
    if count <= at_most:
        return list(range(count))
    return sorted(rng.choice(count, at_most, replace=False).tolist())


def _scores(given: Sequence[float] | None, chosen: Sequence[int]) -> list[float]:
    return [nan if given is None else given[i] for i in chosen]
