"""Every other bit, cut, deletion or swap in an index is refused, or changes no hit."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from tercet.errors import IndexFolderError
from tercet.rank.quantized import Stored
from tercet.search.exact.exact_engine import ExactEngine
from tests.damage import damages, unnoticed
from tests.search import conformance as c

KINDS_OF = {"float32": ("dense",), "int8": ("dense",), "int4": ("dense",), "binary": ("dense",)}
WAYS = [*KINDS_OF.items(), ("float32", ("sparse",)), ("float32", ("multi",))]


def filled(folder: Path, stored: Stored = "float32", kinds=("dense",)) -> list:
    """Two segments with deleted rows; what is found in them."""
    docs, records = c.DOCUMENTS.only(kinds), c.records()
    with closing(ExactEngine(folder, stored=stored)) as engine:
        if stored != "float32":
            engine.settle(c.RANGES)
        engine.upsert(records[:30], docs.take(list(range(30))))
        engine.flush()
        engine.upsert(records[30:], docs.take(list(range(30, len(records)))))
        engine.delete([records[3].id, records[33].id])
    return asked(folder)


def asked(folder: Path) -> list:
    with closing(ExactEngine(folder, read_only=True)) as engine:
        queries = c.QUESTIONS.only(tuple(engine.widths))
        return [engine.search(queries, 7), list(engine.scan())]


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "kinds"), WAYS)
def test_damage_to_any_file_of_an_index_is_refused_or_changes_no_hit(tmp_path, stored, kinds):
    wanted = filled(tmp_path, stored, kinds)
    assert len(list(tmp_path.glob("segment-*"))) == 2
    assert len(list(tmp_path.glob("deleted-*"))) == 1
    assert not unnoticed(
        tmp_path,
        ask=lambda: asked(tmp_path),
        same=lambda found: found == wanted,
        refusals=IndexFolderError,
        count=12,
    )


def test_a_damaged_file_of_an_index_is_named(tmp_path):
    filled(tmp_path)
    path = max(tmp_path.glob("segment-*")) / "dense.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(IndexFolderError) as caught:
        ExactEngine(tmp_path)
    name = path.relative_to(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: the index is damaged ({name} is not as it was written); build it again with: "
        "tercet index --fresh"
    )


def test_two_segments_in_each_other_s_place_are_refused(tmp_path):
    filled(tmp_path)
    one, other = tmp_path.glob("segment-*")
    one.rename(tmp_path / "x")
    other.rename(one)
    (tmp_path / "x").rename(other)
    with pytest.raises(IndexFolderError, match=r"/dense.npy is not as it was written"):
        ExactEngine(tmp_path, read_only=True)


def test_an_index_of_an_earlier_version_opens_with_one_note_and_stays_unchecked(tmp_path, caplog):
    wanted = filled(tmp_path)
    path = tmp_path / "manifest.json"
    about = json.loads(path.read_text())
    del about["checksum"], about["checksums"]
    path.write_text(json.dumps(about))
    assert asked(tmp_path) == wanted == asked(tmp_path)
    assert caplog.text.count(f"{tmp_path}: holds files of an earlier version") == 1
    with closing(ExactEngine(tmp_path)) as engine:
        engine.upsert([c.records()[0]], c.DOCUMENTS.only(("dense",)).take([0]))
        engine.flush()
        assert not engine.is_sealed
        engine.optimize()
    with closing(ExactEngine(tmp_path)) as engine:
        assert engine.is_sealed


def test_a_damage_is_undone_by_the_test_itself(tmp_path):
    filled(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(list(damages(tmp_path, "*.npy", count=1))) > 10
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
