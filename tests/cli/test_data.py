import json
import os
import subprocess
import sys

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


def test_check_shows_what_columns_were_taken_for_and_names_of_columns_can_be_given(
    tercet, refused, tmp_path
):
    path = tmp_path / "pairs.csv"
    path.write_text("title,context,answer,negatvies\na,b,c,d\n")
    assert '"query"; rename one of its columns to it, or name it with --query-field' in refused(
        "check", path
    )
    named = ("--query-field", "title", "--positive-field", "answer")
    done = tercet("check", path, *named)
    shown = " ".join(done.out.split())
    assert "pairs.csv CSV, UTF-8 1 query: title, positives: answer context, negatvies" in shown
    said = '1 record has a field "negatvies", which is ignored; did you mean "negatives"?'
    assert said in done.err


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["check", "mine", "decontaminate"])
def test_standard_input_is_data_but_only_once(verb, tmp_path):
    rows = b'{"q": "apple tree", "positive": "a tree with apples"}\n' * 2
    rows += b'{"q": "web server", "positive": "serves files"}\n'
    test = tmp_path / "test.jsonl"
    test.write_text('{"query": "apple tree", "positive": "other", "text": "cats"}\n')
    out = tmp_path / "out.jsonl"
    words = {
        "check": ["check", "-", "--test-data"],
        "mine": ["mine", "-", "--by", "bm25", "--out", out, "--work", tmp_path, "--corpus"],
        "decontaminate": ["decontaminate", "-", "--out", out, "--test-data"],
    }[verb]
    named = ["--query-field", "q"]

    def run(*more):
        return subprocess.run(
            [sys.executable, "-m", "tercet", *map(str, [*words, *more, *named])],
            input=rows,
            capture_output=True,
            check=False,
            env={**os.environ, "TERCET_CACHE": str(tmp_path / "cache")},
        )

    once = run(test)
    assert once.returncode == 0, once.stderr
    twice = run("-")
    assert b'"-" is given twice, but standard input can be read only once' in twice.stderr
    assert twice.returncode == 2
    if verb == "decontaminate":
        assert [json.loads(line)["query"] for line in out.read_text().splitlines()] == [
            "web server"
        ]
