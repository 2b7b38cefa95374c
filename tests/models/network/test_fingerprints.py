import hashlib

import pytest
import torch

from tercet.models.network.fingerprints import add_weights, fingerprint_of


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
