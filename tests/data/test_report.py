import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.data.files.sources import write_examples
from tercet.data.report import Lengths, check_examples
from tercet.types import Example


def lines_of(tmp_path, *records):
    path = tmp_path / "nq.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


GOOD = {"query": "q", "positives": ["p"]}


def test_a_report_counts_what_is_there(tmp_path):
    path = lines_of(
        tmp_path,
        {"query": "one", "positives": ["p", "p2"], "negatives": ["n", "p", " "]},
        {"query": "one", "positives": ["p"]},
        {"query": "two words", "positives": ["two words", "n"]},
    )
    report = check_examples(path)
    assert report.examples == 3
    assert report.with_negatives == 1
    assert report.positives_per_query == pytest.approx(5 / 3)
    assert report.distinct_queries == 2
    assert report.distinct_documents == 5  # p, p2, n, blank, "two words"
    assert report.duplicate_pairs == 1  # one, p
    assert report.queries_as_positive == 1
    assert report.negatives_as_positive == 1
    assert report.blank_negatives == 1
    assert report.query_lengths.words == pytest.approx((1, 1, 1, 1.5, 1.9, 2))
    assert report.query_lengths.characters == pytest.approx((3, 3, 3, 6, 8.4, 9))
    assert report.document_lengths.characters[-1] == 9
    assert report.errors == ()
    assert [warning.split(";")[0] for warning in report.warnings] == [
        "1 (query, positive) pairs are there more than once",
        "1 queries are their own positive",
        "1 negatives equal a positive of the same example",
        "1 negatives are blank",
    ]


def test_clean_data_gives_no_warning(tmp_path):
    report = check_examples(lines_of(tmp_path, GOOD, GOOD | {"query": "r"}))
    assert (report.errors, report.warnings) == ((), ())


def test_one_example_alone_is_warned_about(tmp_path):
    assert check_examples(lines_of(tmp_path, GOOD)).warnings == (
        "one example alone cannot form a batch; add examples",
    )


def test_all_errors_are_collected_and_good_examples_counted(tmp_path):
    path = lines_of(tmp_path, GOOD, "{", GOOD, {"query": "q"}, "", {"positives": ["p"]})
    report = check_examples(path)
    assert report.examples == 2
    assert [error.split(":")[1] for error in report.errors] == ["2", "4", "6"]
    assert all(error.startswith(f"{path}:") for error in report.errors)


def test_reading_stops_after_twenty_errors(tmp_path):
    report = check_examples(lines_of(tmp_path, *["{"] * 19, GOOD, *["{"] * 9, GOOD))
    assert len(report.errors) == 20
    assert report.examples == 1
    assert report.warnings[0].startswith("reading stopped after 20 errors; mend them")


def test_a_file_that_cannot_be_read_is_an_error_of_the_report(tmp_path):
    report = check_examples(tmp_path / "absent.jsonl")
    assert report.errors == (f"{tmp_path / 'absent.jsonl'}: no such file",)
    assert (report.examples, report.positives_per_query, report.samples) == (0, 0.0, ())
    assert report.query_lengths == Lengths((), ())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["q"]}), path)
    assert "has no column" in check_examples(path).errors[0]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 4, 8]), (100, [0, 48, 96])],
)
def test_samples_are_spread_over_the_file(tmp_path, suffix, count, expected):
    path = tmp_path / f"a.{suffix}"
    write_examples(path, [Example(f"q{i}", ("p",), task="t") for i in range(count)])
    samples = check_examples(path).samples
    assert [sample.query for sample in samples] == [f"q{i}" for i in expected]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=60))
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_of_any_bytes_gets_a_report(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    report = check_examples(path)
    assert report.errors
