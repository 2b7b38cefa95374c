import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet.models.embedder import Embedder
from tercet.models.network.fingerprints import add_weights, fingerprint_of
from tests import toy


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "table": torch.randn(40, 50),
        "half": torch.randn(30, 40).bfloat16(),
        "turned": torch.randn(20, 30).T,
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }


def slow_fingerprint(given: dict[str, torch.Tensor]) -> str:
    """The same digest of one string of bytes."""
    content = b""
    for name, weight in given.items():
        content += f"{name} {tuple(weight.shape)}".encode()
        for number in weight.float().flatten():
            content += bytes(number.reshape(1).view(torch.uint8).tolist())
    return hashlib.sha256(content).hexdigest()[:16]


def test_a_fingerprint_is_the_digest_of_all_numbers():
    assert fingerprint_of(weights()) == slow_fingerprint(weights())


@pytest.mark.parametrize("name", ["table", "half", "turned"])
def test_an_edit_in_the_middle_of_a_tensor_is_noticed(name):
    before, edited = weights(), weights()
    middle = edited[name].shape[0] // 2, edited[name].shape[1] // 2
    edited[name][middle] += 0.01 + edited[name][middle].abs() / 16
    assert fingerprint_of(edited) != fingerprint_of(before)
    assert fingerprint_of(weights()) == fingerprint_of(before)


def test_names_and_shapes_count_too_and_types_do_not():
    one = torch.arange(6.0)
    every = [{"a": one}, {"b": one}, {"a": one.view(2, 3)}, {}]
    assert len({fingerprint_of(given) for given in every}) == len(every)
    assert fingerprint_of({"a": one.half()}) == fingerprint_of({"a": one.double()})


def test_an_index_s_fingerprint_reads_the_ends_of_a_weight():
    """What indexes remember; it has to stay as it was."""

    def ends(given: torch.Tensor) -> str:
        digest = hashlib.blake2b(digest_size=8)
        add_weights(digest, {"table": given})
        return digest.hexdigest()

    table = torch.zeros(40, 50)
    first, middle = table.clone(), table.clone()
    first[0, 0], middle[20, 25] = 1.0, 1.0
    assert ends(first) != ends(table) == ends(middle)


def changed_folder(kind: str, folder: Path, change: str) -> None:
    """Change what a folder's model reads, and none of its weights."""
    if change == "tokens":
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        path.write_text(json.dumps(content))
    elif change == "config":
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["layer_norm_eps" if kind == "bert" else "rms_norm_eps"] = 0.1
        path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "change", "how"),
    [
        ("bert", "tokens", {}),
        ("bert", "config", {}),
        ("llama", "tokens", {}),
        ("llama", "config", {}),
        ("llama", "direction", {"attention": "bidirectional"}),
        ("mistral", "windows", {"attention": "bidirectional", "window": "keep"}),
    ],
)
def test_models_of_equal_weights_that_make_other_vectors_have_other_fingerprints(
    tmp_path, kind, change, how
):
    folder = toy.save_model(tmp_path / "model", kind)
    usual: dict[str, Any] = {"attention": "bidirectional"} if change == "windows" else {}
    before = Embedder.load(folder, **usual)
    changed_folder(kind, folder, change)
    after = Embedder.load(folder, **how)
    assert after.fingerprint() != before.fingerprint()
    assert set(after.fingerprints()).isdisjoint(before.fingerprints())
    assert Embedder.load(folder, **how).fingerprint() == after.fingerprint()
    after.save(tmp_path / "saved")
    assert Embedder.load(tmp_path / "saved").fingerprint() == after.fingerprint()


def test_weights_in_another_type_have_another_fingerprint_though_their_numbers_are_equal(tmp_path):
    folder = toy.save_model(tmp_path / "model", "llama")
    Embedder.load(folder, dtype=torch.bfloat16).save(tmp_path / "half")
    whole, half = (
        Embedder.load(tmp_path / "half", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert whole.fingerprints() == half.fingerprints()
    assert whole.fingerprint() == whole.fingerprints()[0] != half.fingerprint()
    assert half.fingerprint() == half.fingerprints()[1]
