"""The scripts that texts are written in, as far as they tell that two texts differ in language."""

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Final

REQUIRED: Final = 0.2  # share of a script from which a question about the text has to use it too
FOREIGN: Final = 0.05  # share below which a text is not written in a script
CLEAR: Final = 0.3  # share from which a question is written in a script
TOUCHED: Final = 0.1  # share of a required script that is enough: names are often in another

READ: Final = 2000  # characters of a text that its script is told by

_KANA: Final = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")
_OF_LANGUAGES: Final[dict[str, tuple[str, ...]]] = {  # those of one script that is not Latin
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
    """The part of a text's letters that each script has; none for a text without letters.

    A script is the first word of a letter's Unicode name. Both kana are one: no text in Japanese
    has to use the two.
    """
    found = Counter(map(_script, unicodedata.normalize("NFKC", text)))
    del found[""]
    total = found.total()
    return {script: count / total for script, count in found.most_common()}


def same_scripts(question: str, passage: str) -> bool:
    """Whether a question may be in the language of a passage, as far as their scripts tell.

    The question has to use each script that a fifth of the passage's letters have, and must not
    be written in one that the passage lacks. Where another script has a fifth, Latin letters are
    names and are not asked for. Languages of one script, such as German and English, are not told
    apart.
    """
    asked, given = script_shares(question), script_shares(passage)
    required = {name for name, share in given.items() if share >= REQUIRED and name != "LATIN"}
    if given.get("KANA", 0.0) >= TOUCHED:  # Japanese: few words need characters of Chinese
        required = required - {"CJK"} | {"KANA"}
    required = required or set(list(given)[:1])
    lost = any(asked.get(name, 0.0) < TOUCHED for name in required)
    strange = any(
        share >= CLEAR and given.get(name, 0.0) < FOREIGN for name, share in asked.items()
    )
    return not lost and not strange


def fits_language(text: str, lang: str, *, names: bool = False) -> bool:
    """Whether a text may be in a language, as far as its script tells.

    A tenth of its letters has to be in a script of the language: names are often in Latin ones.
    With ``names`` Latin letters alone do as well, for a text that may be nothing but a name.
    Any text fits a language that is not told, or whose script is not known here, and one without
    letters fits all. Languages of one script are not told apart.
    """
    wanted = _OF_LANGUAGES.get(lang.replace("-", "_").partition("_")[0].lower())
    shares = script_shares(text[:READ]) if wanted else {}
    if wanted is None or not shares:
        return True
    accepted = (*wanted, "LATIN") if names else wanted
    return sum(shares.get(script, 0.0) for script in accepted) >= TOUCHED


@lru_cache(maxsize=1 << 14)
def _script(char: str) -> str:
    """The script of a letter; nothing for any other character."""
    if not char.isalpha():
        return ""
    name = unicodedata.name(char, "").partition(" ")[0]
    return "KANA" if name in _KANA else name
