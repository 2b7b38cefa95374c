"""What conversions share: which rows are wanted, how labels are balanced, what is reported."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from tercet.errors import RecipeError
from tercet.models.settings import as_prompt
from tercet.types import Example

Mode: TypeAlias = Literal["label", "example"]
"""What answers a text: the words of its label, or another text of the same label."""

_SAMPLE: Final = 0  # purposes of draws, so that no two share random numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the rows of a conversion are to be.

    Raises:
        RecipeError: when no negatives are wanted; the rows would have nothing to be told from.
    """

    task: str  # the name of the set
    instruction: str  # what to do with a query, in words; becomes the prompt
    negatives: int = 7  # of each row, at most
    seed: int = 0

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise RecipeError(
                f"{self.negatives} negatives a row: such rows have no negatives but their own; "
                "ask for one or more"
            )

    def row(
        self, query: str, positive: str, negatives: Sequence[str], *, symmetric: bool
    ) -> Example:
        """A row with its prompt before the query, and before documents that are of its kind.

        Other rows' documents are never its negatives: they may be of its own label.
        """
        prompt = as_prompt(self.instruction)
        return Example(
            query=query,
            positives=(positive,),
            negatives=tuple(negatives),
            query_prompt=prompt,
            document_prompt=prompt if symmetric else "",
            task=self.task,
            in_batch="none",
        )

    def random(self, *purpose: int) -> np.random.Generator:
        """Random numbers that hang on the seed and the purpose alone."""
        return np.random.default_rng([self.seed, *purpose])


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What became of the records of a file."""

    records: int  # that came in
    rows: int  # that came out
    negatives: int  # of all rows together
    skipped: Mapping[str, int]  # records that gave no row, by reason
    labels: Mapping[str, int]  # rows by the label of the positive, the largest first
    mode: Mode | None = None
    label_instead: int = 0  # rows of the example mode whose label had no other example

    @property
    def negatives_per_row(self) -> float:
        """The mean."""
        return self.negatives / max(self.rows, 1)


@dataclass(frozen=True, slots=True)
class Converted:
    """The rows of a conversion, in the order of their records."""

    rows: tuple[Example, ...]
    report: ConversionReport


def stratified(labels: Sequence[str], rows: int | None, wanted: Wanted) -> list[int]:
    """Which of the places to take, so that no label has more than its part; None: all of them.

    Of k labels each gives at most ceil(rows / k), without replacement. What a small label leaves
    goes in equal parts to larger ones. In order of place.
    """
    if rows is not None and rows < 1:
        raise RecipeError(f"{rows} rows are too few; ask for one or more")
    if rows is None or rows >= len(labels):
        return list(range(len(labels)))
    places: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    random, left = wanted.random(_SAMPLE), rows
    chosen: list[int] = []
    # The smallest first: by then, what it cannot give is still to be given out.
    for waiting, label in enumerate(sorted(places, key=lambda each: (len(places[each]), each))):
        quota = min(len(places[label]), left // (len(places) - waiting))
        left -= quota
        chosen += random.choice(places[label], quota, replace=False).tolist()
    return sorted(chosen)
