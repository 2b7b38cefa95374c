import random
import subprocess
import sys

import pytest
import torch

from tercet.data.batches.relation import Relation, hash_of, relation_of
from tercet.types import IGNORED, NEGATIVE, POSITIVE, InBatch

Texts = list[list[str]]
POLICIES: tuple[InBatch, ...] = ("all", "positives", "none")


def slow_relation(queries: list[str], positives: Texts, negatives: Texts, policies: list[InBatch]):
    columns = [
        (owner, text, place < len(positives[owner]))
        for owner in range(len(queries))
        for place, text in enumerate(positives[owner] + negatives[owner])
    ]

    def entry(query: int, owner: int, text: str, is_positive: bool) -> int:
        if owner == query and is_positive:
            return POSITIVE
        if text in positives[query]:
            return IGNORED
        if owner == query:
            return NEGATIVE
        if policies[query] == "none" or queries[owner] == queries[query]:
            return IGNORED
        return NEGATIVE if policies[query] == "all" or is_positive else IGNORED

    return torch.tensor(
        [[entry(query, *column) for column in columns] for query in range(len(queries))],
        dtype=torch.int8,
    )


def random_batch(seed: int, size: int, vocabulary: int) -> tuple[list[str], Texts, Texts]:
    """Up to three positives and two negatives for each query, and at least one text in all."""
    draw = random.Random(seed)

    def texts(least: int, most: int) -> list[str]:
        return [f"text {draw.randrange(vocabulary)}" for _ in range(draw.randint(least, most))]

    queries = [f"query {draw.randrange(vocabulary)}" for _ in range(size)]
    positives = [texts(0, 3) for _ in range(size)]
    return queries, positives, [texts(0 if found else 1, 2) for found in positives]


def whole(relation: Relation) -> torch.Tensor:
    return relation.rows(0, len(relation.policies))


def test_each_pair_is_positive_negative_or_neither_worked_by_hand():
    relation = relation_of(
        ["a", "b", "a"],
        [["x", "y"], ["z"], ["w"]],
        [["n"], ["x", "z"], []],
    )
    # columns: x y n | z x z | w.  Row 0: the second x is its positive, w answers the same query.
    # Row 1: the mined z is its own positive.  Row 2: everything of row 0 answers the same query.
    assert whole(relation).tolist() == [
        [1, 1, -1, -1, 0, -1, 0],
        [-1, -1, -1, 1, -1, 0, -1],
        [0, 0, 0, -1, -1, -1, 1],
    ]


def test_a_query_with_its_own_negatives_only_ignores_other_examples():
    relation = relation_of(
        ["a", "b"], [["x"], ["y"]], [["n"], ["x", "m"]], in_batch=["none", "all"]
    )
    assert whole(relation).tolist() == [[1, -1, 0, 0, 0], [-1, -1, 1, -1, -1]]


@pytest.mark.parametrize("vocabulary", [2, 6, 1000])
@pytest.mark.parametrize("seed", range(8))
def test_rows_equal_the_slow_definition(seed: int, vocabulary: int):
    queries, positives, negatives = random_batch(seed, 9, vocabulary)
    policies: list[InBatch] = [random.Random(seed + i).choice(POLICIES) for i in range(9)]
    relation = relation_of(queries, positives, negatives, in_batch=policies)
    expected = slow_relation(queries, positives, negatives, policies)
    torch.testing.assert_close(whole(relation), expected)
    assert relation.positives == int((expected == POSITIVE).sum())


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_blocks_of_rows_keep_every_positive(factor: int):
    """Trap A8 of Arctic-Embed."""
    queries, positives, negatives = random_batch(3, 16, 10)
    relation = relation_of(queries, positives, negatives)
    height = 16 // factor
    blocks = [relation.rows(start, start + height) for start in range(0, 16, height)]
    assert sum(int((block == POSITIVE).sum()) for block in blocks) == relation.positives
    torch.testing.assert_close(torch.cat(blocks), whole(relation))


def test_equal_text_under_two_ids_is_never_a_negative():
    """Trap A16 of Arctic-Embed."""
    relation = relation_of(["a", "b", "c"], [["same"], ["same"], ["other"]], [[], [], ["same"]])
    assert whole(relation).tolist() == [[1, 0, -1, 0], [0, 1, -1, 0], [-1, -1, 1, -1]]


def test_a_query_that_takes_the_others_positives_ignores_what_was_mined_for_them():
    relation = relation_of(["a", "b"], [["x"], ["y"]], [["n"], ["m"]], in_batch="positives")
    assert whole(relation).tolist() == [[1, -1, -1, 0], [-1, 0, 1, -1]]


def test_without_the_mask_equal_texts_and_queries_are_negatives_like_any_other():
    relation = relation_of(
        ["a", "a", "b"], [["same"], ["same"], ["x"]], [["same"], [], []], mask_duplicates=False
    )
    assert whole(relation).tolist() == [[1, -1, -1, -1], [-1, -1, 1, -1], [-1, -1, -1, 1]]


def test_a_batch_without_equal_texts_has_no_repeats_to_look_up():
    relation = relation_of(["a", "b"], [["x", "y"], ["z"]], [["n"], []])
    assert len(relation.repeats.rows) == 0


def test_a_positive_listed_twice_is_two_positives_and_no_repeat():
    relation = relation_of(["a", "b"], [["x", "x"], ["z"]], [[], []])
    assert whole(relation).tolist() == [[1, 1, -1], [-1, -1, 1]]
    assert len(relation.repeats.rows) == 0


def test_a_query_that_ignores_other_examples_has_no_repeats_to_look_up():
    labels = [["yes"] if i % 2 else ["no"] for i in range(10)]
    relation = relation_of(
        [str(i) for i in range(10)], labels, labels[1:] + labels[:1], in_batch="none"
    )
    assert len(relation.repeats.rows) == 0
    assert int((whole(relation) == POSITIVE).sum()) == 10


def test_an_example_without_documents_takes_a_row_and_no_column():
    relation = relation_of(["a", "b", "c"], [["x"], [], ["z"]], [[], [], []])
    assert whole(relation).tolist() == [[1, -1], [-1, -1], [-1, 1]]


def test_a_batch_without_documents_has_no_positives():
    relation = relation_of(["a"], [[]], [[]])
    assert relation.positives == 0
    assert whole(relation).shape == (1, 0)


def test_one_process_gathers_nothing():
    relation = relation_of(["a"], [["x"]], [["n"]])
    assert relation.gathered() is relation


def test_hash_of_is_the_same_in_a_process_with_another_hash_seed():
    code = "from tercet.data.batches.relation import hash_of; print(hash_of('häß \\ud800'))"
    printed = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )
    assert int(printed.stdout) == hash_of("häß \ud800")
