import json
from pathlib import Path

import pytest

from tercet.curate.convert.flagembedding import FileLimits, convert_flag_rows, flag_set
from tercet.errors import DataError, RecipeError
from tercet.models.formats.bge_m3_files import FlagRows


def write(path: Path, rows: int, **more) -> Path:
    path.parent.mkdir(exist_ok=True)
    lines = [{"query": f"{path.stem} {i}", "pos": [f"p{i}"], **more} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def converted(*places: Path, **limits):
    counted: list[int] = []
    bounds = FileLimits(**limits)
    chosen = flag_set(places, bounds)
    return list(convert_flag_rows(chosen, FlagRows(), bounds, counted.append)), chosen, counted


def test_files_of_all_places_become_tasks_in_order(tmp_path):
    folder = tmp_path / "set_no_in_batch_neg"
    write(folder / "b_len-0-500.jsonl", 2)
    write(folder / "b_len-500-1000.jsonl", 1)
    alone = write(tmp_path / "a.jsonl", 1, prompt="find: ")
    examples, _, counted = converted(folder, alone)
    assert [(e.task, e.in_batch, e.query_prompt) for e in examples] == [
        *[("b", "none", None)] * 3,
        ("a", None, "find: "),
    ]
    assert sum(counted) == 4


def test_small_files_of_a_folder_become_one_task_or_none(tmp_path):
    folder = tmp_path / "mixed"
    for name, rows in (("big", 5), ("one", 2), ("two", 1)):
        write(folder / f"{name}.jsonl", rows)
    lone = write(tmp_path / "lone.jsonl", 1)
    kept, _, _ = converted(folder, lone, small=3, drop=3)
    assert [e.task for e in kept] == [*["big"] * 5, *["mixed"] * 3, "lone"]
    dropped, chosen, _ = converted(folder, lone, small=3, drop=4)
    assert [e.task for e in dropped] == [*["big"] * 5, "lone"]
    assert dict(chosen.left_out) == {"small files with too few rows together": 2}
    with pytest.raises(DataError, match="all left out; lower --drop"):
        flag_set([folder], FileLimits(small=9, drop=99))


def test_the_rows_of_each_file_are_drawn_the_same_each_time(tmp_path):
    first, second = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 3)
    examples, _, counted = converted(first, second, rows=5)
    assert [e.task for e in examples] == [*["a"] * 5, *["b"] * 3]
    assert len({e.query for e in examples}) == 8
    assert examples[:5] != converted(first)[0][:5]
    assert examples == converted(first, second, rows=5)[0]
    assert sum(counted) == 43
    with pytest.raises(RecipeError, match="rows per file must be at least 1; got 0"):
        FileLimits(rows=0)


def test_what_cannot_be_read_is_named(tmp_path):
    bad = write(tmp_path / "bad.jsonl", 2)
    bad.write_text(bad.read_text() + '{"query": "x", "pos": []}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:3: \"positives\" is missing or empty"):
        converted(bad)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: has no .jsonl file"):
        converted(tmp_path / "none")
    with pytest.raises(DataError, match="nowhere"):
        converted(tmp_path / "nowhere.jsonl")
