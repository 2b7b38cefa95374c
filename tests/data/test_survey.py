import numpy as np
import pytest

from tercet.data.batches.mixture import batches_of, by_language, shares_of
from tercet.data.batches.sampler import BatchPlan, Sampler
from tercet.data.files.sources import write_examples
from tercet.data.files.texts import text_key
from tercet.data.survey import Counting, survey
from tercet.types import Example
from tests.data.batches.test_mixture import NEWS, NQ
from tests.data.batches.test_sampler import batches_of as drawn
from tests.data.batches.test_sampler import source_of


@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "sources"
    german = [Example("eins zwei", ("drei vier fünf",), lang="de")] * 2
    write_examples(base / "news" / "1.jsonl", [*german, Example("a", ("b c",))])
    write_examples(base / "news" / "2.parquet", [Example("sechs", ("x", "y y y y"), lang="de")])
    write_examples(base / "nq.jsonl", [Example(f"q {i}", ("p " * (i + 1),)) for i in range(6)])
    return base


def test_rows_pairs_and_lengths_are_counted_by_source_and_language(folder):
    found = survey([folder], Counting(batch_size=2))
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


def test_tokens_are_those_of_a_sample_and_too_long_ones_a_share(folder):
    asked = []

    def words(texts, role):
        asked.append((role, len(texts)))
        return [len(text.split()) for text in texts]

    counting = Counting(tokens=words, query_tokens=1, document_tokens=3)
    _, german, nq = survey([folder], counting).sources
    assert german.queries.truncated == pytest.approx(2 / 3)
    assert nq.documents.tokens is not None and nq.documents.tokens.median == 3.5
    assert nq.documents.truncated == 0.5
    assert asked[-1] == ("document", 6)


def test_the_sample_of_a_large_source_is_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tercet.data.survey.SAMPLE", 8)
    write_examples(tmp_path / "a.jsonl", [Example(f"{i}", ("p",)) for i in range(100)])
    seen = []

    def count(texts, role):
        seen.append(texts)
        return [1] * len(texts)

    survey([tmp_path / "a.jsonl"], Counting(tokens=count))
    rows = [int(text) for text in seen[0]]
    assert 8 <= len(rows) <= 16 and rows == list(range(0, 100, rows[1]))


def test_rows_with_a_text_of_an_evaluation_set_are_counted(folder):
    test = {text_key(text) for text in ("EINS  zwei", "p p")}
    found = survey([folder], Counting(against={"test": test, "other": set()}))
    assert [dict(each.overlap) for each in found.sources] == [
        {"test": 0, "other": 0},
        {"test": 2, "other": 0},
        {"test": 1, "other": 0},
    ]


def test_errors_of_all_shards_are_collected(folder):
    (folder / "news" / "0.jsonl").write_text('{}\n{"query": "q", "positives": ["p"]}\nx\n')
    (folder / "zz.jsonl").write_text("")
    found = survey([folder], Counting())
    assert [error.removeprefix(f"{folder}/").split(": ")[0] for error in found.errors] == [
        "news/0.jsonl:1",
        "news/0.jsonl:3",
        "zz.jsonl",
    ]
    assert sum(each.rows for each in found.sources) == 11
    (error,) = survey([folder / "lost.jsonl"], Counting()).errors
    assert error == f"{folder}/lost.jsonl: no such file"


def test_the_shares_of_a_mixture_add_up_and_follow_the_weights():
    shares = shares_of([*NEWS, NQ], 8)
    assert [each.examples for each in shares] == [30, 10, 10]
    assert [each.share for each in shares] == pytest.approx([0.6, 0.2, 0.2])
    assert [each.batches for each in shares] == [4, 2, 2]
    assert [each.batches for each in shares_of([NQ], 8, single=False)] == [None]
    assert list(by_language(shares)) == ["de", "en", ""]


@pytest.mark.parametrize("rows", [3, 17, 32, 33])
@pytest.mark.parametrize("weight", [1, 2, 1.5, 0.75])
def test_batches_are_counted_as_the_sampler_draws_them(rows, weight):
    sampler = Sampler([source_of("a", [5] * rows, weight=weight)], BatchPlan(batch_size=8, seed=0))
    assert batches_of(rows, weight, 8) == len(drawn(sampler))
