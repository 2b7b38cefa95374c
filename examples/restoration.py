"""Labels that any text has: the capitals and the punctuation that were removed from it.

Whether a comma or a full stop follows a word depends on the words after it. So a bidirectional
model has more information than a causal one, which a probe of words should show. No label is
anyone's opinion.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from tercet.data.files.conll import UNLABELLED
from tercet.files.atomic import replacing_file

NOTHING: Final = "O"  # no mark follows the word
MARKS: Final = {".": ".", "!": ".", "?": ".", ",": ",", ":": ",", ";": ","}  # mark -> label

_OPENING: Final = "([{<\"'`*_"
_CLOSING: Final = ")]}>\"'`*_" + "".join(MARKS)
_ABBREVIATIONS: Final = frozenset({"e.g", "i.e", "etc", "vs", "cf", "resp", "incl", "approx"})


def restoration(text: str) -> list[tuple[str, str, str]]:
    """Return each word of a text in lower case and without marks, its case, and the mark after it.

    Case is ``aa``, ``Aa`` (a capital first) or ``AA`` (two letters or more, all capital). The mark
    is ``.`` (also for ! and ?), ``,`` (also for : and ;) or ``O``, the first one where several
    follow each other; the point of "e.g." and its like does not count. The mark after the last word
    is unlabelled: a bidirectional model would only detect the end of the text. A piece without a
    letter or digit is not a word.
    """
    rows: list[tuple[str, str, str]] = []
    for piece in text.split():
        inner = piece.lstrip(_OPENING)
        word = inner.rstrip(_CLOSING)
        if not any(character.isalnum() for character in word):
            continue
        mark = next((MARKS[c] for c in inner[len(word) :] if c in MARKS), NOTHING)
        if word.lower() in _ABBREVIATIONS and mark == ".":
            mark = NOTHING
        rows.append((word.lower(), _case(word), mark))
    return [*rows[:-1], *((word, case, UNLABELLED) for word, case, _ in rows[-1:])]


def write_restoration(path: Path | str, texts: Iterable[str], sentences: int) -> None:
    """Write up to ``sentences`` texts in CoNLL columns, with tabs: word, case, mark.

    A text is the first paragraph of each one given, if it has 15 to 80 words, ends like a
    sentence and did not occur before.

    Raises:
        StorageError: if the disk refuses.
    """
    with replacing_file(Path(path)) as fresh, fresh.open("w", encoding="utf-8") as file:
        for _, text in zip(range(sentences), _paragraphs(texts), strict=False):
            file.writelines("\t".join(row) + "\n" for row in restoration(text))
            file.write("\n")


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        paragraph = text.partition("\n")[0].strip()
        if 15 <= len(paragraph.split()) <= 80 and paragraph[-1] in ".!?" and paragraph not in seen:
            seen.add(paragraph)
            yield paragraph


def _case(word: str) -> str:
    letters = [character for character in word if character.isalpha()]
    if len(letters) > 1 and word.isupper():
        return "AA"
    return "Aa" if letters and letters[0].isupper() else "aa"
