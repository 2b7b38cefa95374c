"""What is wrong with a pair of a query and a document that one can see without a model."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from tercet.curate.filtering.scripts import READ, fits_language
from tercet.data.files.texts import normal_form
from tercet.errors import RecipeError

KEPT: Final = ""
SAME: Final = "same"
SHORT: Final = "short"
LONG: Final = "long"
LETTERS: Final = "letters"
SCRIPT: Final = "script"
DUPLICATE: Final = "duplicate"
RANK: Final = "rank"
RULES: Final = (SAME, SHORT, LONG, LETTERS, SCRIPT, DUPLICATE)
"""In the order in which they are asked; a pair is counted under the first that it breaks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRules:
    """The rules that pairs have to keep, and their numbers.

    - ``same``: the document is the query, but for case, spaces or Unicode form.
    - ``short``, ``long``: the query or the document has too few or too many characters.
    - ``letters``: letters, and the marks on them, are too small a part of what is no space.
    - ``script``: the document has too few letters of a script of the language that the row names,
      or the query is in neither such a script nor Latin letters.
    - ``duplicate``: the same pair, but for case, spaces or Unicode form, came before.

    Raises:
        RecipeError: for a rule that there is not, or numbers that no text could keep.
    """

    without: tuple[str, ...] = ()  # rules that are not asked
    query_characters: tuple[int, int | None] = (2, None)  # least and most
    document_characters: tuple[int, int | None] = (2, None)
    letters: float = 0.3  # least share

    def __post_init__(self) -> None:
        if unknown := set(self.without) - set(RULES):
            raise RecipeError(
                f"there is no rule {sorted(unknown)[0]!r} to do without; "
                f"choose of {', '.join(RULES)}"
            )
        for role, (least, most) in (
            ("query", self.query_characters),
            ("document", self.document_characters),
        ):
            if least < 0 or (most is not None and most < max(least, 1)):
                raise RecipeError(f"no {role} has from {least} to {most} characters")
        if not 0 <= self.letters <= 1:
            raise RecipeError(f"a share of letters of {self.letters:g} is none from 0 to 1")

    @property
    def asked(self) -> tuple[str, ...]:
        """The rules that are asked, in order."""
        return tuple(rule for rule in RULES if rule not in self.without)

    def broken(self, query: str, documents: Sequence[str], lang: str) -> list[str]:
        """The first rule that each pair of the query breaks, "" for none; not of duplicates."""
        of_query = self._broken_by(query, self.query_characters)
        of_query |= {SCRIPT} if not _fits(query, lang, names=True) else set()
        form = normal_form(query)
        found = []
        for document in documents:
            broken = of_query | self._broken_by(document, self.document_characters)
            broken |= {SAME} if normal_form(document) == form else set()
            broken |= {SCRIPT} if not _fits(document, lang, names=False) else set()
            found.append(next((rule for rule in self.asked if rule in broken), KEPT))
        return found

    def _broken_by(self, text: str, characters: tuple[int, int | None]) -> set[str]:
        least, most = characters
        length, broken = len(text.strip()), set[str]()
        if length < least:
            broken.add(SHORT)
        if most is not None and length > most:
            broken.add(LONG)
        if share_of_letters(text) < self.letters:
            broken.add(LETTERS)
        return broken


def share_of_letters(text: str) -> float:
    """Letters and marks on them, as a share of the characters that are no spaces.

    The beginning of a long text stands for it.
    """
    seen = "".join(text[:READ].split())
    return sum(map(_is_letter, seen)) / max(len(seen), 1)


@lru_cache(maxsize=1 << 14)
def _is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] in "LM"


def _fits(text: str, lang: str, *, names: bool) -> bool:
    return not lang or fits_language(text, lang, names=names)
