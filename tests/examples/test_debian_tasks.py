import json
import runpy
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tercet.data.files.labelled import read_labelled_texts
from tercet.data.files.similarity import SimilaritySet
from tercet.data.files.sources import iter_examples
from tercet.evaluate.sets.label_sets import ClassificationSet, ClusteringSet, read_label_set
from tercet.evaluate.sets.retrieval_set import RetrievalSet

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT = 300


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(EXAMPLES / "debian_tasks.py"))


@pytest.fixture(scope="module")
def suite(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("suite")
    script["main"]([str(out), "--limit", str(LIMIT)])
    return out


@pytest.fixture(scope="module")
def split_of():
    """The split of each text of the packages."""
    rows = pq.read_table(EXAMPLES / "data/packages.en.parquet").to_pylist()
    return {row[name]: row["split"] for row in rows for name in ("short", "long")}


def texts_of(path):
    records = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
    for record in records:
        for name in ("text", "text1", "text2", "query"):
            if name in record:
                yield record.get("split"), record[name]
        yield from ((None, text) for text in record.get("positives", ()))


def test_training_is_of_the_train_split_and_what_is_measured_of_the_test_split(suite, split_of):
    for part in ("train", "dev", "test"):
        files = sorted((suite / part).rglob("*.jsonl"))
        assert len(files) == {"train": 4, "dev": 1, "test": 6}[part]
        for path in files:
            if path.name != "queries.jsonl":  # the words of topics
                found = [(split or part, split_of[text]) for split, text in texts_of(path)]
                assert len(found) >= 100 and all(wanted == of for wanted, of in found), path


def test_each_file_is_read_as_what_it_is_for(suite):
    examples = list(iter_examples(suite / "train/retrieval.jsonl"))
    assert len(examples) == LIMIT and {each.task for each in examples} == {"retrieval"}
    assert all((each.query_prompt or "").startswith("Instruct: Given") for each in examples)
    assert {each.document_prompt for each in examples} == {None}
    pairs = SimilaritySet.from_file(suite / "train/similarity.jsonl")
    assert len(pairs.pairs) > 200 and pairs.scores.min() == 0 and pairs.scores.max() == 5
    assert (pairs.scores >= 4).sum() >= 20  # that make rows
    uses = list(read_labelled_texts(suite / "train/uses.jsonl"))
    assert any(len(each.labels) > 1 for each in uses)
    assert min(Counter(label for each in uses for label in each.labels).values()) > 3
    sections = read_label_set(suite / "test/sections.jsonl")
    assert isinstance(sections, ClassificationSet) and len(sections.labels) >= 30
    grouped = read_label_set(suite / "test/uses.jsonl")
    assert isinstance(grouped, ClusteringSet)
    assert set(grouped.labels) <= {label for each in uses for label in each.labels}
    topics = RetrievalSet.from_folder(suite / "test/topics")
    assert len(topics.documents) == LIMIT and len(topics.queries) > 10
    assert (topics.judgements.query_of()[:3] == 0).all()  # three or more of each topic


def test_two_runs_write_the_same_and_name_the_commands_that_follow(script, suite, tmp_path, capsys):
    script["main"]([str(tmp_path), "--limit", str(LIMIT)])
    for path in sorted(suite.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / path.relative_to(suite)).read_bytes()
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split() for line in lines if line.startswith("tercet convert ")]
    assert [words[2] for words in commands] == ["labels", "labels", "scores"]
    assert all(Path(words[3]).is_file() for words in commands)


def test_a_text_that_leaks_stops_the_script(script, tmp_path):
    for part, text in (("train", "A  Small\neditor"), ("test", "a small editor")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "sections.jsonl").write_text(json.dumps({"text": text}) + "\n")
    with pytest.raises(SystemExit, match="'a small editor' is in the training data too"):
        script["refuse_leaks"](tmp_path)
