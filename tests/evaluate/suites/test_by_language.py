import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.errors import DataError, RecipeError
from tercet.evaluate.measures.retrieval import evaluate_hits, evaluate_retrieval
from tercet.evaluate.sets.location import SetLocation, sets_in
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.by_language import (
    SetScores,
    axis_of,
    keep_scores,
    measure_sets,
    measure_words,
    scores_of,
)
from tercet.files.artifacts import KeptResults, fingerprint_of_file
from tercet.models.embedder import Embedder
from tercet.rank.topk import Hits
from tercet.types import Example, Role
from tests.toy import SENTENCES


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def beir(folder, queries, documents):
    """A folder whose queries and documents, given with their languages, answer in turn."""
    write(
        folder / "corpus.jsonl",
        *({"_id": f"d{i}", "text": t, "lang": lang} for i, (t, lang) in enumerate(documents)),
    )
    write(
        folder / "queries.jsonl",
        *({"_id": f"q{i}", "text": t, "lang": lang} for i, (t, lang) in enumerate(queries)),
    )
    write(
        folder / "qrels.jsonl",
        *({"qid": f"q{i}", "docid": f"d{i}", "score": 1} for i in range(len(queries))),
    )
    return folder


def pairs(*langs):
    return [
        {"query": text.split()[-1], "positives": [text], **({"lang": lang} if lang else {})}
        for text, lang in zip(SENTENCES, langs, strict=False)
    ]


@pytest.fixture
def folder(tmp_path):
    """Sets in one language, from one to another, and in many; and files that are none."""
    write(tmp_path / "de.jsonl", *pairs(*[None] * 4))
    write(tmp_path / "news.jsonl", *pairs("fr", "fr", "fr"))
    write(tmp_path / "lost.jsonl", *pairs(None, None))
    write(tmp_path / "topics.jsonl", {"text": "a", "label": "b"})
    write(tmp_path / "alike.jsonl", {"text1": "a", "text2": "b", "score": 1})
    (tmp_path / "README.md").write_text("no set")
    unnamed = [(text, None) for text in SENTENCES[:3]]
    beir(tmp_path / "ko-en", unnamed, unnamed)
    many = [(text, lang) for text, lang in zip(SENTENCES, ("de", "en", "fr", "de"), strict=False)]
    beir(tmp_path / "mixed", many, many)
    write(tmp_path / "clef/de.jsonl", *pairs(*[None] * 3))
    return tmp_path


def test_a_folder_of_sets_is_read_with_its_groups_and_without_what_is_no_retrieval_set(folder):
    found = sets_in(folder)
    assert [each.name for each in found] == ["clef/de", "de", "ko-en", "lost", "mixed", "news"]
    assert [each.group for each in found] == ["clef", "", "", "", "", ""]


def test_a_set_itself_or_a_file_is_no_folder_of_sets(folder):
    assert sets_in(folder / "ko-en") == []
    assert sets_in(folder / "de.jsonl") == []
    (folder / "ko-en/corpus.jsonl").unlink()  # of a damaged one too, which says so when it is read
    assert sets_in(folder / "ko-en") == []


def test_two_sets_of_one_name_are_refused(folder):
    write(folder / "ko-en.jsonl", *pairs("en"))
    with pytest.raises(DataError, match="holds 2 sets of the name ko-en; rename one"):
        sets_in(folder)


@pytest.mark.parametrize(
    ("name", "axis", "languages"),
    [
        ("de", "monolingual", "de"),
        ("news", "monolingual", "fr"),  # its records say so
        ("ko-en", "cross-lingual", "ko -> en"),
        ("mixed", "mixed", "3 -> 3 languages"),
        ("lost", "unknown", "?"),
    ],
)
def test_languages_are_those_of_the_records_or_of_the_name(folder, name, axis, languages):
    place = next(each for each in sets_in(folder) if each.name == name)
    assert axis_of(place.open()) == (axis, languages)


def test_the_language_of_an_example_may_be_a_pair():
    examples = [
        Example("a", ("x", "y"), ("z",), lang="ko-en"),
        Example("b", ("x",), lang="pt-PT"),
        Example("a", ("w",), lang="de"),  # a query that is known stays what it was
    ]
    data = RetrievalSet.from_examples(examples)
    assert data.query_langs == ("ko", "pt-PT")
    assert data.document_langs == ("en", "en", "en", "de")


def hits(*rows):
    found = np.array(rows, dtype=np.int64)
    return Hits(np.zeros(found.shape, np.float32), found)


def test_bias_is_the_share_in_the_own_language_minus_what_the_corpus_has_of_it():
    """By hand: two of three found documents are German, and half of the corpus is."""
    data = RetrievalSet.from_examples(
        [
            Example("a", ("de 1",), ("de 2",), lang="de"),
            Example("b", ("en 1",), ("en 2",), lang="en"),
            Example("c", ("de 1",), lang="fr"),
        ]
    )
    ranking = hits([0, 1, 2, -1], [1, 0, 3, 2], [-1, -1, -1, -1])
    result = evaluate_hits(data, ranking, names=("ndcg@10", "recall@100"))
    found = scores_of(SetLocation("mixed", "", Path("mixed")), data, result)
    np.testing.assert_allclose(found.same, [2 / 3, 2 / 4, np.nan])
    np.testing.assert_allclose(found.chance, [1 / 2, 1 / 2, 0])
    np.testing.assert_allclose(found.bias, [1 / 6, 0, np.nan])
    assert found.own.tolist() == [True, True, False]
    assert found.of("de").tolist() == [True, False, False]


def test_only_the_first_ten_count_for_the_bias():
    rows = [Example(f"q{i}", (f"t{i}",), lang="de" if i < 10 else "en") for i in range(20)]
    data = RetrievalSet.from_examples(rows)
    ranking = hits(*[[*range(10, 20), *range(10)]] * 20)
    result = evaluate_hits(data, ranking, names=("ndcg@10", "recall@100"))
    found = scores_of(SetLocation("mixed", "", Path("mixed")), data, result)
    assert found.same.tolist() == [0.0] * 10 + [1.0] * 10


def test_a_model_is_measured_as_on_each_set_alone(folder, encoder_folder):
    embedder = Embedder.load(encoder_folder, prompts={"query": "query: "})
    found = {each.name: each for each in measure_sets(embedder, sets_in(folder))}
    assert set(found) == {"clef/de", "de", "ko-en", "lost", "mixed", "news"}
    for place in sets_in(folder):
        data = place.open()
        queries = embedder.encode(data.queries, "query")
        alone = evaluate_retrieval(data, queries, embedder.encode(data.documents, "document"))
        for metric, scores in found[place.name].scores.items():
            np.testing.assert_array_equal(scores, alone.scores[metric])


def test_documents_that_sets_share_are_encoded_once(tmp_path, encoder_folder, monkeypatch):
    texts = [(text, None) for text in SENTENCES[:4]]
    write(tmp_path / "en.jsonl", *pairs(*[None] * 4))
    for name in ("de-en", "ko-en"):
        beir(tmp_path / name, [(f"{text} {name}", None) for text, _ in texts], texts)
    write(tmp_path / "fr.jsonl", *({"query": "a", "positives": [t]} for t in SENTENCES[:2]))
    embedder = Embedder.load(encoder_folder)
    encoded, plain = [], Embedder.encode

    def encode(self: Embedder, texts: list[str], role: Role = "document", **how: Any):
        encoded.append((role, len(texts)))
        return plain(self, texts, role, **how)

    monkeypatch.setattr(Embedder, "encode", encode)
    assert len(list(measure_sets(embedder, sets_in(tmp_path)))) == 4
    assert [count for role, count in encoded if role == "document"] == [4, 2]


def test_codes_and_fewer_coordinates_are_measured_too(folder, encoder_folder):
    embedder = Embedder.load(encoder_folder)
    full, coded = (
        {each.name: each for each in measure_sets(embedder, sets_in(folder), **how)}
        for how in ({}, {"dims": 8, "stored": "int4"})
    )
    assert any((full[n].scores["ndcg@10"] != coded[n].scores["ndcg@10"]).any() for n in full)


def test_a_set_whose_queries_would_get_no_prompt_is_refused_before_any_is_measured(
    folder, encoder_folder
):
    embedder = Embedder.load(encoder_folder, task_prompts={"de": {"query": "find: "}})
    with pytest.raises(RecipeError, match="ko-en: a query gets no prompt"):
        next(measure_sets(embedder, sets_in(folder)))
    chosen = [place for place in sets_in(folder) if place.path.stem == "de"]
    assert len(list(measure_sets(embedder, chosen))) == 2
    assert len(list(measure_sets(embedder, sets_in(folder), task="de"))) == 6


def test_words_in_common_are_measured_on_the_same_queries(folder):
    (found,) = measure_words([place for place in sets_in(folder) if place.name == "de"])
    assert found.scores["ndcg@10"].tolist() == [1.0] * 4 and found.langs == ("de",) * 4


# --- kept scores ------------------------------------------------------------------------------


@pytest.fixture
def two_sets(tmp_path):
    for lang in ("de", "fr"):
        write(tmp_path / "sets" / f"{lang}.jsonl", *pairs(*[None] * 5))
    return tmp_path / "sets"


@pytest.fixture
def kept(tmp_path):
    (tmp_path / "kept").mkdir()
    return KeptResults(tmp_path / "kept", "a model")


def as_lists(found: SetScores):
    scores = {name: values.tolist() for name, values in found.scores.items()}
    facts = (found.name, found.group, found.axis, found.languages, found.documents, found.langs)
    return facts, scores, *(it.tolist() for it in (found.same, found.chance, found.own))


def test_kept_scores_are_found_again_and_the_model_is_not_asked(
    two_sets, kept, encoder_folder, monkeypatch
):
    embedder = Embedder.load(encoder_folder)
    first = next(measure_sets(embedder, sets_in(two_sets), kept=kept))  # as if killed after it
    measured, plain = [], Embedder.encode
    monkeypatch.setattr(
        Embedder,
        "encode",
        lambda self, texts, *a, **k: measured.append(1) or plain(self, texts, *a, **k),
    )
    again = list(measure_sets(embedder, sets_in(two_sets), kept=kept))
    assert as_lists(again[0]) == as_lists(first) and len(measured) == 2  # of the second set alone
    monkeypatch.undo()
    plainly = list(measure_sets(embedder, sets_in(two_sets)))
    assert list(map(as_lists, again)) == list(map(as_lists, plainly))


def test_changed_files_another_model_and_damaged_scores_are_measured_again(
    two_sets, kept, encoder_folder, tmp_path
):
    embedder = Embedder.load(encoder_folder)
    location, _ = sets_in(two_sets)
    wrong = SetScores(
        *("de", "", "monolingual", "de", 3, ("de",)),
        {"ndcg@10": np.array([0.5]), "recall@100": np.array([0.5])},
        *(np.array([0.5]), np.array([0.5]), np.array([True])),
    )
    keep_scores(kept, wrong, location.name, fingerprint_of_file(location.path))

    def measured(where=kept):
        return as_lists(next(measure_sets(embedder, [location], kept=where)))

    assert measured() == as_lists(wrong)
    right = as_lists(next(measure_sets(embedder, [location])))
    assert measured(KeptResults(tmp_path / "kept", "another")) == right
    file = kept.path(location.name, fingerprint_of_file(location.path))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert measured() == right
    location.path.write_text(location.path.read_text().replace("server", "servant"))
    before = len(list((tmp_path / "kept").iterdir()))
    assert measured() != as_lists(wrong)
    assert len(list((tmp_path / "kept").iterdir())) == before + 1
