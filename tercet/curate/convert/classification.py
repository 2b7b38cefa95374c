"""Training rows from labelled texts: of classes (one label per text) and of topics (several)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from tercet.curate.convert.conversion import Conversion, Converted, Mode, stratified
from tercet.data.files.labelled import LabelledText
from tercet.data.files.texts import normal_form
from tercet.errors import RecipeError
from tercet.types import Example

Lonely: TypeAlias = Literal["label", "skip"]
"""What to do with a text that is alone with its label: use the label's words, or skip it."""

_LABEL: Final = 1  # purposes of random draws
_TEXTS: Final = 2
_TRIES: Final = 8  # at drawing negatives at random, before all texts are searched

_REPEATED = "repeats an earlier text"
_UNLABELLED = "has no label"
_LONELY = "no other text of its label"
_OWN_LABEL = "is the words of its label"
_NO_NEGATIVE = "no text or label to tell it from"
_NOT_SAMPLED = "not drawn"


def convert_labelled(
    texts: Iterable[LabelledText],
    conversion: Conversion,
    *,
    mode: Mode | None = None,
    rows: int | None = None,
    lonely: Lonely = "label",
    label_texts: Mapping[str, str] | None = None,
) -> Converted:
    """Make a row of each text, or of ``rows`` texts balanced by label (arXiv 2405.17428, sec. 4.2).

    In mode "label" the positive is the words of the label and the negatives those of other
    labels: one negative if there are two labels. In mode "example" the positive is another text
    of the label, and the negatives are texts that share no label with the query. The default is
    "example" for more than two labels, else "label".

    Of several labels of a text one is drawn, preferably one with another text; the others never
    become negatives. Texts that are equal in ``normal_form`` count as one, with the labels of all.
    ``label_texts`` gives the words of labels; by default, their names.

    Raises:
        RecipeError: if there are fewer than two labels.
    """
    pool = _LabelledPool()
    skipped: Counter[str] = Counter()
    records = 0
    for text in texts:
        records += 1
        skipped[_REPEATED if pool.add(text) else _UNLABELLED] += 1
    skipped[_REPEATED] -= len(pool.texts)
    if len(pool.members) < 2:
        raise RecipeError(
            f"the texts must have at least 2 different labels; got {len(pool.members)}"
        )
    maker = _RowMaker(
        pool,
        conversion,
        mode=mode or ("example" if len(pool.members) > 2 else "label"),
        words={label: (label_texts or {}).get(label, label) for label in pool.members},
    )
    drawn = {place: maker.draw_label(place) for place in range(len(pool.texts))}
    if maker.mode == "example" and lonely == "skip":
        shared = {place: label for place, label in drawn.items() if len(pool.members[label]) > 1}
        skipped[_LONELY] = len(drawn) - len(shared)
        drawn = shared
    places = list(drawn)
    chosen = [places[i] for i in stratified(list(drawn.values()), rows, conversion)]
    skipped[_NOT_SAMPLED] = len(drawn) - len(chosen)
    return _convert(maker, {place: drawn[place] for place in chosen}, skipped, records)


def _convert(
    maker: "_RowMaker", drawn: Mapping[int, str], skipped: Counter[str], records: int
) -> Converted:
    made: list[Example] = []
    labels: Counter[str] = Counter()
    instead = 0
    for place, label in drawn.items():
        row = maker.row(place, label)
        if isinstance(row, str):
            skipped[row] += 1
        else:
            made.append(row)
            labels[label] += 1
            instead += maker.mode == "example" and not row.document_prompt
    return Converted(
        tuple(made),
        records,
        {reason: count for reason, count in skipped.items() if count},
        dict(labels.most_common()),
        maker.mode,
        instead,
    )


class _LabelledPool:
    """Distinct texts with the labels of all their copies, and the texts of each label."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.labels: list[dict[str, None]] = []  # of each text, in order of appearance
        self.members: dict[str, list[int]] = {}  # of each label, the places of its texts
        self._place: dict[str, int] = {}

    def add(self, text: LabelledText) -> bool:
        """Add a text and return True, or False if it has no label."""
        if not text.labels:
            return False
        place = self._place.setdefault(normal_form(text.text), len(self.texts))
        if place == len(self.texts):
            self.texts.append(text.text)
            self.labels.append({})
        for label in text.labels:
            if label not in self.labels[place]:
                self.labels[place][label] = None
                self.members.setdefault(label, []).append(place)
        return True


@dataclass(frozen=True, slots=True)
class _RowMaker:
    """Makes one row at a time; every draw depends on the seed and the place of the text only."""

    pool: _LabelledPool
    conversion: Conversion
    mode: Mode
    words: Mapping[str, str]  # of each label

    def draw_label(self, place: int) -> str:
        labels = list(self.pool.labels[place])
        if self.mode == "example":
            labels = [each for each in labels if len(self.pool.members[each]) > 1] or labels
        if len(labels) == 1:
            return labels[0]
        return labels[self.conversion.random(_LABEL, place).integers(len(labels))]

    def row(self, place: int, label: str) -> Example | str:
        """Return the row of this text, or the reason why it has none."""
        random = self.conversion.random(_TEXTS, place)
        if self.mode == "example" and len(self.pool.members[label]) > 1:
            return self._example_row(place, label, random)
        return self._label_row(place, label, random)

    def _example_row(self, place: int, label: str, random: np.random.Generator) -> Example | str:
        texts, members = self.pool.texts, self.pool.members[label]
        positive = members[random.integers(len(members) - 1)]
        if positive == place:  # replaced by the last: so all others are equally likely
            positive = members[-1]
        negatives = [texts[other] for other in self._others(place, random)]
        if not negatives:
            return _NO_NEGATIVE
        return self.conversion.row(texts[place], texts[positive], negatives, symmetric=True)

    def _others(self, place: int, random: np.random.Generator) -> Sequence[int]:
        """Draw texts that share no label with this one, each equally likely."""
        labels, count = self.pool.labels, self.conversion.negatives
        own = labels[place].keys()
        found: dict[int, None] = {}
        for _ in range(_TRIES):
            draws = random.integers(len(labels), size=2 * count).tolist()
            found |= {other: None for other in draws if own.isdisjoint(labels[other])}
            if len(found) >= count:
                return list(found)[:count]
        rest = [i for i in range(len(labels)) if i not in found and own.isdisjoint(labels[i])]
        return [*found, *random.permutation(rest).tolist()][:count]

    def _label_row(self, place: int, label: str, random: np.random.Generator) -> Example | str:
        query, positive = self.pool.texts[place], self.words[label]
        if normal_form(query) == normal_form(positive):
            return _OWN_LABEL
        taken = {normal_form(self.words[own]) for own in self.pool.labels[place]}
        taken.add(normal_form(query))
        others: dict[str, str] = {}
        for words in self.words.values():
            if normal_form(words) not in taken:
                others.setdefault(normal_form(words), words)
        if not others:
            return _NO_NEGATIVE
        words = list(others.values())
        chosen = random.permutation(len(words))[: self.conversion.negatives].tolist()
        return self.conversion.row(query, positive, [words[i] for i in chosen], symmetric=False)
