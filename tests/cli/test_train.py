import csv
import gzip
import json

import numpy as np
import pytest
import torch
import transformers as t

from tercet.cli.train import shown
from tercet.data.files.sources import iter_examples
from tercet.models.embedder import Embedder
from tercet.recipes.catalog import RECIPES
from tercet.recipes.settings import settings_of
from tests.cli.lines import cells, table, write
from tests.toy import DECODERS, SENTENCES, byte_bpe


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """A tiny decoder that still has its head."""
    folder = tmp_path_factory.mktemp("language-model")
    torch.manual_seed(3)
    t.LlamaForCausalLM(DECODERS["llama"]).save_pretrained(folder)  # pyright: ignore
    byte_bpe().save_pretrained(folder)
    return folder


@pytest.fixture
def llm2vec(language_model):
    """The words of a short training of all stages that are asked for."""

    def words(out, *more, model=language_model):
        settings = "mntp.steps=2 mntp.batch_size=4 mntp.block_tokens=32 simcse.steps=3"
        settings += " simcse.batch_size=6 lora_rank=2"
        if any("supervised" in str(word) for word in more):
            settings += " supervised.steps=2 supervised.batch_size=4"
        start = ("train", "llm2vec", "--model", model, "--out", out, "--device=cpu")
        return [*start, *(f"--set={word}" for word in settings.split()), *more]

    return words


def test_explain_lists_every_setting_with_default_unit_and_meaning(tercet):
    for recipe, entry in RECIPES.items():
        out = tercet("train", recipe, "--explain").out
        for setting in settings_of(entry).values():
            (line,) = [line for line in out.splitlines() if line.split(" ")[0] == setting.name]
            assert cells(line)[1] == shown(setting.default) and setting.meaning in line
        assert f"Example: tercet train {entry.example}" in out


def test_plan_prints_what_each_stage_will_do_and_writes_nothing(tercet, train, files, tmp_path):
    ended = tercet(*train(tmp_path / "run", "--plan"))
    assert ended.status == 0 and not (tmp_path / "run").exists()
    first, header, row, machine = ended.out.splitlines()
    assert first.startswith("plan: 1 stage, about ")
    assert cells(header)[:5] == ["stage", "reads", "steps", "batch", "candidates"]
    assert cells(row)[:5] == ["contrastive", "pairs", "3", "8 examples", "8"]
    assert machine == "  on cpu in float32, 2,048 tokens encoded together"
    words = ["--model", files.parent / "none", "--data", files / "pairs.jsonl", "--plan"]
    ended = tercet("train", "bge-m3", *words)
    assert ended.status == 2 and "no such folder" in ended.err  # a plan looks at the model too


def test_a_training_begins_with_the_plan_of_all_stages(tercet, llm2vec, files, tmp_path):
    words = llm2vec(tmp_path / "run", "--data", files / "texts.txt")
    said = tercet(*words).err.splitlines()
    at = next(number for number, line in enumerate(said) if line.startswith("plan: 2 stages"))
    rows = [cells(line)[:5] for line in said[at + 2 : at + 4]]
    assert rows == [
        ["mntp", "texts", "2", "4 blocks", "-"],
        ["simcse", "texts", "3", "6 texts", "6"],
    ]
    assert not any(line.startswith("mntp:") for line in said[:at])
    assert "plan:" not in tercet(*words).err  # it has finished


def test_settings_come_from_a_file_and_from_an_earlier_run(tercet, refused, train, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('recipe = "finetune"\ntemperature = 0.1\n[run]\nsave_steps = 2\n')
    assert tercet(*train(tmp_path / "first", "--recipe", file, "--set=seed=5")).status == 0
    made = json.loads((tmp_path / "first/recipe.json").read_text())
    assert made["recipe"]["stages"][0]["objective"]["temperature"] == 0.1
    assert (made["recipe"]["seed"], made["run"]["save_steps"]) == (5, 2)
    start, data = train(tmp_path / "again")[:2], train(tmp_path / "again")[-4:-2]
    words = [*start, *data, "--recipe", tmp_path / "first/recipe.json", "--device", "cpu"]
    assert tercet(*words, "--out", tmp_path / "again").status == 0
    ends = [
        (tmp_path / name / "model/model.safetensors").read_bytes() for name in ("first", "again")
    ]
    assert ends[0] == ends[1]
    said = refused("train", "bge-m3", "--recipe", tmp_path / "first/recipe.json", "--plan")
    assert said.endswith(f"write: tercet train finetune --recipe {tmp_path}/first/recipe.json")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("train finetun", "there is no recipe 'finetun' (did you mean \"finetune\"?)"),
        ("train finetune", "--out is missing: name the folder of the run, as in --out runs/mine"),
        ("train finetune --plan", "the stage contrastive needs examples, but no data is given"),
        ("train finetune --plan --seed 1 --set seed=2", "--seed and --set seed give the same"),
        ("train bge-m3 --plan --data unifed=a.jsonl", "--data unifed=a.jsonl: there is no stage"),
        ("train finetune --plan --dtype float16", "Invalid value for '--dtype': 'float16'"),
    ],
)
def test_a_training_that_is_not_described_well_is_refused(refused, words, problem):
    assert refused(*words.split()).startswith(problem)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing.jsonl", "no such file"),
        ("empty.jsonl", "holds no records; write one JSON object per line"),
        ("pairs.csv", "holds no records; write the names of the columns, and a row for each"),
        (
            "folder",
            "is a folder that holds no .jsonl, .csv, .tsv or .parquet file; put data into it",
        ),
        ("pairs.jsonl:x", "no such file"),
        ("docs.jsonl", '"query" is missing'),
    ],
)
def test_data_that_cannot_be_trained_on_is_named(refused, train, files, tmp_path, name, problem):
    said = refused(*train(tmp_path / "run", "--data", files / name))
    assert said.startswith(str(files / name)) and problem in said
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_or_incomplete_is_named(refused, train, files, tmp_path):
    out = tmp_path / "run"
    said = refused(*train(out, base=tmp_path / "lost"))
    assert said.startswith(f"{tmp_path}/lost: no such folder or file; check the path, or use one")
    assert "has no config.json" in refused(*train(out, base=files / "folder"))
    assert "is it a complete transformers folder" in refused(*train(out, base=files / "incomplete"))
    said = refused("eval", files / "pairs.jsonl", "--model", tmp_path / "lost")
    assert said.startswith(f"{tmp_path}/lost: no such folder")


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("dims=65", "dims are [65], but the model's vectors have 64"),
        ("dims=8,8", "dims are (8, 8); give lengths of 1 or more, each once"),
        ("learning_rate=-1", "learning_rate is -1.0; give a number above 0"),
        ("temperature=0", "temperature is 0.0; give a number above 0"),
        ("lora_rank=0", "rank is 0; give 1 or more"),
        ("run.save_steps=0", "save_steps is 0; give 1 or more"),
        ("token_budget=0", "token_budget is 0; give 1 or more"),
        ("run.device=tpu", "the device 'tpu' cannot be used here"),
        ("attention=causal", "BertModel is an encoder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(refused, train, tmp_path, setting, problem):
    words = train(tmp_path / "run", "--set", setting)
    if setting.startswith("run.device"):
        words = [word for word in words if word not in ("--device", "cpu")]
    assert refused(*words).startswith(problem)
    assert not (tmp_path / "run/recipe.json").exists()


def test_a_batch_of_one_example_is_refused(refused, train, tmp_path):
    words = [word for word in train(tmp_path / "run") if word not in ("--set", "batch_size=8")]
    said = refused(*words, "--set", "batch_size=1")
    assert said.startswith("batch_size must be at least 2, got 1")


def test_a_run_folder_of_other_settings_is_refused_and_the_same_command_goes_on(
    refused, tercet, train, tmp_path
):
    out = tmp_path / "run"
    assert tercet(*train(out)).status == 0
    said = refused(*train(out, "--set", "temperature=0.1"))
    assert said.startswith(f"{out} holds a run with other settings (objective.temperature was ")
    assert said.endswith("another --out, or delete that folder")
    ended = tercet(*train(out))
    assert ended.status == 0 and "this stage is finished already" in ended.err


def test_a_rank_of_lora_trains_a_model_that_loads_without_peft(tercet, train, tmp_path):
    ended = tercet(*train(tmp_path / "run", "--set", "lora_rank=2"))
    assert ended.status == 0
    assert not list((tmp_path / "run/model").glob("adapter*"))
    assert Embedder.load(tmp_path / "run/model").encode(["music"]).shape == (1, 64)


def test_a_file_whose_name_has_a_colon_or_an_equals_sign_is_that_file(
    tercet, train, files, tmp_path
):
    for number, name in enumerate(("pairs:2.jsonl", "contrastive=pairs.jsonl")):
        named = tmp_path / name
        named.write_bytes((files / "pairs.jsonl").read_bytes())
        ended = tercet(*train(tmp_path / f"run{number}", "--data", named))
        assert "contrastive: 3 steps" in ended.err


def test_a_packed_table_with_names_of_its_columns_trains_the_same_model(
    tercet, train, files, tmp_path
):
    rows = list(iter_examples(files / "pairs.jsonl"))
    with gzip.open(tmp_path / "pairs.csv.gz", "wt", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["title", "body"])
        table.writerows([row.query, row.positives[0]] for row in rows)
    one, other = tmp_path / "one", tmp_path / "other"
    assert tercet(*train(one, "--steps", "1")).status == 0
    named = ["--query-field", "title", "--positive-field", "body"]
    data = ["--data", tmp_path / "pairs.csv.gz", "--dev", tmp_path / "pairs.csv.gz"]
    ended = tercet(*train(other, "--steps", "1", *data, *named))
    assert ended.status == 0, ended.err
    first, second = (Embedder.load(run / "model").encode(["a b"]) for run in (one, other))
    np.testing.assert_array_equal(first, second)


def test_weights_and_counts_are_given_by_source_and_language(tercet, train, tmp_path):
    folder = tmp_path / "sources"
    (folder / "news").mkdir(parents=True)
    for lang in ("de", "en"):
        rows = [{"query": f"{lang} {i}", "positives": [f"a {i}"], "lang": lang} for i in range(24)]
        write(folder / "news" / f"{lang}.jsonl", *rows)
    write(folder / "nq.jsonl", *rows)
    for number, (flags, steps) in enumerate(
        [
            ([], 9),
            (["--weight", "news=2"], 15),
            (["--weight", "news=2", "--weight", "news/de=0.5"], 11),
            (["--count", "news=16", "--weight", "nq=0"], 2),
            (["--count", "news/de=8"], 7),
        ]
    ):
        ended = tercet(*train(tmp_path / f"run{number}", "--data", folder, *flags))
        assert f"contrastive: {steps} steps of 8 examples" in ended.err, ended.err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--weight", "news=2"], "there is no source 'news'; the sources are pairs"),
        (["--weight", "pairs"], "--weight is 'pairs'; write NAME=NUMBER, as in news/de=2"),
        (["--count", "pairs=1.5"], "--count is 'pairs=1.5'; write NAME=NUMBER"),
        (["--weight", "pairs=-1"], "the weight or count of 'pairs' must be 0 or more, got -1.0"),
        (["--weight", "pairs=1", "--weight", "pairs=2"], "--weight names 'pairs' twice; leave one"),
        (["--weight", "pairs=1", "--count", "pairs=9"], "source 'pairs' has a weight and a count"),
        (["--weight", "pairs=0"], "the stage contrastive reads pairs, and none are given"),
    ],
)
def test_weights_that_cannot_be_are_refused(refused, train, files, tmp_path, flags, problem):
    said = refused(*train(tmp_path / "run", "--data", files / "pairs.jsonl", *flags))
    assert said.startswith(problem)


def test_cached_tokens_train_the_same_model_and_the_mixture_is_written(
    tercet, train, tmp_path, monkeypatch
):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    losses = []
    for number, flags in enumerate([[], ["--set", "run.cache_tokens=true"]]):
        out = tmp_path / f"run{number}"
        assert tercet(*train(out, *flags)).status == 0
        log = (out / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert len(list((tmp_path / "cache/tokens").glob("*/ids.npy"))) == 2  # queries and documents
    mixture = json.loads((tmp_path / "run1/mixture.json").read_text())["contrastive"]
    (pairs,) = mixture["sources"]
    assert (pairs["name"], pairs["rows"], pairs["share"], pairs["batches"]) == ("pairs", 24, 1, 3)


def test_length_flags_are_in_tokens(tercet, train, tmp_path):
    flags = ["--set", "length_edges=8,10", "--set", "token_budget=24"]
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
    assert "16 times a text was longer than the model takes, and was cut" in ended.err


# --- llm2vec ----------------------------------------------------------------------------------


def test_llm2vec_trains_its_stages_and_a_finished_run_is_left_alone(
    tercet, llm2vec, files, tmp_path
):
    out = tmp_path / "run"
    words = llm2vec(out, "--data", files / "texts.txt")
    ended = tercet(*words)
    assert (ended.status, ended.out) == (0, f"{out}/model\n")
    assert "mntp: 2 steps of 4 blocks of 32 tokens" in ended.err
    assert "simcse: 3 steps of 6 texts" in ended.err
    said = table(tercet("inspect", out / "model").out)
    assert said["recipe"] == "llm2vec" and said["attention"].startswith("bidirectional")
    assert said["stage 1"].startswith("mntp: 2 steps of 4")
    assert said["stage 2"].startswith("simcse: 3 steps of 6")
    before = (out / "model/model.safetensors").read_bytes()
    ended = tercet(*words)
    assert (ended.status, ended.err.count("this stage is finished already")) == (0, 2)
    assert (out / "model/model.safetensors").read_bytes() == before


def test_each_stage_of_llm2vec_reads_the_data_of_its_flag(tercet, llm2vec, files, tmp_path):
    texts = write(tmp_path / "texts.jsonl", *({"body": text} for text in SENTENCES))
    sentences = write(tmp_path / "sentences.jsonl", *({"body": f"{i} maps"} for i in range(7)))
    pairs = files / "pairs.jsonl"
    data = ["--data", texts, "--data", f"simcse={sentences}", "--data", f"supervised={pairs}"]
    stages = ["--set", "stages=mntp,simcse,supervised", "--text-field", "body"]
    ended = tercet(*llm2vec(tmp_path / "run", *data, *stages))
    assert ended.status == 0, ended.err
    started = [line.split(":")[0] for line in ended.err.splitlines() if "in training" in line]
    assert started == ["mntp", "simcse", "supervised"]
    seen = [
        sum(json.loads(line)["tokens"] for line in (folder / "log.jsonl").read_text().splitlines())
        for folder in (tmp_path / "run/2-simcse", tmp_path / "run/1-mntp")
    ]
    assert seen[0] < 3 * 12 * 8 < 2 * seen[1]  # SimCSE saw the short ones


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            "mntp,simcse",
            "the stage mntp needs texts, but no data is given for it; give --data FILE or",
        ),
        ("mntp --data simcse={0}/texts.txt", "the stage mntp needs texts"),
        ("mntp,supervised --data {0}/texts.txt", "the stage supervised needs examples, but no"),
        (
            "mntp,simcse --data {0}/texts.txt --data supervised={0}/pairs.jsonl",
            "--data supervised={0}/pairs.jsonl: no stage reads it (stages: mntp, simcse)",
        ),
        (
            "supervised --data {0}/texts.txt --data supervised={0}/pairs.jsonl",
            "--data {0}/texts.txt: no stage reads it",
        ),
        ("mntp,simsce --data {0}/texts.txt", "stages are 'mntp,simsce'; choose from mntp, simcse"),
    ],
)
def test_data_that_is_missing_or_too_much_is_named(
    refused, language_model, files, tmp_path, flags, problem
):
    stages, *data = flags.format(files).split()
    words = ["--model", language_model, "--out", tmp_path / "run", "--device", "cpu"]
    said = refused("train", "llm2vec", *words, "--set", f"stages={stages}", *data)
    assert said.startswith(problem.format(files))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"", "a.txt: holds no texts"),
        ("a.txt", b"\n \n", "a.txt: holds no texts"),
        ("a.txt", bytes(range(256)), "a.txt:2: invalid UTF-8"),
        ("a.txt", b"a\nb\n", "a.txt: no text has two tokens"),
        ("a.jsonl", b'{"long": "a small web server"}\n', '"text" is missing'),
    ],
)
def test_texts_that_cannot_be_trained_on_are_named(
    refused, llm2vec, tmp_path, name, content, problem
):
    (tmp_path / name).write_bytes(content)
    words = llm2vec(tmp_path / "run", "--data", tmp_path / name)
    assert problem in refused(*words)


def test_a_base_that_llm2vec_cannot_turn_is_refused(
    refused, llm2vec, files, decoder_folder, encoder_folder, tmp_path
):
    data = ["--data", files / "texts.txt"]
    assert "is an encoder, which" in refused(*llm2vec(tmp_path, *data, model=encoder_folder))
    said = refused(*llm2vec(tmp_path / "run", *data, model=decoder_folder))
    assert said.startswith(f"{decoder_folder}: the weights of its language-model head are missing")


def test_models_at_saves_models_on_the_way(tercet, refused, train, tmp_path):
    assert tercet(*train(tmp_path / "run", "--set", "run.models_at=0,2")).status == 0
    assert sorted(path.name for path in (tmp_path / "run/steps").iterdir()) == ["0", "2"]
    said = refused(*train(tmp_path / "other", "--set", "run.models_at=1.5"))
    assert said.startswith("run.models_at must be a list of whole numbers, as in 64,128; got '1.5'")
    said = refused(*train(tmp_path / "other", "--set", "run.models_at=-1"))
    assert said.startswith("models_at is [-1]; give steps")
