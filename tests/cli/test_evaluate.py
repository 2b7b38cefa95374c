import json
import re
from itertools import pairwise

import numpy as np
import pytest

from tercet.data.files.similarity import SimilaritySet
from tercet.evaluate.measures.labels import (
    measure_classification,
    measure_clustering,
    measure_clustering_by_words,
)
from tercet.evaluate.measures.sts import measure_similarity
from tercet.evaluate.sets.label_sets import ClassificationSet, ClusteringSet, read_label_set
from tercet.models.choices import LayerSettings
from tercet.models.embedder import Embedder
from tests.cli.lines import cells, write
from tests.toy import SENTENCES


@pytest.fixture(scope="session")
def scored(tmp_path_factory):
    """Pairs of sentences with scores."""
    file = tmp_path_factory.mktemp("scored") / "pairs.jsonl"
    pairs = enumerate(pairwise(SENTENCES))
    return write(file, *({"text1": a, "text2": b, "score": i % 4} for i, (a, b) in pairs))


@pytest.fixture(scope="session")
def grouped(tmp_path_factory):
    """Sentences with labels, to be found by clustering."""
    file = tmp_path_factory.mktemp("grouped") / "groups.jsonl"
    return write(file, *({"text": t, "label": i % 3} for i, t in enumerate(SENTENCES)))


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """Sentences with labels, some to learn from and some to tell."""
    file = tmp_path_factory.mktemp("learned") / "sections.jsonl"
    lines = enumerate(SENTENCES)
    return write(
        file,
        *({"text": t, "label": i % 3, "split": ("train", "test")[i > 7]} for i, t in lines),
    )


@pytest.fixture(scope="session")
def prompted(encoder_folder, tmp_path_factory):
    """A model with prompts for two tasks, named like files here, and none by default."""
    folder = tmp_path_factory.mktemp("prompted") / "model"
    tasks = {"sections": {"query": "tell: "}, "pairs": {"query": "find a: ", "document": "b: "}}
    Embedder.load(encoder_folder, task_prompts=tasks).save(folder)
    return folder


@pytest.fixture(scope="session")
def triples(tmp_path_factory):
    """Beginnings, and three ways for each to go on."""
    rest = {"query": " in a file", "positive": " in a map", "negative": " of the moon"}
    file = tmp_path_factory.mktemp("triples") / "triples.jsonl"
    return write(file, *({"prefix": text, **rest} for text in SENTENCES[:4]))


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Words of the sentences, labelled by their length."""
    file = tmp_path_factory.mktemp("labelled") / "words.conll"
    kinds = ("SHORT", "LONG")
    rows = ["\n".join(f"{w} x {kinds[len(w) > 3]}" for w in text.split()) for text in SENTENCES]
    file.write_text("\n\n".join(rows) + "\n")
    return file


# --- eval -------------------------------------------------------------------------------------


def test_a_second_model_is_looked_for_before_the_first_is_measured(
    refused, encoder_folder, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(Embedder, "encode", None)
    lost = ["--against", tmp_path / "lost"]
    assert "lost: no such folder" in refused("eval", encoder_folder, files / "pairs.jsonl", *lost)


def test_a_file_of_scored_pairs_is_measured_by_correlation(
    tercet, encoder_folder, decoder_folder, scored
):
    ended = tercet("eval", encoder_folder, scored, "--against", decoder_folder)
    lines = ended.out.splitlines()
    assert (ended.status, lines[0]) == (0, "11 pairs of 12 texts")
    assert cells(lines[1]) == ["model", "spearman", "pearson"]
    names = [str(decoder_folder), "word overlap"]
    assert [cells(line)[0] for line in lines[2:5]] == [str(encoder_folder), *names]
    assert cells(lines[5]) == [f"{encoder_folder} minus", "spearman", "pearson"]
    assert [cells(line)[0] for line in lines[6:]] == names
    assert len(tercet("eval", encoder_folder, scored, "--no-bm25").out.splitlines()) == 3


@pytest.mark.parametrize(
    ("flags", "how"),
    [
        (["--attention", "bidirectional"], {"attention": "bidirectional"}),
        (["--pooling", "first"], {"pooling": "first"}),
        (["--echo"], {"echo": True}),
        (
            ["--query-tokens", "3", "--document-tokens", "4"],
            {"query_tokens": 3, "document_tokens": 4},
        ),
    ],
)
def test_eval_reads_as_its_flags_say(tercet, decoder_folder, files, scored, flags, how):
    def shown(*more):
        return tercet("eval", decoder_folder, scored, "--no-bm25", *more).out.splitlines()[2]

    measured = measure_similarity(
        Embedder.load(decoder_folder, **how), SimilaritySet.from_file(scored)
    )
    assert cells(shown(*flags))[1:] == [str(measured.interval(m)) for m in ("spearman", "pearson")]
    assert shown(*flags) != shown()
    found, usual = (
        tercet("eval", decoder_folder, files / "pairs.jsonl", "--no-bm25", *more).out
        for more in (flags, [])
    )
    assert found != usual


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"text1": "a", "score": 1}, '"text2" is missing'),
        ({"text1": "a", "text2": "b"}, '"score" is missing'),
        ({"text1": "a", "text2": "b", "score": "high"}, '"score" must hold numbers'),
        ({"text1": " ", "text2": "b", "score": 1}, '"text1" holds a blank text'),
    ],
)
def test_a_bad_pair_is_named_with_its_line(refused, encoder_folder, tmp_path, line, problem):
    good = {"text1": "a", "text2": "b", "score": 2}
    file = write(tmp_path / "pairs.jsonl", good, line)
    said = refused("eval", encoder_folder, file)
    assert said.startswith(f"{file}:2: ") and problem in said


def test_an_encoder_cannot_be_measured_causal(refused, encoder_folder, scored):
    said = refused("eval", encoder_folder, scored, "--attention", "causal")
    assert "BertModel is an encoder" in said


def test_labels_of_a_file_with_splits_are_learned_and_told(
    tercet, encoder_folder, decoder_folder, learned
):
    ended = tercet("eval", encoder_folder, learned, "--against", decoder_folder)
    lines = ended.out.splitlines()
    assert (ended.status, lines[0]) == (0, "4 texts, 3 labels, learned from 8")
    assert cells(lines[1]) == ["model", "accuracy", "macro F1"]
    data = read_label_set(learned)
    assert isinstance(data, ClassificationSet)
    found = measure_classification(Embedder.load(encoder_folder), data)
    told = [str(found.interval(metric)) for metric in ("accuracy", "macro F1")]
    assert cells(lines[2]) == [str(encoder_folder), *told]
    assert [cells(line)[0] for line in lines[3:5]] == [str(decoder_folder), "TF-IDF"]
    assert cells(lines[5])[0] == f"{encoder_folder} minus"
    few = tercet("eval", encoder_folder, learned, "--per-label", "2", "--no-bm25").out.splitlines()
    assert few[0] == "4 texts, 3 labels, learned from 6" and len(few) == 3


def test_labels_of_a_file_without_splits_are_found_by_clustering(tercet, encoder_folder, grouped):
    lines = tercet("eval", encoder_folder, grouped, "--seed", "3").out.splitlines()
    assert lines[0] == "12 texts, 3 labels"
    data = read_label_set(grouped)
    assert isinstance(data, ClusteringSet)
    found = measure_clustering(Embedder.load(encoder_folder), data)
    words = measure_clustering_by_words(data)
    assert [cells(line) for line in lines[1:4]] == [
        ["model", "v-measure"],
        [str(encoder_folder), str(found.interval(seed=3))],
        ["TF-IDF", str(words.interval(seed=3))],
    ]
    gain = found.minus(words, seed=3)
    assert cells(lines[5]) == ["TF-IDF", f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"]


def test_a_task_that_a_file_is_called_by_is_used_and_said(tercet, prompted, files, learned):
    ended = tercet("eval", prompted, learned, "--no-bm25")
    assert f"{prompted}: using its prompts for the task 'sections'" in ended.err
    assert "gets no prompt" not in ended.err
    named = tercet("eval", prompted, learned, "--no-bm25", "--task", "sections")
    assert (named.out, "using its prompts" in named.err) == (ended.out, False)
    ended = tercet("eval", prompted, files / "pairs.jsonl", "--no-bm25")
    assert "using its prompts for the task 'pairs'" in ended.err
    bare = tercet("eval", prompted, files / "pairs.jsonl", "--no-bm25", "--no-prompts")
    assert bare.out != ended.out


def test_the_task_that_the_records_name_goes_before_the_name_of_the_file(
    tercet, prompted, tmp_path
):
    record = {"query": "a", "positives": [SENTENCES[0]], "negatives": [SENTENCES[1]]}
    file = write(tmp_path / "pairs.jsonl", {**record, "task": "sections"})
    ended = tercet("eval", prompted, file, "--no-bm25")
    assert "using its prompts for the task 'sections'" in ended.err


def test_a_model_without_the_prompts_it_was_trained_with_is_refused_unless_that_is_forced(
    tercet, refused, prompted, encoder_folder, grouped, learned
):
    said = refused("eval", prompted, grouped, "--no-bm25")  # "groups" is no task of its
    assert said.startswith(f"{prompted}: a query gets no prompt, but the model was trained with")
    assert "--no-prompts" in said and "sections-query 'tell:'" in said
    assert tercet("eval", prompted, grouped, "--no-bm25", "--no-prompts").status == 0
    forced = tercet("eval", prompted, learned, "--no-prompts", "--no-bm25")
    assert forced.err.count("measured without prompts, as requested") == 1
    assert "gets no prompt" not in forced.err
    plain = tercet("eval", encoder_folder, learned, "--no-bm25")
    assert cells(forced.out.splitlines()[2])[1:] == cells(plain.out.splitlines()[2])[1:]
    assert plain.err == ""


def test_a_task_has_to_be_known_by_the_first_model_only(
    tercet, refused, prompted, encoder_folder, learned
):
    said = refused("eval", prompted, learned, "--task", "lost")
    assert said == "the model has no prompt for the task 'lost'; it knows: pairs, sections"
    both = ["--against", encoder_folder, "--task", "sections"]
    ended = tercet("eval", prompted, learned, "--no-bm25", *both)
    assert f"{encoder_folder}: has no prompts for the task 'sections'; its" in ended.err
    said = refused("eval", prompted, learned, "--task", "sections", "--no-prompts")
    assert said.startswith("--task and --no-prompts exclude each other")


def test_what_is_wrong_with_a_file_of_labels_is_named(refused, encoder_folder, tmp_path):
    good = {"text": "a", "label": "b"}
    file = write(tmp_path / "labels.jsonl", good, {"text": "b"})
    said = refused("eval", encoder_folder, file)
    assert said.startswith(f"{file}:2: ") and '"label" is missing' in said
    file = write(tmp_path / "labels.jsonl", good, {**good, "split": "test"})
    assert "others do not; add it to all" in refused("eval", encoder_folder, file)


def test_figures_of_any_set_are_written_on_request(tercet, encoder_folder, scored, tmp_path):
    file = tmp_path / "figures.json"
    ended = tercet("eval", encoder_folder, scored, "--json", file)
    record = json.loads(file.read_text())
    spearman = record["results"][str(encoder_folder)]["spearman"]
    shown = cells(ended.out.splitlines()[2])[1]
    assert shown == f"{spearman['mean']:.3f} [{spearman['low']:.3f}, {spearman['high']:.3f}]"
    assert list(record["differences"]) == [f"{encoder_folder} minus"]


# --- diagnose ---------------------------------------------------------------------------------


def test_diagnose_prints_readings_and_layers_and_where_the_report_is(
    tercet, decoder_folder, encoder_folder, triples, tmp_path
):
    out = tmp_path / "diagnosis"
    ended = tercet(
        *("diagnose", decoder_folder, "--against", encoder_folder),
        *("--triples", triples, "--out", out),
    )
    assert (ended.status, ended.err) == (0, "")
    rows = [cells(line) for line in ended.out.splitlines()]
    assert rows[0] == ["model and reading", "cosine, same", "cosine, other", "gap", "gap > 0"]
    ways = [f"{decoder_folder} {way}" for way in ("causal", "echo", "bidirectional")]
    assert [row[0] for row in rows[1:5]] == [*ways, f"{encoder_folder} bidirectional"]
    assert rows[5] == ["both ways and causal", "mean cosine", "lowest", "in layer", "last layer"]
    record = json.loads((out / "diagnosis.json").read_text())["models"]
    layers = record[str(decoder_folder)]["direction_map"]["layer_means"][1:]
    lowest = int(np.argmin(layers))
    numbers = [f"{number:.3f}" for number in (np.mean(layers), layers[lowest], layers[-1])]
    where = f"{lowest + 1} of 3"
    assert rows[6] == [str(decoder_folder), numbers[0], numbers[1], where, numbers[2]]
    assert rows[7:] == [[f"{out}/report.html"]] and (out / "report.html").exists()


def test_diagnose_of_an_encoder_alone_has_no_layers_to_compare(
    tercet, encoder_folder, triples, tmp_path
):
    ended = tercet("diagnose", encoder_folder, "--triples", triples, "--out", tmp_path)
    rows = [cells(line)[0] for line in ended.out.splitlines()]
    assert rows[1:] == [f"{encoder_folder} bidirectional", f"{tmp_path}/report.html"]


def test_material_that_cannot_be_read_is_named_before_a_model_is_loaded(
    refused, decoder_folder, triples, tmp_path, monkeypatch
):
    monkeypatch.setattr(Embedder, "load", None)
    words = ["diagnose", decoder_folder, "--out", tmp_path / "out"]
    bad = write(tmp_path / "bad.jsonl", {"prefix": "a", "query": "b", "positive": "c"})
    said = refused(*words, "--triples", bad)
    assert said.startswith(f"{bad}:1: ") and '"negative" is missing' in said
    said = refused(*words, "--triples", triples, "--text", tmp_path / "lost.txt")
    assert said == f"{tmp_path}/lost.txt: no such file"
    assert not (tmp_path / "out").exists()


def test_a_diagnosis_does_not_replace_the_report_of_a_run(
    refused, decoder_folder, triples, tmp_path
):
    (tmp_path / "report.html").write_text("of a run")
    said = refused("diagnose", decoder_folder, "--triples", triples, "--out", tmp_path)
    assert said.startswith(f"{tmp_path}: contains the report of another run")
    assert (tmp_path / "report.html").read_text() == "of a run"


# --- probe ------------------------------------------------------------------------------------


def test_probe_compares_models_with_what_words_alone_tell(
    tercet, decoder_folder, encoder_folder, labelled
):
    words = ["probe", decoder_folder, "--train", labelled, "--test", labelled]
    ended = tercet(*words, "--against", encoder_folder)
    assert (ended.status, ended.err) == (0, "")
    rows = [cells(line) for line in ended.out.splitlines()]
    assert rows[0] == ["model", "accuracy", "minus first", "macro F1", "minus first", "cut"]
    models = [str(decoder_folder), str(encoder_folder)]
    assert [row[0] for row in rows[1:]] == ["most frequent label", "label of the word", *models]
    assert all(re.fullmatch(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", row[1]) for row in rows[1:])
    assert rows[2][1].startswith("1.000") and rows[3][2] == "-"
    assert tercet(*words, "--predictor").out != tercet(*words).out
    assert tercet(*words, "--attention", "bidirectional").out != tercet(*words).out


@pytest.mark.parametrize(
    ("train", "test", "problem"),
    [
        ("a X\nb Y Z\n", "a X\n", "train.conll:2: has 3 columns, but line 1 has 2"),
        ("a X\nb Y\n", "a X\nb\n", "test.conll:2: has 1 columns, but line 1 has 2"),
        ("a X\nb X\n", "a X\n", "the training sentences have only one label, 'X'"),
        ("a _\nb _\n", "a X\n", "the training sentences have no labelled word"),
        ("a X\nb Y\n", "a _\n", "the test sentences have no labelled word"),
        ("\n\n", "a X\n", "train.conll: holds no sentences"),
    ],
)
def test_labels_that_cannot_be_learned_are_named(
    refused, decoder_folder, tmp_path, train, test, problem
):
    files = []
    for name, text in (("train", train), ("test", test)):
        (tmp_path / f"{name}.conll").write_text(text)
        files += [f"--{name}", tmp_path / f"{name}.conll"]
    assert problem in refused("probe", decoder_folder, *files)


def test_a_column_that_holds_no_labels_is_named(refused, decoder_folder, labelled):
    words = ["probe", decoder_folder, "--train", labelled, "--test", labelled, "--column"]
    assert refused(*words, "4").startswith(f"{labelled}:1: has 3 columns, and none of them is col")
    assert refused(*words, "1").startswith("column 1 holds no labels")
    assert refused(*words, "2") == (
        "the training sentences have only one label, 'x'; a probe needs at least two labels"
    )


def test_diagnose_shows_how_much_of_its_dictionary_each_head_uses(tercet, decoder_folder, tmp_path):
    layer = LayerSettings(latents=6, heads=2, init="normal")
    Embedder.load(decoder_folder, attention="bidirectional", layer=layer).save(tmp_path / "model")
    triples = tmp_path / "triples.jsonl"
    words = {"prefix": "the editor", "query": " for mail", "positive": " of mail"}
    triples.write_text(json.dumps(words | {"negative": " for music"}) + "\n")
    out = tmp_path / "out"
    ended = tercet("diagnose", tmp_path / "model", "--triples", triples, "--out", out)
    assert ended.status == 0, ended.err
    shown = [line.split() for line in ended.out.splitlines() if line.startswith(("head ", "all "))]
    assert [row[:2] for row in shown] == [["head", "1"], ["head", "2"], ["all", "heads"]]
    assert all(0 < float(row[4]) <= 1 for row in shown)
    assert (out / "latents.png").stat().st_size > 1_000
