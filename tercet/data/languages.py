"""Languages and the families that they belong to, as tables of results group them."""

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
"""The families of arXiv 2412.04506, section 5, and of the languages that it does not name ours."""

OTHER: Final = "other"


def family_of(lang: str) -> str:
    """The family of a language; a country is no matter: ``pt_BR`` and ``pt-PT`` are Romance."""
    return FAMILIES.get(lang.replace("-", "_").partition("_")[0].lower(), OTHER)
