"""Rules on pairs of a query and a document that need no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tercet.curate.filtering.scripts import READ, fits_language, share_of_letters
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
"""In the order of application; a pair is counted under the first rule that it breaks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRules:
    """The rules for pairs, and their thresholds.

    - ``same``: the document equals the query, up to case, spaces and Unicode form.
    - ``short``, ``long``: the query or the document has too few or too many characters.
    - ``letters``: the share of letters, and marks on them, among non-space characters is too low.
    - ``script``: the document has too few letters in a script of the language that the row names,
      or the query is in neither such a script nor Latin letters.
    - ``duplicate``: the same pair, up to case, spaces and Unicode form, occurs before.

    Raises:
        RecipeError: for an unknown rule, or thresholds that no text can meet.
    """

    without: tuple[str, ...] = ()  # rules that are not applied
    query_characters: tuple[int, int | None] = (2, None)  # minimum and maximum
    document_characters: tuple[int, int | None] = (2, None)
    letters: float = 0.3  # minimum share

    def __post_init__(self) -> None:
        if unknown := set(self.without) - set(RULES):
            raise RecipeError(
                f"without must name rules of {', '.join(RULES)}; got {sorted(unknown)[0]!r}"
            )
        for role, (least, most) in (
            ("query", self.query_characters),
            ("document", self.document_characters),
        ):
            if least < 0 or (most is not None and most < max(least, 1)):
                raise RecipeError(
                    f"{role} characters must be a minimum from 0 and a maximum not below it; "
                    f"got {least} and {most}"
                )
        if not 0 <= self.letters <= 1:
            raise RecipeError(f"letters must be between 0 and 1; got {self.letters:g}")

    @property
    def applied(self) -> tuple[str, ...]:
        """The rules that are applied, in order."""
        return tuple(rule for rule in RULES if rule not in self.without)

    def broken(self, query: str, documents: Sequence[str], lang: str) -> list[str]:
        """Return the first rule that each pair breaks, or ""; duplicates are not looked for."""
        of_query = self._broken_by(query, self.query_characters)
        of_query |= set() if fits_language(query, lang, names=True) else {SCRIPT}
        form = normal_form(query)
        found = []
        for document in documents:
            broken = of_query | self._broken_by(document, self.document_characters)
            broken |= {SAME} if normal_form(document) == form else set()
            broken |= set() if fits_language(document, lang) else {SCRIPT}
            found.append(next((rule for rule in self.applied if rule in broken), KEPT))
        return found

    def _broken_by(self, text: str, characters: tuple[int, int | None]) -> set[str]:
        least, most = characters
        length, broken = len(text.strip()), set[str]()
        if length < least:
            broken.add(SHORT)
        if most is not None and length > most:
            broken.add(LONG)
        if share_of_letters(text[:READ]) < self.letters:
            broken.add(LETTERS)
        return broken
