import json

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


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    (folder / "news").mkdir(parents=True)
    for lang in ("de", "en"):
        rows = [{"query": f"{lang} {i}", "positives": [f"a {i}"], "lang": lang} for i in range(9)]
        write(folder / "news" / f"{lang}.jsonl", *rows)
    write(folder / "nq.jsonl", *({"query": f"q{i}", "positives": ["p p"]} for i in range(6)))
    return folder


def test_check_tells_a_folder_source_by_source(tercet, sources, encoder_folder, tmp_path):
    test, report = tmp_path / "test.jsonl", tmp_path / "report.json"
    write(test, {"query": "DE 3", "positives": ["none of them"]})
    ended = tercet(
        *("check", sources, "--batch-size", "4", "--test-data", test, "--json", report),
        *("--model", encoder_folder, "--query-tokens", "2", "--plot", tmp_path / "mixture.png"),
    )
    assert (ended.status, ended.err) == (0, "")
    lines = [cells(line) for line in ended.out.splitlines()]
    assert ["news", "de", "9", "37.5%", "2", "0.0%"] in lines
    assert ["nq", "-", "6", "25.0%", "2", "0.0%"] in lines
    assert ["all", "-", "24", "100.0%", "6", "0.0%"] in lines
    assert ["news", "de", "1"] in lines and ["nq", "-", "0"] in lines
    first = json.loads(report.read_text())["sources"][0]
    assert (first["source"], first["lang"], first["overlap"]) == ("news", "de", {"test.jsonl": 1})
    assert first["queries"]["truncated"] == 1.0 and first["documents"]["truncated"] is None
    assert (tmp_path / "mixture.png").read_bytes()[1:4] == b"PNG"


def test_check_of_a_folder_collects_the_errors_of_all_shards(tercet, sources):
    write(sources / "news" / "x.jsonl", {"query": "q"}, {"positives": ["p"]})
    ended = tercet("check", sources)
    assert ended.status == 2
    assert [line.split(": ")[1] for line in ended.err.splitlines()] == [
        f"{sources}/news/x.jsonl:1",
        f"{sources}/news/x.jsonl:2",
    ]
    assert ["news", "en", "9", "37.5%", "1", "0.0%"] in [cells(x) for x in ended.out.splitlines()]


def test_check_refuses_limits_without_a_model(refused, sources):
    said = refused("check", sources, "--query-tokens", "9")
    assert said.startswith("tokens are counted with a model's tokenizer; name one with --model")
