import pytest

from tercet.data.languages import family_of


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
