import json
from dataclasses import astuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.data.files.sources import write_examples
from tercet.data.files.texts import text_key
from tercet.data.report import CheckOptions, DataReport, SourceReport, check_data
from tercet.types import Example


def lines_of(tmp_path, *records):
    path = tmp_path / "nq.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def total(report: DataReport) -> SourceReport:
    assert report.total is not None
    return report.total


GOOD = {"query": "q", "positives": ["p"]}


def test_a_report_counts_what_is_there(tmp_path):
    path = lines_of(
        tmp_path,
        {"query": "one", "positives": ["p", "p2"], "negatives": ["n", "p", " "]},
        {"query": "one", "positives": ["p"]},
        {"query": "two words", "positives": ["two words", "n"]},
    )
    report = check_data([path])
    found = total(report)
    assert (found.rows, found.with_negatives, found.pairs) == (3, 1, 5)
    assert found.positives_per_query == pytest.approx(5 / 3)
    assert found.distinct_queries == 2
    assert found.distinct_documents == 5  # p, p2, n, blank, "two words"
    assert found.duplicate_pairs == 1  # one, p
    assert found.queries_as_positive == 1
    assert found.negatives_as_positive == 1
    assert found.blank_negatives == 1
    assert astuple(found.queries.words) == pytest.approx((1, 1, 1, 1.5, 1.9, 2))
    assert astuple(found.queries.bytes) == pytest.approx((3, 3, 3, 6, 8.4, 9))
    assert found.documents.bytes.most == 9
    assert report.errors == ()
    assert [warning.split(";")[0] for warning in report.warnings] == [
        "1 (query, positive) pairs are duplicates",
        "1 queries are their own positive",
        "1 negatives equal a positive of the same example",
        "1 negatives are blank",
    ]


def test_clean_data_gives_no_warning(tmp_path):
    report = check_data([lines_of(tmp_path, GOOD, GOOD | {"query": "r"})])
    assert (report.errors, report.warnings) == ((), ())


def test_one_example_alone_is_warned_about(tmp_path):
    assert check_data([lines_of(tmp_path, GOOD)]).warnings == (
        "one example alone cannot form a batch; add examples",
    )


def test_all_errors_are_collected_and_good_examples_counted(tmp_path):
    path = lines_of(tmp_path, GOOD, "{", GOOD, {"query": "q"}, "", {"positives": ["p"]})
    report = check_data([path])
    assert total(report).rows == 2
    assert [error.split(":")[1] for error in report.errors] == ["2", "4", "6"]
    assert all(error.startswith(f"{path}:") for error in report.errors)


def test_reading_stops_after_twenty_errors(tmp_path):
    report = check_data([lines_of(tmp_path, *["{"] * 19, GOOD, *["{"] * 9, GOOD)])
    assert len(report.errors) == 20
    assert total(report).rows == 1
    assert report.warnings[0].startswith("reading stopped after 20 errors; repair them")


def test_a_file_that_cannot_be_read_is_an_error_of_the_report(tmp_path):
    report = check_data([tmp_path / "absent.jsonl"])
    assert report.errors == (f"{tmp_path / 'absent.jsonl'}: no such file",)
    assert (report.sources, report.total, report.samples) == ((), None, ())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["q"]}), path)
    assert "has no column" in check_data([path]).errors[0]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 4, 8]), (100, [0, 48, 96])],
)
def test_samples_are_spread_over_the_file(tmp_path, suffix, count, expected):
    path = tmp_path / f"a.{suffix}"
    write_examples(path, [Example(f"q{i}", ("p",), task="t") for i in range(count)])
    samples = check_data([path]).samples
    assert [sample.query for sample in samples] == [f"q{i}" for i in expected]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=60))
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_of_any_bytes_gets_a_report(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    report = check_data([path])
    assert report.errors


@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "sources"
    german = [Example("eins zwei", ("drei vier fünf",), lang="de")] * 2
    write_examples(base / "news" / "1.jsonl", [*german, Example("a", ("b c",))])
    write_examples(base / "news" / "2.parquet", [Example("sechs", ("x", "y y y y"), lang="de")])
    write_examples(base / "nq.jsonl", [Example(f"q {i}", ("p " * (i + 1),)) for i in range(6)])
    return base


def test_rows_pairs_and_lengths_are_counted_by_source_and_language(folder):
    found = check_data([folder], CheckOptions(batch_size=2))
    assert found.errors == ()
    plain, german, nq = found.sources
    assert [each.name for each in found.sources] == ["news", "news/de", "nq"]
    assert [each.rows for each in found.sources] == [1, 3, 6]
    assert [each.share for each in found.sources] == [0.1, 0.3, 0.6]
    assert [each.batches for each in found.sources] == [0, 1, 3]
    assert (german.pairs, german.duplicate_pairs, nq.duplicate_pairs) == (4, 1, 0)
    assert (plain.documents.bytes.least, german.documents.bytes.least) == (3, 1)
    assert german.documents.words.median == 3  # of 3, 3, 1 and 4
    assert nq.documents.words.p95 == pytest.approx(np.quantile(range(1, 7), 0.95))
    assert nq.queries.tokens is None and nq.queries.truncated is None
    assert total(found).batches == 4 and total(found).rows == 10


def test_tokens_are_those_of_a_sample_and_too_long_ones_a_share(folder):
    asked = []

    def words(texts, role):
        asked.append((role, len(texts)))
        return [len(text.split()) for text in texts]

    counting = CheckOptions(tokens=words, query_tokens=1, document_tokens=3)
    _, german, nq = check_data([folder], counting).sources
    assert german.queries.truncated == pytest.approx(2 / 3)
    assert nq.documents.tokens is not None and nq.documents.tokens.median == 3.5
    assert nq.documents.truncated == 0.5
    assert asked[-1] == ("document", 6)


def test_the_sample_of_a_large_source_is_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tercet.data.report.TOKEN_SAMPLE", 16)
    write_examples(tmp_path / "a.jsonl", [Example(f"{i}", ("p",)) for i in range(100)])
    seen = []

    def count(texts, role):
        seen.append(texts)
        return [1] * len(texts)

    check_data([tmp_path / "a.jsonl"], CheckOptions(tokens=count))
    rows = [int(text) for text in seen[0]]
    assert 8 <= len(rows) <= 16 and rows == list(range(0, 100, rows[1]))


def test_rows_with_a_text_of_an_evaluation_set_are_counted(folder):
    test = {text_key(text) for text in ("EINS  zwei", "p p")}
    found = check_data([folder], CheckOptions(against={"test": test, "other": set()}))
    assert [dict(each.overlap) for each in found.sources] == [
        {"test": 0, "other": 0},
        {"test": 2, "other": 0},
        {"test": 1, "other": 0},
    ]


def test_errors_of_all_shards_are_collected(folder):
    (folder / "news" / "0.jsonl").write_text('{}\n{"query": "q", "positives": ["p"]}\nx\n')
    (folder / "zz.jsonl").write_text("")
    found = check_data([folder])
    assert [error.removeprefix(f"{folder}/").split(": ")[0] for error in found.errors] == [
        "news/0.jsonl:1",
        "news/0.jsonl:3",
        "zz.jsonl",
    ]
    assert sum(each.rows for each in found.sources) == 11
    (error,) = check_data([folder / "lost.jsonl"]).errors
    assert error == f"{folder}/lost.jsonl: no such file"
