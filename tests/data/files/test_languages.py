import pytest

from tercet.data.files.languages import family_of, named_pair, plain


@pytest.mark.parametrize(
    ("lang", "family"),
    [
        ("de", "Germanic"),
        ("pt_BR", "Romance"),
        ("pt-PT", "Romance"),
        ("zh_CN", "Sino-Tibetan"),
        ("JA", "Koreanic and Japonic"),
        ("tlh", "other"),
        ("", "other"),
    ],
)
def test_a_language_has_a_family_whatever_its_country(lang: str, family: str):
    assert family_of(lang) == family


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("de", ("de", "de")),
        ("pt_BR", ("pt_BR", "pt_BR")),
        ("pt-PT", ("pt-PT", "pt-PT")),
        ("ko-en", ("ko", "en")),
        ("pt_BR-en", ("pt_BR", "en")),
        ("ko-zh-Hans", ("ko", "zh-Hans")),
        ("longdocs-ja", ("ja", "ja")),
        ("wiki-ko-en", ("ko", "en")),
        ("qa-en", ("en", "en")),
        ("mixed", ("", "")),
        ("en-1000", ("", "")),
        ("dev", ("", "")),
        ("", ("", "")),
    ],
)
def test_a_name_ends_in_the_languages_of_queries_and_documents_or_tells_none(name, pair):
    assert named_pair(name) == pair


def test_a_country_is_no_part_of_a_plain_language():
    assert [plain(lang) for lang in ("pt_BR", "zh-Hans", "EN", "")] == ["pt", "zh", "en", ""]
