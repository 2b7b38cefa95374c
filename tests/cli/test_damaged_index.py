"""Every file of an index, cut, emptied, removed or with a byte of another value."""

import json
import shutil
from itertools import product

import pytest

from tercet.kinds import KINDS
from tercet.models.embedder import Embedder
from tests.cli.lines import write
from tests.toy import SENTENCES

DAMAGES = ("cut", "emptied", "removed", "first byte", "header", "middle", "last byte")
PAYLOAD = ("dense.npy", "multi.npy", "token_weights.npy", "tokens.npy", "token_rows.npy")


def damage(path, how):
    content = bytearray(path.read_bytes())
    place = {"first byte": 0, "header": 70, "middle": len(content) // 2, "last byte": -1}
    path.unlink()
    if how in place and content:
        content[place[how] if place[how] < len(content) else 0] ^= 0x05
    if how != "removed":
        path.write_bytes({"cut": content[: len(content) // 2], "emptied": b""}.get(how, content))


@pytest.fixture(scope="module")
def made(tmp_path_factory, encoder_folder):
    folder = tmp_path_factory.mktemp("made")
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8).save(folder / "model")
    records = [
        {"id": f"d{i}", "text": text, "year": 2000 + i} for i, text in enumerate(SENTENCES[:6])
    ]
    write(folder / "docs.jsonl", *records)
    write(folder / "fewer.jsonl", *records[:-1])
    return folder


def build(tercet, made, out, *flags):
    """An index with deleted rows; how it is searched, and what that finds."""
    for file in ("docs.jsonl", "fewer.jsonl"):
        ended = tercet("index", made / file, "--model", made / "model", "--out", out, *flags)
        assert ended.status == 0, ended.err


def search(tercet, out):
    return tercet("search", out, "music", "-k", "9", "--where", "year=2001", "--candidates", "0")


def is_plain(ended):
    """Done, or refused in one line that names a remedy."""
    lines = [line for line in ended.err.splitlines() if line.startswith("tercet: ")]
    assert ended.status in (0, 2) and "Traceback" not in ended.err, ended
    assert ended.status == 0 or len(lines) == 1, ended.err
    return True


@pytest.fixture
def without_the_model(monkeypatch, made):
    """The model is read once: many searches are about the index."""
    from tercet.cli import search as verbs

    embedder = Embedder.load(made / "model")
    real = verbs.load

    def load(model, dtype, **how):
        return embedder if model == str(made / "model") else real(model, dtype, **how)

    monkeypatch.setattr(verbs, "load", load)


def test_no_damage_to_any_file_of_a_scanned_index_ends_in_a_traceback_or_in_wrong_hits(
    tercet, made, tmp_path, without_the_model
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build(tercet, made, whole)
    right = search(tercet, whole).out
    paths = sorted(path for path in whole.rglob("*") if path.is_file() and path.name != ".lock")
    assert len(paths) >= 10  # seven arrays, records, the manifest, and what the folder is
    for path, how in product(paths, DAMAGES):
        shutil.copytree(whole, broken)
        damage(broken / path.relative_to(whole), how)
        ended = search(tercet, broken)
        assert is_plain(ended)
        silent = path.name in PAYLOAD and how in ("middle", "last byte")  # nobody sees a number
        assert ended.status == 2 or ended.out == right or silent, (path.name, how, ended)
        assert is_plain(
            tercet("index", made / "docs.jsonl", "--model", made / "model", "--out", broken)
        )
        shutil.rmtree(broken)


def test_what_the_messages_say_mends_a_damaged_index(tercet, made, tmp_path, without_the_model):
    out = tmp_path / "index"
    build(tercet, made, out)
    right = search(tercet, out).out
    for name in ("index.json", "exact/manifest.json", "exact/segment-1/dense.npy"):
        damage(next(out.glob(name.replace("-1", "-*"))), "cut")
        assert "tercet index --fresh" in search(tercet, out).err
        ended = tercet(
            "index", made / "fewer.jsonl", "--model", made / "model", "--out", out, "--fresh"
        )
        assert ended.status == 0, ended.err
        assert search(tercet, out).out == right


def test_settings_of_an_index_that_cannot_be_are_told(refused, tercet, made, tmp_path):
    out = tmp_path / "index"
    build(tercet, made, out)
    about = json.loads((out / "index.json").read_text())
    for name, value in {"precision": "float33", "kinds": ["eense"], "dims": "8"}.items():
        changed = about | {"settings": about["settings"] | {name: value}}
        (out / "index.json").write_text(json.dumps(changed))
        said = refused("search", out, "music")
        assert said.startswith(f"{out}: the index cannot be used (index.json says that its {name}")
