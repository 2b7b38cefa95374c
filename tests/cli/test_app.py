import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.cli.app import main
from tercet.files.signals import SIGNALS
from tercet.models.embedder import Embedder
from tests.cli.lines import cells, write
from tests.toy import SENTENCES

ROOT = Path(__file__).parents[2]


def test_train_eval_index_search_and_encode_follow_each_other(
    tercet, train, encoder_folder, files, tmp_path
):
    out = tmp_path / "run"
    dev = files / "pairs.jsonl"
    ended = tercet(*train(out, "--set", "epochs=2", "--dev", dev, "--set", "run.eval_steps=3"))
    assert (ended.status, ended.out) == (0, f"{out}/model\n")
    assert "contrastive: 6 steps of 8 examples" in ended.err
    assert re.search(
        r"dev set: 0\.\d+ before training, 0\.\d+ at best, after step \d of 6", ended.err
    )
    assert f"next: tercet index docs.jsonl --model {out}/model --out {out}/index\n" in ended.err

    ended = tercet("eval", dev, "--model", out / "model", "--compare-with", encoder_folder)
    lines = ended.out.splitlines()
    assert lines[0] == "22 queries, 24 documents"  # two sentences end in the same word
    assert cells(lines[1]) == ["model", "ndcg@10", "recall@100", "mrr@10", "map@100"]
    models = [str(encoder_folder), "BM25"]
    assert [cells(line)[0] for line in lines[2:5]] == [str(out / "model"), *models]
    assert re.fullmatch(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", cells(lines[2])[1])
    assert [cells(line)[0] for line in lines[5:]] == [f"{out}/model minus", *models]

    ended = tercet("index", files / "docs.jsonl", "--model", out / "model", "--out", out / "index")
    assert (ended.status, ended.out) == (0, f"{out}/index: 12 documents\n")
    estimate, size, hint = ended.err.splitlines()
    assert size.startswith("dense vectors") and "256 bytes" in size  # 64 coordinates of 4 bytes
    assert estimate == "12 documents; their vectors will take about 3.07 KB: dense 3.07 KB"
    assert hint == f'search it: tercet search {out}/index "your question"'

    ended = tercet("search", out / "index", SENTENCES[3], "music", "-k", "2")
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [cells(line) for line in lines[:3]] == [
        [SENTENCES[3]],
        ["score", "id", "title"],
        ["1.000", "d3", SENTENCES[3][:12]],
    ]
    assert lines[4] == "music" and len(lines) == 8

    ended = tercet(
        "encode", files / "texts.txt", "--model", out / "model", "--out", tmp_path / "v.npy"
    )
    assert (ended.status, ended.out) == (0, f"{tmp_path}/v.npy: 12 vectors of 64 dimensions\n")
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(
        vectors, Embedder.load(out / "model").encode(SENTENCES), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["search", "index", "q", "--k", "0"], "'--k'"),
        (["search", "index", "q", "--k", "many"], "'--k'"),
        (["search", "index"], "'QUESTION'"),
        (["encode", "a.txt", "--model", "model", "--out", "v.npy", "--role", "title"], "'--role'"),
        (["train", "--out", "run"], "'RECIPE'"),
        (["serach", "index", "q"], "'serach'"),
    ],
)
def test_a_slip_in_the_words_of_a_command_is_named(tercet, words, about):
    ended = tercet(*words)
    assert ended.status == 2 and ended.out == "" and "Traceback" not in ended.err
    assert about in ended.err.splitlines()[-1]


@pytest.mark.parametrize("verb", ["encode", "index", "eval"])
def test_a_missing_or_empty_file_is_named_by_every_verb(
    refused, encoder_folder, files, tmp_path, verb
):
    model = ["--model", encoder_folder]
    out = [] if verb == "eval" else ["--out", tmp_path / "out"]
    said = refused(verb, files / "missing.jsonl", *model, *out)
    assert said == f"{files}/missing.jsonl: no such file"
    assert "holds no records" in refused(verb, files / "empty.jsonl", *model, *out)
    assert list(tmp_path.iterdir()) == []


def test_dims_that_the_model_does_not_have_are_refused(refused, encoder_folder, files, tmp_path):
    texts, docs, pairs = (files / name for name in ("texts.txt", "docs.jsonl", "pairs.jsonl"))
    expected = "dims must be between 1 and the model's 64; got 65"
    out = ["--out", tmp_path / "out", "--dims", "65"]
    assert refused("encode", texts, "--model", encoder_folder, *out) == expected
    assert refused("index", docs, "--model", encoder_folder, *out) == expected
    assert refused("eval", pairs, "--model", encoder_folder, "--dims", "65") == expected
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_named_before_the_work(
    refused, train, encoder_folder, files, tmp_path, monkeypatch
):
    blocked = files / "texts.txt"
    inside = blocked / "inside"
    said = refused(*train(blocked))
    assert said.startswith(f"{blocked}: could not be written: a file is where a folder has to be")
    assert refused(*train(inside)).startswith(f"{inside}: could not be written")
    said = refused("index", files / "docs.jsonl", "--model", encoder_folder, "--out", blocked)
    assert "is not an index and would be overwritten" in said
    monkeypatch.setattr(Embedder, "encode", None)

    said = refused("encode", blocked, "--model", encoder_folder, "--out", tmp_path)
    assert said.startswith(f"{tmp_path}: could not be written: it is not a file")

    said = refused("encode", blocked, "--model", encoder_folder, "--out", inside)
    assert said.startswith(f"{blocked}: could not be written: a file is where")


def test_a_long_path_is_not_broken_over_lines(refused, tercet, encoder_folder, files, tmp_path):
    deep = tmp_path / "/".join(["a_rather_long_name_of_a_folder"] * 8)
    assert refused("check", deep / "pairs.jsonl") == f"{deep}/pairs.jsonl: no such file"
    ended = tercet("index", files / "docs.jsonl", "--model", encoder_folder, "--out", deep)
    assert ended.out == f"{deep}: 12 documents\n"
    assert ended.err.endswith(f'search it: tercet search {deep} "your question"\n')


def test_remarks_are_plain_lines(tercet, encoder_folder, tmp_path):
    (tmp_path / "long.txt").write_text("music " * 300 + "\nshort\n")
    ended = tercet(
        "encode", tmp_path / "long.txt", "--model", encoder_folder, "--out", tmp_path / "v.npy"
    )
    assert re.fullmatch(r"tercet: note: 1 of 2 .*texts were cut to 128 tokens\n", ended.err)


def test_warnings_of_what_will_change_elsewhere_are_not_for_users(tercet):
    tercet("list-models")
    warnings.warn("this will be gone", FutureWarning, stacklevel=1)  # an error in other tests


def test_the_loggers_of_other_packages_are_left_alone(tercet):
    before = list(logging.getLogger().handlers)
    tercet("list-models")
    assert logging.getLogger().handlers == before
    assert len(logging.getLogger("tercet").handlers) == 1


def test_an_interrupted_command_says_so_with_status_130(tercet, files, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tercet.cli.data.check_data", interrupted)
    ended = tercet("check", files / "pairs.jsonl")
    assert ended.status == 130 and ended.err.startswith("tercet: stopped; ")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_with_a_line_that_says_what_is_kept(
    tercet, encoder_folder, files, tmp_path, monkeypatch, number
):
    def signalled(*_, **__):
        os.kill(os.getpid(), number)

    handlers = [signal.getsignal(each) for each in SIGNALS]
    monkeypatch.setattr("tercet.search.indexing.document_batches", signalled)
    command = [
        "index",
        files / "docs.jsonl",
        "--model",
        encoder_folder,
        "--out",
        tmp_path / "index",
    ]
    ended = tercet(*command)
    assert (ended.status, ended.out) == (128 + number, "")
    said = [line for line in ended.err.splitlines() if line.startswith("tercet: ")]
    assert said == [
        "tercet: stopped; what is finished is kept, and the same command goes on with the rest"
    ]
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    monkeypatch.undo()
    assert tercet(*command).out == f"{tmp_path}/index: 12 documents\n"


def test_as_a_program_it_prints_its_results_and_nothing_else_to_a_pipe(files):
    command = [sys.executable, "-m", "tercet", "search", str(files / "index"), SENTENCES[1]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, "-k1"], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [cells(line) for line in ended.stdout.splitlines()] == [
        [SENTENCES[1]],
        ["score", "id", "title"],
        ["1.000", "d1", SENTENCES[1][:12]],
    ]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_threads_wait_asleep_unless_the_user_has_chosen_how(tercet, monkeypatch, chosen, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert tercet("--version").status == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_how_threads_wait_is_chosen_before_torch_reads_it():
    code = "import sys, tercet.cli.app; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "False\n"


# ---- output that cannot show or take everything ----------------------------------------------


def program(words: list[str | Path], **options: Any) -> "subprocess.CompletedProcess[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.update(options.pop("env", {}))
    command = [sys.executable, "-m", "tercet", *map(str, words)]
    return subprocess.run(command, env=environment, check=False, **options)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_characters_that_an_encoding_lacks_are_shown_as_escapes(
    tercet, tmp_path, monkeypatch, encoding
):
    pairs = write(tmp_path / "日.jsonl", {"query": "日本 é", "positives": ["\U0001f600"]})
    with pairs.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"query": "a", "positives": ["b"]}) + "\n")
    streams = {}
    for name in ("stdout", "stderr"):
        streams[name] = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, name, streams[name])
    with pytest.raises(SystemExit) as end:
        main(["check", str(pairs)])
    assert not end.value.code
    with pytest.raises(SystemExit) as end:
        main(["check", str(tmp_path / "本.jsonl")])
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    shown = str if encoding == "utf-8" else (lambda text: escaped(text, encoding))
    assert shown("日本 é") in out and shown("\U0001f600") in out
    assert err.endswith(shown("本.jsonl: no such file\n"))


def escaped(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "NAMES": "ascii"},
    ],
)
def test_files_are_utf_8_whatever_the_locale(encoder_folder, files, tmp_path, env):
    docs = tmp_path / "docs.jsonl"
    docs.write_text('{"id": "日", "title": "本", "text": "play 日本 music"}\n', encoding="utf-8")
    index, out = (("índex", "日.jsonl"), ("index", "rows.jsonl"))["NAMES" in env]
    for words in (
        ["index", docs, "--model", encoder_folder, "--out", tmp_path / index],
        ["search", tmp_path / index, "music", "-k1"],
        ["encode", docs, "--model", encoder_folder, "--format", "qdrant", "--out", tmp_path / out],
    ):
        ended = program(words, env=env, capture_output=True)
        assert (ended.returncode, b"Traceback" in ended.stderr) == (0, False), ended.stderr
    (row,) = (tmp_path / out).read_text(encoding="utf-8").splitlines()
    assert "日" in row and "本" in row


def test_an_argument_that_is_no_text_is_refused(refused, encoder_folder, files, monkeypatch):
    def takes_no_such_path(*_, **__):
        "\udce9".encode()

    monkeypatch.setattr("tercet.search.export.write_dense", takes_no_such_path)
    said = refused(
        "encode", files / "texts.txt", "--model", encoder_folder, "--out", "caf\udce9.npy"
    )
    assert said == (
        "the argument 'caf\\udce9.npy' is not in utf-8; rename the file, or set PYTHONUTF8=1 if it "
        "is UTF-8"
    )


@pytest.mark.slow
def test_a_reader_that_ends_early_or_a_full_disk_is_no_traceback(files):
    search = ["search", files / "index", *SENTENCES]
    read, write_end = os.pipe()
    os.close(read)
    ended = program(search, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (141, b"")
    with open("/dev/full", "w") as full:
        ended = program(search, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 2 and ended.stderr.decode() == (
        "tercet: standard output cannot be written to: No space left on device\n"
    )
    ended = program(["check", files / "missing"], stderr=subprocess.DEVNULL)
    assert ended.returncode == 2
    script = f"exec {sys.executable} -m tercet check {files}/pairs.jsonl <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], cwd=ROOT, check=False).returncode == 0


def test_a_bug_keeps_its_traceback_without_keys(tercet, files, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("the key is hf_0123456789")

    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setattr("tercet.cli.data.check_data", broken)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ValueError, match="the key is") as error:
        main(["check", str(files / "pairs.jsonl")])
    sys.excepthook(ValueError, error.value, error.tb)
    said = capsys.readouterr().err
    assert "Traceback" in said and "ValueError: the key is ***" in said and "hf_0" not in said
