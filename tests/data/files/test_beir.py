"""Folders of both layouts: what is read, which split, and what is said of what is wrong."""

import gzip
import json
import pickle
import tracemalloc

import numpy as np
import pytest

from tercet.data.files.documents import Document, read_documents
from tercet.data.files.folders import open_sources
from tercet.data.files.sources import open_source
from tercet.data.files.texts import text_format
from tercet.data.report import check_data
from tercet.errors import DataError, RecipeError
from tercet.evaluate.measures.retrieval import evaluate_hits
from tercet.evaluate.sets.retrieval_set import METRICS, RetrievalSet
from tercet.rank.topk import Hits
from tercet.types import Example
from tests.cli.lines import write


def write_beir(folder, *, corpus=None, queries=None, qrels=None, at="qrels/test.tsv"):
    def lines(records):
        return "".join(json.dumps(record) + "\n" for record in records)

    corpus = corpus or [
        {"_id": "a", "title": "Title", "text": "one"},
        {"_id": "b", "title": "", "text": "two"},
        {"_id": 3, "text": "three"},
    ]
    queries = queries or [{"_id": "x", "text": "qx"}, {"_id": "y", "text": "qy"}]
    (folder / "corpus.jsonl").write_text(lines(corpus))
    (folder / "queries.jsonl").write_text(lines(queries))
    (folder / at).parent.mkdir(exist_ok=True)
    (folder / at).write_text(qrels or "query-id\tcorpus-id\tscore\ny\tb\t2\ny\t3\t0\n")
    return folder


@pytest.mark.parametrize("at", ["qrels/test.tsv", "qrels.tsv", "qrels.jsonl"])
def test_a_beir_folder_is_read(tmp_path, at):
    jsonl = '{"qid": "y", "docid": "b", "relevance": 2}\n{"qid": "y", "docid": 3, "score": 0.0}\n'
    write_beir(tmp_path, at=at, qrels=jsonl if at.endswith("jsonl") else None)
    data = RetrievalSet.from_folder(tmp_path)
    assert data.documents == ("Title one", "two", "three")
    assert data.document_ids == ("a", "b", "3")
    assert (data.queries, data.query_ids) == (("qy",), ("y",))
    assert data.judgements.docs.tolist() == [1, 2]
    assert data.judgements.grades.tolist() == [2, 0]
    assert data.name == tmp_path.name


def test_queries_of_a_beir_folder_keep_the_order_of_their_file(tmp_path):
    data = RetrievalSet.from_folder(write_beir(tmp_path, qrels="y\ta\t1\nx\tb\t1\n"))
    assert data.query_ids == ("x", "y")
    assert data.judgements.docs.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"corpus": [{"_id": "a", "text": "t"}] * 2}, r"corpus.jsonl:2: id 'a' occurs twice"),
        ({"corpus": [{"_id": "a"}]}, r'corpus.jsonl:1: "text" must be a text, got None'),
        ({"corpus": [{"text": "a"}]}, r'corpus.jsonl:1: "_id" must be a text, got None'),
        ({"corpus": [["a"]]}, r"corpus.jsonl:1: expected an object"),
        ({"queries": [{"_id": "x", "text": " "}]}, r'queries.jsonl:1: "text" holds a blank text'),
        (
            {"qrels": "x\ta\n"},
            r"test.tsv:1: must have 3 columns .* got 2",
        ),
        ({"qrels": "x\ta\t1\nx\tb\t1.5\n"}, r'test.tsv:2: "relevance" must be a whole number'),
        ({"qrels": "x\ta\thigh\n"}, r"test.tsv:1: .* must be a whole number, got 'high'"),
        ({"qrels": "x\ta\tinf\n"}, r"test.tsv:1: .* must be a whole number, got 'inf'"),
        ({"qrels": "x\ta\t1e300\n"}, r"test.tsv:1: .* must be a whole number, got '1e300'"),
        (
            {
                "qrels": f'{{"qid": "x", "docid": "a", "score": 1{400 * "0"}}}\n',
                "at": "qrels.jsonl",
            },
            r"qrels.jsonl:1: .* must be a whole number",
        ),
        ({"qrels": "x\tnone\t1\n"}, r"test.tsv:1: id 'none' is not in corpus.jsonl; add it"),
        ({"qrels": "none\ta\t1\n"}, r"test.tsv:1: id 'none' is not in queries.jsonl"),
        ({"qrels": '{"qid": "x"}\n', "at": "qrels.jsonl"}, r'qrels.jsonl:1: "docid" must be a'),
        ({"at": "elsewhere/test.tsv"}, r"has no judgements; add qrels/test.tsv"),
        (
            {"queries": [{"_id": "x", "text": "t", "answers": 3}]},
            r'jsonl:1: "answers" must be a list',
        ),
        (
            {"queries": [{"_id": "x", "text": "t", "answers": [" "]}]},
            r'"answers" holds a blank text',
        ),
    ],
)
def test_what_is_wrong_in_a_beir_folder_is_named_with_its_line(tmp_path, parts, message):
    with pytest.raises(DataError, match=message):
        RetrievalSet.from_folder(write_beir(tmp_path, **parts))


def test_a_beir_folder_without_corpus_is_named(tmp_path):
    with pytest.raises(DataError, match=r"corpus.jsonl: no such file"):
        RetrievalSet.from_folder(tmp_path)


# ---- FlagEmbedding's layout ----------------------------------------------------------------------


def write_flag(folder, *splits, answers=False):
    """Each split asks for another document."""
    corpus = [{"id": "a", "title": "T", "text": "one"}, {"id": 7, "text": "two"}]
    write(folder / "corpus.jsonl", *corpus)
    for row, split in enumerate(splits):
        asked = [{"id": f"{split}{i}", "text": f"{split} {i}"} for i in range(2)]
        write(folder / f"{split}_queries.jsonl", *asked)
        judged = {"docid": ("a", 7)[row % 2], "relevance": 1}
        given = {"answers": ["two"]} if answers else judged
        write(folder / f"{split}_qrels.jsonl", {"qid": f"{split}1", **given})
    return folder


def test_a_folder_of_flagembedding_is_read_and_its_only_split_needs_no_name(tmp_path):
    data = RetrievalSet.from_folder(write_flag(tmp_path, "dev"))
    assert (data.documents, data.document_ids) == (("T one", "two"), ("a", "7"))
    assert (data.queries, data.query_ids) == (("dev 1",), ("dev1",))
    assert (data.judgements.docs.tolist(), data.judgements.grades.tolist()) == ([0], [1])
    assert (data.answers, data.metrics) == ((), METRICS)


def test_of_several_splits_one_has_to_be_named(tmp_path):
    folder = write_flag(tmp_path, "dev", "test")
    with pytest.raises(DataError, match=r"has the splits dev, test; name one \(--split\)"):
        RetrievalSet.from_folder(folder)
    with pytest.raises(
        DataError, match=r"has no split 'train'; name one of its splits .*dev, test"
    ):
        RetrievalSet.from_folder(folder, "train")
    for row, split in enumerate(("dev", "test")):
        data = RetrievalSet.from_folder(folder, split)
        assert (data.query_ids, data.judgements.docs.tolist()) == ((f"{split}1",), [row])


def test_a_split_without_its_queries_or_its_judgements_is_told(tmp_path):
    folder = write_flag(tmp_path, "dev")
    (folder / "dev_qrels.jsonl").rename(folder / "test_qrels.jsonl")
    with pytest.raises(DataError, match=r"test_queries.jsonl: no such file"):
        RetrievalSet.from_folder(folder, "test")
    with pytest.raises(DataError, match="has no judgements"):
        RetrievalSet.from_folder(folder, "dev")


def test_of_beirs_splits_the_usual_one_is_test_and_others_can_be_named(tmp_path):
    folder = write_beir(tmp_path, qrels="x\ta\t1\n")
    (folder / "qrels/dev.tsv").write_text("y\tb\t1\n")
    assert RetrievalSet.from_folder(folder).query_ids == ("x",)
    assert RetrievalSet.from_folder(folder, "dev").query_ids == ("y",)
    (folder / "qrels/test.tsv").rename(folder / "qrels/train.tsv")
    with pytest.raises(DataError, match="has the splits dev, train"):
        RetrievalSet.from_folder(folder)
    (folder / "qrels/train.tsv").unlink()
    assert RetrievalSet.from_folder(folder).query_ids == ("y",)
    with pytest.raises(DataError, match="has no split 'test'"):
        RetrievalSet.from_folder(folder, "test")
    (folder / "qrels.tsv").write_text("x\ta\t1\n")  # of whatever split, but not of a wrong one
    with pytest.raises(DataError, match="has no split 'devv'"):
        RetrievalSet.from_folder(folder, "devv")


def test_queries_of_one_layout_and_judgements_of_the_other_go_together(tmp_path):
    folder = write_beir(tmp_path, qrels="x\ta\t1\n")
    (folder / "queries.jsonl").rename(folder / "test_queries.jsonl")
    assert RetrievalSet.from_folder(folder, "test").query_ids == ("x",)


# ---- answers -------------------------------------------------------------------------------------


def answered(first, second):
    """What the queries of BEIR's folder carry beside their texts."""
    queries = ({"_id": "x", "text": "qx"}, first), ({"_id": "y", "text": "qy"}, second)
    return [{**query, **({} if given is None else {"answers": given})} for query, given in queries]


def test_answers_stand_in_for_judgements(tmp_path):
    write_beir(tmp_path, queries=answered(["one"], "two"), at="elsewhere/test.tsv")
    data = RetrievalSet.from_folder(tmp_path)
    assert data.answers == (("one",), ("two",)) and len(data.judgements.docs) == 0
    assert data.metrics == ("answer@20", "answer@100")
    rows = np.array([[2, 1, 0], [0, 1, -1]])
    found = evaluate_hits(data, Hits(np.zeros(rows.shape, np.float32), rows))
    assert list(found.scores) == ["answer@20", "answer@100"]
    first = evaluate_hits(data, found.hits, names=["answer@1", "answer@2", "answer@3"])
    assert [scores.tolist() for scores in first.scores.values()] == [[0, 0], [0, 1], [1, 1]]
    with pytest.raises(RecipeError, match="no judged documents, which tuning needs"):
        data.require_judgements("tuning")


def test_queries_without_answers_do_not_count_where_answers_judge(tmp_path):
    write_beir(tmp_path, queries=answered(None, ["two"]), at="elsewhere/test.tsv")
    data = RetrievalSet.from_folder(tmp_path)
    assert (data.query_ids, data.answers) == (("y",), (("two",),))


def test_answers_beside_judgements_are_measured_too(tmp_path):
    write_beir(tmp_path, queries=answered(["one"], ["two"]), qrels="y\ta\t1\nx\ta\t1\n")
    data = RetrievalSet.from_folder(tmp_path)
    assert data.metrics == (*METRICS, "answer@20", "answer@100")
    data.require_judgements("tuning")
    rows = np.array([[0], [0]])
    found = evaluate_hits(data, Hits(np.zeros(rows.shape, np.float32), rows))
    assert found.scores["ndcg@10"].tolist() == [1, 1]
    assert found.scores["answer@20"].tolist() == [1, 0]
    write_beir(tmp_path, queries=answered(["one"], None), qrels="y\ta\t1\nx\ta\t1\n")
    with pytest.raises(DataError, match="query 'y' has no \"answers\", but others have"):
        RetrievalSet.from_folder(tmp_path)


def test_answers_in_the_file_of_judgements_are_read_as_flagembedding_writes_mkqa(tmp_path):
    folder = write_flag(tmp_path, "test", answers=True)
    data = RetrievalSet.from_folder(folder)
    assert (data.query_ids, data.answers) == (("test1",), (("two",),))
    assert data.metrics == ("answer@20", "answer@100")
    lost = {"qid": "lost", "answers": ["one"]}
    write(folder / "test_qrels.jsonl", lost)
    with pytest.raises(DataError, match=r"id 'lost' is not in test_queries.jsonl"):
        RetrievalSet.from_folder(folder)
    write(folder / "test_qrels.jsonl", lost, {"qid": "test1"})
    with pytest.raises(DataError, match=r"test_qrels.jsonl:2: \"answers\" is missing or empty"):
        RetrievalSet.from_folder(folder)


def test_a_metric_of_answers_needs_some(tmp_path):
    data = RetrievalSet.from_folder(write_beir(tmp_path))
    hits = Hits(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int64))
    with pytest.raises(RecipeError, match='its queries have no "answers" to look for'):
        evaluate_hits(data, hits, names=["answer@20"])


TRAIN = "query-id\tcorpus-id\tscore\ny\tb\t2\ny\t3\t0\nx\ta\t1\nx\t3\t1\n"
LEARNED = [
    Example("qx", ("Title one", "three"), task="scifact"),
    Example("qy", ("two",), ("three",), task="scifact"),
]


@pytest.fixture
def beir(tmp_path):
    (tmp_path / "scifact").mkdir()
    write_beir(tmp_path / "scifact", at="qrels/train.tsv", qrels=TRAIN)
    (tmp_path / "scifact/qrels/test.tsv").write_text("x\ta\t1\n")
    return tmp_path / "scifact"


def test_the_training_split_of_a_folder_is_a_source_of_examples(beir):
    source = open_source(beir)
    assert (source.name, source.without_negatives) == ("scifact", 1)
    assert pickle.loads(pickle.dumps(source)).examples([1, 0]) == LEARNED[::-1]
    (same,) = open_sources(beir)
    assert (same.fingerprint, same.examples([0, 1])) == (source.fingerprint, LEARNED)
    (beir / "qrels/train.tsv").write_text(TRAIN.replace("y\t3\t0\n", ""))
    assert open_source(beir).examples([1])[0].negatives == ()


def test_a_folder_of_several_sets_has_a_source_for_each(beir):
    (beir.parent / "more.jsonl").write_text('{"query": "a", "positives": ["b"]}\n')
    assert [(it.name, len(it)) for it in open_sources(beir.parent)] == [("more", 1), ("scifact", 2)]


def test_files_of_a_set_may_be_packed(beir):
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        (beir / f"{name}.gz").write_bytes(gzip.compress((beir / name).read_bytes()))
        (beir / name).unlink()
    assert open_source(beir).examples([0, 1]) == LEARNED
    assert RetrievalSet.from_folder(beir, "train").queries == ("qx", "qy")


def test_documents_of_a_folder_have_their_titles_and_are_texts_too(beir):
    documents = [Document("a", "Title one"), Document("b", "two"), Document("3", "three")]
    assert list(read_documents(beir)) == documents
    (source,) = open_sources(beir, record_format=text_format())
    assert [it.query for it in source.examples([0, 1, 2])] == ["one", "two", "three"]


def test_check_says_that_it_is_a_folder_of_beir(beir):
    report = check_data([beir])
    (file,) = report.files
    assert (file.format, file.rows, report.errors) == ("folder of BEIR", 2, ())
    assert file.columns == {
        "query": "queries.jsonl",
        "positives": "corpus.jsonl by qrels/train.tsv",
    }


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("x\ta\t1\nx\tz\t1\n", r"train.tsv:2: id 'z' is not in corpus.jsonl"),
        ("x\ta\t1\nw\tz\t0\nw\ta\t1\n", r"train.tsv:2: id 'z' is not in corpus.jsonl"),
        ("w\ta\t1\n", r"train.tsv:1: id 'w' is not in queries.jsonl"),
        ("x\ta\t0\n", r"train.tsv: judges no document above 0"),
        ("", r"train.tsv: holds no judgements"),
    ],
)
def test_what_is_wrong_with_training_judgements_is_named(beir, qrels, message):
    (beir / "qrels/train.tsv").write_text(qrels)
    with pytest.raises(DataError, match=message):
        open_source(beir)


def test_a_folder_without_a_training_split_says_which_it_has(beir):
    (beir / "qrels/train.tsv").unlink()
    message = r"no judgements to train on; add qrels/train.tsv; it has those of test, which are for"
    with pytest.raises(DataError, match=message):
        open_source(beir)


def test_blank_documents_and_queries_without_an_answer_are_left_out_and_counted(beir, caplog):
    (beir / "corpus.jsonl").write_text(
        '{"_id": "a", "text": ""}\n{"_id": "b", "text": "two"}\n{"_id": 3, "text": "three"}\n'
    )
    (beir / "qrels/train.tsv").write_text("y\tb\t2\ny\ta\t1\nx\ta\t1\n")
    assert open_source(beir).examples([0]) == [Example("qy", ("two",), task="scifact")]
    said = [record.getMessage().removeprefix(f"{beir}: ") for record in caplog.records]
    assert "1 judged documents are blank, and are left out" in said
    assert "1 queries have no document above 0: left out" in said


def test_documents_that_nobody_judged_are_not_held(beir):
    with (beir / "corpus.jsonl").open("a") as file:
        for number in range(20_000):
            file.write(json.dumps({"_id": f"other {number}", "text": "x" * 200}) + "\n")
    tracemalloc.start()
    try:
        open_source(beir)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20  # ids alone would take more
    finally:
        tracemalloc.stop()
