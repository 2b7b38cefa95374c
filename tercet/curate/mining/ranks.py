"""The nearest documents of queries, with all that a rule needs to judge them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int8, Int64, UInt64

from tercet.curate.mining.document_pools import Pool
from tercet.curate.mining.finders import Finder
from tercet.curate.mining.relevant import Collection
from tercet.curate.mining.rules import (
    ABSENT,
    ALREADY,
    LEFT,
    POSITIVE,
    QUERY,
    MiningRule,
    choose,
    judge,
)
from tercet.data.files.texts import text_key
from tercet.models.settings import Settings
from tercet.types import Example, Role

_PAIRS: Final = 8192  # pairs of a query and a text that are searched among candidates together
_DECIMALS: Final = 6  # of scores; further ones differ between kernels and batches


def prompt_for(
    settings: Settings | None, example: Example, role: Role, first: Literal["row", "teacher"]
) -> str:
    """Return the prompt that a teacher reads before a text of this example.

    This is the row's own, unless the teacher's go ``first``; else the teacher's for the row's
    task, if it knows that task, or its default. Without settings of a teacher it is empty.
    """
    if settings is None:
        return ""
    own = example.query_prompt if role == "query" else example.document_prompt
    if first == "row" and own is not None:
        return own
    task = example.task if example.task in settings.task_prompts else None
    return settings.prompt(role, task)


@dataclass(frozen=True, slots=True, eq=False)
class RankedExamples:
    """Some examples and the nearest documents of their queries, best first, before any rule."""

    places: list[int]  # of these examples in their block
    examples: list[Example]
    pool: Pool
    keys: UInt64[np.ndarray, "queries"]
    rows: Int64[np.ndarray, "queries ranks"]  # of the pool; -1: no document
    scores: Float64[np.ndarray, "queries ranks"]
    barred: Int8[np.ndarray, "queries ranks"]  # verdicts that do not depend on scores
    positives: list[list[float]]  # scores of the positives
    found: list[list[bool]]  # whether each positive is among the candidates of its query
    own: list[list[tuple[str, float]]]  # negatives of the row that are kept, and their scores
    refused: int  # negatives of the row that are dropped as positives, duplicates or blank

    @property
    def unfound(self) -> int:
        """The number of positives that are not among the candidates of their query."""
        return sum(row.count(False) for row in self.found)

    def references(self, most: int | None) -> Float64[np.ndarray, "queries"]:
        """Return the score of each query's lowest positive, with which a rule compares.

        With ``most``, the lowest of that many of its best among the candidates; NaN without any.
        """
        if most is None:
            return np.array([min(scores) for scores in self.positives])
        found = [
            sorted(score for score, there in zip(*both, strict=True) if there)[-most:]
            for both in zip(self.positives, self.found, strict=True)
        ]
        return np.array([scores[0] if scores else np.nan for scores in found], np.float64)

    def judged(self, rule: MiningRule, negatives: int, most: int | None = None) -> "JudgedExamples":
        """Apply a rule, and take the mined negatives that each row needs."""
        lowest = self.references(most)
        verdicts = judge(rule, self.scores, lowest, self.barred)
        counts = np.array([max(0, negatives - len(own)) for own in self.own])
        chosen = choose(rule, self.scores, verdicts == LEFT, counts, self.keys)
        return JudgedExamples(self, lowest, verdicts, chosen)


@dataclass(frozen=True, slots=True, eq=False)
class JudgedExamples:
    """Ranked documents with the verdict on each candidate, and which of them are taken."""

    ranked: RankedExamples
    references: Float64[np.ndarray, "queries"]  # scores that the rule compared with
    verdicts: Int8[np.ndarray, "queries ranks"]
    chosen: Bool[np.ndarray, "queries ranks"]

    def negatives(self, row: int) -> list[tuple[str, float]]:
        """Return the negatives of a row and their scores: its own, then mined ones, best first."""
        ranked, columns = self.ranked, np.flatnonzero(self.chosen[row])
        texts = ranked.pool.texts.read(ranked.rows[row, columns].tolist())
        return [*ranked.own[row], *zip(texts, ranked.scores[row, columns].tolist(), strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Ranker:
    """Finds the nearest documents of examples in a collection whose pools are ready."""

    finder: Finder
    collection: Collection
    depth: int
    keep: bool  # whether examples keep their negatives
    prompts: Literal["row", "teacher"]

    def ranked(self, block: Sequence[Example]) -> Iterator[RankedExamples]:
        """Yield the ranked examples of a block, grouped by the pool of their documents."""
        for places, examples, pool in self._by_pool(block):
            queries = self._queries(examples)
            found = self.finder.nearest(queries, pool, self.depth)
            absent = found.rows < 0
            candidates = np.where(absent, np.uint64(0), pool.keys[found.rows])
            keys = np.array([text_key(example.query) for example in examples], np.uint64)
            answers = [list(map(text_key, example.positives)) for example in examples]
            own, kept = self._own(examples, keys, pool, queries)
            refused = sum(len(e.negatives) for e in examples) - sum(map(len, own))
            yield RankedExamples(
                places=places,
                examples=examples,
                pool=pool,
                keys=keys,
                rows=found.rows,
                scores=_rounded(found.scores),
                barred=np.where(absent, np.int8(ABSENT), self._barred(candidates, keys, kept)),
                positives=self._scores(queries, pool, answers),
                found=_found(candidates, answers),
                own=own,
                refused=refused if self.keep else 0,
            )

    def lowest_positives(self, block: Sequence[Example]) -> list[float]:
        """Return the score of each example's lowest positive, without a search."""
        found: list[float] = []
        for _, examples, pool in self._by_pool(block):
            answers = [list(map(text_key, example.positives)) for example in examples]
            found += map(min, self._scores(self._queries(examples), pool, answers))
        return found

    def _by_pool(self, block: Sequence[Example]) -> Iterator[tuple[list[int], list[Example], Pool]]:
        places: dict[str, list[int]] = {}
        for place, example in enumerate(block):
            places.setdefault(self.prompt(example, "document"), []).append(place)
        for prompt, some in places.items():
            yield some, [block[place] for place in some], self.collection.pools[prompt]

    def prompt(self, example: Example, role: Role) -> str:
        """Return the prompt before this example's texts."""
        return prompt_for(self.finder.settings, example, role, self.prompts)

    def _queries(self, examples: Sequence[Example]) -> Any:
        prompts = [self.prompt(example, "query") for example in examples]
        return self.finder.queries([example.query for example in examples], prompts)

    def _own(
        self,
        examples: Sequence[Example],
        keys: UInt64[np.ndarray, "queries"],
        pool: Pool,
        queries: Any,
    ) -> tuple[list[list[tuple[str, float]]], list[list[int]]]:
        """Return the negatives that each example keeps, with their scores, and their keys."""
        texts: list[list[str]] = [[] for _ in examples]
        kept: list[list[int]] = [[] for _ in examples]
        if not self.keep:
            return [[] for _ in examples], kept
        for row, example in enumerate(examples):
            query = int(keys[row])
            seen = {query, *self.collection.relevant.of(query).tolist()}
            for text in example.negatives:
                key = text_key(text)
                if key in pool.rows and key not in seen:  # blank texts are in no pool
                    seen.add(key)
                    kept[row].append(key)
                    texts[row].append(text)
        scores = self._scores(queries, pool, kept)
        return [list(zip(*pair, strict=True)) for pair in zip(texts, scores, strict=True)], kept

    def _scores(self, queries: Any, pool: Pool, keys: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the score of each query with each of its texts, by their keys in the pool."""
        owners = np.repeat(np.arange(len(keys)), [len(some) for some in keys])
        rows = np.array([pool.rows[key] for some in keys for key in some], np.int64)
        flat = iter(_rounded(self.finder.scores(queries, owners, pool, rows)).tolist())
        return [list(islice(flat, len(some))) for some in keys]

    def _barred(
        self,
        candidates: UInt64[np.ndarray, "queries ranks"],
        keys: UInt64[np.ndarray, "queries"],
        kept: Sequence[Sequence[int]],
    ) -> Int8[np.ndarray, "queries ranks"]:
        barred = np.full(candidates.shape, LEFT, np.int8)
        _mark(barred, candidates, *_pairs(kept), verdict=ALREADY)
        barred[candidates == keys[:, None]] = QUERY
        _mark(barred, candidates, *self.collection.relevant.among(keys), verdict=POSITIVE)
        return barred


def _pairs(
    keys: Sequence[Sequence[int]],
) -> tuple[Int64[np.ndarray, "pairs"], UInt64[np.ndarray, "pairs"]]:
    """Return the place of the query and the key, for all keys of all queries."""
    places = np.repeat(np.arange(len(keys)), [len(some) for some in keys])
    return places, np.array([key for some in keys for key in some], np.uint64)


def _found(
    candidates: UInt64[np.ndarray, "queries ranks"], answers: Sequence[Sequence[int]]
) -> list[list[bool]]:
    """Return whether each text is among the candidates of its query."""
    return [
        np.isin(np.array(some, np.uint64), row).tolist()
        for some, row in zip(answers, candidates, strict=True)
    ]


def _mark(
    barred: Int8[np.ndarray, "queries ranks"],
    candidates: UInt64[np.ndarray, "queries ranks"],
    places: Int64[np.ndarray, "pairs"],
    keys: UInt64[np.ndarray, "pairs"],
    *,
    verdict: int,
) -> None:
    """Set the verdict on the candidates that are these texts."""
    for start in range(0, len(places), _PAIRS):  # a query may have many answers
        part = slice(start, start + _PAIRS)
        pair, column = np.nonzero(candidates[places[part]] == keys[part, None])
        barred[places[part][pair], column] = verdict


def _rounded(scores: np.ndarray) -> np.ndarray:
    return np.round(scores.astype(np.float64), _DECIMALS)
