"""What ``eval`` measures: every kind and every sum, folders, and flags without effect."""

import json
from dataclasses import asdict

import pytest

from tercet.evaluate.measures.bm25 import by_tokens_of
from tercet.evaluate.measures.embedder_kinds import measure_kinds
from tercet.evaluate.measures.retrieval import measure_bm25
from tercet.evaluate.sets.retrieval_set import METRICS, RetrievalSet
from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tests.cli.lines import cells, write
from tests.toy import SENTENCES


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
    words = ["eval", of_all_kinds, files / "pairs.jsonl", "--against", encoder_folder]
    ended = tercet(*words, "--json", figures, "--weights", "1,0.5,2")
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
    gain = found.minus(SEVEN[-1], "dense", "ndcg@10")
    kept = record["differences"][f"minus {names[0]}"][names[6]]["ndcg@10"]
    assert (kept["mean"], kept["low"], kept["high"]) == (gain.mean, gain.low, gain.high)
    assert rows[18][1] == f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    search = record["search"][str(of_all_kinds)]
    assert search["protocol"] == "exact" and search["weights"]["sparse"] == 0.5
    assert search["terms"]["document"] == asdict(found.terms["document"])


def test_kinds_and_protocol_are_as_asked_for(tercet, refused, of_all_kinds, files, tmp_path):
    words = ["eval", of_all_kinds, files / "pairs.jsonl", "--no-bm25"]
    ended = tercet(*words, "--kinds", "multi,dense", "--protocol", "paper")
    rows = [cells(line) for line in ended.out.splitlines()]
    names = [f"{of_all_kinds} {each}" for each in ("dense", "multi", "dense+multi")]
    assert [row[0] for row in rows[2:5]] == names
    assert "best 200 of dense" in ended.err and "terms" not in ended.err
    assert "kinds are 'colbert'; choose" in refused(*words, "--kinds", "colbert")
    assert "a number above 0" in refused(*words, "--weights", "0,0,0")
    for wrong in ("1,2", "1,x,3", "1,-1,1", "1,nan,1"):
        assert "give three numbers" in refused(*words, "--weights", wrong)
    scored = write(
        tmp_path / "scored.jsonl", *({"text1": "a", "text2": "b", "score": i} for i in (1, 2))
    )
    assert "is not a retrieval set" in refused("eval", of_all_kinds, scored, "--kinds", "dense")


def test_a_kind_that_the_model_does_not_make_is_told(refused, encoder_folder, files):
    words = ["eval", encoder_folder, files / "pairs.jsonl", "--kinds", "sparse"]
    assert "makes no sparse vectors" in refused(*words)


# --- flags without effect ---------------------------------------------------------------------


ALONE = "measured by dense vectors only"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], None),
        (["--weights", "1,0.3,1"], f"{ALONE}: --weights has no effect"),
        (["--protocol", "reference"], f"{ALONE}: --protocol has no effect"),
        (
            ["--weights", "1,1,1", "--protocol", "paper"],
            f"{ALONE}: --weights and --protocol have no effect",
        ),
        (["--kinds", "dense"], None),
        (["--kinds", "dense", "--weights", "1,0.3,1"], f"{ALONE}: --weights has no effect"),
    ],
)
def test_flags_that_say_nothing_of_a_dense_model_are_named(
    tercet, encoder_folder, files, flags, said
):
    words = ["eval", encoder_folder, files / "pairs.jsonl", "--no-bm25"]
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
    words = ["eval", of_all_kinds, files / "pairs.jsonl", "--against", encoder_folder, "--no-bm25"]
    ended = tercet(*words, "--kinds", "sparse", "--weights", "1,1,1", "--protocol", "reference")
    assert (
        f"{encoder_folder}: {ALONE}: --kinds and --weights and --protocol have no effect"
        in ended.err
    )
    one = f"{of_all_kinds}: measured by sparse vectors only: --weights has no effect"
    assert one in ended.err.splitlines()


def test_only_weights_of_kinds_that_are_measured_are_shown(tercet, of_all_kinds, files):
    words = ["eval", of_all_kinds, files / "pairs.jsonl", "--no-bm25"]
    ended = tercet(*words, "--kinds", "dense,sparse", "--weights", "1,0.5,2")
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
    words = ["eval", encoder_folder, folder, "--no-bm25"]
    assert "set: has the splits dev, test; name one (--split)" in refused(*words)
    assert "has no split 'train'" in refused(*words, "--split", "train")
    for split, queries in (("dev", 5), ("test", 6)):
        out = tercet(*words, "--split", split).out
        assert out.startswith(f"{queries} queries, 12 documents\n")
    pairs = ["eval", encoder_folder, files / "pairs.jsonl", "--split", "dev"]
    assert "--split applies to folders only" in refused(*pairs)


def test_queries_with_answers_are_measured_by_what_holds_them(
    tercet, refused, of_all_kinds, tmp_path
):
    folder = flag_folder(tmp_path / "set", "test", answers=True)
    lines = tercet("eval", of_all_kinds, folder).out.splitlines()
    assert cells(lines[1]) == ["model", "answer@20", "answer@100"]
    rows = {row[0]: row[1:] for row in map(cells, lines[2:11])}
    assert rows["BM25"][0].startswith("1.000")  # it finds the document by the word asked for
    assert list(rows)[:7] == [f"{of_all_kinds} {each}" for each in SEVEN]
    assert all(figure.startswith("1.000") for figure in rows[f"{of_all_kinds} dense"])
    said = refused("tune-weights", of_all_kinds, folder, "--split", "test")
    assert "set: its queries have answers but no judged documents, which tune-weights" in said
