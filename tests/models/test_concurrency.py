"""One embedder in several threads, processes, copies and modes of torch."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from tercet.models.embedder import Embedder
from tests.processes import forks
from tests.toy import SENTENCES, save_model

TEXTS = [" ".join(SENTENCES[: 1 + i % 9]) + f" {i}" for i in range(32)]
SIZES = (1, 2, 5, 8, 16, 32)


def calls(decoder: bool):
    """Encodings of many kinds: roles, directions, poolings, parts, words, kinds of vectors."""
    found = []
    for number, size in enumerate(SIZES * 6):
        texts, role = TEXTS[:size], ("query", "document")[number % 2]
        way = {"attention": ("causal", "bidirectional")[number // 2 % 2]} if decoder else {}
        found += [
            partial(Embedder.encode, texts=texts, role=role, **way),
            partial(Embedder.encode, texts=texts, role=role, pooling="last", dims=16, **way),
            partial(Embedder.encode, texts=texts[:4], role=role, output="words", **way),
            partial(Embedder.encode_words, sentences=[text.split() for text in texts[:4]]),
            partial(Embedder.encode_vectors, texts=texts, role=role),
        ]
    return found


def arrays(result) -> list[np.ndarray]:
    if isinstance(result, np.ndarray):
        return [result]
    if isinstance(result, list):
        return result
    return [tensor.numpy() for tensor in result.tensors()]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_eight_threads_get_the_vectors_of_one(tmp_path, kind):
    folder = save_model(tmp_path / "model", kind)
    embedder = Embedder.load(folder, kinds=("dense", "sparse", "multi"))
    work = calls(kind == "llama")
    expected = [arrays(call(embedder)) for call in work]
    fresh = Embedder.load(folder, kinds=("dense", "sparse", "multi"))  # copies are made in threads
    fresh.heads.load_state_dict(embedder.heads.state_dict())
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda number: work[number % len(work)](fresh), range(432)))
    for number, result in enumerate(results):
        for found, wanted in zip(arrays(result), expected[number % len(work)], strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_thread_that_trains_does_not_change_vectors_of_one_that_encodes(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    expected = embedder.encode(TEXTS)
    packed = embedder.tokenize(TEXTS, "query").pack()

    def train(_: int) -> None:
        embedder.train()
        embedder(packed).square().sum().backward()
        assert embedder.training

    with ThreadPoolExecutor(2) as pool:
        training = [pool.submit(train, number) for number in range(20)]
        encoding = [pool.submit(embedder.encode, TEXTS) for _ in range(20)]
    for each in training:
        each.result()
    for each in encoding:
        np.testing.assert_allclose(each.result(), expected, atol=1e-6)


COPIES = {
    "pickle": lambda embedder: pickle.loads(pickle.dumps(embedder)),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda embedder: saved_by_torch(embedder),
}


def saved_by_torch(embedder: Embedder) -> Embedder:
    file = io.BytesIO()
    torch.save(embedder, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_encodes_alike_and_has_its_own_weights(encoder_folder, way, used):
    embedder = Embedder.load(encoder_folder)
    expected = embedder.encode(TEXTS) if used else Embedder.load(encoder_folder).encode(TEXTS)
    copied = COPIES[way](embedder)
    np.testing.assert_array_equal(copied.encode(TEXTS), expected)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.mul_(0.5)
    assert np.abs(copied.encode(TEXTS) - expected).max() > 1e-3
    np.testing.assert_array_equal(embedder.encode(TEXTS), expected)


def encode_in_process(rank: int, embedder: Embedder) -> np.ndarray:
    return embedder.encode(TEXTS[rank::2])


def test_worker_processes_encode_with_the_embedder_they_are_sent(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    expected = embedder.encode(TEXTS)
    with forks.Pool(2) as pool:
        found = pool.starmap(encode_in_process, [(0, embedder), (1, embedder)])
    for rank, vectors in enumerate(found):
        np.testing.assert_allclose(vectors, expected[rank::2], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_autocast_changes_no_vector(tmp_path, kind, dtype):
    embedder = Embedder.load(save_model(tmp_path / "model", kind))
    expected = embedder.encode(TEXTS)
    with torch.autocast("cpu", dtype=dtype):
        np.testing.assert_array_equal(embedder.encode(TEXTS), expected)
        loaded = Embedder.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.encode(TEXTS), expected)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama", "gemma3"])
def test_the_default_type_of_torch_changes_no_vector(tmp_path, kind):
    embedder = Embedder.load(save_model(tmp_path / "model", kind))
    expected = embedder.encode(TEXTS)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            np.testing.assert_allclose(embedder.encode(TEXTS), expected, atol=1e-6)
            loaded = Embedder.load(tmp_path / "model")
            np.testing.assert_allclose(loaded.encode(TEXTS), expected, atol=1e-6)
    finally:
        torch.set_default_dtype(before)


def test_inference_mode_around_loading_or_encoding_changes_no_vector(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    expected = embedder.encode(TEXTS)
    with torch.inference_mode():
        np.testing.assert_array_equal(embedder.encode(TEXTS), expected)
        loaded = Embedder.load(encoder_folder)
        np.testing.assert_array_equal(loaded.encode(TEXTS), expected)
    np.testing.assert_array_equal(loaded.encode(TEXTS), expected)


@pytest.mark.parametrize("change", ["module", "parameter", "type", "hook"])
def test_a_changed_network_is_copied_again(encoder_folder, change):
    embedder = Embedder.load(encoder_folder)
    before = embedder.encode(TEXTS)
    layer = embedder.backbone.model.encoder.layer[1].intermediate
    if change == "module":
        layer.dense = nn.Linear(layer.dense.in_features, layer.dense.out_features)
    elif change == "parameter":
        layer.dense.weight = nn.Parameter(layer.dense.weight * 0.5)
    elif change == "type":
        embedder.to(torch.float64)
    else:
        layer.register_forward_hook(lambda *given: given[-1] * 0.5)
    found = embedder.encode(TEXTS)
    if change == "type":
        np.testing.assert_allclose(found, before, atol=1e-6)
    else:
        assert np.abs(found - before).max() > 1e-3
    with torch.no_grad():
        states = embedder.eval()(embedder.tokenize(TEXTS, "document").pack())
    expected = torch.nn.functional.normalize(states.float(), dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
