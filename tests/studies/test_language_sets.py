"""Evaluation sets by language, and the languages of sources."""

import pytest

from tercet.data.files.sources import open_source, write_examples
from tercet.errors import DataError, RecipeError
from tercet.studies.language_sets import english_and_others, language_of, open_languages
from tercet.types import Example


def test_a_limit_takes_the_first_queries_and_what_answers_them_first(tmp_path):
    rows = [Example(f"q{i}", (f"p{i}",), (f"n{i}",)) for i in range(5)]
    write_examples(tmp_path / "de.jsonl", rows)
    found = [
        open_languages([tmp_path / "de.jsonl"], queries=queries, documents=documents)[0]
        for queries, documents in ((None, None), (2, None), (2, 3), (3, 1))
    ]
    assert [each.size for each in found] == [
        "5 queries, 10 documents",
        "2 queries, 10 documents",
        "2 queries, 3 documents",
        "3 queries, 3 documents",
    ]
    assert len({each.fingerprint for each in found}) == 4
    with pytest.raises(RecipeError, match="queries is 0; give 1 or more"):
        open_languages([tmp_path / "de.jsonl"], queries=0)


def test_rows_name_their_language_or_the_file_does_and_families_stay_together(tmp_path):
    write_examples(tmp_path / "fr.jsonl", [Example("a", ("b",))])
    rows = [Example(lang, ("b",), lang=lang) for lang in ("en", "da", "pt_BR")]
    write_examples(tmp_path / "mixed.jsonl", rows)
    sets = open_languages([tmp_path])
    assert [each.name for each in sets] == ["da", "en", "fr", "pt_BR"]
    assert sets[0].tasks == ("mixed",)
    assert english_and_others(sets) == {"en": ("en",), "others": ("da", "fr", "pt_BR")}
    assert english_and_others(sets[1:2]) == {"en": ("en",)}
    with pytest.raises(RecipeError, match=r"no evaluation set is in English \(there are da\)"):
        english_and_others(sets[:1])
    assert language_of(open_source(tmp_path / "fr.jsonl")) == "fr"
    assert language_of(open_source(tmp_path / "mixed.jsonl")) == ""
    write_examples(tmp_path / "da.jsonl", [Example("a", ("b",), score=1.0)])
    assert language_of(open_source(tmp_path / "da.jsonl")) == "da"


def test_rows_without_a_language_are_refused(tmp_path):
    write_examples(tmp_path / "test.set.jsonl", [Example("a", ("b",))])
    with pytest.raises(DataError, match=r"'test\.set' is not one; give rows a \"lang\""):
        open_languages([tmp_path / "test.set.jsonl"])
