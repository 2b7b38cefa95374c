from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tercet.curate.jobs.encode_job import EncodeJob, encode_files, open_files
from tercet.curate.jobs.runners import LOOP, Runner
from tercet.errors import RecipeError
from tercet.files.arrays import NAMES
from tercet.kinds import KINDS
from tercet.models.embedder import Embedder
from tercet.search.export import EncodeOptions
from tests.damage import unnoticed
from tests.processes import ROOT
from tests.toy import SENTENCES


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven texts in one shard, five in another."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("\n".join(SENTENCES[:7]) + "\n")
    (folder / "more/b.txt").write_text("\n".join(SENTENCES[7:]) + "\n")
    return folder


def encoding(model: Path, folder: Path, out: Path, **settings) -> EncodeJob:
    how = {"wanted": EncodeOptions(kinds=("dense",)), "arrays": False, **settings}
    load = partial(Embedder.load, str(model))
    about = {"model": load().fingerprint()}
    return EncodeJob(load=load, about=about, sources=open_files([folder], "text"), out=out, **how)


def arrays(out: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(out)): np.load(path) for path in sorted(out.rglob("*.npy"))}


def test_each_file_becomes_a_file_of_the_vectors_of_its_texts(encoder_folder, folder, tmp_path):
    out = tmp_path / "out"
    written = encode_files(encoding(encoder_folder, folder, out))
    assert (written.texts, written.bytes) == (12, {"dense": 12 * 64 * 4})
    found, model = arrays(out), Embedder.load(encoder_folder)
    assert list(found) == ["a.npy", "more/b.npy"]
    np.testing.assert_allclose(found["a.npy"], model.encode(SENTENCES[:7]), atol=1e-6)
    np.testing.assert_allclose(found["more/b.npy"], model.encode(SENTENCES[7:]), atol=1e-6)


def test_parts_are_rows_of_the_file_and_daft_writes_the_same_bytes(
    encoder_folder, folder, tmp_path, monkeypatch
):
    pytest.importorskip("daft")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = []
    for name, runner in (("loop", LOOP), ("daft", Runner(engine="daft", workers=2))):
        encode_files(encoding(encoder_folder, folder, tmp_path / name), part=3, runner=runner)
        found.append(arrays(tmp_path / name))
    plain, spread = found
    names = ["a-00000.npy", "a-00001.npy", "a-00002.npy", "more/b-00000.npy", "more/b-00001.npy"]
    assert list(plain) == list(spread) == names
    assert [len(part) for part in plain.values()] == [3, 3, 1, 3, 2]
    assert all((plain[name] == spread[name]).all() for name in names)
    expected = Embedder.load(encoder_folder).encode(SENTENCES)
    np.testing.assert_allclose(np.concatenate(list(plain.values())), expected, atol=1e-6)


def test_what_is_there_is_not_encoded_again_and_what_was_deleted_is(
    encoder_folder, folder, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    encode_files(encoding(encoder_folder, folder, out))
    before, job = arrays(out), encoding(encoder_folder, folder, out)
    (out / "more/b.npy").unlink()
    encoded: list[str] = []
    encode = Embedder.encode

    def noted(self, texts, *args, **how):
        encoded.extend(texts)
        return encode(self, texts, *args, **how)

    monkeypatch.setattr(Embedder, "encode", noted)
    assert encode_files(job).texts == 12
    assert encoded == list(SENTENCES[7:])
    assert all((arrays(out)[name] == before[name]).all() for name in before)


def test_several_kinds_are_a_folder_of_arrays_for_each_file(encoder_folder, folder, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8).save(model)
    encode_files(encoding(model, folder, out, wanted=EncodeOptions(kinds=KINDS), arrays=True))
    assert {path.name for path in (out / "more/b").glob("*.npy")} == set(NAMES)
    assert len(np.load(out / "a/dense.npy")) == 7


def test_vectors_of_parts_of_another_size_are_not_mixed_in(encoder_folder, folder, tmp_path):
    out = tmp_path / "out"
    encode_files(encoding(encoder_folder, folder, out), part=4)
    with pytest.raises(
        RecipeError, match=r"out/a-00000\.npy: is of another file or another part size"
    ):
        encode_files(encoding(encoder_folder, folder, out), part=5000)


def test_two_files_with_one_name_are_refused(folder, tmp_path):
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(RecipeError, match="the vectors of both would be named a; rename one"):
        open_files([folder], "text")
    with pytest.raises(RecipeError, match=r"empty: has no \.jsonl, .* or \.txt file"):
        (tmp_path / "empty").mkdir()
        open_files([tmp_path / "empty"], "text")


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("dense",), KINDS])
def test_damage_to_a_finished_folder_is_mended_by_the_same_command(
    encoder_folder, folder, tmp_path, kinds
):
    out, model = tmp_path / "out", encoder_folder
    if kinds == KINDS:
        Embedder.load(model, kinds=KINDS).save(model := tmp_path / "model")
    wanted = EncodeOptions(kinds=kinds)
    job = encoding(model, folder, out, wanted=wanted, arrays=kinds == KINDS)

    def files() -> dict[str, bytes]:
        encode_files(job)
        return {name: array.tobytes() for name, array in arrays(out).items()}

    first = files()
    assert not unnoticed(
        out, "*.npy", "*.json", ask=files, same=lambda found: found == first, count=1
    )
