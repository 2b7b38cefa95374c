"""What an output may replace: never an input, never what tercet did not make."""

import json
import os
from pathlib import Path

import pytest

from tercet.errors import RecipeError, StorageError
from tercet.files.outputs import MARK, FolderKind, check_files, check_output, mark

WHOLE = FolderKind("a map")  # replaced as a whole; its marker lists its files
PARTS = FolderKind("an atlas", own=("a.txt", "maps/*"))
SHARED = FolderKind("a diary", own=("day-*",), shared=True)
ROWS = FolderKind("a folder of rows", shared=True, is_data=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an input, in which relative paths begin."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/in.txt").write_text("worth a year")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def linked(place: Path, name: str) -> Path:
    """Another name of the input."""
    out, target = place / f"{name}.txt", place / "data/in.txt"
    if name == "symbolic":
        out.symlink_to(target)
    elif name == "hard":
        os.link(target, out)
    elif name == "by_folder":
        (place / "other").symlink_to(place / "data")
        out = place / "other/in.txt"
    elif name == "relative":
        out = Path("data/../data/./in.txt")
    else:
        out = target
    return out


NAMES = ("itself", "symbolic", "hard", "by_folder", "relative")


@pytest.mark.parametrize("name", NAMES)
def test_an_input_is_not_an_output_by_whatever_name(place, name):
    other = linked(place, name)
    for out, given in ((other, place / "data/in.txt"), (place / "data/in.txt", other)):
        with pytest.raises(RecipeError, match="is an input; give another --json"):
            check_output(out, [given], flag="--json")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_inside_an_input_folder_is_an_input_by_whatever_name(place, name):
    out = linked(place, name)
    with pytest.raises(RecipeError, match=r"is (an|inside the) input.*; give another --out"):
        check_output(out, [Path("data")])


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_file_outside_that_an_input_folder_leads_to_is_an_input(place, kind):
    out = place / "out.txt"
    out.write_text("old")
    if kind == "hard":
        os.link(out, place / "data/more.txt")
    else:
        (place / "data/more.txt").symlink_to(out)
    with pytest.raises(RecipeError, match="is an input"):
        check_output(out, [place / "data"])


def test_a_new_file_beside_inputs_and_an_old_one_elsewhere_may_be_written(place):
    (place / "out.txt").write_text("old")
    check_output(place / "data/new.txt", [place / "data"])
    check_output(place / "out.txt", [place / "data", "minilm", None, place / "missing"])
    check_output(place / "loop", [place / "data"])
    (place / "loop").symlink_to("loop")
    check_output(place / "data/new.txt", [place / "loop"])


def test_a_folder_in_the_place_of_a_file_and_a_file_in_that_of_a_folder_are_refused(place):
    with pytest.raises(StorageError, match="it is not a file"):
        check_output(place / "data")
    with pytest.raises(StorageError, match="it is not a file"):
        check_output("/dev/null")
    with pytest.raises(StorageError, match="a file is where a folder has to be"):
        check_output(place / "data/in.txt", kind=SHARED)
    with pytest.raises(RecipeError, match="is not a map and would be overwritten"):
        check_output(place / "data/in.txt", kind=WHOLE)


def test_two_flags_do_not_name_one_file(place):
    check_files([place / "data", None], json=place / "a.json", plot=None)
    with pytest.raises(RecipeError, match="--json and --plot name the same file; give two"):
        check_files([], json=place / "a", plot=place / "data/../a")


@pytest.mark.parametrize("kind", [WHOLE, PARTS, SHARED, ROWS], ids=lambda kind: kind.name)
def test_a_folder_is_written_where_nothing_is_or_tercet_was(place, kind):
    out = place / "out"
    check_output(out, kind=kind)
    out.mkdir()
    (out / ".lock").touch()
    check_output(out, kind=kind)  # an empty one
    (out / "a.txt").write_text("by tercet")
    with pytest.raises(RecipeError, match=f"is not {kind.name} and would be overwritten"):
        check_output(out, kind=kind)
    mark(out, kind)
    check_output(out, kind=kind)
    with pytest.raises(RecipeError, match="is not a song"):
        check_output(out, kind=FolderKind("a song"))
    (out / MARK).write_text("not ours")
    with pytest.raises(RecipeError, match="would be overwritten"):
        check_output(out, kind=kind)


@pytest.mark.parametrize("kind", [WHOLE, PARTS], ids=lambda kind: kind.name)
@pytest.mark.parametrize("path", ["letter.txt", "maps/of/letter.txt", "link"])
def test_what_was_put_into_a_folder_of_tercet_is_not_lost(place, kind, path):
    out = place / "out"
    (out / "maps").mkdir(parents=True)
    (out / "a.txt").write_text("by tercet")
    (out / "maps/1.txt").write_text("by tercet")
    mark(out, kind)
    check_output(out, kind=kind)
    if path == "link":
        (out / path).symlink_to(place / "data")
    else:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text("dear all")
    if kind is PARTS and path.startswith("maps"):
        check_output(out, kind=kind)  # a name that tercet gives
    else:
        with pytest.raises(RecipeError, match=f"holds {path}, which tercet did not write"):
            check_output(out, kind=kind)


def test_a_folder_that_is_replaced_holds_no_input_and_a_shared_one_none_that_is_replaced(place):
    inside = place / "data/in.txt"
    for kind in (WHOLE, ROWS):
        for given in (inside, place / "data"):
            with pytest.raises(RecipeError, match=r"is an input|is or contains the input"):
                check_output(place / "data", [given], kind)
    mark(place / "data", SHARED)
    check_output(place / "data", [inside], SHARED)
    day = place / "data/day-1"
    day.write_text("x")
    with pytest.raises(RecipeError, match="is or contains the input"):
        check_output(place / "data", [day], SHARED)
    (place / "far").mkdir()
    (place / "far/link.txt").symlink_to(day)
    with pytest.raises(RecipeError, match="is or contains the input"):
        check_output(place / "data", [place / "far"], SHARED)


def test_a_folder_that_would_be_read_with_the_input_is_refused_inside_it(place):
    check_output(place / "data/out", [place / "data"], SHARED)
    with pytest.raises(RecipeError, match="is inside the input"):
        check_output(place / "data/out", [place / "data"], ROWS)


def test_the_marker_is_the_same_for_the_same_files(place):
    mark(place / "data", WHOLE)
    first = (place / "data" / MARK).read_bytes()
    assert json.loads(first) == {"made": "a map", "files": ["in.txt"]}
    mark(place / "data", WHOLE)
    assert (place / "data" / MARK).read_bytes() == first
    mark(place / "data", PARTS)
    assert json.loads((place / "data" / MARK).read_text()) == {"made": "an atlas"}
