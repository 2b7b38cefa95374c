"""Two processes against one. Run as a script, this file is one of the two."""

import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tercet import distributed
from tercet.data.batches.relation import Relation, relation_of
from tercet.losses.info_nce import info_nce
from tercet.models.network.chunked import Chunks, backward_in_chunks
from tercet.segments import Packed, offsets_of, total
from tercet.types import InBatch
from tests.processes import run_together

SHARES = [slice(0, 5), slice(5, 8)]  # eight examples on two processes

# "twin", "early" and the query "c" stand on both sides of the cut.
QUERIES = ["a", "b", "c", "d", "e", "f", "c", "h"]
POSITIVES = [
    ["p0"],
    ["twin"],
    ["p2", "q2"],
    ["p3", "early", "r3"],
    ["p4"],
    ["twin"],
    ["p6"],
    ["p7"],
]
NEGATIVES = [["n0"], [], ["n2", "p3"], [], ["n4"], ["n5", "m5"], ["early"], []]
POLICIES: dict[str, list[InBatch]] = {
    "in-batch": ["all"] * 8,
    "own": ["none"] * 8,
    "blended": ["all", "none", "positives", "all", "none", "all", "positives", "all"],
}
DIMS = {"whole": None, "prefixes": [2, 4, 6]}
CASES = list(product(POLICIES, DIMS))


class Embedder(nn.Module):
    """Letters to vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(128, 6, dtype=torch.float64))

    def forward(self, texts: Packed) -> Tensor:
        return torch.tanh(total(self.table[texts.ids], texts.offsets))


def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder()


def letters(texts: list[str]) -> Packed:
    ids = torch.tensor([ord(letter) for text in texts for letter in text])
    offsets = offsets_of(torch.tensor([len(text) for text in texts]))
    return Packed(ids, offsets, torch.ones_like(ids, dtype=torch.bool))


def relation(share: slice, policy: str) -> Relation:
    return relation_of(
        QUERIES[share], POSITIVES[share], NEGATIVES[share], in_batch=POLICIES[policy][share]
    )


def texts_of(share: slice) -> Packed:
    documents = zip(POSITIVES[share], NEGATIVES[share], strict=True)
    return letters(QUERIES[share] + [text for both in documents for text in (*both[0], *both[1])])


def step(share: slice, policy: str, dims: list[int] | None) -> dict[str, Tensor]:
    """Loss and gradient of some of the examples, as a training loop takes them."""
    model, queries = embedder(), len(QUERIES[share])

    def loss_of(embeddings: Tensor) -> dict[str, Tensor]:
        docs = distributed.gather_rows(embeddings[queries:])
        everybody = relation(share, policy).gathered()
        return {"loss": info_nce(embeddings[:queries], docs, everybody, 0.5, dims=dims)}

    chunks = Chunks(max_tokens=9, graph_tokens=12)
    loss = backward_in_chunks(model, texts_of(share), loss_of, chunks=chunks)["loss"]
    assert model.table.grad is not None
    own = model.table.grad.clone()
    distributed.sum_gradients(model.parameters())
    return {"loss": loss, "own": own, "gradient": model.table.grad}


def sparse_gradients(rank: int) -> list[Tensor | None]:
    """Weights that both, one or none of the processes have a gradient for, in two dtypes."""
    dtypes = [torch.float64, torch.bfloat16, torch.float64, torch.float64]
    weights = [nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for dtype in dtypes]
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    weights[0].grad = torch.full_like(weights[0], 1.0 + rank)
    weights[1].grad = torch.full_like(weights[1], 256.0 if rank else 2.0)
    if rank == 1:
        weights[2].grad = torch.full_like(weights[2], 7.0)
    distributed.sum_gradients([*weights, frozen])
    return [weight.grad for weight in weights]


def gradient_of_gathered_rows(rank: int) -> Tensor:
    """Each process weighs every row by its own factor, so a row's gradient is the factors' sum."""
    rows = torch.ones(2 + rank, 3, requires_grad=True)
    columns = distributed.gather_rows(rows).T  # its gradient comes back transposed in memory
    (columns * torch.full((3, 5), 10.0**rank)).sum().backward()
    assert rows.grad is not None
    return rows.grad


def gradient_autograd_owns(rank: int) -> Tensor:
    """The gradient of the sum itself, which backward may not change."""
    rows = torch.ones(2, 3, requires_grad=True)
    by_rows = torch.full((4, 3), 1.0 + rank)
    distributed.gather_rows(rows).backward(by_rows)
    return by_rows


def one_of_two(out: Path) -> None:
    """What one of the two processes does, for the tests below to look at."""
    torch.set_num_threads(1)
    distributed.start()
    distributed.start()  # a second time does nothing
    rank = distributed.rank()
    share = SHARES[rank]
    facts: dict[str, Any] = {
        "world": distributed.world(),
        "is_main": distributed.is_main(),
        "local_world_size": distributed.local_world_size(),
        "steps": {case: step(share, case[0], DIMS[case[1]]) for case in CASES},
        "rows": relation(share, "blended").gathered().rows(0, len(QUERIES[share])),
        "positives": relation(share, "blended").gathered().positives,
        "gathered": distributed.gather_rows(torch.full((2 + rank, 3), float(rank))),
        "gathered half": distributed.gather_rows(torch.full((1, 2), 0.5, dtype=torch.bfloat16)),
        "gathered ints": distributed.gather_ints(torch.arange(3 * rank)),  # none of rank 0
        "gathered gradient": gradient_of_gathered_rows(rank),
        "gradient left alone": gradient_autograd_owns(rank),
        "sparse gradients": sparse_gradients(rank),
        "object": distributed.broadcast_object({"from": rank}, source=1),
    }
    distributed.barrier()
    torch.save(facts, out / f"{rank}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """The facts that two processes, described as torchrun does it, came back with."""
    out = tmp_path_factory.mktemp("both")
    run_together(__file__, str(out))
    yield [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_with_unequal_shares_give_the_gradient_of_one(both, case):
    """Traps A1 and A20 of Arctic-Embed."""
    alone = step(slice(None), case[0], DIMS[case[1]])
    steps = [facts["steps"][case] for facts in both]
    torch.testing.assert_close(steps[0]["gradient"], alone["gradient"], rtol=0, atol=1e-12)
    assert torch.equal(steps[0]["gradient"], steps[1]["gradient"])
    torch.testing.assert_close(
        steps[0]["loss"] + steps[1]["loss"], alone["loss"], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_mean_over_processes_is_not_that_gradient(both, case):
    """Trap A1 of Arctic-Embed."""
    alone = step(slice(None), case[0], DIMS[case[1]])["gradient"]
    mean = torch.stack([facts["steps"][case]["own"] for facts in both]).mean(0)
    assert (mean - alone).abs().max() > 0.1 * alone.abs().max()


def test_each_process_counts_the_positives_of_both(both):
    """Trap A2 of Arctic-Embed."""
    assert [facts["positives"] for facts in both] == [11, 11]


def test_equal_texts_are_found_across_processes(both):
    """Trap A16 of Arctic-Embed."""
    alone = relation(slice(None), "blended").rows(0, len(QUERIES))
    assert torch.equal(torch.cat([facts["rows"] for facts in both]), alone)


def test_each_process_knows_its_place(both):
    assert [(facts["world"], facts["is_main"]) for facts in both] == [(2, True), (2, False)]
    assert [facts["local_world_size"] for facts in both] == [2, 2]


def test_gathered_rows_are_in_the_order_of_the_processes(both):
    for facts in both:
        assert facts["gathered"][:, 0].tolist() == [0, 0, 1, 1, 1]
        assert facts["gathered half"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert facts["gathered ints"].tolist() == [0, 1, 2]


def test_gradient_of_a_gathered_row_is_summed_and_goes_home(both):
    for rank, facts in enumerate(both):
        assert torch.equal(facts["gathered gradient"], torch.full((2 + rank, 3), 11.0))
        assert torch.equal(facts["gradient left alone"], torch.full((4, 3), 1.0 + rank))


def test_a_gradient_that_one_process_lacks_counts_as_zero_there(both):
    for facts in both:
        first, half, lopsided, nowhere = facts["sparse gradients"]
        assert torch.equal(first, torch.full((2, 3), 3.0, dtype=torch.float64))
        assert torch.equal(half, torch.full((2, 3), 258.0, dtype=torch.bfloat16))
        assert torch.equal(lopsided, torch.full((2, 3), 7.0, dtype=torch.float64))
        assert nowhere is None


def test_an_object_is_sent_from_its_source(both):
    assert [facts["object"] for facts in both] == [{"from": 1}, {"from": 1}]


@pytest.mark.parametrize(("on_gpus", "backend"), [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_processes_wait_for_hours_for_one_that_prepares_data(monkeypatch, on_gpus, backend):
    joined: list[tuple[str, timedelta]] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        distributed.dist,
        "init_process_group",
        lambda name, *, timeout, device_id=None: joined.append((name, timeout)),
    )
    distributed.start()
    distributed.start(wait=timedelta(minutes=1))
    assert joined == [(backend, timedelta(hours=12)), (backend, timedelta(minutes=1))]


def test_everything_is_the_identity_for_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    distributed.start()
    rows, ints = torch.randn(2, 3, requires_grad=True), torch.arange(4)
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    distributed.sum_gradients([weight])
    distributed.barrier()
    distributed.stop()
    assert distributed.gather_rows(rows) is rows
    assert distributed.gather_ints(ints) is ints
    assert weight.grad.tolist() == [1, 1]
    assert distributed.broadcast_object("x") == "x"
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    assert distributed.local_world_size() == 1


def test_small_gradients_share_a_message_and_a_large_one_has_its_own(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET_NUMBERS", 5)
    sizes = [2, 3, 1, 9, 4]
    buckets = distributed._buckets([torch.zeros(size) for size in sizes])
    assert [[len(tensor) for tensor in bucket] for bucket in buckets] == [[2, 3], [1], [9], [4]]


def test_gradients_of_one_dtype_share_a_message_wherever_they_stand():
    dtypes = [torch.float32, torch.float64, torch.float32]
    buckets = distributed._buckets([torch.zeros(2, dtype=dtype) for dtype in dtypes])
    assert [len(bucket) for bucket in buckets] == [2, 1]


def test_bfloat16_gradients_of_many_processes_are_summed_in_float32(monkeypatch):
    def two_others_add_one(message: Tensor) -> None:
        for _ in range(2):
            message += 1  # 257 does not exist in bfloat16

    monkeypatch.setattr(torch.distributed, "all_reduce", two_others_add_one)
    gradient = torch.full((3,), 256.0, dtype=torch.bfloat16)
    distributed._sum_in_place([gradient])
    assert gradient.tolist() == [258, 258, 258]


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
