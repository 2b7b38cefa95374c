"""Who is a positive, who is a negative and who is neither, one block of queries at a time.

32,768 queries and as many documents are a billion pairs. What decides about all of them is a few
numbers for each document: whose it is, what it is to its owner, and which texts are equal. The
rows of a block are written when a loss asks for them, and forgotten after it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Bool, Int, Int8
from torch import Tensor

from tercet.distributed import gather_ints, rank, world
from tercet.segments import ragged_places, row_of
from tercet.types import IGNORED, NEGATIVE, POSITIVE, InBatch

# What a query takes from other examples, in numbers.
_POLICIES: Final[Mapping[InBatch, int]] = {"none": 0, "positives": 1, "all": 2}


@dataclass(frozen=True, slots=True, eq=False)
class Repeats:
    """For each query the other examples' documents that may answer it too, as runs of columns.

    Run ``r`` says that query ``rows[r]`` has no negative among
    ``columns[begins[r]:ends[r]]``.
    """

    rows: Int[Tensor, "runs"]  # ascending
    begins: Int[Tensor, "runs"]
    ends: Int[Tensor, "runs"]
    columns: Int[Tensor, "sorted"]  # documents, those with equal texts side by side

    def pairs(self, start: int, stop: int) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
        """The rows, counted from ``start``, and the columns of all runs of these queries."""
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
        begins, rows = self.begins[first:last], self.rows[first:last] - start
        places, offsets = ragged_places(begins, self.ends[first:last])
        return rows[row_of(offsets)], self.columns[places]


@dataclass(frozen=True, slots=True, eq=False)
class Relation:
    """What each document is to each query: POSITIVE, NEGATIVE or IGNORED.

    A positive is a document that came with the query as one. Never a negative are: a document
    with the text of one of the query's positives, under whatever id; a document of another
    example that asks the same query; and, by the query's policy, whatever came with another
    example ("none"), or what was mined for it ("positives"). Use ``relation_of`` to make one.
    """

    owners: Int[Tensor, "docs"]  # the query each document came with; ascending
    own: Int8[Tensor, "docs"]  # what it is to that query
    texts: Int[Tensor, "docs"]  # hash of its text
    questions: Int[Tensor, "docs"]  # hash of the text of that query
    policies: Int8[Tensor, "queries"]  # 0: none of the others' documents, 1: positives, 2: all
    first_query: int  # row 0 is this query; the earlier ones belong to other processes
    mask_duplicates: bool  # false: equal texts and equal queries are negatives like any other
    repeats: Repeats

    @property
    def positives(self) -> int:
        """Number of POSITIVE pairs, over all processes once gathered: what a mean divides by."""
        return int((self.own == POSITIVE).sum())

    def rows(
        self, start: int, stop: int, device: torch.device | None = None
    ) -> Int8[Tensor, "rows docs"]:
        """The relation of queries ``start`` to ``stop`` of this process to all documents."""
        policies = self.policies[start:stop]
        others = torch.where(policies > 0, NEGATIVE, IGNORED).to(torch.int8)
        block = others.to(device)[:, None].repeat(1, len(self.owners))
        if bool((choosy := policies == _POLICIES["positives"]).any()):
            mined = self.own != POSITIVE
            block.masked_fill_(choosy.to(device)[:, None] & mined.to(device), IGNORED)
        rows, columns = self.repeats.pairs(start, stop)
        if len(rows):
            block[rows.to(device), columns.to(device)] = IGNORED
        rows, columns = self.group(start, stop)
        block[rows.to(device), columns.to(device)] = self.own[columns].to(device)
        return block

    def group(self, start: int, stop: int) -> tuple[Int[Tensor, "own"], Int[Tensor, "own"]]:
        """Rows, counted from ``start``, and columns of the documents that came with them."""
        first = self.first_query + start
        edges = torch.tensor([first, self.first_query + stop])
        low, high = torch.searchsorted(self.owners, edges).tolist()
        return self.owners[low:high] - first, torch.arange(low, high)

    def gathered(self) -> "Relation":
        """The queries of this process against the documents of all of them.

        The columns are in the order of ``gather_rows``.
        """
        if world() == 1:
            return self
        queries = gather_ints(torch.tensor([len(self.policies)]))
        first = int(queries[: rank()].sum())
        facts = torch.stack([self.owners + first, self.own, self.texts, self.questions], dim=1)
        everybody = gather_ints(facts).T.contiguous()
        return _assembled(everybody, self.policies, first, self.mask_duplicates)


def relation_of(
    queries: Sequence[str],
    positives: Sequence[Sequence[str]],
    negatives: Sequence[Sequence[str]],
    *,
    in_batch: InBatch | Sequence[InBatch] = "all",
    mask_duplicates: bool = True,
) -> Relation:
    """The relation of a batch whose columns are each example's positives, then its negatives.

    ``in_batch`` may differ by query, so that tasks with and without in-batch negatives can share
    a batch. Texts are compared as they are; a mined negative that equals a positive of its own
    query is ignored. Without ``mask_duplicates`` no text is compared with another, as in most
    published training code.
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
    return _assembled(torch.stack([x.to(torch.int64) for x in facts]), agreed, 0, mask_duplicates)


def hash_of(text: str) -> int:
    """64 bits that are the same in every process, as those of ``hash`` are not.

    Among 100,000 texts two different ones share them once in three billion batches.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _assembled(
    facts: Int[Tensor, "4 docs"],
    policies: Int8[Tensor, "queries"],
    first_query: int,
    mask_duplicates: bool,
) -> Relation:
    """Facts are owners, own, texts and questions of the documents of all processes."""
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
    )


def _runs(
    owners: Int[Tensor, "docs"], keys: Int[Tensor, "docs"], of: Bool[Tensor, "docs"]
) -> Repeats:
    """For the owners of documents ``of``: the documents with the same key."""
    ranked, columns = keys.sort(stable=True)  # stable: owners ascend inside a run
    begins = torch.searchsorted(ranked, keys[of])
    ends = torch.searchsorted(ranked, keys[of], right=True)
    shared = owners[columns[begins]] != owners[columns[ends - 1]]
    return Repeats(owners[of][shared], begins[shared], ends[shared], columns)
