"""What is said about slips in the words of a command, and what a shell completes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tercet.files.console import QUIET
from tests.cli.lines import write
from tests.toy import SENTENCES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("serach I q", "No such command 'serach'. Did you mean 'search'?"),
        ("encode a.txt --model m --out v.npy --kinds dense", "Did you mean --kind?"),
        ("search I q --fusion weigthed", "Did you mean weighted?"),
        (
            "encode a.txt --model minilmm --out v.npy",
            'there is no model "minilmm"; did you mean minilm?',
        ),
        ("encode minilm a.txt --out v.npy", "tercet encode a.txt --out v.npy --model minilm?"),
        ("eval minilm a.txt", "Did you mean: tercet eval a.txt --model minilm?"),
        ("index minilm a.txt --out I", "Did you mean: tercet index a.txt --out I --model minilm?"),
        (
            "score minilm a.jsonl --out o.jsonl",
            "Did you mean: tercet score a.jsonl --out o.jsonl --model minilm?",
        ),
        ("search question folder", "the index comes first: tercet search folder question"),
        (
            "encode a.txt --model minilm --out v.npy --device tpu9",
            "the device 'tpu9' cannot be used here",
        ),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(refused, files, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("music\n")
    (tmp_path / "folder").mkdir()
    assert said in refused(*words.split())


def test_quiet_leaves_results_and_errors_alone(
    tercet, encoder_folder, files, tmp_path, monkeypatch
):
    monkeypatch.delenv(QUIET, raising=False)
    words = ["index", files / "docs.jsonl", "--model", encoder_folder, "--out", tmp_path / "index"]
    ended = tercet(words[0], "--quiet", *words[1:])
    assert (ended.status, ended.out, ended.err) == (0, f"{tmp_path}/index: 12 documents\n", "")
    assert "search it: " in tercet(*words).err
    ended = tercet("--quiet", "check", tmp_path / "lost.jsonl")
    assert ended.err == f"tercet: {tmp_path}/lost.jsonl: no such file\n"
    found = tercet("search", tmp_path / "index", "--", "--quiet")
    assert found.out.splitlines()[0] == "--quiet"


def test_json_takes_the_place_of_tables(tercet, files, tmp_path):
    import json

    ended = tercet("search", files / "index", SENTENCES[3], "--json", "-", "-k", "1")
    ((hit,),) = [each["hits"] for each in json.loads(ended.out)]
    assert (hit["id"], hit["title"]) == ("d3", SENTENCES[3][:12])
    assert tercet("search", files / "index", "music", "--json", tmp_path / "a.json").out
    assert json.loads((tmp_path / "a.json").read_text())[0]["query"] == "music"


# ---- extras --------------------------------------------------------------------------------------


def without(monkeypatch, *packages):
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


def test_eval_leaves_out_what_needs_packages_that_are_missing(
    tercet, encoder_folder, files, tmp_path, monkeypatch
):
    without(monkeypatch, "bm25s")
    ended = tercet(
        "eval", files / "pairs.jsonl", "--model", encoder_folder, "--out", tmp_path / "o"
    )
    assert ended.status == 0 and "BM25 is left out: " in ended.err and "[bm25]" in ended.err
    assert len(ended.out.splitlines()) == 3 and (tmp_path / "o/scores.json").exists()


def test_a_missing_package_is_named_before_the_work(refused, files, tmp_path, monkeypatch):
    monkeypatch.setattr("tercet.cli.options.find_spec", lambda name: None)
    said = refused("check", files / "pairs.jsonl", "--plot", tmp_path / "a.png")
    assert said == "--plot needs an extra package; install it: pip install 'tercet[plot]'"
    pairs = write(tmp_path / "labels.jsonl", *({"text": t, "label": t[0]} for t in SENTENCES))
    monkeypatch.setattr("tercet.models.embedder.Embedder.load", None)
    assert "tercet[probe]" in refused("eval", pairs, "--model", files / "incomplete")


# ---- completion ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tercet in", ["index", "inspect"]),
        ("tercet tune ", ["weights", "codes"]),
        ("tercet index --store", ["--store-as"]),
        ("tercet encode --model mini", ["minilm"]),
        ("tercet train fine", ["finetune"]),
        ("tercet search I q --fusion r", ["rrf", "rerank"]),
        ("tercet check tex", []),  # nothing: then the shell completes files
    ],
)
def test_a_shell_completes_without_torch(tmp_path, line, expected):
    script = (
        "import sys; sys.meta_path.insert(0, type('No', (), {'find_spec': staticmethod("
        "lambda name, *_: sys.exit(9) if name in ('torch', 'transformers') else None)})); "
        "from tercet.cli import main; main([])"
    )
    words = line.split(" ")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_TERCET_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.split() == expected
