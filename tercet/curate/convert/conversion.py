"""What conversions share: the form of rows, balanced sampling of labels, the report."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np

from tercet.errors import RecipeError
from tercet.models.settings import as_prompt
from tercet.types import Example

Mode: TypeAlias = Literal["label", "example"]
"""What is the positive of a text: the words of its label, or another text of the same label."""

_SAMPLE: Final = 0  # purposes of random draws, so that no two share random numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """Settings of the rows that a conversion makes.

    Raises:
        RecipeError: if negatives is below 1.
    """

    task: str  # name of the data set
    instruction: str  # what to do with a query, in words; becomes the prompt
    negatives: int = 7  # per row, at most
    seed: int = 0

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise RecipeError(
                f"negatives must be at least 1; got {self.negatives}: converted rows have no "
                "in-batch negatives"
            )

    def row(
        self, query: str, positive: str, negatives: Sequence[str], *, symmetric: bool
    ) -> Example:
        """Make a row with the prompt before its query and, if symmetric, before its documents.

        There are no in-batch negatives: other rows may have the same label.
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
        """Return random numbers that depend on the seed and the purpose alone."""
        return np.random.default_rng([self.seed, *purpose])


@dataclass(frozen=True, slots=True)
class Converted:
    """The rows of a conversion, in the order of their records, and counts."""

    rows: tuple[Example, ...]
    records: int  # read
    skipped: Mapping[str, int]  # records that gave no row, by reason
    labels: Mapping[str, int] = field(default_factory=dict)  # rows by label, the largest first
    mode: Mode | None = None
    label_instead: int = 0  # rows in example mode whose label had no other text


def stratified(labels: Sequence[str], rows: int | None, conversion: Conversion) -> list[int]:
    """Return the sorted places of a sample balanced by label; of all if ``rows`` is None.

    Each of k labels gives at most ceil(rows / k), without replacement. What a small label lacks
    is divided equally among larger ones.
    """
    if rows is not None and rows < 1:
        raise RecipeError(f"rows must be at least 1; got {rows}")
    if rows is None or rows >= len(labels):
        return list(range(len(labels)))
    places: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    random, left = conversion.random(_SAMPLE), rows
    chosen: list[int] = []
    # The smallest first, so that what it lacks can still be divided among the others.
    for waiting, label in enumerate(sorted(places, key=lambda each: (len(places[each]), each))):
        quota = min(len(places[label]), left // (len(places) - waiting))
        left -= quota
        chosen += random.choice(places[label], quota, replace=False).tolist()
    return sorted(chosen)
