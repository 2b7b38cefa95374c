import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, Gemma2Config

from tercet.models import devices
from tercet.models.devices import free_memory
from tercet.models.embedder import Embedder
from tercet.models.frozen import linear_numbers
from tercet.models.network.attention import KEPT_LENGTH
from tercet.models.network.chunked import _first_kept
from tercet.segments import Packed, batches_by_length
from tercet.training.memory import (
    COPIES,
    MemoryBudget,
    StepMemory,
    graph_bytes,
    pair_bytes,
    states_to_come,
    step_memory,
    trained_numbers,
)
from tercet.training.recipe import Lora, Run
from tercet.vectors import Terms, TokenRows, Vectors
from tests import toy

ROOM = MemoryBudget(total=1e6, token_graph=1000, kinds=("dense", "sparse", "multi"), dim=8, width=4)


def bytes_of(vectors: Vectors) -> int:
    """What the arrays of three kinds take; offsets are not worth counting."""
    arrays = [vectors.dense, vectors.multi and vectors.multi.vectors]
    arrays += [vectors.sparse and vectors.sparse.ids, vectors.sparse and vectors.sparse.weights]
    return sum(array.nbytes for array in arrays if array is not None)


@pytest.mark.parametrize("kinds", [("dense",), ("sparse",), ("multi",), ("dense", "multi")])
def test_vectors_take_what_their_arrays_take(kinds):
    offsets = torch.tensor([0, 3, 3, 10])
    vectors = Vectors(
        torch.zeros(3, 8),
        Terms(torch.zeros(10, dtype=torch.int64), torch.zeros(10), offsets),
        TokenRows(torch.zeros(10, 4), offsets),
    )
    assert replace(ROOM, kinds=kinds).vectors(3, 10) == bytes_of(vectors.only(kinds))


def test_a_token_of_a_model_without_a_width_is_as_wide_as_a_text():
    assert replace(ROOM, kinds=("multi",), width=None).vectors(3, 10) == 10 * 8 * 4


def test_graphs_are_kept_in_what_the_vectors_leave():
    texts = toy.pack(*toy.random_texts(30, 20))
    left = 1e6 - COPIES * ROOM.vectors(2, 50)
    assert left > 0 and ROOM.graph_tokens(texts) == 50
    beside = ROOM.total - left
    assert replace(ROOM, total=beside + 50_000).graph_tokens(texts) == 50
    assert replace(ROOM, total=beside + 49_999).graph_tokens(texts) == 20
    assert replace(ROOM, total=beside + 19_999).graph_tokens(texts) == 0
    assert replace(ROOM, kinds=(), total=49_999.0).graph_tokens(texts) == 20
    assert replace(ROOM, total=100.0).graph_tokens(texts) == 0


def test_long_texts_leave_room_for_fewer_graphs_where_attention_weights_are_kept():
    room = replace(ROOM, kinds=(), pair_graph=10)
    assert room.graph(100) == 2000
    assert room.graph(KEPT_LENGTH + 1) == 1000  # whose weights are computed a second time
    texts = toy.pack(*toy.random_texts(300, 200, 100))
    assert room.graph_tokens(texts) == 300  # of 200 kB and 600 kB; the third would take 1.2 MB
    none = torch.zeros(0, dtype=torch.int64)
    nothing = Packed(none, torch.zeros(1, dtype=torch.int64), none.bool())
    assert room.graph_tokens(nothing) == 0


@pytest.mark.parametrize("seed", range(6))
def test_the_graphs_that_are_kept_take_no_more_than_there_is(seed):
    """Of long and short texts, the costliest tokens of which are those of 512 tokens."""
    lengths = np.random.default_rng(seed).choice([40, 200, 500, 512, 513, 900, 2000], 60).tolist()
    texts = toy.pack(*toy.random_texts(*lengths))
    graph_of_all = sum(length * (1000 + 10 * length * (length <= 512)) for length in lengths)
    sparse = replace(ROOM, kinds=("sparse",), pair_graph=10)
    beside = COPIES * sparse.vectors(len(texts), len(texts.ids))
    for share in (0.02, 0.3, 0.6, 0.9, 1.0):
        room = replace(sparse, total=beside + share * graph_of_all)
        for max_tokens in (1, 2048):
            members = batches_by_length(texts.lengths, max_tokens)
            sizes = [sum(lengths[text] for text in chunk) for chunk in members]
            first = _first_kept(sizes, room.graph_tokens(texts))
            kept = [lengths[text] for chunk in members[first:] for text in chunk]
            taken = sum(length * room.graph(length) for length in kept)
            assert beside + taken <= room.total
            if share == 1:
                assert len(kept) == len(lengths)
            elif max_tokens == 1:  # and the next one would be too much
                (text,) = members[first - 1]
                assert beside + taken + lengths[text] * room.graph(lengths[text]) > room.total


def saved_bytes(embedder: Embedder, *lengths: int, half: bool) -> float:
    """Bytes a token that wait for the backward, of each storage once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in embedder.parameters()}
    copies = {tuple(p.shape) for p in embedder.parameters() if p.ndim == 2}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape[::-1]) not in copies:
            held[storage.data_ptr()] = storage
        return tensor

    texts = toy.pack(*toy.random_texts(*lengths, vocabulary=240))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        states = embedder.train().states(texts)
    total = sum(storage.nbytes() for storage in held.values())
    assert states.requires_grad
    return total / sum(lengths)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Embedder]:
    """An encoder with dropout, and a decoder that bends its scores."""
    shape: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 300, "max_position_embeddings": 1100}
    configs = {
        "bert": BertConfig(**shape, intermediate_size=512),
        "gemma2": Gemma2Config(
            **shape, intermediate_size=256, num_key_value_heads=2, head_dim=32, sliding_window=4096
        ),
    }
    found = {}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp(name)
        toy.random_model(config).save_pretrained(folder)
        toy.wordpiece().save_pretrained(folder)
        found[name] = Embedder.load(folder)
    return found


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_the_estimate_of_a_graph_is_on_the_safe_side_and_not_far_off(models, name, half):
    embedder = models[name]
    backbone = embedder.backbone
    estimate, pair = graph_bytes(backbone, half=half), pair_bytes(backbone, half=half)
    assert (pair > 0) == (name == "gemma2" or not half)  # a fused kernel keeps no weights
    for length in (32, 128, 512):
        saved = saved_bytes(embedder, *[length] * (1024 // length), half=half)
        assert 0.9 * saved < estimate + pair * length < 2.2 * saved


@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_the_graph_of_a_long_text_does_not_grow_with_the_square_of_its_length(models, name):
    embedder = models[name]
    longer = saved_bytes(embedder, 1024, half=False)
    assert longer < 1.1 * saved_bytes(embedder, 513, half=False)
    assert longer < 0.5 * saved_bytes(embedder, 512, half=False)
    assert longer < graph_bytes(embedder.backbone)


def test_without_dropout_or_bent_scores_no_attention_weights_are_kept(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    assert pair_bytes(embedder.backbone) > 0
    embedder.backbone.attention_dropout = 0.0
    assert pair_bytes(embedder.backbone) == 0


def kernel_files(root: Path, *, group: str, limit: str, used: int, cached: int) -> Path:
    """Files as the kernel shows them: 8 GB free, and a control group."""
    files = {
        "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n",
        "proc/self/cgroup": f"0::/{group}\n",
        f"sys/fs/cgroup/{group}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{group}/memory.current": f"{used}\n",
        f"sys/fs/cgroup/{group}/memory.stat": f"anon 5\ninactive_file {cached}\nslab 7\n",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_free_memory_is_that_of_the_container(tmp_path):
    limited = kernel_files(
        tmp_path / "a", group="job/step", limit="3000000000", used=1_500_000_000, cached=200_000_000
    )
    assert free_memory(limited) == 1_700_000_000
    outer = kernel_files(tmp_path / "b", group="", limit="2000000000", used=0, cached=0)
    (outer / "proc/self/cgroup").write_text("0::/job/step\n")  # only the outer group has a limit
    assert free_memory(outer) == 2_000_000_000
    full = kernel_files(tmp_path / "c", group="job", limit="1000", used=2_000, cached=0)
    assert free_memory(full) == 0


def test_without_a_limit_free_memory_is_that_of_the_machine(tmp_path):
    unlimited = kernel_files(tmp_path / "a", group="", limit="max", used=5, cached=0)
    assert free_memory(unlimited) == 8_000_000 * 1024
    shutil.rmtree(unlimited / "sys")
    assert free_memory(unlimited) == 8_000_000 * 1024
    (unlimited / "proc/meminfo").unlink()
    assert free_memory(unlimited) > 0


# ---- what is chosen --------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def free_on_gpu(monkeypatch) -> Callable[[float], None]:
    """Set the free memory of a GPU that every run takes."""
    monkeypatch.setattr("tercet.training.recipe.find_device", lambda name: GPU)

    def free(size: float) -> None:
        monkeypatch.setattr(devices, "free_bytes", lambda device: int(size))

    return free


def chosen(embedder: Embedder, lora: Lora | None = None, **settings: Any) -> StepMemory:
    return step_memory(embedder, ("dense",), Run(**settings), lora=lora)


def test_on_a_cpu_2048_tokens_are_encoded_together_and_a_quarter_of_memory_is_used(
    models, monkeypatch
):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 8_000_000_000)
    found = chosen(models["bert"], device="cpu")
    assert (found.chunk_tokens, found.recomputed, found.budget.total) == (2_048, False, 2e9)
    kept = found.budget.graph(128) * 2_048
    monkeypatch.setattr(devices, "free_bytes", lambda device: kept)  # with what AdamW needs, less
    found = chosen(models["bert"], device="cpu")
    assert (found.chunk_tokens, found.recomputed) == (2_048, True)
    assert not chosen(models["bert"], device="cpu", checkpoint_activations=False).recomputed


def test_on_a_gpu_a_chunk_fits_into_what_is_free_beside_gradients_and_optimizer(
    models, free_on_gpu
):
    embedder = models["gemma2"]
    to_come = states_to_come(embedder, Run(dtype="float32"))
    numbers = sum(p.numel() for p in embedder.parameters())
    assert to_come == 16 * numbers  # weights that have to get there, gradients, two moments
    sizes = []
    for free in (8e9, 2e9, 1e9, 0.5e9):
        free_on_gpu(to_come + free)
        found = chosen(embedder, dtype="float32")
        assert found.budget.total == pytest.approx(0.6 * free, rel=1e-6)
        assert not found.recomputed and found.chunk_tokens >= 2_048
        assert found.chunk_tokens * found.budget.graph(128) <= max(
            0.6 * free / 4, 2_048 * found.budget.graph(128)
        )
        sizes.append(found.chunk_tokens)
    assert sizes == sorted(sizes, reverse=True) and len({*sizes}) > 2
    free_on_gpu(to_come + 8e9)
    assert chosen(embedder, dtype="float32", chunk_tokens=77).chunk_tokens == 77
    assert chosen(embedder, dtype="float32", memory_gb=0.5).budget.total == 0.5e9


def test_layers_are_computed_again_where_the_smallest_useful_chunk_does_not_fit(
    models, free_on_gpu
):
    embedder = models["gemma2"]
    to_come = states_to_come(embedder, Run(dtype="bfloat16"))
    graph = graph_bytes(embedder.backbone, half=True) + 128 * pair_bytes(embedder.backbone)
    free_on_gpu(to_come + 2_048 * graph / 0.6 + 1e6)
    assert not chosen(embedder, dtype="bfloat16").recomputed
    free_on_gpu(to_come + 2_048 * graph / 0.6 - 1e6)
    found = chosen(embedder, dtype="bfloat16")
    assert found.recomputed and found.chunk_tokens == 2_048
    assert not chosen(embedder, dtype="bfloat16", compile_layers=True).recomputed
    free_on_gpu(0)
    assert chosen(embedder, dtype="bfloat16").chunk_tokens == 256


def test_lora_that_is_still_to_come_is_counted_as_if_it_were_there(models):
    embedder = copy.deepcopy(models["bert"])
    run, lora = Run(device="cpu", dtype="bfloat16"), Lora(rank=8)
    before = states_to_come(embedder, run, lora), trained_numbers(embedder, lora)
    graph = chosen(embedder, lora, device="cpu", dtype="bfloat16").budget.token_graph
    embedder.backbone.add_lora(8, 16, 0.0)
    trained = sum(p.numel() for p in embedder.parameters() if p.requires_grad)
    frozen = linear_numbers(embedder.backbone.model, frozen=True)
    assert before == (states_to_come(embedder, run), trained)
    assert before[0] == 14 * trained + 2 * frozen  # on a CPU the exact weights stay
    assert graph == chosen(embedder, device="cpu", dtype="bfloat16").budget.token_graph


def test_the_line_about_a_machine_names_what_was_chosen(models, free_on_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    free_on_gpu(1e11)
    found = replace(chosen(models["bert"]), recomputed=True, chunk_tokens=16_384)
    assert found.line("bfloat16") == (
        "cuda:0 (NVIDIA H200) in bfloat16, 16,384 tokens encoded together, layers computed again "
        "in the backward"
    )
