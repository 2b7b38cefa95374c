"""What is chosen for a GPU, by what it says of itself; none is needed here."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tercet.errors import RecipeError
from tercet.models import devices
from tercet.models.devices import (
    encoded_tokens,
    exact_products,
    find_device,
    free_bytes,
    take_own_gpu,
)
from tercet.models.embedder import Embedder

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def card(monkeypatch):
    """A GPU of 80 GB, of which others take 10 and torch's allocator keeps 6, 4 of them in use."""
    facts = SimpleNamespace(capability=(9, 0), count=1, free=64e9, total=80e9, part=1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: facts.count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts.capability)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (int(facts.free), int(facts.total))
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(4e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(6e9))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: facts.part)
    return facts


@pytest.fixture
def found(monkeypatch):
    """Make torch find the devices that are named, and remember the mode of its products."""
    made = torch.zeros

    def zeros(*size, device=None, **options):
        place = torch.device(device or "cpu")
        if place.type == "cuda":
            return SimpleNamespace(device=torch.device("cuda", place.index or 0))
        return made(*size, device=device, **options)

    monkeypatch.setattr(torch, "zeros", zeros)
    mode = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(mode)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), "float32"), ((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_a_gpu_that_computes_in_bfloat16_does_so_unless_told_otherwise(card, capability, expected):
    card.capability = capability
    assert devices.number_type(GPU) == expected
    assert devices.number_type(CPU) == "float32"


def test_float32_on_a_gpu_takes_tf32_but_not_where_states_are_compared(card, found):
    assert find_device("cpu") == CPU
    assert torch.get_float32_matmul_precision() == "highest"  # a CPU changes nothing
    assert find_device() == GPU
    assert torch.get_float32_matmul_precision() == "high"
    with exact_products():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"


def test_one_gpu_for_all_processes_of_a_machine_is_refused(card, found, monkeypatch):
    monkeypatch.setattr(devices.distributed, "local_world_size", lambda: 4)
    card.count = 4
    assert find_device("cuda") == GPU  # that of this process
    with pytest.raises(RecipeError, match=r"must be cuda for several processes.* got cuda:0"):
        find_device("cuda:0")
    card.count = 1  # the launcher shows each process its own one
    assert find_device("cuda:0") == GPU


def test_what_the_allocator_keeps_is_free(card):
    assert free_bytes(GPU) == 64e9 + 2e9
    card.part = 0.25  # of 80 GB, 4 of which are in use
    assert free_bytes(GPU) == 20e9 - 4e9
    card.part, card.free = 0.02, 1e9
    assert free_bytes(GPU) == 0


class Card(Embedder):
    """An embedder whose weights say that they are on a GPU."""

    device = property(lambda self: GPU)  # pyright: ignore


def test_batches_are_those_of_the_device_where_the_weights_are_now(card, encoder_folder):
    embedder = Embedder.load(encoder_folder)
    assert embedder.batch_tokens == 2_048
    embedder.__class__ = Card  # as after .to("cuda")
    assert embedder.batch_tokens == devices.MOST_ON_GPU  # a tiny model
    embedder.batch_tokens = 4_000
    assert embedder.batch_tokens == 4_000


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [(10_600_000, 131_072), (85_000_000, 32_768), (303_000_000, 8_192), (7_000_000_000, 2_048)],
)
def test_a_small_model_encodes_more_tokens_together(numbers, expected):
    assert devices.usual_tokens(GPU, numbers) == expected
    assert devices.usual_tokens(CPU, numbers) == 2_048


def test_little_free_memory_makes_batches_smaller(card, encoder_folder):
    model = Embedder.load(encoder_folder).backbone.model
    card.free, card.part = 0.0, (4e9 + 1e8) / 80e9
    few = encoded_tokens(model, GPU)
    assert few < devices.MOST_ON_GPU and few & (few - 1) == 0
    width, inner = model.config.hidden_size, model.config.intermediate_size
    assert few * 4 * (24 * width + 4 * inner) <= 0.5e8


@pytest.mark.parametrize(
    ("visible", "workers", "expected", "part"),
    [(None, 2, ["0", "1"], None), ("5,3", 3, ["5", "3", "5"], 0.5), (None, 1, ["0"], None)],
)
def test_each_worker_takes_a_gpu_of_its_own(
    tmp_path, monkeypatch, visible, workers, expected, part
):
    """Each keeps its lock until it ends; a later one takes the place of one that is gone."""
    parts: list[float] = []

    def seen() -> int:
        return len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(","))

    monkeypatch.setattr(torch.cuda, "device_count", seen)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", parts.append)
    held: list[Any] = []
    monkeypatch.setattr(devices, "_KEPT", held)

    def taken() -> str:
        with monkeypatch.context() as patch:
            if visible is None:
                patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            else:
                patch.setenv("CUDA_VISIBLE_DEVICES", visible)
            take_own_gpu(tmp_path, workers)
            found = os.environ["CUDA_VISIBLE_DEVICES"]
            os.environ.pop("CUDA_VISIBLE_DEVICES")
        return found

    assert [taken() for _ in range(workers)] == expected
    assert parts == ([] if part is None else [part] * workers)
    held.pop(0).release()
    assert taken() == expected[0]
    for lock in held:
        lock.release()


def test_a_worker_whose_driver_was_asked_before_chooses_its_gpu_by_number(tmp_path, monkeypatch):
    """torch then looks no longer at the variable, and every worker would take the first GPU."""
    chosen: list[int] = []
    held: list[Any] = []
    monkeypatch.setattr(devices, "_KEPT", held)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for _ in range(2):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        take_own_gpu(tmp_path, 2)
    assert chosen == [0, 1]
    for lock in held:
        lock.release()


def test_under_torchrun_cuda_is_the_gpu_of_the_local_rank(monkeypatch):
    named: list[str] = []
    zeros = torch.zeros

    def on_cpu(count: int, *, device: str) -> torch.Tensor:
        named.append(device)
        return zeros(count)

    monkeypatch.setattr(torch, "zeros", on_cpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("cuda", "cuda:1", "cpu"):
        devices.find_device(name)
    assert named == ["cuda:3", "cuda:1", "cpu"]


def test_without_a_gpu_a_worker_takes_none(tmp_path):
    take_own_gpu(tmp_path, 2)
    assert not list(tmp_path.iterdir())
