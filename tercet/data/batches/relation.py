"""Which documents are positives, negatives or ignored, computed for one block of queries at a time.

32,768 queries and as many documents are a billion pairs. They follow from a few numbers for each
document: its query, its role for that query, and the hash of its text. The matrix of a block is
computed when a loss needs it, and dropped afterwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Final

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from tercet.data.batches.false_negatives import IgnoreRule
from tercet.distributed import gather_ints, gather_rows, rank, world
from tercet.files.artifacts import fingerprint_number
from tercet.segments import moved, ragged_places, row_of
from tercet.types import IGNORED, NEGATIVE, POSITIVE, InBatch

# The policy of a query towards documents of other examples, as a number.
_POLICIES: Final[Mapping[InBatch, int]] = {"none": 0, "positives": 1, "all": 2}


@dataclass(frozen=True, slots=True, eq=False)
class Repeats:
    """For each query the documents of other examples that may answer it too, as runs of columns.

    Run ``r``: query ``rows[r]`` has no negative among ``columns[begins[r]:ends[r]]``.
    """

    rows: Int[Tensor, "runs"]  # ascending
    begins: Int[Tensor, "runs"]
    ends: Int[Tensor, "runs"]
    columns: Int[Tensor, "sorted"]  # documents, those with equal texts side by side

    def pairs(self, start: int, stop: int) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
        """Return rows, counted from ``start``, and columns of all runs of these queries."""
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
        begins, rows = self.begins[first:last], self.rows[first:last] - start
        places, offsets = ragged_places(begins, self.ends[first:last])
        return rows[row_of(offsets)], self.columns[places]


@dataclass(frozen=True, slots=True, eq=False)
class GuideVectors:
    """Vectors by which a guide decides what is ignored, of unit length and without gradient."""

    queries: Float[Tensor, "queries dim"]
    docs: Float[Tensor, "docs dim"]

    def scores(self, start: int, stop: int, device: torch.device) -> Float[Tensor, "rows docs"]:
        """Return the cosines of these queries with all documents."""
        with torch.autocast(device.type, enabled=False):
            return moved(self.queries[start:stop], device) @ moved(self.docs, device).T


@dataclass(frozen=True, slots=True, eq=False)
class Relation:
    """The relation of each document to each query: POSITIVE, NEGATIVE or IGNORED.

    A document is a positive of the query whose example lists it as one. Never negatives are: a
    document with the text of one of the query's positives, under any id; a document of another
    example with the same query; and, by the query's policy, all documents of other examples
    ("none"), or their mined ones ("positives"). ``ignoring`` adds those that score too near to the
    positive, which ``false_negatives`` finds. ``relation_of`` makes a relation.
    """

    owners: Int[Tensor, "docs"]  # the query each document came with; ascending
    own: Int8[Tensor, "docs"]  # its relation to that query
    texts: Int[Tensor, "docs"]  # hash of its text
    questions: Int[Tensor, "docs"]  # hash of the text of that query
    policies: Int8[Tensor, "queries"]  # 0: none of the others' documents, 1: positives, 2: all
    first_query: int  # the query of row 0; earlier ones belong to other processes
    mask_duplicates: bool  # false: equal texts and equal queries are ordinary negatives
    repeats: Repeats
    ignoring: IgnoreRule | None = None  # likely false negatives, by scores
    guide: GuideVectors | None = None  # whose scores these are; None: the model's in training

    @property
    def positives(self) -> int:
        """The number of POSITIVE pairs, of all processes once gathered: the divisor of a mean."""
        return int((self.own == POSITIVE).sum())

    def rows(
        self, start: int, stop: int, device: torch.device | None = None
    ) -> Int8[Tensor, "rows docs"]:
        """Return the relation of queries ``start`` to ``stop`` of this process to all documents."""
        policies = self.policies[start:stop]
        others = torch.where(policies > 0, NEGATIVE, IGNORED).to(torch.int8)
        device = self.owners.device if device is None else device
        block = moved(others, device)[:, None].repeat(1, len(self.owners))
        if bool((choosy := policies == _POLICIES["positives"]).any()):
            mined = self.own != POSITIVE
            block.masked_fill_(moved(choosy, device)[:, None] & moved(mined, device), IGNORED)
        rows, columns = self.repeats.pairs(start, stop)
        if len(rows):
            block[moved(rows, device), moved(columns, device)] = IGNORED
        rows, columns = self.group(start, stop)
        block[moved(rows, device), moved(columns, device)] = moved(self.own[columns], device)
        return block

    def positive_pairs(
        self, start: int, stop: int
    ) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
        """Return rows, counted from ``start``, and columns of the positives, row by row."""
        rows, columns = self.group(start, stop)
        positive = self.own[columns] == POSITIVE
        return rows[positive], columns[positive]

    def false_negatives(
        self, start: int, stop: int, logits: Float[Tensor, "rows docs"], temperature: float
    ) -> Bool[Tensor, "rows docs"] | None:
        """Return the documents that the rule ignores, among those that ``rows`` calls NEGATIVE.

        ``logits`` are scores divided by ``temperature``; they decide, and get no gradient from it.
        Where the relation has a guide, its cosines decide instead.
        Whether documents are marked that ``rows`` does not call NEGATIVE means nothing. None: there
        is no rule. A query without a positive keeps all its negatives.
        """
        if self.ignoring is None:
            return None
        device = logits.device
        if self.guide is not None:
            logits, temperature = self.guide.scores(start, stop, device), 1.0
        row, column = (moved(each, device) for each in self.positive_pairs(start, stop))
        lowest = logits.new_full((len(logits),), inf)
        lowest.scatter_reduce_(0, row, logits[row, column], "amin")
        limit = self.ignoring.limit(lowest * temperature) / temperature
        above = logits > limit[:, None]
        if not self.ignoring.own:
            rows, columns = self.group(start, stop)
            above[moved(rows, device), moved(columns, device)] = False
        return above

    def group(self, start: int, stop: int) -> tuple[Int[Tensor, "own"], Int[Tensor, "own"]]:
        """Return rows, counted from ``start``, and columns of the documents of their examples."""
        first = self.first_query + start
        edges = torch.tensor([first, self.first_query + stop])
        low, high = torch.searchsorted(self.owners, edges).tolist()
        return self.owners[low:high] - first, torch.arange(low, high)

    def gathered(self) -> "Relation":
        """Return the relation of the queries of this process to the documents of all processes.

        The columns are in the order of ``gather_rows``.
        """
        if world() == 1:
            return self
        queries = gather_ints(torch.tensor([len(self.policies)]))
        first = int(queries[: rank()].sum())
        facts = torch.stack([self.owners + first, self.own, self.texts, self.questions], dim=1)
        everybody = gather_ints(facts).T.contiguous()
        found = _assembled(everybody, self.policies, first, self.mask_duplicates, self.ignoring)
        if self.guide is None:
            return found
        docs = gather_rows(self.guide.docs)
        return replace(found, guide=GuideVectors(self.guide.queries, docs))


def relation_of(
    queries: Sequence[str],
    positives: Sequence[Sequence[str]],
    negatives: Sequence[Sequence[str]],
    *,
    in_batch: InBatch | Sequence[InBatch] = "all",
    mask_duplicates: bool = True,
    ignoring: IgnoreRule | None = None,
) -> Relation:
    """Return the relation of a batch; columns are each example's positives, then its negatives.

    ``in_batch`` may differ by query, so that tasks with and without in-batch negatives can share
    a batch. Texts are compared exactly; a mined negative that equals a positive of its own query
    is ignored. Without ``mask_duplicates`` texts are not compared, as in most published training
    code. ``ignoring`` is the rule by which a loss ignores documents for their scores.
    """
    owners: list[int] = []
    own: list[int] = []
    texts: list[int] = []
    for i, (right, wrong) in enumerate(zip(positives, negatives, strict=True)):
        owners += [i] * (len(right) + len(wrong))
        own += [POSITIVE] * len(right)
        equal = set(right) if mask_duplicates else set()
        own += [IGNORED if text in equal else NEGATIVE for text in wrong]
        texts += [hash_of(text) for text in (*right, *wrong)]
    if isinstance(in_batch, str):
        in_batch = (in_batch,) * len(queries)
    asked = torch.tensor([hash_of(query) for query in queries], dtype=torch.int64)
    whose = torch.tensor(owners, dtype=torch.int64)
    facts = [whose, torch.tensor(own), torch.tensor(texts), asked[whose]]
    agreed = torch.tensor([_POLICIES[policy] for policy in in_batch], dtype=torch.int8)
    everything = torch.stack([x.to(torch.int64) for x in facts])
    return _assembled(everything, agreed, 0, mask_duplicates, ignoring)


def hash_of(text: str) -> int:
    """Return a signed 64-bit hash that, unlike ``hash``, is the same in every process.

    Two of 100,000 different texts have the same hash in one of three billion batches.
    """
    number = fingerprint_number(text)
    return number - (1 << 64) if number >= 1 << 63 else number


def _assembled(
    facts: Int[Tensor, "4 docs"],
    policies: Int8[Tensor, "queries"],
    first_query: int,
    mask_duplicates: bool,
    ignoring: IgnoreRule | None,
) -> Relation:
    """Make a relation from owners, own, texts and questions of the documents of all processes."""
    owners, own, texts, questions = facts
    rows = owners - first_query
    here = (rows >= 0) & (rows < len(policies)) & mask_duplicates
    here[here.clone()] = policies[rows[here]] > 0  # other rows ignore everybody else's anyway
    begins_example = owners.diff(prepend=owners.new_tensor([-1])) != 0
    by_text = _runs(owners, texts, here & (own == POSITIVE))
    by_question = _runs(owners, questions, here & begins_example)
    order = torch.cat([by_text.rows, by_question.rows]).argsort()
    return Relation(
        owners=owners,
        own=own.to(torch.int8),
        texts=texts,
        questions=questions,
        policies=policies,
        first_query=first_query,
        mask_duplicates=mask_duplicates,
        repeats=Repeats(
            rows=torch.cat([by_text.rows, by_question.rows])[order] - first_query,
            begins=torch.cat([by_text.begins, by_question.begins + len(owners)])[order],
            ends=torch.cat([by_text.ends, by_question.ends + len(owners)])[order],
            columns=torch.cat([by_text.columns, by_question.columns]),
        ),
        ignoring=ignoring,
    )


def _runs(
    owners: Int[Tensor, "docs"], keys: Int[Tensor, "docs"], of: Bool[Tensor, "docs"]
) -> Repeats:
    """Find, for the owners of documents ``of``, the documents with the same key."""
    ranked, columns = keys.sort(stable=True)  # stable: owners ascend inside a run
    begins = torch.searchsorted(ranked, keys[of])
    ends = torch.searchsorted(ranked, keys[of], right=True)
    shared = owners[columns[begins]] != owners[columns[ends - 1]]
    return Repeats(owners[of][shared], begins[shared], ends[shared], columns)
