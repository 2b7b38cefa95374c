from typing import Any

import pytest

from tercet.curate.filtering.pair_rules import PairRules
from tercet.curate.filtering.scripts import fits_language, share_of_letters
from tercet.errors import RecipeError


def broken(query: str, document: str, lang: str = "", **rules: Any) -> str:
    return PairRules(**rules).broken(query, [document], lang)[0]


def test_a_good_pair_breaks_no_rule():
    assert broken("a web server", "Serves static files.", "en") == ""
    assert broken("辞書", "日本語の辞書を引くための小さな道具です。", "ja") == ""


@pytest.mark.parametrize(
    ("query", "document", "lang", "rule"),
    [
        ("A web  server", "a Web server", "", "same"),
        ("x", "Serves static files.", "", "short"),
        ("a web server", "Serves 1.", "", "short"),
        ("a web server", "word " * 100, "", "long"),
        ("a web server", "12345 67890 %%%% x", "", "letters"),
        ("2024-01-01", "The first day of the year.", "", "letters"),
        ("辞書", "A small dictionary tool", "ja", "script"),
        ("вебсервер", "Ein kleiner Webserver.", "de", "script"),
    ],
)
def test_each_rule_drops_what_it_is_for(query, document, lang, rule):
    numbers = {"document_characters": (10, 400)}
    assert broken(query, document, lang, **numbers) == rule
    assert broken(query, document, lang, without=(rule,), **numbers) == ""


def test_the_first_rule_that_is_broken_is_the_one_that_counts():
    assert broken("?", "?") == "same"
    assert broken("?", "?", without=("same",)) == "short"
    assert broken("?", "?", without=("same", "short")) == "letters"


def test_each_document_of_a_query_is_judged_by_itself():
    found = PairRules().broken("a web server", ["Serves files.", "a web server", "1234"], "en")
    assert found == ["", "same", "letters"]


def test_a_name_in_latin_letters_may_ask_in_any_language():
    assert broken("libreoffice", "ワープロや表計算ができる事務用ソフトです。", "ja") == ""


def test_marks_on_letters_are_letters():
    assert share_of_letters("हिन्दी") == 1.0
    assert share_of_letters("a 1") == 0.5
    assert share_of_letters(" ") == 0.0


def test_a_language_is_told_by_its_script_where_that_is_known():
    assert fits_language("kleiner Webserver", "de_AT") and fits_language("вебсервер", "ru")
    assert not fits_language("вебсервер", "de") and not fits_language("web server", "zh-CN")
    assert fits_language("웹 서버 apache nginx", "ko")
    assert fits_language("anything", "tlh") and fits_language("1234", "ru")


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"without": ("lang",)}, "got 'lang'"),
        ({"query_characters": (5, 4)}, "query characters must be .* got 5 and 4"),
        ({"document_characters": (-1, None)}, "document characters must be .* got -1 and None"),
        ({"letters": 1.5}, "letters must be between 0 and 1; got 1.5"),
    ],
)
def test_rules_that_no_text_keeps_are_refused(rules, said):
    with pytest.raises(RecipeError, match=said):
        PairRules(**rules)
