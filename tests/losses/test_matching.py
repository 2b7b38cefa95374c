import pytest
import torch
import torch.nn.functional as F

from tercet.losses.matching import Matched, cosine_distance, relational

TEXTS, DIM, WIDER = 7, 5, 8


def slow_relational(student, teacher, temperature):
    """Text by text, over the other texts alone."""
    terms = []
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]
        wanted, found = (
            torch.stack([F.cosine_similarity(of[i], of[j], dim=0) for j in others]) / temperature
            for of in (teacher, student)
        )
        p, q = wanted.softmax(0), found.softmax(0)
        terms.append((p * (p.log() - q.log())).sum())
    return torch.stack(terms).mean()


def vectors(dtype=torch.float64):
    student = torch.randn(TEXTS, DIM, dtype=dtype, requires_grad=True)
    return student, torch.randn(TEXTS, WIDER, dtype=dtype)


def alone(rows, width=None):
    return Matched(rows, rows).prefix(width or rows.shape[1])


@pytest.mark.parametrize("block", [1, 3, 7, None])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_neighbours_and_their_gradient_are_those_of_the_slow_formula(block, temperature):
    student, teacher = vectors()
    loss = relational(alone(student), alone(teacher), temperature, block=block)
    expected = slow_relational(student, teacher, temperature)
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(3 * each, student)[0] for each in (loss, expected))
    torch.testing.assert_close(got, wanted)


def test_equal_neighbours_cost_nothing_and_have_no_gradient():
    student, _ = vectors()
    loss = relational(alone(student), alone(student.detach()), 0.05)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.zeros_like(student))


def test_a_text_alone_has_no_neighbours_and_no_texts_have_no_loss():
    for count in (1, 0):
        student, teacher = torch.randn(count, DIM, requires_grad=True), torch.randn(count, WIDER)
        loss = relational(alone(student), alone(teacher), 0.05)
        loss.backward()
        assert loss == 0 and student.grad is not None and not student.grad.any()
    assert cosine_distance(alone(student), alone(torch.randn(0, DIM))) == 0


def test_the_distance_is_half_the_square_of_that_of_unit_vectors():
    student, teacher = vectors()[0], torch.randn(TEXTS, DIM, dtype=torch.float64)
    loss = cosine_distance(alone(student), alone(teacher))
    apart = F.normalize(student, dim=1) - F.normalize(teacher, dim=1)
    torch.testing.assert_close(loss, apart.square().sum(1).mean() / 2)


def test_a_prefix_is_scaled_again_before_it_is_compared():
    student, teacher = vectors()[0], torch.randn(TEXTS, DIM, dtype=torch.float64)
    expected = 1 - F.cosine_similarity(student[:, :2], teacher[:, :2]).mean()
    torch.testing.assert_close(cosine_distance(alone(student, 2), alone(teacher, 2)), expected)


@pytest.mark.parametrize("split", [0, 2, 7])
def test_shares_of_two_processes_add_up_to_the_whole(split):
    """As by gather_rows, the gradient by a text's row among all returns to its process."""
    student, teacher = vectors()
    parts = [slice(0, split), slice(split, TEXTS)]
    losses = [
        relational(
            Matched(student[part], student).prefix(DIM),
            Matched(teacher[part], teacher).prefix(WIDER),
            0.2,
            first=part.start,
            block=2,
        )
        for part in parts
    ]
    whole = relational(alone(student), alone(teacher), 0.2)
    torch.testing.assert_close(losses[0] + losses[1], whole, rtol=1e-9, atol=1e-9)
    got, expected = (
        torch.autograd.grad(each, student)[0] for each in (losses[0] + losses[1], whole)
    )
    torch.testing.assert_close(got, expected)


def test_similarities_of_bfloat16_vectors_are_summed_in_float32():
    student, teacher = (each.detach().bfloat16() for each in vectors(torch.float32))
    loss = relational(alone(student), alone(teacher), 0.05)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, slow_relational(student.float(), teacher.float(), 0.05))
