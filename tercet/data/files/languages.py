"""Languages and their families, by which tables of results are grouped."""

import re
from typing import Final

FAMILIES: Final[dict[str, str]] = {
    **dict.fromkeys(("en", "de", "da", "nl", "sv", "no", "nb"), "Germanic"),
    **dict.fromkeys(("fr", "es", "it", "pt", "ro", "ca"), "Romance"),
    **dict.fromkeys(("ru", "pl", "uk", "cs", "bg", "sk", "sr", "hr", "sl"), "Slavic"),
    **dict.fromkeys(("ko", "ja"), "Koreanic and Japonic"),
    "zh": "Sino-Tibetan",
    **dict.fromkeys(("bn", "hi", "fa", "ur", "mr", "pa"), "Indo-Iranian"),
    **dict.fromkeys(("ar", "he", "am"), "Semitic"),
    **dict.fromkeys(("fi", "hu", "et"), "Uralic"),
    **dict.fromkeys(("te", "ta", "ml", "kn"), "Dravidian"),
    **dict.fromkeys(("th", "lo"), "Kra-Dai"),
    **dict.fromkeys(("id", "ms", "tl"), "Austronesian"),
    **dict.fromkeys(("sw", "yo"), "Niger-Congo"),
    "tr": "Turkic",
    "vi": "Austroasiatic",
    "el": "Hellenic",
}
"""The families of arXiv 2412.04506, section 5; those of languages it does not name are ours."""

OTHER: Final = "other"


_CODE: Final = r"[a-z]{2,3}(?:_[A-Za-z]{2,4}|-[A-Z][A-Za-z]{1,3})?"  # de, pt_BR, zh-Hans
_PAIR: Final = re.compile(rf"(?:.*?-)??({_CODE})(?:-({_CODE}))?")


def family_of(lang: str) -> str:
    """Return the family of a language in any country: ``pt_BR`` and ``pt-PT`` are Romance."""
    return FAMILIES.get(plain(lang), OTHER)


def plain(lang: str) -> str:
    """Return a language without its country or script: ``pt`` of ``pt_BR``."""
    return lang.replace("-", "_").partition("_")[0].lower()


def named_pair(name: str) -> tuple[str, str]:
    """Return the languages of queries and documents that a name ends with, or empty ones.

    ``de`` and ``longdocs-de`` name German for both, ``ko-en`` and ``wiki-ko-en`` Korean queries and
    English documents. Only languages of ``FAMILIES`` are found: others are words as well.
    """
    found = _PAIR.fullmatch(name)
    if found is None:
        return "", ""
    first, last = found[1], found[2] or found[1]
    if plain(last) not in FAMILIES:
        return "", ""
    return (first, last) if plain(first) in FAMILIES else (last, last)
