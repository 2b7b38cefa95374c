import pytest

from tests.cli.lines import cells, write


def test_check_counts_and_shows_three_samples(tercet, files):
    ended = tercet("check", files / "pairs.jsonl")
    assert (ended.status, ended.err) == (0, "")
    lines = [cells(line) for line in ended.out.splitlines()]
    assert ["examples", "24"] in lines and ["distinct documents", "24"] in lines
    assert [line for line in lines if line[0].startswith("sample")] == [
        ["sample 1"],
        ["sample 2"],
        ["sample 3"],
    ]


def test_check_names_each_error_with_its_line_and_ends_with_status_2(tercet, tmp_path):
    good = {"query": "q", "positives": ["p"]}
    file = write(tmp_path / "bad.jsonl", good, {"query": "q"}, good, {"query": 5, "positives": []})
    ended = tercet("check", file)
    assert ended.status == 2
    errors = [line for line in ended.err.splitlines() if "note:" not in line]
    assert [error.split(": ")[1] for error in errors] == [f"{file}:2", f"{file}:4"]
    assert ["examples", "2"] in [cells(line) for line in ended.out.splitlines()]


@pytest.mark.parametrize("name", ["missing.jsonl", "empty.jsonl", "pairs.csv", "folder"])
def test_check_shows_no_table_of_zeros(refused, files, name):
    assert refused("check", files / name).startswith(f"{files / name}: ")
