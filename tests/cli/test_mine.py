import json
import shutil
from typing import cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from tercet.curate.mining.finders import By
from tercet.curate.mining.miner import Mining, mine
from tercet.curate.mining.rules import MiningRule
from tercet.data.files.sources import iter_examples, open_source
from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tercet.models.formats.cross_encoder import CrossEncoder
from tercet.models.pairs import score_pairs
from tests.cli.lines import cells, write
from tests.toy import SENTENCES


@pytest.fixture
def start(encoder_folder, files, tmp_path):
    """The words of a mining."""
    words = ["mine", files / "pairs.jsonl", "--model", encoder_folder]
    return [*words, "--work", tmp_path / "work"]


def tables(out: str) -> list[dict[str, str]]:
    """The rows of the three tables, joined; mean scores are under their title's words."""
    parts: list[list[list[str]]] = []
    for line in out.splitlines():
        row = cells(line)
        if row[0] == "source":
            parts.append([row])
        elif len(row) > 1:
            parts[-1].append(row)
    parts[2][0][-3:-1] = ["positive score", "negative score"]
    dicts = [[dict(zip(part[0], row, strict=True)) for row in part[1:]] for part in parts]
    return [a | b | c for a, b, c in zip(*dicts, strict=True)]


def test_mined_rows_are_written_and_what_was_dropped_is_counted(tercet, start, tmp_path):
    ended = tercet(*start, "--out", tmp_path / "mined.jsonl", "--rule", "naive", "--negatives", "3")
    assert ended.status == 0
    (row,) = tables(ended.out)
    assert (row["source"], row["rule"], row["value"]) == ("pairs", "naive", "-")
    found = list(iter_examples(tmp_path / "mined.jsonl"))
    assert {len(example.negatives) for example in found} == {3}
    assert (row["written"], row["a row"], row["short"]) == ("24", "3.00", "0")
    # Two sentences end in "files", so four queries have two known positives each.
    assert (row["rows"], row["seen"], row["positive"]) == ("24", "576", "28")
    scores = [score for example in found for score in example.negative_scores or ()]
    assert row["negative score"] == f"{sum(scores) / len(scores):.3f}"
    assert f"vectors stay in {tmp_path / 'work'}" in ended.err


def test_every_flag_of_the_rule_is_taken(tercet, start, tmp_path):
    out = ["--out", tmp_path / "mined.parquet", "--negatives", "2", "--at-least", "2"]
    rule = ["--rule", "absolute", "--value", "2", "--shift", "4", "--depth", "11"]
    draw = ["--sample-from", "5", "--temperature", "0.5"]
    found = []
    for seed in ("1", "2", "1"):
        ended = tercet(*start, *out, *rule, *draw, "--seed", seed)
        (row,) = tables(ended.out)
        assert (row["value"], row["shifted"], row["seen"]) == ("2", "96", "264")
        found.append([example.negatives for example in iter_examples(tmp_path / "mined.parquet")])
    assert found[0] == found[2] != found[1]


def test_a_sweep_prints_a_line_for_each_value_and_writes_no_rows(tercet, start, tmp_path):
    ended = tercet(*start, "--sweep", "0.5", "--sweep", "0.9", "--sweep", "1", "--rule", "percent")
    rows = tables(ended.out)
    assert (ended.status, [row["value"] for row in rows]) == (0, ["0.5", "0.9", "1"])
    dropped = [int(row["too close"].replace(",", "")) for row in rows]
    assert dropped == sorted(dropped, reverse=True) and dropped[0] > dropped[2]
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_documents_of_a_corpus_are_mined(tercet, encoder_folder, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", {"query": "a web server", "positives": [SENTENCES[0]]})
    corpus = write(tmp_path / "docs.jsonl", *({"body": text} for text in SENTENCES[:3]))
    words = ["--model", encoder_folder, "--rule", "naive", "--work", tmp_path / "work"]
    more = ["--corpus", corpus, "--text-field", "body", "--out", tmp_path / "mined.jsonl"]
    ended = tercet("mine", pairs, *words, *more)
    (example,) = iter_examples(tmp_path / "mined.jsonl")
    assert ended.status == 0 and set(example.negatives) == set(SENTENCES[1:3])


def test_the_corpus_of_a_folder_of_beir_is_mined(tercet, tmp_path):
    folder = tmp_path / "fruit"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": str(i), "title": f"t{i}", "text": f"apple {i}"} for i in range(9)]
    write(folder / "corpus.jsonl", *corpus)
    write(folder / "queries.jsonl", {"_id": "q", "text": "apple"}, {"_id": "r", "text": "t8 8"})
    (folder / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq\t3\t1\nr\t8\t1\n")
    words = ["mine", folder, "--by", "bm25", "--work", tmp_path / "work", "--rule", "naive"]
    ended = tercet(*words, "--out", tmp_path / "mined.jsonl")
    assert ended.status == 0, ended.err
    first, _ = iter_examples(tmp_path / "mined.jsonl")
    assert (first.query, first.positives) == ("apple", ("t3 apple 3",))
    assert len(first.negatives) == 7
    assert set(first.negatives) < {f"t{i} apple {i}" for i in range(9)} - {"t3 apple 3"}
    assert tercet(*words, "--out", tmp_path / "mined").status == 0
    assert (tmp_path / "mined/fruit.jsonl").exists()


def test_negatives_that_rows_had_are_replaced_or_kept_and_that_is_said(
    tercet, encoder_folder, tmp_path
):
    record = {"query": "a web server", "positives": [SENTENCES[0]], "negatives": [" ", "a map"]}
    pairs = write(tmp_path / "pairs.jsonl", record)
    words = ["mine", pairs, "--model", encoder_folder, "--out", tmp_path / "mined.jsonl"]
    words += ["--work", tmp_path / "work"]
    replaced, kept = tercet(*words, "--rule", "naive"), tercet(*words, "--keep-negatives")
    assert "pairs: 1 rows had negatives: replaced; --keep-negatives keeps them\n" in replaced.err
    assert "pairs: 1 rows had negatives: kept\npairs: 1 of them" in kept.err
    assert json.loads((tmp_path / "mined.jsonl").read_text())["negatives"] == ["a map"]


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory, encoder_folder):
    """A model of three kinds of vectors."""
    folder = tmp_path_factory.mktemp("kinds") / "model"
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8).save(folder)
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        ["sparse"],
        ["multi"],
        ["hybrid"],
        [
            "hybrid",
            "--kind-weight",
            "dense=1",
            "--kind-weight",
            "sparse=0.5",
            "--kind-weight",
            "multi=0",
        ],
        ["bm25"],
    ],
)
def test_the_way_that_is_mined_by_is_taken(tercet, all_kinds, files, tmp_path, flags):
    out, work = tmp_path / "mined.jsonl", tmp_path / "work"
    words = ["mine", files / "pairs.jsonl", "--out", out, "--work", work, "--rule", "naive"]
    of = [] if flags == ["bm25"] else ["--model", all_kinds]
    ended = tercet(*words, *of, "--negatives", "3", "--by", *flags)
    assert ended.status == 0
    weights = Weights(1.0, 0.5, 0.0) if len(flags) > 1 else None
    mining = Mining(
        rule=MiningRule(kind="naive"), negatives=3, by=cast("By", flags[0]), weights=weights
    )
    teacher = Embedder.load(all_kinds) if of else None
    expected, source = tmp_path / "expected.jsonl", open_source(files / "pairs.jsonl")
    mine(teacher, [source], expected, mining=mining, work=work)
    assert out.read_text() == expected.read_text()
    unscored = (
        f"rows were written without scores: scores by {flags[0]} are not cosines" in ended.err
    )
    assert unscored == (flags[0] != "multi")
    assert ("vectors stay in" in ended.err) == bool(of)


def test_ways_that_need_what_is_not_there_are_refused(refused, encoder_folder, files, tmp_path):
    words = ["mine", files / "pairs.jsonl", "--out", tmp_path / "mined.jsonl"]
    assert refused(*words) == "--by dense needs --model; without a model, use --by bm25"
    said = refused(*words, "--by", "hybrid", "--model", encoder_folder)
    assert said.startswith("mining by hybrid needs sparse vectors, and the teacher makes dense")
    said = refused(
        *words,
        "--by",
        "bm25",
        "--kind-weight",
        "dense=1",
        "--kind-weight",
        "sparse=1",
        "--kind-weight",
        "multi=1",
    )
    assert said.startswith("weights are for mining by hybrid; got by bm25")
    said = refused(*words, "--by", "bm25", "--rule", "margin")
    assert said.startswith("the default value of the rule margin is for cosines")


def test_a_rule_that_drops_most_candidates_is_remarked(tercet, start, tmp_path):
    ended = tercet(*start, "--out", tmp_path / "mined.jsonl", "--rule", "absolute", "--value", "-1")
    assert "pairs: 95% of the candidates score too close to the positive, and 24 rows" in ended.err


def test_wrong_words_are_refused_before_the_teacher_is_loaded(refused, files, tmp_path):
    words = ["mine", files / "pairs.jsonl", "--model", tmp_path / "lost"]
    out = ["--out", tmp_path / "mined.jsonl"]
    either = "give either --out, to write mined rows, or --sweep, to only count"
    assert refused(*words) == either
    assert refused(*words, *out, "--sweep", "0.9") == either
    for wrong in ("0.9;1", "0.9,0.95", ""):
        assert "'--sweep'" in refused(*words, "--sweep", wrong)
    assert refused(*words, *out, "--value", "95").startswith(
        "the value of the rule percent must be between 0 and 1"
    )
    assert refused("mine", files / "pairs.csv", *words[2:], *out).startswith(f"{files}/pairs.csv: ")
    assert "lost: no such folder" in refused(*words, *out)


def test_score_adds_the_scores_of_an_embedder_or_a_cross_encoder(
    tercet, refused, files, encoder_folder, tmp_path
):
    out, more = tmp_path / "scored.jsonl", ("--work", tmp_path / "work", "--device", "cpu")
    words = ("score", files / "pairs.jsonl", "--out", out, *more)
    ended = tercet(*words, "--model", encoder_folder, "--json", tmp_path / "figures.json")
    assert ended.status == 0, ended
    assert "no row has negatives, so there is nothing to compare with" in ended.err
    (first, *_) = iter_examples(out)
    embedder = Embedder.load(encoder_folder)
    expected = score_pairs(embedder, [first.query], list(first.positives))["dense"].tolist()
    assert first.positive_scores == pytest.approx(expected, abs=1e-5)
    assert json.loads((tmp_path / "figures.json").read_text())["documents"] == 24

    reranker = shutil.copytree(encoder_folder, tmp_path / "reranker")
    config = AutoConfig.from_pretrained(reranker, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(reranker)
    ended = tercet(*words, "--model", reranker)
    assert ended.status == 0, ended
    (first, *_) = iter_examples(out)
    teacher = CrossEncoder.load(str(reranker))
    expected = teacher.score([first.query], list(first.positives)).tolist()
    assert first.positive_scores == pytest.approx(expected, abs=1e-5)
    said = refused(*words, "--model", reranker, "--score-by", "dense")
    assert said == "--score-by and --kind-weight are of embedders; a cross-encoder has one score"
    said = refused(*words, "--model", encoder_folder, "--architecture", "cross-encoder")
    assert "a reranker must have 1 label" in said


def test_a_cross_encoder_scores_in_float32_and_is_never_taken_for_an_embedder(
    tercet, refused, files, encoder_folder, tmp_path, monkeypatch
):
    reranker = shutil.copytree(encoder_folder, tmp_path / "reranker")
    config = AutoConfig.from_pretrained(reranker, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(reranker)
    monkeypatch.setattr("tercet.models.devices.number_type", lambda device: "bfloat16")
    loaded: list[torch.dtype] = []
    load = CrossEncoder.load

    def noted(*args, dtype, **options):
        loaded.append(dtype)
        return load(*args, dtype=dtype, **options)

    monkeypatch.setattr(CrossEncoder, "load", noted)
    words = ("score", files / "pairs.jsonl", "--out", tmp_path / "scored.jsonl", "--device", "cpu")
    words = (*words, "--work", tmp_path / "work", "--model", reranker)
    assert tercet(*words).status == 0
    assert {*loaded} == {torch.float32}
    assert tercet(*words, "--dtype", "bfloat16").status == 0
    assert loaded[-1] == torch.bfloat16

    place = "tercet.models.formats.cross_encoder.is_cross_encoder"
    monkeypatch.setattr(place, lambda model: False)  # as if its config could not be read then
    assert refused(*words) == (
        f"{reranker}: its config names a classifier, such as a reranker, whose vectors were not "
        "trained; give --architecture cross-encoder, or embedder if they were"
    )
    assert tercet(*words, "--architecture", "embedder").status == 0
