from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, nan

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tercet.data.batches.relation import relation_of
from tercet.errors import RecipeError
from tercet.losses.info_nce import block_of, info_nce
from tercet.types import IGNORED, NEGATIVE, POSITIVE


@dataclass
class Dense:
    """A relation that is given as a matrix."""

    matrix: Tensor
    elsewhere: int = 0  # positives of other processes

    @property
    def positives(self) -> int:
        return int((self.matrix == POSITIVE).sum()) + self.elsewhere

    def positive_pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        row, column = (self.rows(start, stop) == POSITIVE).nonzero(as_tuple=True)
        return row, column

    def rows(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        return self.matrix[start:stop].to(device)

    def false_negatives(self, start: int, stop: int, logits: Tensor, temperature: float) -> None:
        """Every negative counts."""


def dense(*rows: list[int]) -> Dense:
    return Dense(torch.tensor(rows, dtype=torch.int8))


def identity(size: int) -> Dense:
    return Dense((2 * torch.eye(size) - 1).to(torch.int8))


def slow_info_nce(queries: Tensor, docs: Tensor, relation: Dense, temperature: float) -> Tensor:
    """The equation, term by term: one softmax for each positive, over it and the negatives."""
    logits = queries @ docs.T / temperature
    terms = [
        torch.cat([logits[i, j, None], logits[i][relation.matrix[i] == NEGATIVE]]).logsumexp(0)
        - logits[i, j]
        for i, j in (relation.matrix == POSITIVE).nonzero().tolist()
    ]
    return torch.stack(terms).mean()


def slow_matryoshka(
    queries: Tensor, docs: Tensor, relation: Dense, temperature: float, weights: dict[int, float]
) -> Tensor:
    return torch.stack(
        [
            weight
            * slow_info_nce(
                F.normalize(queries[:, :dim], dim=1),
                F.normalize(docs[:, :dim], dim=1),
                relation,
                temperature,
            )
            for dim, weight in weights.items()
        ]
    ).sum()


def vectors(rows: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of very different lengths, so that a forgotten norm shows."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.rand(rows, 1, generator=random, dtype=torch.float64) + 0.2
    values = torch.randn(rows, dim, generator=random, dtype=torch.float64) * lengths
    return values.to(dtype).requires_grad_()


def mixed_relation() -> Dense:
    """Everything at once: 0 to 3 positives a query, ignored pairs, rows without negatives."""
    random = torch.Generator().manual_seed(1)
    matrix = -torch.randint(0, 2, (13, 19), generator=random, dtype=torch.int8)
    matrix[torch.arange(13), torch.arange(13)] = POSITIVE
    matrix[3, 14] = matrix[3, 15] = matrix[4, 3] = POSITIVE
    matrix[5] = NEGATIVE
    matrix[6] = IGNORED
    matrix[7][matrix[7] == NEGATIVE] = IGNORED
    return Dense(matrix)


def assert_same_loss_and_gradients(fast: Tensor, slow: Tensor, leaves: Sequence[Tensor]) -> None:
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    ours, theirs = torch.autograd.grad(fast, leaves), torch.autograd.grad(slow, leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [1, 2, 5, 12, 13, 100, None])
def test_loss_and_gradients_equal_the_slow_formula_for_every_block(block: int | None):
    queries, docs, relation = vectors(13, 7), vectors(19, 7, seed=1), mixed_relation()
    fast = info_nce(queries, docs, relation, 0.3, block=block)
    assert_same_loss_and_gradients(
        fast, slow_info_nce(queries, docs, relation, 0.3), [queries, docs]
    )


@pytest.mark.parametrize("block", [1, 5, None])
@pytest.mark.parametrize("weights", [{7: 1.0}, {4: 0.5, 7: 2.0}, {1: 0.2, 3: 0.3, 5: 0.5}])
def test_prefixes_equal_the_slow_formula_on_cut_and_scaled_vectors(
    weights: dict[int, float], block: int | None
):
    queries, docs, relation = vectors(13, 7), vectors(19, 7, seed=1), mixed_relation()
    fast = info_nce(queries, docs, relation, 0.3, dims=weights, block=block)
    slow = slow_matryoshka(queries, docs, relation, 0.3, weights)
    assert_same_loss_and_gradients(fast, slow, [queries, docs])


def test_prefixes_without_weights_are_averaged_in_any_order():
    queries, docs, relation = vectors(5, 4), vectors(5, 4, seed=1), identity(5)
    expected = info_nce(queries, docs, relation, 0.3, dims={2: 0.5, 4: 0.5})
    torch.testing.assert_close(info_nce(queries, docs, relation, 0.3, dims=[4, 2]), expected)


@pytest.mark.parametrize("dims", [None, [2, 3, 5]])
def test_gradients_equal_finite_differences(dims: list[int] | None):
    queries, docs = vectors(6, 5), vectors(8, 5, seed=1)
    relation = Dense(mixed_relation().matrix[2:8, 2:10])
    assert torch.autograd.gradcheck(
        lambda q, d: info_nce(q, d, relation, 0.5, dims=dims, block=4), (queries, docs)
    )


def test_one_positive_a_query_is_cross_entropy():
    queries, docs = vectors(6, 4), vectors(6, 4, seed=1)
    expected = F.cross_entropy(queries @ docs.T / 0.05, torch.arange(6))
    fast = info_nce(queries, docs, identity(6), 0.05)
    assert_same_loss_and_gradients(fast, expected, [queries, docs])


def test_a_relation_of_texts_is_taken_as_it_is():
    relation = relation_of(["a", "b"], [["x", "y"], ["z"]], [["n"], []])
    queries, docs = vectors(2, 3), vectors(4, 3, seed=1)
    slow = slow_info_nce(queries, docs, Dense(relation.rows(0, 2)), 0.3)
    assert_same_loss_and_gradients(info_nce(queries, docs, relation, 0.3), slow, [queries, docs])


def test_the_mean_is_over_the_positives_of_the_whole_batch():
    """Trap A2 of Arctic-Embed."""
    queries, docs = vectors(4, 3), vectors(4, 3, seed=1)
    shared = info_nce(queries, docs, Dense(identity(4).matrix, elsewhere=8), 0.3)
    expected = info_nce(queries, docs, identity(4), 0.3) / 3
    assert_same_loss_and_gradients(shared, expected, [queries, docs])


def test_two_positives_and_none_is_not_one_and_one():
    # As many positives as queries, but not one each: they may not be matched up by position.
    """Trap A3 of Arctic-Embed."""
    relation = dense([POSITIVE, POSITIVE, NEGATIVE], [NEGATIVE, NEGATIVE, NEGATIVE])
    queries, docs = vectors(2, 3), vectors(3, 3, seed=1)
    logits = queries[0] @ docs.T / 0.2
    expected = torch.stack([F.softplus(logits[2] - logits[i]) for i in (0, 1)]).mean()
    assert_same_loss_and_gradients(
        info_nce(queries, docs, relation, 0.2), expected, [queries, docs]
    )


@pytest.mark.parametrize("dims", [None, [2, 4]])
def test_a_batch_without_positives_has_zero_loss_and_a_warning(dims: list[int] | None):
    """Trap A4 of Arctic-Embed."""
    queries, docs = vectors(2, 4), vectors(3, 4, seed=1)
    with pytest.warns(UserWarning, match="no query of this batch has a positive"):
        loss = info_nce(
            queries, docs, Dense(torch.full((2, 3), -1, dtype=torch.int8)), 0.02, dims=dims
        )
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, [queries, docs]))


@pytest.mark.parametrize("dims", [None, [2, 4]])
def test_a_query_without_negatives_has_zero_loss_and_gradient(dims: list[int] | None):
    queries, docs = vectors(1, 4), vectors(2, 4, seed=1)
    loss = info_nce(queries, docs, dense([POSITIVE, IGNORED]), 0.02, dims=dims)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, [queries, docs]))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.filterwarnings("ignore:no query of this batch")
def test_a_process_without_queries_or_documents_has_zero_loss(shape: tuple[int, int]):
    queries, docs = vectors(shape[0], 4), vectors(shape[1], 4, seed=1)
    for dims in (None, [2, 4]):
        loss = info_nce(queries, docs, Dense(torch.zeros(shape, dtype=torch.int8)), 0.1, dims=dims)
        assert loss == 0
        assert torch.autograd.grad(loss, docs)[0].shape == docs.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [None, [4, 8]])
def test_half_precision_vectors_are_scored_in_float32(dtype: torch.dtype, dims: list[int] | None):
    """Trap A5 of Arctic-Embed."""
    queries, docs = vectors(9, 8, dtype=dtype), vectors(9, 8, seed=1, dtype=dtype)
    wide = queries.detach().float().requires_grad_(), docs.detach().float().requires_grad_()
    loss = info_nce(queries, docs, identity(9), 0.02, dims=dims)
    expected = info_nce(wide[0], wide[1], identity(9), 0.02, dims=dims)
    assert loss.dtype == torch.float32
    assert loss == expected
    for ours, theirs in zip(
        torch.autograd.grad(loss, [queries, docs]), torch.autograd.grad(expected, wide), strict=True
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dims", [None, [4, 8]])
def test_autocast_does_not_round_the_scores(dims: list[int] | None):
    """Trap A5 of Arctic-Embed."""
    queries, docs = vectors(9, 8, dtype=torch.float32), vectors(9, 8, dtype=torch.float32, seed=1)
    expected = info_nce(queries, docs, identity(9), 0.02, dims=dims)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert info_nce(queries, docs, identity(9), 0.02, dims=dims) == expected


def test_a_small_float16_gradient_survives_when_the_loss_is_scaled():
    # An almost solved pair: a gradient of -24 / e^24 is zero in float16.
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float16, requires_grad=True)
    docs = torch.tensor([[12.0, 0.0], [-12.0, 0.0]], dtype=torch.float16)
    loss = info_nce(queries, docs, dense([POSITIVE, NEGATIVE]), 1.0)
    (gradient,) = torch.autograd.grad(loss * 65536, queries)
    assert float(gradient[0, 0]) == pytest.approx(-24 / exp(24) * 65536, rel=1e-2)


def test_an_ignored_pair_weighs_nothing_beside_scores_that_are_far_below_it():
    queries, docs = torch.ones(1, 1), torch.tensor([[-300.0], [-301.0], [0.0]])
    loss = info_nce(queries, docs, dense([POSITIVE, NEGATIVE, IGNORED]), 0.01)
    assert float(loss) == pytest.approx(exp(-100), abs=1e-30)


@pytest.mark.parametrize("dims", [None, [2, 4]])
@pytest.mark.parametrize("temperature", [1e-3, 10.0])
def test_extreme_temperatures_stay_finite(temperature: float, dims: list[int] | None):
    queries, docs = vectors(6, 4, dtype=torch.float32), vectors(6, 4, seed=1, dtype=torch.float32)
    loss = info_nce(queries, docs, identity(6), temperature, dims=dims)
    wide = queries.detach().double(), docs.detach().double()
    expected = info_nce(wide[0], wide[1], identity(6), temperature, dims=dims)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    for gradient in torch.autograd.grad(loss, [queries, docs]):
        assert gradient.isfinite().all()


def test_a_prefix_of_zeros_scores_zero_and_learns_from_the_longer_ones():
    queries, docs = vectors(4, 5), vectors(4, 5, seed=1)
    with torch.no_grad():
        queries[2, :3] = 0
    loss = info_nce(queries, docs, identity(4), 0.1, dims=[3, 5])
    by_queries, by_docs = torch.autograd.grad(loss, [queries, docs])
    assert by_queries.isfinite().all()
    assert by_docs.isfinite().all()
    assert (by_queries[2] != 0).all()


@pytest.mark.parametrize("dims", [None, [2, 4]])
def test_vectors_that_do_not_learn_get_no_gradient(dims: list[int] | None):
    queries, docs = vectors(3, 4), vectors(3, 4, seed=1)
    expected = torch.autograd.grad(info_nce(queries, docs, identity(3), 0.1, dims=dims), docs)[0]
    loss = info_nce(queries.detach(), docs, identity(3), 0.1, dims=dims)
    loss.backward()
    torch.testing.assert_close(docs.grad, expected)
    assert queries.grad is None


def test_matrix_products_nobody_wants_are_left_out():
    queries, docs = vectors(3, 4), vectors(3, 4, seed=1)

    def products(queries: Tensor, docs: Tensor) -> int:
        with Largest() as seen:
            info_nce(queries, docs, identity(3), 0.1)
        return seen.products

    assert products(queries, docs) == 3
    assert products(queries.detach(), docs) == products(queries, docs.detach()) == 2
    with torch.no_grad():
        assert products(queries, docs) == 1


def test_gradients_are_not_differentiable_a_second_time():
    queries, docs = vectors(3, 4), vectors(3, 4, seed=1)
    squared = info_nce(queries, docs, identity(3), 0.1) ** 2
    (gradient,) = torch.autograd.grad(squared, queries, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Largest(TorchDispatchMode):
    """Watches the tensors that are made: the largest one, and the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.products += func.__name__.split(".")[0] in {"mm", "addmm", "addmm_"}
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("dims", [None, [4, 8]])
def test_no_tensor_is_as_large_as_queries_times_documents(dims: list[int] | None):
    size, block = 2048, 64
    texts = [[str(i)] for i in range(size)]
    queries = vectors(size, 8, dtype=torch.float32)
    docs = vectors(size, 8, dtype=torch.float32, seed=1)
    with Largest() as seen:
        relation = relation_of([f"q{i}" for i in range(size)], texts, [[]] * size)
        info_nce(queries, docs, relation, 0.05, dims=dims, block=block).backward()
    assert seen.numbers == block * size


@pytest.mark.parametrize("docs", [1, 1000, 32_768, 1_000_000])
def test_a_block_never_reaches_two_to_the_31_scores(docs: int):
    """Trap A17 of Arctic-Embed."""
    for device, most in (("cpu", 1024), ("cuda", 8192)):
        block = block_of(docs, device=torch.device(device))
        assert 16 <= block <= most
        assert block * docs < 2**31
        assert block_of(docs, prefixes=6, device=torch.device(device)) <= block


@pytest.mark.parametrize("temperature", [0.0, -0.02])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float):
    with pytest.raises(RecipeError, match="it must be above zero"):
        info_nce(vectors(2, 3), vectors(2, 3), identity(2), temperature)


@pytest.mark.parametrize("dim", [0, 4])
def test_a_prefix_that_vectors_do_not_have_is_refused(dim: int):
    with pytest.raises(RecipeError, match=f"prefix of {dim} dimensions asked of vectors with 3"):
        info_nce(vectors(2, 3), vectors(2, 3), identity(2), 0.1, dims=[dim, 3])


def test_a_prefix_given_twice_is_refused_instead_of_weighing_half():
    with pytest.raises(
        RecipeError, match=r"prefixes of \[2, 2\] dimensions; give each length once"
    ):
        info_nce(vectors(2, 3), vectors(2, 3), identity(2), 0.1, dims=[2, 2])


def test_a_vector_that_is_not_a_number_gives_such_a_loss():
    queries = vectors(2, 3)
    with torch.no_grad():
        queries[0, 0] = nan
    assert info_nce(queries, vectors(2, 3, seed=1), identity(2), 0.1).isnan()
