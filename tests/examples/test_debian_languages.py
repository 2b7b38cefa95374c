import json
import runpy
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.files.sources import iter_examples
from tercet.evaluate.sets.retrieval_set import RetrievalSet

SCRIPT = Path(__file__).parents[2] / "examples/debian_languages.py"
SPLITS = ("train", "train", "dev", "test", "test", "test")
LONG = ("en", "ja")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def data(script, tmp_path_factory):
    """Twelve packages in English, of which a language describes the first six."""
    folder = tmp_path_factory.mktemp("debian")
    for lang in script["ALL"]:
        rows = [
            {
                "id": f"p{number}",
                "lang": lang,
                "short": f"{lang} line {number}",
                "long": f"{lang} description {number}",
                "split": SPLITS[number % 6],
            }
            for number in range(12 if lang == "en" else 6)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"packages.{lang}.parquet")
    for lang in LONG:
        page = {"query": f"{lang} purpose", "body": f"{lang} page"}
        rows = [{n: f"{t} {s}" for n, t in page.items()} | {"split": s} for s in SPLITS]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"longdocs.{lang}.parquet")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_four_languages_are_written_without_their_names(script, data, tmp_path):
    script["main"]([str(tmp_path), "--data", str(data)])
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl")}
    of_test = {f"test/{name}-en/{part}.jsonl" for name in ("ko", "ja", "de") for part in PARTS}
    assert {name for name in names if name.startswith("test/")} == of_test | {
        f"test/{name}.jsonl" for name in ("en", "ko", "de", "ja", "longdocs-en", "longdocs-ja")
    }
    assert all("lang" not in row for name in names for row in lines(tmp_path / name))
    assert len(lines(tmp_path / "dev/mixed.jsonl")) == 5


PARTS = ("corpus", "queries")


def test_all_languages_are_written_a_file_each_and_every_row_names_its_own(script, data, tmp_path):
    script["main"]([str(tmp_path), "--data", str(data), "--all"])
    for split, count in (("train", 2), ("dev", 1), ("test", 3)):
        files = sorted((tmp_path / split).glob("*.jsonl"))
        assert {path.stem for path in files} == set(script["ALL"])
        for path in files:
            examples = list(iter_examples(path))
            assert {example.lang for example in examples} == {path.stem}
            assert len(examples) == count * (2 if path.stem == "en" else 1)
    crossed = tmp_path / "test/zh_CN-en"
    assert {row["lang"] for row in lines(crossed / "queries.jsonl")} == {"zh_CN"}
    assert {row["lang"] for row in lines(crossed / "corpus.jsonl")} == {"en"}
    assert len(RetrievalSet.from_folder(crossed).documents) == 6


def test_a_mixed_corpus_holds_each_package_in_one_language_and_queries_in_all(
    script, data, tmp_path
):
    script["main"]([str(tmp_path / "a"), "--data", str(data), "--all"])
    script["main"]([str(tmp_path / "b"), "--data", str(data), "--all", "--seed", "1"])
    first, second = (lines(tmp_path / name / "test/mixed/corpus.jsonl") for name in "ab")
    assert [row["_id"] for row in first] == ["p3", "p4", "p5"]  # p9 to p11 are in English alone
    assert first != second
    asked = lines(tmp_path / "a/test/mixed/queries.jsonl")
    assert Counter(row["lang"] for row in asked) == dict.fromkeys(script["ALL"], 3)
    read = RetrievalSet.from_folder(tmp_path / "a/test/mixed")
    found = [read.document_ids[row] for row in read.judgements.docs]
    assert found == [name.partition(".")[0] for name in read.query_ids]


def test_the_same_seed_writes_the_same_files(script, data, tmp_path):
    for name in "ab":
        script["main"]([str(tmp_path / name), "--data", str(data), "--all"])
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
