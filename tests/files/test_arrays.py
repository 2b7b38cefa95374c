from pathlib import Path

import numpy as np
import pytest
import torch

from tercet.errors import DataError
from tercet.files.arrays import NAMES, GrowingArray, VectorWriter, is_whole, read_vectors
from tercet.kinds import KINDS
from tercet.vectors import Terms, Vectors
from tests.evaluate.kinds import drawn


@pytest.fixture
def vectors() -> Vectors:
    return drawn(9, seed=1, without_terms=(2, 8))


@pytest.fixture
def folder(tmp_path, vectors):
    """The same vectors, written in three parts, one of them of no text."""
    with VectorWriter.open(tmp_path) as writer:
        for part in (slice(0, 4), slice(4, 4), slice(4, 9)):
            writer.add(vectors.take(part))
    return tmp_path


def kinds_in(folder: Path) -> set[str]:
    return {path.stem.partition("_")[0] for path in folder.glob("*.npy")}


def test_any_texts_are_read_as_they_were_written(folder, vectors):
    for rows in (np.arange(9), np.array([8, 2, 2, 5]), np.array([2])):
        expected = vectors.take(torch.from_numpy(rows))
        dense, terms, tokens = (
            getattr(read_vectors(folder, rows, kind), kind) for kind in ("dense", "sparse", "multi")
        )
        assert torch.equal(dense, expected.dense)
        assert expected.sparse is not None and expected.multi is not None
        for name in ("ids", "weights", "offsets"):
            assert torch.equal(getattr(terms, name), getattr(expected.sparse, name))
        assert torch.equal(tokens.offsets, expected.multi.offsets)
        assert torch.equal(tokens.vectors, expected.multi.vectors.half().float())


def test_a_folder_holds_the_files_that_are_named_and_no_others(folder):
    assert {path.name for path in folder.iterdir()} == NAMES


def test_files_are_closed_when_an_error_ends_the_writing(tmp_path, vectors, monkeypatch):
    opened, real = [], Path.open
    monkeypatch.setattr(Path, "open", lambda *how: opened.append(real(*how)) or opened[-1])
    with pytest.raises(KeyError), VectorWriter.open(tmp_path) as writer:
        writer.add(vectors)
        assert not any(file.closed for file in opened)
        raise KeyError
    assert len(opened) == len(NAMES) and all(file.closed for file in opened)
    assert not any(is_whole(tmp_path, 9, kind) for kind in KINDS)


def test_the_files_are_arrays_that_numpy_maps(folder, vectors):
    assert kinds_in(folder) == set(KINDS)
    offsets = np.load(folder / "sparse_offsets.npy", mmap_mode="r")
    ids = np.load(folder / "sparse_ids.npy", mmap_mode="r")
    assert (offsets.dtype, ids.dtype, len(offsets)) == (np.int64, np.int32, 10)
    assert ids[offsets[3] : offsets[4]].tolist() == vectors.take([3]).sparse.ids.tolist()


def test_a_token_that_occurs_twice_in_a_text_is_kept_once(tmp_path):
    ids, weights = torch.tensor([7, 3, 7]), torch.tensor([0.5, 0.2, 0.9])
    with VectorWriter.open(tmp_path) as writer:
        writer.add(Vectors(sparse=Terms(ids, weights, torch.tensor([0, 3]))))
    found = read_vectors(tmp_path, np.array([0]), "sparse").sparse
    assert found is not None
    assert (found.ids.tolist(), found.weights.tolist()) == ([3, 7], pytest.approx([0.2, 0.9]))
    assert kinds_in(tmp_path) == {"sparse"}


def test_texts_without_any_term_are_whole(tmp_path):
    with VectorWriter.open(tmp_path) as writer:
        writer.add(Vectors(sparse=Terms(*_nothing(), torch.zeros(4, dtype=torch.int64))))
    found = read_vectors(tmp_path, np.array([0, 2]), "sparse").sparse
    assert found is not None and found.offsets.tolist() == [0, 0, 0]
    assert is_whole(tmp_path, 3, "sparse") and not is_whole(tmp_path, 4, "sparse")


def _nothing() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(0, dtype=torch.int64), torch.zeros(0)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_cut_short_or_absent_are_not_whole_and_refused(folder, kind):
    assert is_whole(folder, 9, kind) and not is_whole(folder, 8, kind)
    (path,) = folder.glob(f"{kind}.npy" if kind != "sparse" else "sparse_weights.npy")
    path.write_bytes(path.read_bytes()[:-5])
    assert not is_whole(folder, 9, kind)
    with pytest.raises(DataError, match=f"{path}: cannot be read"):
        read_vectors(folder, np.arange(9), kind)
    path.unlink()
    assert not is_whole(folder, 9, kind)
    with pytest.raises(DataError, match="no such file"):
        read_vectors(folder, np.arange(9), kind)


@pytest.mark.parametrize("dtype", ["<i4", "<f2"])
def test_an_array_grows_block_by_block(tmp_path, dtype):
    blocks = [np.arange(6).reshape(2, 3), np.empty((0, 3)), np.ones((1, 3), np.float64)]
    with GrowingArray.open(tmp_path / "a.npy", np.dtype(dtype), (3,)) as array:
        for block in blocks:
            array.add(block)
    found = np.load(tmp_path / "a.npy")
    assert found.dtype == np.dtype(dtype)
    assert found.tolist() == np.concatenate(blocks).tolist()
