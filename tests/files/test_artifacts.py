import hashlib

import numpy as np
import pytest

from tercet.errors import StorageError
from tercet.files.artifacts import (
    KeptResults,
    fingerprint,
    fingerprint_number,
    fingerprint_of_ends,
    fingerprint_of_file,
    json_text,
    read_json,
    write_json,
)


def blake(content: bytes, size: int = 16) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def test_json_reads_back_and_letters_of_all_scripts_stay_readable(tmp_path):
    value = {"text": "häß 한국어", "numbers": [1, 2.5, None]}
    write_json(tmp_path / "a" / "b.json", value)
    assert read_json(tmp_path / "a" / "b.json") == value
    written = (tmp_path / "a" / "b.json").read_text(encoding="utf-8")
    assert written == json_text(value) and "한국어" in written and written.endswith("}\n")
    assert json_text([1, {2}], indent=None, default=sorted) == "[1, [2]]\n"


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a file is where a folder has to be"):
        write_json(tmp_path / "file" / "a.json", 1)


def test_a_fingerprint_of_one_part_is_that_of_its_bytes():
    assert fingerprint("häß") == blake("häß".encode())
    assert fingerprint(b"abc", size=7) == blake(b"abc", 7)
    assert fingerprint((1, "x", None)) == blake(b"(1, 'x', None)")
    assert fingerprint("\ud800") == blake(b"\xed\xa0\x80")
    assert fingerprint_number("abc") == int.from_bytes(bytes.fromhex(blake(b"abc", 8)), "little")


def test_several_parts_are_framed_by_their_lengths():
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc")]
    assert len({fingerprint(*each) for each in parts}) == len(parts)
    assert fingerprint("ab", "c") == fingerprint(b"ab", "c") == blake(b"2:ab1:c")


def test_a_fingerprint_of_a_file_is_of_its_content_and_of_its_ends_of_those(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"begin" + b"." * 1000 + b"end")
    whole, ends = fingerprint_of_file(path), fingerprint_of_ends(path, 5)
    assert whole == blake(path.read_bytes())
    assert ends == blake(b"begin..end")
    path.write_bytes(b"begin" + b":" * 1000 + b".." + b"end")
    assert fingerprint_of_file(path) != whole
    assert fingerprint_of_ends(path, 5) == ends


def test_a_fingerprint_of_a_folder_is_of_all_its_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("second")
    (tmp_path / "a").write_text("first")
    assert fingerprint_of_file(tmp_path) == blake(b"firstsecond")


@pytest.mark.parametrize("mapped", [False, True])
def test_a_result_is_found_by_its_key_and_by_all_that_it_depends_on(tmp_path, mapped):
    results = KeptResults(tmp_path / "r", 1, mapped=mapped)
    assert results.find("a", 2) is None
    results.keep({"n": 3}, {"x": np.arange(4), "0-y": np.eye(2)}, "a", 2)
    found = KeptResults(tmp_path / "r", 1, mapped=mapped).find("a", 2)
    assert found is not None
    facts, arrays = found
    assert facts == {"n": 3} and set(arrays) == {"x", "0-y"}
    assert arrays["x"].tolist() == [0, 1, 2, 3]
    assert isinstance(arrays["x"], np.memmap) is mapped
    assert results.find("a") is None and results.find("a", 3) is None
    assert KeptResults(tmp_path / "r", 2, mapped=mapped).find("a", 2) is None


def test_a_key_names_the_same_file_in_every_version(tmp_path):
    """Caches that were written before stay valid."""
    name = blake(b"(1, 'path', {'task': 'nq'})")
    for suffix, mapped in (("", True), (".npz", False)):
        results = KeptResults(tmp_path, 1, mapped=mapped)
        assert results.path("path", {"task": "nq"}) == tmp_path / f"{name}{suffix}"


@pytest.mark.parametrize("mapped", [False, True])
def test_a_damaged_result_is_none_and_can_be_written_again(tmp_path, mapped):
    results = KeptResults(tmp_path, mapped=mapped)
    results.keep({}, {"x": np.arange(1000)}, "key")
    path = results.path("key")
    for file in sorted(path.glob("*")) if mapped else [path]:
        whole = file.read_bytes()
        for part in (whole[: len(whole) // 2], b"", b"nonsense"):
            file.write_bytes(part)
            assert results.find("key") is None
        file.write_bytes(whole)
    results.keep({"again": True}, {"x": np.arange(2)}, "key")
    found = results.find("key")
    assert found is not None and found[0] == {"again": True} and len(found[1]["x"]) == 2


def test_a_folder_that_its_maker_filled_needs_no_json(tmp_path):
    results = KeptResults(tmp_path, mapped=True)
    results.path("key").mkdir()
    assert results.find("key") is None
    np.save(results.path("key") / "x.npy", np.arange(3))
    found = results.find("key")
    assert found is not None and found[0] == {} and found[1]["x"].tolist() == [0, 1, 2]


def test_facts_that_are_not_json_are_refused_and_leave_nothing(tmp_path):
    results = KeptResults(tmp_path, mapped=True)
    with pytest.raises(TypeError):
        results.keep({"x": object()}, {}, "key")
    assert list(tmp_path.iterdir()) == []
