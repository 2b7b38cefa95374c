"""Names in any script in a picture: drawn with the system's fonts, or a language code instead.

matplotlib brings one font, DejaVu Sans, which lacks Chinese, Japanese, Korean, Thai and Indian
letters. Other fonts of the system are searched only for a name that needs them.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN_FONT: Final = "DejaVu Sans"  # comes with matplotlib
_STAND_IN: Final = "Last Resort"  # comes with it too, and has a box for every character
_NORMAL: Final = 400  # weight of a font
_REPEATED: Final = re.compile(r"(\[[a-z?]+\])( ?\1)+")
_CODES: Final = {
    "HANGUL": "ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "zh",
    "ARABIC": "ar",
    "HEBREW": "he",
    "THAI": "th",
    "DEVANAGARI": "hi",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "GURMUKHI": "pa",
    "GUJARATI": "gu",
    "KANNADA": "kn",
    "MALAYALAM": "ml",
    "SINHALA": "si",
    "LAO": "lo",
    "TIBETAN": "bo",
    "MYANMAR": "my",
    "KHMER": "km",
    "ETHIOPIC": "am",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
}
# Their letters change places or forms, which matplotlib does from version 3.11 on.
_ARRANGED: Final = frozenset(_CODES) - {
    *("HANGUL", "HIRAGANA", "KATAKANA", "CJK", "THAI", "LAO", "ETHIOPIC", "GEORGIAN", "ARMENIAN")
}


@dataclass(frozen=True, slots=True)
class Lettering:
    """What is drawn for each text, and with which fonts, the first that has a letter."""

    drawn: dict[str, str]
    families: list[str]


def lettering(texts: Iterable[str]) -> Lettering:
    """Return how texts are drawn; those that differ stay different.

    A part that no font has is replaced: by plain letters where Unicode knows some, or else by a
    language code in brackets, such as ``[ko]``.
    """
    texts = list(dict.fromkeys(texts))
    missing = frozenset(char for text in texts for char in text if not _own(char))
    fonts = _fonts_with(missing, _known_fonts()) if missing else ()
    found = {char for _, chars in fonts for char in chars}
    drawn: dict[str, str] = {}
    for text in texts:
        shown = _replaced(text, missing - found)
        number, fresh = 1, shown
        while fresh in drawn.values():
            number += 1
            fresh = f"{shown} {number}"
        drawn[text] = fresh
    return Lettering(drawn, [OWN_FONT, *(name for name, _ in fonts)])


def give_fonts(figure: "Figure") -> None:
    """Let every text of a figure be drawn as :func:`lettering` says, before it is drawn."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedLocator

    every = [axis for one in figure.axes for axis in (one.xaxis, one.yaxis)]
    named = [axis for axis in every if isinstance(axis.get_major_locator(), FixedLocator)]
    ticks = {axis: [label.get_text() for label in axis.get_ticklabels()] for axis in named}
    artists = [each for each in figure.findobj(Text) if isinstance(each, Text)]
    texts = [each.get_text() for each in artists] + [n for names in ticks.values() for n in names]
    lines = [line for text in texts for line in text.split("\n")]
    if all(_own(char) for line in lines for char in line):
        return
    found = lettering(lines)

    def drawn(text: str) -> str:
        return "\n".join(found.drawn.get(line, line) for line in text.split("\n"))

    for axis, names in ticks.items():
        axis.set_tick_params(labelfontfamily=found.families)
        if names:
            axis.set_ticklabels([drawn(name) for name in names])
    for each in artists:
        each.set_text(drawn(each.get_text()))  # a name that has been replaced stays
        each.set_fontfamily(found.families)


def width(text: str) -> int:
    """Return how wide a text is drawn, in letters: Chinese and Korean ones count twice."""
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def fitted(name: str, characters: int) -> str:
    """Shorten a name in its middle: both the beginning and the end say what it is."""
    if width(name) <= characters:
        return name
    tail = (2 * characters) // 3
    head = characters - 1 - tail
    return f"{_within(name, head)}…{_within(name[::-1], tail)[::-1]}"


def _within(text: str, characters: int) -> str:
    while width(text) > characters:
        text = text[:-1]
    return text


def _own(char: str) -> bool:
    """Return whether the font of matplotlib draws a character, or nothing has to be drawn."""
    return unicodedata.category(char)[0] in "CZ" or (
        char.isascii() or (ord(char) in _own_characters() and _is_arranged(char))
    )


@lru_cache(maxsize=1)
def _own_characters() -> frozenset[int]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(OWN_FONT)).get_charmap())


def _is_arranged(char: str) -> bool:
    """Return whether this matplotlib puts the letters of a script in order."""
    return _script(char) not in _ARRANGED or _arranges()


def _arranges() -> bool:
    from matplotlib import ft2font

    return hasattr(ft2font, "__libraqm_version__")


def _known_fonts() -> tuple[Any, ...]:
    from matplotlib.font_manager import fontManager

    upright = [
        e for e in fontManager.ttflist if e.style == "normal" and not e.name.startswith(_STAND_IN)
    ]
    return tuple(sorted(upright, key=_preference))


def _preference(entry: Any) -> tuple[bool, bool, int, str]:
    weight = entry.weight if isinstance(entry.weight, int) else _NORMAL
    special = any(word in entry.name for word in ("Serif", "Mono", "Condensed"))
    return special, "Sans" not in entry.name, abs(weight - _NORMAL), entry.name


@lru_cache(maxsize=64)
def _fonts_with(
    chars: frozenset[str], fonts: tuple[Any, ...]
) -> tuple[tuple[str, frozenset[str]], ...]:
    """Return names of fonts with the characters that each adds, the one with most first."""
    from matplotlib.ft2font import FT2Font

    left = {char for char in chars if _is_arranged(char)}
    has: dict[str, set[str]] = {}
    for entry in fonts:
        try:
            font = FT2Font(entry.fname)
        except (OSError, RuntimeError):  # deleted since, or not scalable
            continue
        if some := {char for char in left if font.get_char_index(ord(char))}:
            has.setdefault(entry.name, some)
            if some == left:
                break
    found: list[tuple[str, frozenset[str]]] = []
    while left and has:
        name = max(has, key=lambda name: len(has[name] & left))
        if not (more := has.pop(name) & left):
            break
        found.append((name, frozenset(more)))
        left -= more
    return tuple(found)


def _replaced(text: str, missing: frozenset[str] | set[str]) -> str:
    shown = ""
    for lacks, run in groupby(text, lambda char: char in missing):
        part = "".join(run)
        if lacks:
            plain = unicodedata.normalize("NFKD", part)
            part = plain if plain.isascii() else f"[{_code(part)}]"
        shown += part
    return _REPEATED.sub(r"\1", shown)  # one code for several words


def _code(text: str) -> str:
    """Return the code of a language that is written like this."""
    codes = [_CODES.get(_script(char), "") for char in text]
    codes = [code for code in codes if code]
    return "ja" if "ja" in codes else codes[0] if codes else "?"


def _script(char: str) -> str:
    return unicodedata.name(char, "").partition(" ")[0]
