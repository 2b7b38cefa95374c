import json
import sys
from contextlib import closing

import pytest

from tercet.errors import IndexFolderError, MissingExtraError, RecipeError
from tercet.search.exact.exact_engine import ExactEngine
from tercet.search.opening import (
    About,
    about_index,
    building,
    make_engine,
    open_engine,
    require,
    verify_index,
    write_about,
)
from tercet.search.qdrant.qdrant_engine import QdrantEngine
from tests.search import conformance as c

ABOUT = About(settings={"model": "m", "fingerprint": "abc"})


def make(folder, about=ABOUT, **how):
    with closing(make_engine(folder, about, **how)) as engine:
        engine.upsert(c.records(), c.DOCUMENTS)
    write_about(folder, about)


def test_an_index_is_opened_with_its_own_engine_and_says_what_made_it(tmp_path):
    make(tmp_path / "index")
    assert about_index(tmp_path / "index") == ABOUT
    with closing(open_engine(tmp_path / "index")) as engine:
        assert isinstance(engine, ExactEngine)
        assert engine.stats().records == c.RECORDS


@pytest.mark.parametrize(("engine", "package"), [("qdrant", "qdrant_edge")])
def test_another_engine_is_opened_where_its_package_is(tmp_path, engine, package):
    pytest.importorskip(package)
    about = About(settings={}, engine=engine)
    make(tmp_path / "index", about)
    with closing(open_engine(tmp_path / "index")) as opened:
        assert isinstance(opened, QdrantEngine)
        assert type(opened.store).__name__ == "EdgeStore"
        assert opened.stats().records == c.RECORDS


def test_an_index_is_incomplete_until_it_is_said_to_be_complete(tmp_path):
    with closing(make_engine(tmp_path / "index", ABOUT)):
        assert not about_index(tmp_path / "index").complete
    write_about(tmp_path / "index", ABOUT)
    assert about_index(tmp_path / "index").complete
    with closing(make_engine(tmp_path / "index", ABOUT)):
        assert not about_index(tmp_path / "index").complete


def test_an_incomplete_index_of_nothing_can_be_searched(tmp_path):
    make_engine(tmp_path / "index", ABOUT).close()
    with closing(open_engine(tmp_path / "index", read_only=True)) as engine:
        assert engine.search(c.QUESTIONS, 3) == [[]] * c.QUERIES


def test_an_index_made_with_other_settings_is_added_to_by_nobody_and_replaced_on_request(tmp_path):
    folder = tmp_path / "index"
    make(folder)
    other = About(settings={"model": "m", "fingerprint": "xyz"})
    with pytest.raises(IndexFolderError, match="was built with fingerprint 'abc', not 'xyz'"):
        make_engine(folder, other)
    elsewhere = About(settings=ABOUT.settings, engine="cluster", url="http://h", collection="c")
    with pytest.raises(IndexFolderError, match="is an index of the engine 'exact'"):
        make_engine(folder, elsewhere)
    with closing(make_engine(folder, other, fresh=True)) as engine:
        assert engine.stats().records == 0
    assert about_index(folder) == other
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_index_that_another_process_writes_is_not_replaced(tmp_path):
    with closing(make_engine(tmp_path / "index", ABOUT)) as engine:
        engine.upsert(c.records(), c.DOCUMENTS)
        with pytest.raises(RecipeError, match="is writing there"):
            make_engine(tmp_path / "index", ABOUT, fresh=True)
        engine.flush()
        assert engine.stats().records == c.RECORDS


@pytest.mark.parametrize(
    ("engine", "package", "where"),
    [
        ("qdrant", "qdrant_edge", {}),
        ("cluster", "qdrant_client", {"url": "http://h", "collection": "c"}),
    ],
)
def test_an_index_is_not_replaced_by_one_of_an_engine_whose_package_is_missing(
    tmp_path, monkeypatch, engine, package, where
):
    make(tmp_path / "index")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    module = {"qdrant": "edge", "cluster": "server"}[engine]
    monkeypatch.delitem(sys.modules, f"tercet.search.qdrant.{module}", raising=False)
    other = About(settings={}, engine=engine, **where)
    with pytest.raises(MissingExtraError, match=r"tercet\[qdrant\]"):
        make_engine(tmp_path / "index", other, fresh=True)
    assert about_index(tmp_path / "index") == ABOUT and about_index(tmp_path / "index").complete
    with closing(open_engine(tmp_path / "index")) as opened:
        assert opened.stats().records == c.RECORDS
    with pytest.raises(MissingExtraError):
        make_engine(tmp_path / "new", other)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_index_that_a_kill_left_under_another_name_is_not_begun_anew(tmp_path):
    make(tmp_path / "index")
    (tmp_path / "index").rename(tmp_path / ".index.old-host-1-2")
    with closing(make_engine(tmp_path / "index", ABOUT)) as opened:
        assert opened.stats().records == c.RECORDS


def test_an_index_stays_until_the_one_that_replaces_it_is_whole(tmp_path):
    folder, beside, said = tmp_path / "index", tmp_path / ".index.fresh", list[str]()
    make(folder)
    assert verify_index(folder).complete
    other = About(settings={"model": "n", "fingerprint": "xyz"})

    def rebuild(about: About, done: int | None, there: int = 0) -> None:
        with building(folder, about, fresh=True, say=said.append) as engine:
            assert engine.stats().records == there
            engine.upsert(c.records()[:1], c.DOCUMENTS.take([0]))
            engine.flush()
            if done is None:
                raise KeyboardInterrupt
            engine.upsert(c.records()[:done], c.DOCUMENTS.take(slice(done)))

    for about, there in ((other, 0), (other, 1), (ABOUT, 0), (other, 0)):
        with pytest.raises(KeyboardInterrupt):
            rebuild(about, None, there)
        assert about_index(folder) == ABOUT
        assert verify_index(folder).records == c.RECORDS
        found = verify_index(beside)
        assert (found.records, found.complete) == (1, False)
    assert set(said) == {f"{folder} stays until the new index is whole; it is built in {beside}"}
    with closing(open_engine(folder)), pytest.raises(RecipeError, match="is writing there"):
        rebuild(other, 2, 1)  # it is being written to
    rebuild(other, 2, 1)
    assert about_index(folder) == other
    found = verify_index(folder)
    assert (found.records, found.complete) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    with pytest.raises(KeyboardInterrupt):
        rebuild(ABOUT, None)
    for path in (beside / "exact").glob("segment-*/*"):
        path.write_bytes(b"damaged")
    rebuild(ABOUT, 1)  # begins again
    with closing(make_engine(folder, other, fresh=True)):
        pass
    with building(folder, ABOUT, fresh=True, say=said.append) as engine:  # nothing to keep
        assert (engine.stats().records, beside.exists()) == (0, False)
    assert len(said) == 7


def test_a_folder_of_other_things_is_not_overwritten_not_even_fresh(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(IndexFolderError, match="is not an index and would be overwritten"):
            make_engine(tmp_path, ABOUT, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_folder_and_a_folder_without_index_are_told_apart(tmp_path):
    with pytest.raises(IndexFolderError, match="gone: no such folder; build one with: tercet"):
        open_engine(tmp_path / "gone")
    with pytest.raises(IndexFolderError, match="is not an index; build one with: tercet index"):
        open_engine(tmp_path)


def test_an_index_of_version_1_is_refused(tmp_path):
    old = {"version": 1, "dim": 8, "count": 5, "settings": {}}
    (tmp_path / "index.json").write_text(json.dumps(old))
    for opening in (open_engine, lambda folder: make_engine(folder, ABOUT)):
        with pytest.raises(IndexFolderError, match=r"not of version 2\); build it again with"):
            opening(tmp_path)
    make(tmp_path, fresh=True)
    assert about_index(tmp_path) == ABOUT


@pytest.mark.parametrize(
    "change", [{"engine": "other"}, {"settings": None}, {"surplus": 1}, {"version": 3}]
)
def test_what_cannot_be_true_is_told(tmp_path, change):
    make(tmp_path / "index")
    path = tmp_path / "index/index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(IndexFolderError, match=r"cannot be used \(.*\); build it again with"):
        about_index(tmp_path / "index")
    path.write_text("{")
    with pytest.raises(IndexFolderError, match=r"index.json cannot be read"):
        about_index(tmp_path / "index")


def test_a_setting_that_an_index_does_not_say_or_has_otherwise_is_named():
    with pytest.raises(IndexFolderError, match="f: does not say with which task it was made"):
        ABOUT.setting("f", "task")
    assert ABOUT.setting("f", "model") == "m"
    require("f", ABOUT, {"fingerprint": "abc"})
    with pytest.raises(IndexFolderError, match="f: was built with fingerprint 'abc', not 'xyz'"):
        require("f", ABOUT, {"fingerprint": "xyz"})
