"""The scripts that texts are written in, as far as they tell that two texts differ in language."""

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Final

REQUIRED: Final = 0.2  # share of a script from which a question about the text has to use it too
FOREIGN: Final = 0.05  # share below which a text is not written in a script
CLEAR: Final = 0.3  # share from which a question is written in a script
TOUCHED: Final = 0.1  # share of a required script that is enough: names are often in another

_KANA: Final = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")


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


@lru_cache(maxsize=1 << 14)
def _script(char: str) -> str:
    """The script of a letter; nothing for any other character."""
    if not char.isalpha():
        return ""
    name = unicodedata.name(char, "").partition(" ")[0]
    return "KANA" if name in _KANA else name
