from collections import Counter

import pytest

from tercet.curate.convert.conversion import Conversion, stratified
from tercet.errors import RecipeError

WANTED = Conversion(task="mails", instruction="Sort the mail.")


def counts(labels, rows, wanted=WANTED):
    return Counter(labels[place] for place in stratified(labels, rows, wanted))


@pytest.mark.parametrize(
    ("sizes", "rows", "expected"),
    [
        ((9, 9, 9), 9, (3, 3, 3)),
        ((2, 9, 9), 10, (2, 4, 4)),  # of 4 each, what the first cannot give is two
        ((1, 3, 20), 12, (1, 3, 8)),
        ((5, 5), 10, (5, 5)),
        ((5, 5), 99, (5, 5)),
        ((4, 1, 1, 1), 2, (1, 0, 0, 1)),  # fewer rows than labels
    ],
)
def test_small_labels_give_all_they_have_and_larger_ones_the_rest(sizes, rows, expected):
    labels = [name for name, size in zip("abcd", sizes, strict=False) for _ in range(size)]
    labels = labels[::2] + labels[1::2]
    found = counts(labels, rows)
    assert [found[name] for name in "abcd"[: len(sizes)]] == list(expected)


def test_a_remainder_never_takes_a_label_above_its_part():
    labels = list("abc") * 8
    found = counts(labels, 10)
    assert sorted(found.values()) == [3, 3, 4]


def test_places_are_taken_once_and_in_order_and_depend_on_the_seed():
    labels = list("aab") * 30
    first = stratified(labels, 20, WANTED)
    assert first == sorted(set(first))
    assert first == stratified(labels, 20, WANTED)
    assert first != stratified(labels, 20, Conversion(task="mails", instruction="", seed=1))


def test_without_a_number_all_places_are_taken():
    assert stratified(list("aab"), None, WANTED) == [0, 1, 2]


def test_no_rows_and_no_negatives_are_refused():
    with pytest.raises(RecipeError, match="rows must be at least 1; got 0"):
        stratified(list("ab"), 0, WANTED)
    with pytest.raises(RecipeError, match="negatives must be at least 1; got 0"):
        Conversion(task="mails", instruction="", negatives=0)


def test_a_row_carries_its_task_its_prompts_and_its_policy():
    prompt = "Instruct: Sort the mail.\nQuery: "
    row = WANTED.row("q", "p", ["n"], symmetric=True)
    assert (row.query, row.positives, row.negatives) == ("q", ("p",), ("n",))
    assert (row.task, row.in_batch) == ("mails", "none")
    assert (row.query_prompt, row.document_prompt) == (prompt, prompt)
    plain = WANTED.row("q", "p", ["n"], symmetric=False)
    assert (plain.query_prompt, plain.document_prompt) == (prompt, "")
