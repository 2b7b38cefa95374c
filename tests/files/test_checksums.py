"""Every altered byte of what is trusted again is noticed, or changes nothing."""

import json
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tercet.files.artifacts import KeptResults
from tercet.files.checksums import (
    altered,
    checksum,
    damage,
    is_whole_archive,
    seal,
    seal_archive,
    sealed,
    unsealed,
)
from tests.damage import altered_copies


def test_the_checksum_is_the_crc_of_sums_by_row_and_column_of_each_block(tmp_path: Path):
    content = np.random.default_rng(0).integers(0, 256, 300_001, np.uint8).tobytes()
    (tmp_path / "file").write_bytes(content)
    found = 0
    for start in (0, 1 << 18):
        block = content[start : start + (1 << 18)].ljust(1 << 18, b"\0")
        words = [int.from_bytes(block[i : i + 8], "little") for i in range(0, len(block), 8)]
        rows = [words[i : i + 256] for i in range(0, len(words), 256)]
        for lines in (zip(*rows, strict=True), rows):
            sums = b"".join((sum(line) % (1 << 64)).to_bytes(8, "little") for line in lines)
            found = zlib.crc32(sums, found)
    assert checksum(tmp_path / "file") == f"300001-{found:08x}"


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4096, 300_001])
def test_a_flipped_bit_swapped_words_and_another_length_change_a_checksum(
    tmp_path: Path, size: int
):
    content = np.random.default_rng(1).integers(0, 256, size, np.uint8).tobytes()
    path = tmp_path / "file"
    path.write_bytes(content)
    was = checksum(path)
    others = [content + b"\0", content[:-1] if content else b"x"]
    if size:
        others += altered_copies(content)
    if size > 4096:
        others.append(content[8:16] + content[:8] + content[16:])
        others.append(content[2048:4096] + content[:2048] + content[4096:])
        others.append(content[:4096] + bytes(4096) + content[8192:])
    for other in others:
        path.write_bytes(other)
        assert checksum(path) != was
        assert altered(tmp_path, {"file": was}) == path


def test_an_altered_json_object_is_refused_or_means_the_same():
    value = {"number": 3, "names": ["a", "é"], "shares": {"x": 0.1}, "none": None}
    for other in altered_copies(json.dumps(sealed(value)).encode(), 400):
        try:
            found = unsealed(json.loads(other))
        except (ValueError, RecursionError):
            continue
        assert {name: found.get(name) for name in value} == value
    assert unsealed(json.loads(json.dumps(sealed(value)))) == value
    assert unsealed({"of": "an earlier version"}) == {"of": "an earlier version"}


def test_a_sealed_folder_names_the_file_that_was_altered_or_is_gone(tmp_path: Path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "a.npy").write_bytes(b"one")
    (folder / "b.npy").write_bytes(b"two")
    seal(folder)
    assert damage(folder) is None
    (folder / "a.npy").write_bytes(b"onE")
    assert damage(folder) == folder / "a.npy"
    (folder / "a.npy").write_bytes(b"one")
    (folder / "b.npy").unlink()
    assert damage(folder) == folder / "b.npy"


def test_a_sealed_folder_or_file_in_anothers_place_counts_as_damaged(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        (tmp_path / f"{name}.npy").write_text(name)
        seal(tmp_path / name)
        seal(tmp_path / f"{name}.npy")
    assert damage(tmp_path / "a") is None
    assert damage(tmp_path / "a.npy") is None
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b").rename(tmp_path / "a")
    assert damage(tmp_path / "a") == tmp_path / "a/checksums.json"
    (tmp_path / "b.npy").rename(tmp_path / "a.npy")
    assert damage(tmp_path / "a.npy") == tmp_path / "a.npy"
    (tmp_path / "b.npy.sum").rename(tmp_path / "a.npy.sum")
    assert damage(tmp_path / "a.npy") == tmp_path / "a.npy.sum"


def test_a_file_without_a_checksum_is_used_with_one_note_for_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).write_bytes(b"one")
        assert damage(tmp_path / name) is None
    assert caplog.text.count("have no checksums; they are used unchecked") == 1


@pytest.mark.parametrize("sealed_too", [True, False])
def test_an_altered_archive_is_noticed_or_holds_the_same(tmp_path: Path, sealed_too: bool):
    path = tmp_path / "weights.pt"
    weights = {"a": torch.randn(40, 7), "b": torch.arange(5)}
    torch.save(weights, path)
    if sealed_too:
        seal_archive(path)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert torch.load(path, weights_only=True, mmap=True)["b"].tolist() == [0, 1, 2, 3, 4]
    content = path.read_bytes()
    assert is_whole_archive(path)
    noticed = 0
    for other in (*altered_copies(content, 400), content[:-1], content[: len(content) // 2]):
        path.write_bytes(other)
        if not is_whole_archive(path):
            noticed += 1
            continue
        try:
            found = torch.load(path, weights_only=True)
        except RuntimeError:
            continue
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert noticed > 200


@pytest.mark.parametrize("mapped", [False, True])
def test_an_altered_kept_result_is_missing_or_the_same(tmp_path: Path, mapped: bool):
    kept = KeptResults(tmp_path, 1, mapped=mapped)
    arrays = {"scores": np.arange(40, dtype=np.float32), "rows": np.arange(3)}
    kept.keep({"sum": 7}, arrays, "key")
    place = kept.path("key")
    files = sorted(place.iterdir()) if mapped else [place]
    for path in files:
        content = path.read_bytes()
        for other in altered_copies(content):
            path.write_bytes(other)
            found = kept.find("key")
            if found is not None:
                assert found[0] == {"sum": 7}
                assert {*found[1]} == {*arrays}
                assert all(np.array_equal(found[1][name], arrays[name]) for name in arrays)
        path.write_bytes(content)
    assert kept.find("key") is not None
    kept.keep({"sum": 8}, arrays, "other")
    place.rename(tmp_path / "aside")
    kept.path("other").rename(place)
    assert kept.find("key") is None
