"""The scripts of texts, by which some differences in language are detected."""

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Final

REQUIRED: Final = 0.2  # share of a script in a text from which questions must use it too
FOREIGN: Final = 0.05  # share below which a text is not written in a script
CLEAR: Final = 0.3  # share from which a question is written in a script
TOUCHED: Final = 0.1  # share of a required script that suffices: names are often in another

READ: Final = 2000  # characters from which the script of a text is determined

_KANA: Final = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")
_OF_LANGUAGES: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("ru", "uk", "bg", "be", "mk", "kk", "ky", "tg"), ("CYRILLIC",)),
    **dict.fromkeys(("sr", "mn", "uz"), ("CYRILLIC", "LATIN")),
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ug", "sd", "ckb"), ("ARABIC",)),
    **dict.fromkeys(("he", "yi"), ("HEBREW",)),
    **dict.fromkeys(("hi", "mr", "ne", "sa"), ("DEVANAGARI",)),
    **dict.fromkeys(("bn", "as"), ("BENGALI",)),
    **dict.fromkeys(("am", "ti"), ("ETHIOPIC",)),
    **{"ja": ("KANA", "CJK"), "zh": ("CJK",), "ko": ("HANGUL",), "el": ("GREEK",)},
    **{"th": ("THAI",), "lo": ("LAO",), "km": ("KHMER",), "my": ("MYANMAR",)},
    **{"ta": ("TAMIL",), "te": ("TELUGU",), "kn": ("KANNADA",), "ml": ("MALAYALAM",)},
    **{"gu": ("GUJARATI",), "pa": ("GURMUKHI", "ARABIC"), "si": ("SINHALA",)},
    **{"ka": ("GEORGIAN",), "hy": ("ARMENIAN",)},
    **dict.fromkeys(
        "en de fr es it pt nl sv da no nb nn fi et lv lt pl cs sk sl hr bs hu ro ca gl eu cy ga is "
        "mt sq tr az vi id ms tl sw yo ha zu xh af so la eo lb fy br oc rw ig sn mg jv su".split(),
        ("LATIN",),
    ),
}


def script_shares(text: str) -> dict[str, float]:
    """Return the share of each script among a text's letters, the largest first.

    A script is the first word of a letter's Unicode name. Both kana count as one, because a
    Japanese text may use only one of them.
    """
    found = Counter(map(_script, unicodedata.normalize("NFKC", text)))
    del found[""]
    total = found.total()
    return {script: count / total for script, count in found.most_common()}


def same_scripts(question: str, passage: str) -> bool:
    """Return whether a question and a passage may be in the same language, judging by scripts.

    The question must use each script of at least a fifth of the passage's letters, and must not
    be written in one that the passage lacks. Latin letters are not required if another script has
    a fifth: they are often names.
    """
    asked, given = script_shares(question), script_shares(passage)
    required = {name for name, share in given.items() if share >= REQUIRED and name != "LATIN"}
    if given.get("KANA", 0.0) >= TOUCHED:  # Japanese: few words need characters of Chinese
        required = required - {"CJK"} | {"KANA"}
    required = required or set(list(given)[:1])
    lost = any(asked.get(name, 0.0) < TOUCHED for name in required)
    foreign = any(
        share >= CLEAR and given.get(name, 0.0) < FOREIGN for name, share in asked.items()
    )
    return not lost and not foreign


def fits_language(text: str, lang: str, *, names: bool = False) -> bool:
    """Return whether a text may be in a language: a tenth of its letters are in its script.

    With ``names`` Latin letters alone suffice, for texts that may be just a name. Texts without
    letters fit all languages, and all texts fit an unknown language.
    """
    wanted = _OF_LANGUAGES.get(lang.replace("-", "_").partition("_")[0].lower())
    shares = script_shares(text[:READ]) if wanted else {}
    if wanted is None or not shares:
        return True
    accepted = (*wanted, "LATIN") if names else wanted
    return sum(shares.get(script, 0.0) for script in accepted) >= TOUCHED


def share_of_letters(text: str) -> float:
    """Return the share of letters, and marks on them, among the non-space characters."""
    seen = "".join(text.split())
    return sum(map(_is_letter, seen)) / max(len(seen), 1)


@lru_cache(maxsize=1 << 14)
def _is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] in "LM"


@lru_cache(maxsize=1 << 14)
def _script(char: str) -> str:
    """Return the script of a letter, or "" for any other character."""
    if not char.isalpha():
        return ""
    name = unicodedata.name(char, "").partition(" ")[0]
    return "KANA" if name in _KANA else name
