"""CoSENT against the sum over all pairs of pairs."""

import math

import pytest
import torch
from torch import Tensor

from tercet.errors import RecipeError
from tercet.losses.cosent import cosent

TEMPERATURE = 0.05


def slow(cosines: Tensor, scores: Tensor, scales: Tensor, temperature: float) -> Tensor:
    total = torch.ones((), dtype=cosines.dtype)
    for i in range(len(cosines)):
        for j in range(len(cosines)):
            if scales[i] == scales[j] and scores[i] > scores[j]:
                total = total + ((cosines[j] - cosines[i]) / temperature).exp()
    return total.log()


def made(pairs: int, *, grades: int = 6, scales: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(pairs)
    cosines = torch.rand(pairs, generator=random, dtype=torch.float64) * 2 - 1
    scores = torch.randint(grades, (pairs,), generator=random).double() / 2
    return cosines.requires_grad_(), scores, torch.randint(scales, (pairs,), generator=random)


@pytest.mark.parametrize("pairs", [2, 3, 17, 40])
@pytest.mark.parametrize("scales", [1, 3])
def test_it_is_the_sum_over_all_pairs_of_pairs(pairs: int, scales: int):
    cosines, scores, scale = made(pairs, scales=scales)
    found = cosent(cosines, scores, scale, TEMPERATURE)
    expected = slow(cosines, scores, scale, TEMPERATURE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (by_found,) = torch.autograd.grad(found, cosines)
    (by_expected,) = torch.autograd.grad(expected + 0 * cosines.sum(), cosines)
    torch.testing.assert_close(by_found, by_expected, rtol=1e-10, atol=1e-12)


def test_a_case_by_hand():
    """Scores 1, 2 and 2: the first is below both others, which are not compared."""
    cosines = torch.tensor([0.5, 0.4, 0.7], dtype=torch.float64)
    found = cosent(cosines, torch.tensor([1.0, 2.0, 2.0]), torch.zeros(3, dtype=torch.int64), 0.1)
    assert float(found) == pytest.approx(math.log(1 + math.exp(1) + math.exp(-2)))


def test_only_the_order_of_scores_counts():
    cosines, scores, scale = made(20)
    stretched = cosent(cosines, scores**3 * 7 - 2, scale, TEMPERATURE)
    assert torch.equal(cosent(cosines, scores, scale, TEMPERATURE), stretched)


def test_the_order_of_pairs_does_not_matter():
    cosines, scores, scale = made(30, scales=2)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found = cosent(cosines[order], scores[order], scale[order], TEMPERATURE)
    torch.testing.assert_close(found, cosent(cosines, scores, scale, TEMPERATURE))


@pytest.mark.parametrize("pairs", [0, 1, 4])
def test_pairs_of_one_score_teach_nothing(pairs: int):
    cosines = torch.rand(pairs, dtype=torch.float64, requires_grad=True)
    scores, scale = torch.ones(pairs), torch.zeros(pairs, dtype=torch.int64)
    found = cosent(cosines, scores, scale, TEMPERATURE)
    found.backward()
    assert found.item() == 0
    assert cosines.grad is not None and not cosines.grad.any()


def test_half_precision_is_compared_in_float32():
    """Cosines 2 apart over a temperature of 0.02 are e^100, which only a logarithm holds."""
    cosines = torch.tensor([1.0, -1.0], dtype=torch.bfloat16, requires_grad=True)
    scores, scale = torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cosent(cosines, scores, scale, 0.02)
    found.backward()
    assert found.dtype == torch.float32 and found.item() == pytest.approx(100)
    assert cosines.grad is not None and cosines.grad.dtype == torch.bfloat16
    torch.testing.assert_close(cosines.grad.float(), torch.tensor([50.0, -50.0]))


def test_memory_grows_with_the_pairs_and_not_with_their_square():
    """A matrix of 200,000 pairs would take 160 GB."""
    cosines, scores, scale = made(200_000, grades=1000)
    cosent(cosines, scores, scale, TEMPERATURE).backward()
    assert cosines.grad is not None and bool(cosines.grad.isfinite().all())


def test_a_temperature_of_zero_is_refused():
    cosines, scores, scale = made(2)
    with pytest.raises(RecipeError, match=r"temperature is 0\.0; it must be above zero"):
        cosent(cosines, scores, scale, 0.0)


def test_it_is_that_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    cosines, scores, scale = made(25)

    class Model:
        """Gives the vectors of an angle for each pair, as if they were embedded texts."""

        def __call__(self, features: Tensor) -> dict[str, Tensor]:
            return {"sentence_embedding": features}

    flat = cosines.detach()
    first = torch.stack([torch.ones_like(flat), torch.zeros_like(flat)], 1)
    second = torch.stack([flat, (1 - flat**2).sqrt()], 1)
    theirs = losses.CoSENTLoss(Model(), scale=1 / TEMPERATURE)([first, second], scores)
    ours = cosent(flat, scores, scale, TEMPERATURE)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)
