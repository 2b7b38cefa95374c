"""How many documents a query is compared with in a step: what makes a contrastive batch hard."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tercet import distributed
from tercet.data.files.sources import Source
from tercet.train.lengths import Groups
from tercet.train.recipe import Stage
from tercet.types import Example

_SAMPLE: Final = 64  # examples of a source that are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Documents of a query, on average."""

    positives: float
    negatives: float  # its own
    others: float  # that each other example in the batch brings for it

    @classmethod
    def of(cls, stage: Stage, sources: Sequence[Source]) -> "Candidates":
        """What a few examples of each source bring, in proportion to their number.

        A stage that mines its negatives is taken to have as many as it asks for.
        """
        found, weights = [], []
        for source in sources:
            rows = np.linspace(0, len(source) - 1, num=min(len(source), _SAMPLE)).astype(int)
            counts = [_counts(stage, example) for example in source.examples(rows.tolist())]
            found.append(np.mean(counts, axis=0))
            weights.append(len(source) * source.weight)
        positives, negatives, others = np.average(found, axis=0, weights=weights).tolist()
        return cls(positives=positives, negatives=negatives, others=others)

    def in_batch(self, size: int) -> float:
        """Documents of each query of a batch of ``size`` examples, over all processes."""
        return self.positives + self.negatives + (size - 1) * self.others

    def told(self, groups: Groups) -> str:
        """All of it, for people; documents that answer two queries are counted twice."""
        counts = [round(self.in_batch(size)) for size in groups.sizes]
        first, last = f"{counts[0]:,}", f"{counts[-1]:,}"
        total = first if first == last else f"{first} (short texts) to {last} (long)"
        world = distributed.world()
        where = f" in all {world} processes" if world > 1 else ""
        others = f"those of the other queries{where}" if self.others else "none of other queries"
        return (
            f"each query is compared with about {total} documents: {self.positives:.3g} that "
            f"answer it, {self.negatives:.3g} negatives of its own, and {others}"
        )


def _counts(stage: Stage, example: Example) -> tuple[int, int, int]:
    positives = min(len(example.positives), stage.positives)
    mined = stage.negatives if stage.refresh else min(len(example.negatives), stage.negatives)
    policy = (example.in_batch or "all") if stage.in_batch == "per_row" else stage.in_batch
    return positives, mined, {"all": positives + mined, "positives": positives}.get(policy, 0)
