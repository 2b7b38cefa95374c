"""A sparse head that dies in training is told of before it is dead.

A head that gives every token of a text less than zero gets no gradient from that text any more
(FlagEmbedding issue 982: most texts became empty). So the share of texts without a term is watched.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Final

from tercet.evaluate.measures.by_kind import EMPTY

_RECENT: Final = 32  # batches over which the share is averaged: few texts make a restless number
_FEW: Final = 32  # batches whose mean says nothing yet, neither that it is low nor high
_RISE: Final = 0.1  # of that mean; on a dev set, whose texts stay the same, half of it is enough
_RESTLESS: Final = 1.5  # standard deviations of single batches that a rise must be as well

log = logging.getLogger("tercet")


@dataclass(slots=True)
class SparseAlarm:
    """Compares the share of empty sparse vectors with the lowest so far: a slow rise counts.

    Each of the batches, the queries and the documents of a dev set is told of once. What it knows
    is kept in a checkpoint (``dataclasses.asdict``), so that a run that goes on neither forgets
    where it began nor tells it again.
    """

    lowest: dict[str, float] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    batches: int = 0
    recent: float = 0.0  # the mean share of the last batches, older ones fading out
    variance: float = 0.0  # of their shares

    def after_step(self, step: int, share: float | int) -> None:
        """Look at the share of empty ones among the documents of a batch.

        The mean of the last batches is restless by about an eighth of what single ones are, and
        the lowest and the highest of many such means lie four times that beside the truth. So
        where batches differ much, because they are small, only a larger rise is told of.
        """
        self.batches += 1
        fading, before = 1 / min(self.batches, _RECENT), self.recent
        self.recent += (share - before) * fading
        self.variance += ((share - before) * (share - self.recent) - self.variance) * fading
        if self.batches >= _FEW:
            rise = max(_RISE, _RESTLESS * sqrt(self.variance))
            self._compare(step, "documents in training", self.recent, rise)

    def after_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Look at what ``tercet.evaluate.measures.embedder_kinds.dev_score`` measured."""
        for role in ("query", "document"):
            if (share := figures.get(f"dev_{role}_empty")) is not None:
                self._compare(step, f"{role} texts of the dev set", share, EMPTY)

    def _compare(self, step: int, what: str, share: float | int, rise: float) -> None:
        self.lowest[what] = min(share, self.lowest.get(what, share))
        if what in self.told or share <= self.lowest[what] + rise:
            return
        self.told.append(what)
        log.warning(
            "step %d: the share of %s without a sparse term has risen from %.1f %% to %.1f %%: the "
            "sparse head is dying; where that goes on, train anew with a lower learning rate or "
            "with less weight of its loss, or with a dev set (--dev), by which the best weights "
            "are kept",
            step,
            what,
            100 * self.lowest[what],
            100 * share,
        )
