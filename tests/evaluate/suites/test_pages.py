"""Pages about evaluations: what they show of each kind of set, with a toy model."""

import json
import sys
from itertools import pairwise
from typing import Any

import pytest

from tercet.data.files.sources import write_examples
from tercet.evaluate.measures.retention import retention
from tercet.evaluate.sets.location import sets_in
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.comparison import ComparisonOptions, compare, compare_by_language
from tercet.evaluate.suites.pages import (
    ReportPlace,
    write_language_report,
    write_set_report,
    write_sizes_report,
    write_tasks_report,
)
from tercet.evaluate.suites.suite import open_set
from tercet.models.embedder import Embedder
from tercet.types import Example
from tests.evaluate.report.pages import assert_self_contained, spoken, text_of
from tests.toy import SENTENCES

COMMAND = "tercet eval test.jsonl --model mine --out here"


@pytest.fixture(scope="module")
def embedder(encoder_folder):
    return Embedder.load(encoder_folder)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "out").mkdir()
    return ReportPlace(tmp_path / "out", tmp_path / "test.jsonl", COMMAND)


def examples(lang=""):
    return [
        Example(text.split()[-1] + " " + text.split()[1], (text,), lang=lang) for text in SENTENCES
    ]


def page_of(place):
    page = (place.out / "report.html").read_text(encoding="utf-8")
    assert_self_contained(page)
    return page


def compared(embedder, path, names=("mine", "base"), **options):
    found = ComparisonOptions(**options)
    return compare(names, lambda name: embedder, open_set(path), found)


def test_a_retrieval_set_has_results_differences_examples_and_conditions(embedder, place):
    write_examples(place.data, examples())
    write_set_report(place, compared(embedder, place.data))
    page = page_of(place)
    text = text_of(page)
    for part in (
        "Evaluation of mine on test.jsonl",
        "12 queries, 12 documents.",
        "No difference between mine and base is shown: ndcg@10 +0.000 [+0.000, +0.000]",
        "Over 12 queries",
        "Gained most over base No query.",
        "query tokens",
        "torch",
        COMMAND,
    ):
        assert part in text, part
    assert [each.split(":")[0] for each in spoken(page)] == ["ndcg@10", "mine minus, ndcg@10"]
    record = json.loads((place.out / "scores.json").read_text())
    assert record["results"]["mine"]["ndcg@10"]["mean"] == pytest.approx(
        float(spoken(page)[0].split("mine ")[1][:5]), abs=1e-3
    )
    assert (place.out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_queries_that_gained_and_lost_stand_with_their_documents_and_ranks(embedder, place):
    write_examples(place.data, examples())
    found = compared(embedder, place.data, names=("mine",))  # beside BM25, which is perfect here
    results: Any = found.measured
    mine, words = (results[name].scores["ndcg@10"] for name in ("mine", "BM25"))
    worst = int((mine - words).argmin())
    assert mine[worst] < words[worst]
    write_set_report(place, found)
    text = text_of(page_of(place))
    begin = text.index("Lost most to BM25")
    data = found.examined.data
    assert isinstance(data, RetrievalSet)
    assert data.queries[worst] in text[begin:]
    assert "by BM25" in text[begin:]
    assert "at rank 1 by BM25" in text[begin:]


def test_without_a_baseline_the_best_and_worst_queries_are_shown(embedder, place):
    write_examples(place.data, examples())
    write_set_report(place, compared(embedder, place.data, names=("mine",), baselines=False))
    text = text_of(page_of(place))
    assert "Found best" in text
    assert "Differences" not in text


def test_scored_pairs_are_shown_where_model_and_people_differ_most(embedder, place):
    rows = [
        {"text1": one, "text2": two, "score": float(place_)}
        for place_, (one, two) in enumerate(pairwise(SENTENCES))
    ]
    place.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_set_report(place, compared(embedder, place.data, names=("mine",)))
    text = text_of(page_of(place))
    assert "Too similar for the model" in text
    assert "Over 11 pairs" in text or "Over 12 texts" in text
    assert "score 0, cosine" in text


def test_labelled_texts_are_shown_that_only_one_gets_right(embedder, place):
    rows = [
        {"text": f"{text} {n}", "label": text.split()[0], "split": "test" if n == 2 else "train"}
        for text in SENTENCES
        for n in range(3)
    ]
    place.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_set_report(place, compared(embedder, place.data, names=("mine",)))
    text = text_of(page_of(place))
    assert "Right here, wrong by TF-IDF: " in text
    assert "Wrong here, right by TF-IDF: " in text
    assert "Over 12 texts" in text


def test_a_folder_of_sets_is_shown_by_language(embedder, tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("de", "ko", "ko-en"):
        write_examples(tmp_path / f"sets/{name}.jsonl", examples(name))
    place = ReportPlace(tmp_path / "out", tmp_path / "sets", COMMAND)
    locations = sets_in(tmp_path / "sets")
    found = compare_by_language(
        ["mine", "base"], lambda name: embedder, locations, ComparisonOptions()
    )
    write_language_report(place, found)
    page = page_of(place)
    text = text_of(page)
    for part in (
        "3 sets with 36 queries in all, by ndcg@10.",
        "By language: monolingual",
        "By language: cross-lingual",
        "mean of languages",
        "mine minus",
        "Sets that gained and lost most",
    ):
        assert part in text, part
    assert spoken(page)[0].startswith("ndcg@10 by language, monolingual: de 0.")
    assert (place.out / "languages.png").exists()
    assert json.loads((place.out / "scores.json").read_text())["sets"].keys() == {
        "de",
        "ko",
        "ko-en",
    }


def test_stored_sizes_are_shown_by_bytes(embedder, place):
    write_examples(place.data, examples())
    found = retention(embedder, RetrievalSet.from_path(place.data), dims=[32])
    write_sizes_report(place, found, "mine", metric="ndcg@10", conditions={"query_tokens": 9})
    page = page_of(place)
    assert "binary+int8" in text_of(page)
    assert "64 float32 256" in text_of(page)
    assert "query tokens 9" in text_of(page)
    assert spoken(page)[1].startswith("ndcg@10 minus 64 float32: ")
    assert (place.out / "sizes.png").exists()
    rows = json.loads((place.out / "scores.json").read_text())["rows"]
    assert rows[0]["minus_first"]["mean"] == 0


def test_tasks_of_mteb_have_a_page_too(place):
    score = {"task": "t", "part": "", "figure": "ndcg@10", "score": 0.5, "skipped": ""}
    skipped = {**score, "task": "u", "score": None, "skipped": "no data"}
    record = {"models": {"mine": {"dims": 64}}, "results": {"mine": [score, skipped]}}
    write_tasks_report(place, record)
    text = text_of(page_of(place))
    assert "mine t ndcg@10 0.500" in text
    assert "skipped: no data" in text


def test_without_matplotlib_the_page_is_whole_and_no_pictures_are_drawn(
    embedder, place, monkeypatch
):
    write_examples(place.data, examples())
    said = []
    place = ReportPlace(place.out, place.data, COMMAND, said.append)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_set_report(place, compared(embedder, place.data, names=("mine",)))
    assert len(spoken(page_of(place))) == 2
    assert not (place.out / "results.png").exists()
    assert "no PNG files were drawn" in said[0]


def test_a_key_in_the_command_is_hidden(embedder, place):
    write_examples(place.data, examples())
    secret = ReportPlace(place.out, place.data, "tercet eval https://me:hunter2@host/x")
    write_set_report(secret, compared(embedder, place.data, names=("mine",), baselines=False))
    page = (place.out / "report.html").read_text(encoding="utf-8")
    assert "https://***@host/x" in page
    assert "hunter2" not in page
