from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from tercet.data.batches.relation import relation_of
from tercet.losses.info_nce import info_nce
from tercet.models.network.chunked import Chunks, backward_in_chunks
from tercet.segments import Packed, total
from tests.toy import pack, random_texts

LENGTHS = [3, 7, 2, 5, 1, 4, 6, 2]  # four queries, four documents; 30 tokens
RELATION = relation_of(list("abcd"), [["w"], ["x"], ["y"], ["z"]], [[], [], [], []])


class TinyEmbedder(nn.Module):
    """Two layers and dropout over a mean of tokens; it remembers how many texts it was given."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 8)
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 6)
        self.drop = nn.Dropout(dropout)
        self.calls: list[tuple[int, bool]] = []

    def forward(self, texts: Packed) -> Tensor:
        self.calls.append((len(texts), torch.is_grad_enabled()))
        hidden = self.drop(self.table(texts.ids))
        hidden = self.drop(torch.tanh(self.inner(hidden)))
        mean = total(hidden, texts.offsets) / texts.offsets.diff()[:, None]
        return self.outer(mean)


def batch() -> Packed:
    return pack(*random_texts(*LENGTHS))


def loss_of(embeddings: Tensor) -> dict[str, Tensor]:
    loss = info_nce(embeddings[:4], embeddings[4:], RELATION, 0.5)
    return {"loss": loss, "width": embeddings.norm(dim=1).mean()}


def matryoshka(embeddings: Tensor) -> dict[str, Tensor]:
    return {"loss": info_nce(embeddings[:4], embeddings[4:], RELATION, 0.5, dims=[2, 4, 6])}


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def chunked(
    model: nn.Module,
    texts: Packed,
    chunks: Chunks,
    loss_of: Callable[[Tensor], dict[str, Tensor]] = loss_of,
) -> list[Tensor]:
    backward_in_chunks(model, texts, loss_of, chunks=chunks)
    return gradients(model)


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("objective", [loss_of, matryoshka])
@pytest.mark.parametrize("graph_tokens", [0, 15, None])
@pytest.mark.parametrize("max_tokens", [1, 7, 12, 100])
def test_gradient_is_that_of_the_whole_batch(
    max_tokens: int, graph_tokens: int | None, objective: Callable[[Tensor], dict[str, Tensor]]
):
    """Trap A6 of Arctic-Embed."""
    model, texts = TinyEmbedder().eval().double(), batch()
    objective(model(texts))["loss"].backward()
    expected = gradients(model)
    found = chunked(model, texts, Chunks(max_tokens, graph_tokens), objective)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("graph_tokens", [0, 4, 11, 15, 29])
def test_gradient_is_the_same_to_the_last_bit_whatever_is_kept(graph_tokens: int):
    """Trap A7 of Arctic-Embed."""
    model, texts = TinyEmbedder(), batch()  # dropout is on
    kept = chunked(model, texts, Chunks(7, None, seed=5))
    assert_same_bits(chunked(model, texts, Chunks(7, graph_tokens, seed=5)), kept)


def test_dropout_of_the_second_pass_is_that_of_the_first():
    """Trap A7 of Arctic-Embed."""
    model, texts = TinyEmbedder(), batch()
    seen: list[Tensor] = []

    def embed(texts: Packed) -> Tensor:
        seen.append(model(texts))
        return seen[-1]

    backward_in_chunks(embed, texts, loss_of, chunks=Chunks(7, 0))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert_same_bits([x.detach() for x in first], [x.detach() for x in reversed(second)])


def test_each_chunk_and_each_seed_has_its_own_dropout():
    drop = nn.Dropout(0.5)
    seen: list[Tensor] = []

    def embed(texts: Packed) -> Tensor:
        seen.append(drop(torch.ones(len(texts), 40, requires_grad=True)))
        return seen[-1]

    texts = pack(*random_texts(3, 3, 3))
    for seed in (0, 1):
        backward_in_chunks(embed, texts, lambda x: {"loss": x.sum()}, chunks=Chunks(3, seed=seed))
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 6


def test_random_state_of_the_caller_is_left_as_it_was():
    model, texts = TinyEmbedder(), batch()
    before = torch.get_rng_state()
    chunked(model, texts, Chunks(7, 0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("graph_tokens", "without_graph", "with_graph"),
    [(0, 5, 5), (4, 5, 5), (5, 4, 5), (12, 3, 5), (30, 0, 5), (None, 0, 5)],
)
def test_only_chunks_beyond_the_budget_are_embedded_twice(
    graph_tokens: int | None, without_graph: int, with_graph: int
):
    model = TinyEmbedder()
    chunked(model, batch(), Chunks(7, graph_tokens))
    # Chunks of 7, 6, 5, 4 + 3 and 2 + 2 + 1 tokens.
    assert [n for n, graph in model.calls if not graph] == [1, 1, 1, 2, 3][:without_graph]
    assert sum(graph for _, graph in model.calls) == with_graph


@pytest.mark.parametrize("graph_tokens", [0, 12])
def test_lora_weights_get_the_same_gradient_and_frozen_ones_none(graph_tokens: int):
    model = TinyEmbedder()
    config = LoraConfig(r=2, target_modules=["inner", "outer"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    texts = batch()
    kept = chunked(model, texts, Chunks(7))
    assert len(kept) == 4  # A and B of two layers
    assert_same_bits(chunked(model, texts, Chunks(7, graph_tokens)), kept)
    assert model.table.weight.grad is None


@pytest.mark.parametrize("graph_tokens", [0, 12])
def test_autocast_of_the_caller_reaches_both_passes_and_every_weight(graph_tokens: int):
    model, texts = TinyEmbedder(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = chunked(model, texts, Chunks(7))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # its own cache of weights
        again = chunked(model, texts, Chunks(7, graph_tokens))
    assert len(kept) == 5
    assert_same_bits(again, kept)
    wide = chunked(model, texts, Chunks(7))
    assert not any(torch.equal(x, y) for x, y in zip(kept, wide, strict=True))


def test_losses_come_back_by_name_and_detached():
    model, texts = TinyEmbedder().eval(), batch()
    losses = backward_in_chunks(model, texts, loss_of, chunks=Chunks(7, 0))
    expected = loss_of(model(texts))
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, expected[name].detach())


def test_a_loss_that_is_not_finite_is_returned_and_its_gradients_are_not_finite():
    model = TinyEmbedder()
    losses = backward_in_chunks(
        model, batch(), lambda x: {"loss": x.sum() * float("nan")}, chunks=Chunks(7, 12)
    )
    assert losses["loss"].isnan()
    assert all(gradient.isnan().any() for gradient in gradients(model))


def test_a_loss_of_zero_gives_zero_gradients():
    model = TinyEmbedder()
    found = chunked(model, batch(), Chunks(7, 0), lambda x: {"loss": x.sum() * 0})
    assert len(found) == 5
    assert all((gradient == 0).all() for gradient in found)


def test_a_loss_that_does_not_depend_on_the_texts_gives_no_gradient():
    model = TinyEmbedder()
    assert chunked(model, batch(), Chunks(7, 0), lambda x: {"loss": torch.zeros(())}) == []


def test_a_weight_of_the_loss_itself_learns_too():
    model, scale = TinyEmbedder(), nn.Parameter(torch.tensor(2.0))
    chunked(model, batch(), Chunks(7, 0), lambda x: {"loss": (x * scale).sum()})
    assert scale.grad is not None


def test_gradients_are_added_to_those_already_there():
    model, texts = TinyEmbedder().eval().double(), batch()
    once = chunked(model, texts, Chunks(7))
    backward_in_chunks(model, texts, loss_of, chunks=Chunks(7))
    twice = chunked(model, texts, Chunks(7))
    torch.testing.assert_close(twice, [2 * gradient for gradient in once])
