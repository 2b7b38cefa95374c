import torch

from tercet.kinds import KINDS
from tercet.vectors import Terms, TokenRows, Vectors


def some() -> Vectors:
    return Vectors(
        torch.arange(6.0).view(3, 2),
        Terms(
            torch.tensor([5, 9, 5, 2]),
            torch.tensor([0.1, 0.2, 0.3, 0.0]),
            torch.tensor([0, 3, 3, 4]),
        ),
        TokenRows(torch.arange(10.0).view(5, 2), torch.tensor([0, 2, 4, 5])),
    )


def numbers_of(vectors: Vectors) -> list[list[float]]:
    assert vectors.sparse is not None and vectors.multi is not None
    whole = [vectors.tensors(), [vectors.sparse.ids, vectors.sparse.offsets, vectors.multi.offsets]]
    return [tensor.flatten().tolist() for part in whole for tensor in part]


def test_texts_are_taken_in_any_order_and_more_than_once():
    taken = some().take([2, 0, 0])
    assert taken.dense is not None and taken.dense.tolist() == [[4, 5], [0, 1], [0, 1]]
    assert taken.sparse is not None and taken.multi is not None
    assert taken.sparse.ids.tolist() == [2, 5, 9, 5, 5, 9, 5]
    assert taken.sparse.offsets.tolist() == [0, 1, 4, 7]
    assert taken.multi.vectors[:, 0].tolist() == [8, 0, 2, 0, 2]
    assert len(some().take(slice(1, None))) == 2
    assert len(some().take([])) == 0


def test_joining_what_was_cut_gives_the_whole():
    whole = some()
    parts = [whole.take([i]) for i in range(3)]
    assert numbers_of(Vectors.join(parts)) == numbers_of(whole)
    assert len(Vectors.join([])) == 0


def test_merged_terms_are_unique_and_above_zero():
    sparse = some().sparse
    assert sparse is not None
    merged = sparse.merged()
    assert merged.ids.tolist() == [5, 9]
    assert merged.offsets.tolist() == [0, 2, 2, 2]
    torch.testing.assert_close(merged.weights, torch.tensor([0.3, 0.2]))


def test_of_nothing_has_no_texts_of_every_kind():
    nothing = Vectors.of_nothing(KINDS, 4, 2)
    assert nothing.kinds == KINDS and len(nothing) == 0
    assert nothing.sparse is not None and len(nothing.sparse.merged()) == 0


def test_other_numbers_for_the_same_texts():
    doubled = some().with_tensors([2 * tensor for tensor in some().tensors()])
    assert [t.tolist() for t in doubled.tensors()] == [(2 * t).tolist() for t in some().tensors()]
    assert doubled.only(["sparse"]).kinds == ("sparse",)


def test_a_weight_that_is_no_number_is_not_lost_where_terms_are_merged():
    terms = Terms(torch.tensor([3, 4]), torch.tensor([0.0, torch.nan]), torch.tensor([0, 1, 2]))
    merged = terms.merged()
    assert merged.ids.tolist() == [4] and merged.offsets.tolist() == [0, 0, 1]
    assert bool(merged.weights.isnan().all())
