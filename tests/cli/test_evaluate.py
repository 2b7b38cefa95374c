"""What ``tercet eval`` measures and prints: one set, a folder of sets, a task of mteb."""

import csv
import json
import math
from dataclasses import asdict
from itertools import pairwise

import pytest

from tercet.data.files.similarity import SimilaritySet
from tercet.evaluate.measures.bm25 import by_tokens_of
from tercet.evaluate.measures.by_kind import measure_kinds
from tercet.evaluate.measures.labels import (
    measure_classification,
    measure_clustering,
    measure_clustering_by_words,
)
from tercet.evaluate.measures.retrieval import measure_bm25
from tercet.evaluate.measures.sts import measure_similarity
from tercet.evaluate.report.intervals import paired_difference
from tercet.evaluate.sets.label_sets import ClassificationSet, ClusteringSet, read_label_set
from tercet.evaluate.sets.location import sets_in
from tercet.evaluate.sets.retrieval_set import METRICS, RetrievalSet
from tercet.evaluate.suites import mteb as ours
from tercet.evaluate.suites.averages import averages, cells_of, language_bias
from tercet.evaluate.suites.by_language import measure_sets
from tercet.evaluate.suites.mteb import TaskScore
from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tests.cli.lines import cells, write
from tests.evaluate.report.pages import assert_self_contained, text_of
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


# --- eval -------------------------------------------------------------------------------------


def test_a_second_model_is_looked_for_before_the_first_is_measured(
    refused, encoder_folder, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(Embedder, "encode", None)
    lost = ["--compare-with", tmp_path / "lost"]
    assert "lost: no such folder" in refused(
        "eval", files / "pairs.jsonl", "--model", encoder_folder, *lost
    )


def test_a_file_of_scored_pairs_is_measured_by_correlation(
    tercet, encoder_folder, decoder_folder, scored
):
    ended = tercet("eval", scored, "--model", encoder_folder, "--compare-with", decoder_folder)
    lines = ended.out.splitlines()
    assert (ended.status, lines[0]) == (0, "11 pairs of 12 texts")
    assert cells(lines[1]) == ["model", "spearman", "pearson"]
    names = [str(decoder_folder), "word overlap"]
    assert [cells(line)[0] for line in lines[2:5]] == [str(encoder_folder), *names]
    assert cells(lines[5]) == [f"{encoder_folder} minus", "spearman", "pearson"]
    assert [cells(line)[0] for line in lines[6:]] == names
    assert len(tercet("eval", scored, "--model", encoder_folder, "--no-bm25").out.splitlines()) == 3


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
        return tercet(
            "eval", scored, "--model", decoder_folder, "--no-bm25", *more
        ).out.splitlines()[2]

    measured = measure_similarity(
        Embedder.load(decoder_folder, **how), SimilaritySet.from_file(scored)
    )
    assert cells(shown(*flags))[1:] == [str(measured.interval(m)) for m in ("spearman", "pearson")]
    assert shown(*flags) != shown()
    found, usual = (
        tercet("eval", files / "pairs.jsonl", "--model", decoder_folder, "--no-bm25", *more).out
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
    said = refused("eval", file, "--model", encoder_folder)
    assert said.startswith(f"{file}:2: ") and problem in said


def test_columns_of_a_table_may_be_named(tercet, refused, encoder_folder, files, tmp_path):
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["ask", "text", "label"])
        table.writerows([row["query"], row["positives"][0], "x"] for row in rows)
    words = ["--model", encoder_folder, "--no-bm25"]
    named = ["--query-field", "ask", "--positive-field", "text"]
    figures = [
        cells(tercet("eval", *data, *words).out.splitlines()[-1])[1:]
        for data in ([files / "pairs.jsonl"], [tmp_path / "pairs.csv", *named])
    ]
    assert figures[0] == figures[1]
    assert "--query-field does not apply to --mteb" in refused(
        "eval", *words, "--mteb", "SciFact", *named
    )


def test_an_encoder_cannot_be_measured_causal(refused, encoder_folder, scored):
    said = refused("eval", scored, "--model", encoder_folder, "--attention", "causal")
    assert "BertModel is an encoder" in said


def test_labels_of_a_file_with_splits_are_learned_and_told(
    tercet, encoder_folder, decoder_folder, learned
):
    ended = tercet("eval", learned, "--model", encoder_folder, "--compare-with", decoder_folder)
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
    few = tercet(
        "eval", learned, "--model", encoder_folder, "--per-label", "2", "--no-bm25"
    ).out.splitlines()
    assert few[0] == "4 texts, 3 labels, learned from 6" and len(few) == 3


def test_labels_of_a_file_without_splits_are_found_by_clustering(tercet, encoder_folder, grouped):
    lines = tercet("eval", grouped, "--model", encoder_folder, "--seed", "3").out.splitlines()
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
    ended = tercet("eval", learned, "--model", prompted, "--no-bm25")
    assert f"{prompted}: using its prompts for the task 'sections'" in ended.err
    assert "gets no prompt" not in ended.err
    named = tercet("eval", learned, "--model", prompted, "--no-bm25", "--task", "sections")
    assert (named.out, "using its prompts" in named.err) == (ended.out, False)
    ended = tercet("eval", files / "pairs.jsonl", "--model", prompted, "--no-bm25")
    assert "using its prompts for the task 'pairs'" in ended.err
    bare = tercet("eval", files / "pairs.jsonl", "--model", prompted, "--no-bm25", "--no-prompts")
    assert bare.out != ended.out


def test_the_task_that_the_records_name_goes_before_the_name_of_the_file(
    tercet, prompted, tmp_path
):
    record = {"query": "a", "positives": [SENTENCES[0]], "negatives": [SENTENCES[1]]}
    file = write(tmp_path / "pairs.jsonl", {**record, "task": "sections"})
    ended = tercet("eval", file, "--model", prompted, "--no-bm25")
    assert "using its prompts for the task 'sections'" in ended.err


def test_a_model_without_the_prompts_it_was_trained_with_is_refused_unless_that_is_forced(
    tercet, refused, prompted, encoder_folder, grouped, learned
):
    said = refused("eval", grouped, "--model", prompted, "--no-bm25")  # "groups" is no task of its
    assert said.startswith(f"{prompted}: a query gets no prompt, but the model was trained with")
    assert "--no-prompts" in said and "sections-query 'tell:'" in said
    assert tercet("eval", grouped, "--model", prompted, "--no-bm25", "--no-prompts").status == 0
    forced = tercet("eval", learned, "--model", prompted, "--no-prompts", "--no-bm25")
    assert forced.err.count("measured without prompts, as requested") == 1
    assert "gets no prompt" not in forced.err
    plain = tercet("eval", learned, "--model", encoder_folder, "--no-bm25")
    assert cells(forced.out.splitlines()[2])[1:] == cells(plain.out.splitlines()[2])[1:]
    assert plain.err == ""


def test_a_task_has_to_be_known_by_the_first_model_only(
    tercet, refused, prompted, encoder_folder, learned
):
    said = refused("eval", learned, "--model", prompted, "--task", "lost")
    assert said == "the model has no prompt for the task 'lost'; it knows: pairs, sections"
    both = ["--compare-with", encoder_folder, "--task", "sections"]
    ended = tercet("eval", learned, "--model", prompted, "--no-bm25", *both)
    assert f"{encoder_folder}: has no prompts for the task 'sections'; its" in ended.err
    said = refused("eval", learned, "--model", prompted, "--task", "sections", "--no-prompts")
    assert said.startswith("--task and --no-prompts exclude each other")


def test_what_is_wrong_with_a_file_of_labels_is_named(refused, encoder_folder, tmp_path):
    good = {"text": "a", "label": "b"}
    file = write(tmp_path / "labels.jsonl", good, {"text": "b"})
    said = refused("eval", file, "--model", encoder_folder)
    assert said.startswith(f"{file}:2: ") and '"label" is missing' in said
    file = write(tmp_path / "labels.jsonl", good, {**good, "split": "test"})
    assert "others do not; add it to all" in refused("eval", file, "--model", encoder_folder)


def test_figures_of_any_set_are_written_on_request(tercet, encoder_folder, scored, tmp_path):
    file = tmp_path / "figures.json"
    ended = tercet("eval", scored, "--model", encoder_folder, "--json", file)
    record = json.loads(file.read_text())
    spearman = record["results"][str(encoder_folder)]["spearman"]
    shown = cells(ended.out.splitlines()[2])[1]
    assert shown == f"{spearman['mean']:.3f} [{spearman['low']:.3f}, {spearman['high']:.3f}]"
    assert list(record["differences"]) == [f"{encoder_folder} minus"]


# --- kinds of vectors -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def of_all_kinds(encoder_folder, tmp_path_factory):
    """A model that makes all kinds of vectors, untrained."""
    folder = tmp_path_factory.mktemp("kinds") / "model"
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8).save(folder)
    return folder


SEVEN = ["dense", "sparse", "multi", "dense+sparse", "dense+multi", "sparse+multi"]
SEVEN.append("dense+sparse+multi")


def test_every_kind_and_every_sum_stand_beside_both_bm25(
    tercet, of_all_kinds, encoder_folder, files, tmp_path
):
    figures = tmp_path / "figures.json"
    words = [
        "eval",
        files / "pairs.jsonl",
        "--model",
        of_all_kinds,
        "--compare-with",
        encoder_folder,
    ]
    ended = tercet(
        *words,
        "--json",
        figures,
        "--kind-weight",
        "dense=1",
        "--kind-weight",
        "sparse=0.5",
        "--kind-weight",
        "multi=2",
    )
    rows = [cells(line) for line in ended.out.splitlines()]
    names = [*(f"{of_all_kinds} {each}" for each in SEVEN), str(encoder_folder), "BM25"]
    names.append(f"BM25, tokens of {of_all_kinds}")
    assert ended.status == 0 and [row[0] for row in rows[2:12]] == names
    assert rows[12][0] == f"minus {names[0]}" and [row[0] for row in rows[13:]] == names[1:]
    assert "every document scored by every kind; weights: dense 1, sparse 0.5, multi 2" in ended.err
    assert f"{of_all_kinds}: document terms: " in ended.err

    data = RetrievalSet.from_examples(files / "pairs.jsonl")
    embedder = Embedder.load(of_all_kinds)
    found = measure_kinds(embedder, data, weights=Weights(1.0, 0.5, 2.0))
    own = measure_bm25(data, by_tokens_of(embedder))
    for name, result in zip(names, [*found.results.values(), None, None, own], strict=True):
        if result is not None:
            shown = rows[2 + names.index(name)]
            assert shown[1:] == [str(result.interval(metric)) for metric in METRICS]
    record = json.loads(figures.read_text())
    assert list(record["results"]) == names
    gain = found.results[SEVEN[-1]].minus(found.results["dense"], "ndcg@10")
    kept = record["differences"][f"minus {names[0]}"][names[6]]["ndcg@10"]
    assert (kept["mean"], kept["low"], kept["high"]) == (gain.mean, gain.low, gain.high)
    assert rows[18][1] == f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    search = record["search"][str(of_all_kinds)]
    assert search["protocol"] == "exact" and search["weights"]["sparse"] == 0.5
    assert search["terms"]["document"] == asdict(found.terms["document"])


def test_kinds_and_protocol_are_as_asked_for(tercet, refused, of_all_kinds, files, tmp_path):
    words = ["eval", files / "pairs.jsonl", "--model", of_all_kinds, "--no-bm25"]
    ended = tercet(*words, "--kind", "multi", "--kind", "dense", "--protocol", "paper")
    rows = [cells(line) for line in ended.out.splitlines()]
    names = [f"{of_all_kinds} {each}" for each in ("dense", "multi", "dense+multi")]
    assert [row[0] for row in rows[2:5]] == names
    assert "best 200 of dense" in ended.err and "terms" not in ended.err
    assert "'colbert' is not one of" in refused(*words, "--kind", "colbert")
    assert "a number above 0" in refused(
        *words, "--kind-weight", "dense=0", "--kind-weight", "sparse=0", "--kind-weight", "multi=0"
    )
    for wrong, said in (
        ("sparse", "write NAME=NUMBER, as in sparse=0.3"),
        ("sparse=x", "write NAME=NUMBER, as in sparse=0.3"),
        ("sparce=1", 'there is no such kind (did you mean "sparse"?)'),
        ("sparse=-1", "the weight of sparse must be 0 or more; got -1"),
        ("multi=nan", "the weight of multi must be 0 or more; got nan"),
    ):
        assert said in refused(*words, "--kind-weight", wrong)
    scored = write(
        tmp_path / "scored.jsonl", *({"text1": "a", "text2": "b", "score": i} for i in (1, 2))
    )
    assert "is not a retrieval set" in refused(
        "eval", scored, "--model", of_all_kinds, "--kind", "dense"
    )


def test_a_kind_that_the_model_does_not_make_is_told(refused, encoder_folder, files):
    words = ["eval", files / "pairs.jsonl", "--model", encoder_folder, "--kind", "sparse"]
    assert "makes no sparse vectors" in refused(*words)


# --- flags without effect ---------------------------------------------------------------------


ALONE = "measured by dense vectors only"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], None),
        (
            ["--kind-weight", "dense=1", "--kind-weight", "sparse=0.3", "--kind-weight", "multi=1"],
            f"{ALONE}: --kind-weight has no effect",
        ),
        (["--protocol", "reference"], f"{ALONE}: --protocol has no effect"),
        (
            [
                "--kind-weight",
                "dense=1",
                "--kind-weight",
                "sparse=1",
                "--kind-weight",
                "multi=1",
                "--protocol",
                "paper",
            ],
            f"{ALONE}: --kind-weight and --protocol have no effect",
        ),
        (["--kind", "dense"], None),
        (
            [
                "--kind",
                "dense",
                "--kind-weight",
                "dense=1",
                "--kind-weight",
                "sparse=0.3",
                "--kind-weight",
                "multi=1",
            ],
            f"{ALONE}: --kind-weight has no effect",
        ),
    ],
)
def test_flags_that_say_nothing_of_a_dense_model_are_named(
    tercet, encoder_folder, files, flags, said
):
    words = ["eval", files / "pairs.jsonl", "--model", encoder_folder, "--no-bm25"]
    ended = tercet(*words, *flags)
    lines = [line for line in ended.err.splitlines() if "vectors only" in line]
    if said is None:
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith(f"{encoder_folder}: {said}")
    plain = tercet(*words).out.splitlines()[2]
    assert cells(ended.out.splitlines()[2])[1:] == cells(plain)[1:]


def test_a_dense_model_beside_one_of_all_kinds_is_said_to_be_measured_by_dense_alone(
    tercet, of_all_kinds, encoder_folder, files
):
    words = [
        "eval",
        files / "pairs.jsonl",
        "--model",
        of_all_kinds,
        "--compare-with",
        encoder_folder,
        "--no-bm25",
    ]
    ended = tercet(
        *words,
        "--kind",
        "sparse",
        "--kind-weight",
        "dense=1",
        "--kind-weight",
        "sparse=1",
        "--kind-weight",
        "multi=1",
        "--protocol",
        "reference",
    )
    assert (
        f"{encoder_folder}: {ALONE}: --kind and --kind-weight and --protocol have no effect"
        in ended.err
    )
    one = f"{of_all_kinds}: measured by sparse vectors only: --kind-weight has no effect"
    assert one in ended.err.splitlines()


def test_only_weights_of_kinds_that_are_measured_are_shown(tercet, of_all_kinds, files):
    words = ["eval", files / "pairs.jsonl", "--model", of_all_kinds, "--no-bm25"]
    ended = tercet(
        *words,
        "--kind",
        "dense",
        "--kind",
        "sparse",
        "--kind-weight",
        "dense=1",
        "--kind-weight",
        "sparse=0.5",
        "--kind-weight",
        "multi=2",
    )
    assert "weights: dense 1, sparse 0.5\n" in ended.err


# --- folders ----------------------------------------------------------------------------------


def flag_folder(folder, *splits, answers=False):
    """FlagEmbedding's layout: the sentences, each asked for by its last word."""
    folder.mkdir()
    corpus = [{"id": str(i), "text": text} for i, text in enumerate(SENTENCES)]
    write(folder / "corpus.jsonl", *corpus)
    for size, split in enumerate(splits, start=5):
        asked = [{"id": f"q{i}", "text": SENTENCES[i].split()[-1]} for i in range(size)]
        judged = [{"qid": f"q{i}", "docid": str(i), "relevance": 1} for i in range(size)]
        held = [{**each, "answers": [each["text"].upper()]} for each in asked]
        write(folder / f"{split}_queries.jsonl", *(held if answers else asked))
        if not answers:
            write(folder / f"{split}_qrels.jsonl", *judged)
    return folder


def test_a_folder_of_flagembedding_is_measured_by_its_split(
    tercet, refused, encoder_folder, files, tmp_path
):
    folder = flag_folder(tmp_path / "set", "dev", "test")
    words = ["eval", folder, "--model", encoder_folder, "--no-bm25"]
    assert "set: has the splits dev, test; name one (--split)" in refused(*words)
    assert "has no split 'train'" in refused(*words, "--split", "train")
    for split, queries in (("dev", 5), ("test", 6)):
        out = tercet(*words, "--split", split).out
        assert out.startswith(f"{queries} queries, 12 documents\n")
    pairs = ["eval", files / "pairs.jsonl", "--model", encoder_folder, "--split", "dev"]
    assert "--split applies to folders only" in refused(*pairs)


def test_queries_with_answers_are_measured_by_what_holds_them(
    tercet, refused, of_all_kinds, tmp_path
):
    folder = flag_folder(tmp_path / "set", "test", answers=True)
    lines = tercet("eval", folder, "--model", of_all_kinds).out.splitlines()
    assert cells(lines[1]) == ["model", "answer@20", "answer@100"]
    rows = {row[0]: row[1:] for row in map(cells, lines[2:11])}
    assert rows["BM25"][0].startswith("1.000")  # it finds the document by the word asked for
    assert list(rows)[:7] == [f"{of_all_kinds} {each}" for each in SEVEN]
    assert all(figure.startswith("1.000") for figure in rows[f"{of_all_kinds} dense"])
    said = refused("tune", "weights", folder, "--model", of_all_kinds, "--split", "test")
    assert "set: its queries have answers but no judged documents, which tune weights" in said


# --- documents in codes ---------------------------------------------------------------------------


@pytest.fixture
def short_model(encoder_folder, tmp_path):
    Embedder.load(encoder_folder, dims=(16,)).save(tmp_path / "model")
    return tmp_path / "model"


def test_eval_measures_documents_in_codes(tercet, short_model, files, tmp_path):
    figures = tmp_path / "figures.json"
    words = [
        "eval",
        files / "pairs.jsonl",
        "--model",
        short_model,
        "--no-bm25",
        "--dims",
        "16",
        "--json",
        figures,
    ]
    ended = tercet(*words, "--store-as", "int4")
    assert ended.status == 0
    assert f"{short_model}: documents in int4, 8 bytes each, queries in full; range " in ended.err
    assert "learned from these documents, not from queries" in ended.err
    found = json.loads(figures.read_text())["search"][str(short_model)]
    assert (found["bytes"], found["dims"], found["learned_here"]) == (8, 16, True)
    tercet("tune", "codes", files / "texts.txt", "--model", short_model, "--save")
    again = tercet(*words, "--store-as", "int4")
    kept = Embedder.load(short_model).settings.ranges[16].int4
    assert f"range {kept:.4f}, saved with the model" in again.err
    assert json.loads(figures.read_text())["search"][str(short_model)]["limit"] == kept


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["--kind-weight", "dense=1", "--kind-weight", "sparse=1", "--kind-weight", "multi=1"],
            "applies to dense vectors only; remove --kind-weight",
        ),
        (["--kind", "dense", "--kind", "sparse"], "dense, sparse are measured; add --kind dense"),
        ([], "dense, sparse, multi are measured; add --kind dense"),
    ],
)
def test_codes_are_of_dense_vectors(refused, encoder_folder, files, tmp_path, words, problem):
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8).save(tmp_path / "kinds")
    command = ["eval", files / "pairs.jsonl", "--model", tmp_path / "kinds", "--store-as", "int8"]
    assert problem in refused(*command, *words)


def test_dense_vectors_of_a_model_with_others_can_be_measured_in_codes(
    tercet, encoder_folder, files, tmp_path
):
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8).save(tmp_path / "kinds")
    command = ["eval", files / "pairs.jsonl", "--model", tmp_path / "kinds", "--store-as", "binary"]
    ended = tercet(*command, "--kind", "dense", "--no-bm25")
    assert ended.status == 0 and "documents in binary, 8 bytes each" in ended.err


def test_sets_without_documents_are_not_measured_in_codes(refused, short_model, tmp_path):
    pairs = [{"text1": "a b", "text2": "c", "score": i} for i in range(3)]
    file = write(tmp_path / "pairs.jsonl", *pairs)
    told = refused("eval", file, "--model", short_model, "--store-as", "int4")
    assert "is not a retrieval set" in told and "--store-as do not apply" in told


# --- a folder of sets in several languages --------------------------------------------------------


@pytest.fixture(scope="module")
def language_sets(tmp_path_factory):
    """Sets in German, French and Korean, from Korean to English, and in all of them."""
    folder = tmp_path_factory.mktemp("suite")
    rows = [{"query": text.split()[-1], "positives": [text]} for text in SENTENCES]
    for lang, some in (("de", rows[:4]), ("fr", rows[4:8]), ("ko", rows[:6])):
        write(folder / f"{lang}.jsonl", *some)
    for name in ("ko-en", "mixed"):
        (folder / name).mkdir()
        known = [(i, text, ("de", "fr", "ko")[i % 3]) for i, text in enumerate(SENTENCES)]
        langs = {} if name == "ko-en" else {i: {"lang": lang} for i, _, lang in known}
        write(
            folder / name / "corpus.jsonl",
            *({"_id": f"d{i}", "text": text} | langs.get(i, {}) for i, text, _ in known),
        )
        write(
            folder / name / "queries.jsonl",
            *(
                {"_id": f"q{i}", "text": t[:9]} | langs.get(i + 1, langs.get(0, {}))
                for i, t, _ in known
            ),
        )
        write(
            folder / name / "qrels.jsonl",
            *({"qid": f"q{i}", "docid": f"d{i}", "score": 1} for i, *_ in known),
        )
    return folder


@pytest.fixture(scope="module")
def other_folder(encoder_folder, tmp_path_factory):
    """A second model: the first with fewer layers."""
    folder = tmp_path_factory.mktemp("other") / "model"
    Embedder.load(encoder_folder, keep_layers=1).save(folder)
    return folder


@pytest.fixture(scope="module")
def expected(language_sets, encoder_folder, other_folder):
    """What the two models are worth, set by set."""
    return [
        {each.name: each for each in measure_sets(Embedder.load(model), sets_in(language_sets))}
        for model in (encoder_folder, other_folder)
    ]


def test_every_set_is_measured_and_averages_never_cross_an_axis(
    tercet, language_sets, encoder_folder, other_folder, expected, tmp_path
):
    file, out = tmp_path / "figures.json", tmp_path / "out"
    ended = tercet(
        *(
            "eval",
            language_sets,
            "--model",
            encoder_folder,
            "--compare-with",
            other_folder,
            "--seen",
            "de",
            "--seen",
            "fr",
        ),
        *("--seed", 3, "--json", file, "--out", out),
    )
    assert ended.status == 0, ended.err
    lines = [cells(line) for line in ended.out.splitlines()]
    one, two = expected
    for name, each in one.items():
        (row,) = [line for line in lines if line[:2] == [name, each.axis]]
        gain = paired_difference(each.scores["ndcg@10"], two[name].scores["ndcg@10"], seed=3)
        assert f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" in row
        assert row[2:4] == [each.languages, str(len(each.langs))]
    alone = [each for each in one.values() if each.axis == "monolingual"]
    ours = averages(cells_of(alone, lambda it: it.scores["ndcg@10"], seed=3), seen=["de", "fr"])
    for row, figure, lang in ours.rows():
        (line,) = [
            line for line in lines if line[0] == f"monolingual: {row}" and "+" not in line[1]
        ]
        assert line[1] == f"{figure} {lang}".strip()
    assert (out / "languages.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(file.read_text())
    assert record == json.loads((out / "scores.json").read_text())
    assert set(record["averages"]) == {"monolingual", "cross-lingual", "mixed"}
    figures = record["averages"]["monolingual"]["figures"][str(encoder_folder)]
    assert figures["unseen"]["mean"] == pytest.approx(figures["languages"]["ko"]["mean"])
    assert figures["over_families"]["mean"] == pytest.approx(ours.over_families.mean)


def test_the_record_says_under_which_conditions_each_figure_was_measured(
    tercet, language_sets, encoder_folder, expected, tmp_path
):
    file = tmp_path / "figures.json"
    how = ("--dims", 8, "--store-as", "int8", "--query-tokens", 7, "--json", file)
    assert tercet("eval", language_sets, "--model", encoder_folder, *how).status == 0
    record = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN
    model = record["models"][str(encoder_folder)]
    assert (model["dims"], model["stored"], model["query_tokens"]) == (8, "int8", 7)
    assert model["prompts"] == {} and model["weights"] == "float32"
    assert {"torch", "transformers", "bm25s"} <= set(record["versions"]) and record["seed"] == 0
    assert set(record["sets"]) == set(expected[0])
    of_mixed = record["sets"]["mixed"]["results"]
    assert set(of_mixed) == {str(encoder_folder), "BM25", "BM25 of 3 letters"}
    assert set(of_mixed["BM25"]["languages"]) == {"de", "fr", "ko"}


def test_language_bias_is_shown_for_every_system_and_for_each_language_of_the_first(
    tercet, language_sets, encoder_folder, expected
):
    ended = tercet("eval", language_sets, "--model", encoder_folder)
    rows = [cells(line) for line in ended.out.splitlines()]
    shown = {(row[0], row[2]): row[3:] for row in rows if row[1:2] == ["mixed"] and len(row) > 6}
    assert set(shown) >= {
        *((str(encoder_folder), lang) for lang in ("all", "de", "fr", "ko")),
        ("BM25", "all"),
    }
    found = language_bias(expected[0]["mixed"], "ndcg@10")
    assert found is not None and not math.isnan(found.bias.mean)
    bias = f"{found.bias.mean:+.3f} [{found.bias.low:+.3f}, {found.bias.high:+.3f}]"
    last = shown[str(encoder_folder), "all"]
    assert last[-3:] == [f"{found.same:.3f}", f"{found.chance:.3f}", bias]


def test_a_set_whose_language_nothing_tells_is_said_to_be_in_no_average(
    tercet, encoder_folder, tmp_path
):
    write(tmp_path / "lost.jsonl", {"query": "maps", "positives": [SENTENCES[3]]})
    ended = tercet("eval", tmp_path, "--model", encoder_folder, "--no-bm25")
    assert "lost: of unknown language, so left out of all averages" in ended.err
    assert [cells(line)[:2] for line in ended.out.splitlines()[1:]] == [["lost", "unknown"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kind", "dense"), "--kind does not apply to a folder of sets; remove it"),
        (("--per-label", "3"), "--per-label does not apply to a folder of sets; remove it"),
    ],
)
def test_what_does_not_apply_to_a_folder_of_sets_is_refused(
    refused, encoder_folder, language_sets, words, said
):
    assert refused("eval", language_sets, "--model", encoder_folder, *words) == said


def test_what_says_nothing_of_a_single_set_is_refused(
    refused, encoder_folder, language_sets, tmp_path
):
    said = refused("eval", language_sets / "de.jsonl", "--model", encoder_folder, "--seen", "de")
    assert said == "--seen does not apply to a single set; remove it"
    said = refused("eval", "--model", encoder_folder)
    assert said == "give either data to measure on, or --mteb with a task"


def test_a_folder_of_one_set_is_measured_as_before(tercet, encoder_folder, language_sets):
    ended = tercet("eval", language_sets / "ko-en", "--model", encoder_folder, "--no-bm25")
    assert ended.out.splitlines()[0] == "12 queries, 12 documents"


# --- tasks of mteb --------------------------------------------------------------------------------


@pytest.fixture
def two_tasks(monkeypatch):
    """One task that is run, and one that is skipped; mteb itself is not needed."""
    found = TaskScore(
        "SciFact", "default", ("eng-Latn",), "test", "1", "ndcg_at_10", 0.25, (("recall@100", 0.5),)
    )
    away = TaskScore("NFCorpus", skipped="the hub cannot be reached (no network)")
    monkeypatch.setattr(ours, "named_tasks", lambda names: list(names))
    monkeypatch.setattr(ours, "as_mteb", lambda embedder, name, dims: dims)
    monkeypatch.setattr(ours, "run_tasks", lambda model, tasks: iter([found, away][: len(tasks)]))


def test_scores_are_shown_and_what_was_skipped_is_said_and_both_are_written(
    tercet, encoder_folder, two_tasks, tmp_path
):
    file = tmp_path / "figures.json"
    tasks = ("--mteb", "SciFact", "--mteb", "NFCorpus")
    ended = tercet("eval", "--model", encoder_folder, *tasks, "--dims", 8, "--json", file)
    assert ended.status == 0
    assert ended.out.split()[-4:] == ["default", "ndcg_at_10", "0.250", "0.500"]
    assert "NFCorpus: skipped: the hub cannot be reached (no network)" in ended.err
    record = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN
    rows = record["results"][str(encoder_folder)]
    assert [(row["task"], row["score"]) for row in rows] == [("SciFact", 0.25), ("NFCorpus", None)]
    assert record["models"][str(encoder_folder)]["dims"] == 8
    assert record["models"][str(encoder_folder)]["query_tokens"] > 0
    assert "torch" in record["versions"]


def test_nothing_is_shown_where_all_were_skipped(tercet, encoder_folder, monkeypatch, two_tasks):
    away = TaskScore("SciFact", skipped="the hub cannot be reached")
    monkeypatch.setattr(ours, "run_tasks", lambda model, tasks: iter([away]))
    ended = tercet("eval", "--model", encoder_folder, "--mteb", "SciFact")
    assert (ended.status, ended.out) == (0, "")


def test_a_task_takes_the_place_of_data(refused, encoder_folder, files):
    said = refused("eval", files / "pairs.jsonl", "--model", encoder_folder, "--mteb", "SciFact")
    assert said == "give either data to measure on, or --mteb with a task"
    said = refused("eval", "--model", encoder_folder, "--mteb", "SciFact", "--store-as", "int4")
    assert said == "--store-as does not apply to --mteb; remove it"


def reported(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert_self_contained(page)
    return text_of(page)


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ((), ("Evaluation of", "results.png")),
        (("--compressed", "--dims", 32), ("Compressed vectors of", "sizes.png")),
    ],
    ids=["a set", "compressed"],
)
def test_an_evaluation_leaves_a_report_with_the_command_that_repeats_it(
    tercet, files, encoder_folder, tmp_path, more, shown
):
    out, data = tmp_path / "evaluation", files / "pairs.jsonl"
    words = ("eval", data, "--model", encoder_folder, "--out", out, *more)
    ended = tercet(*words)
    assert ended.status == 0, ended.err
    assert f"report: {out}/report.html" in ended.err
    text, (title, picture) = reported(out), shown
    assert f"{title} {encoder_folder} on pairs.jsonl" in text
    assert f"tercet eval {data} --model {encoder_folder} --out {out}" in text
    names = {path.name for path in out.iterdir() if path.name[0] != "."}
    assert names == {"report.html", "scores.json", picture}
    assert tercet(*words).status == 0  # its own files may be replaced
