"""How near a document is to a query, in mining: the ways to say so, and what each has to offer."""

from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from tercet.curate.mining.document_pools import Pool
from tercet.files.progress import Advance
from tercet.models.settings import Settings
from tercet.rank.topk import Hits

By: TypeAlias = Literal["dense", "sparse", "multi", "hybrid", "bm25"]
"""Which scores decide: those of one kind of vectors, a weighted sum of several, or BM25's."""

COSINES: Final = ("dense", "multi")
"""Ways whose scores are cosines, or a mean of them: a usual margin is meant for these, and they
may stand in a row as a teacher's. Others have a scale of their own from model to model, or query to
query."""


@runtime_checkable
class Finder(Protocol):
    """Finds the documents of a pool that are near to queries. Queries are what it makes of them."""

    @property
    def settings(self) -> Settings | None:
        """What says which prompts are put before texts; None where none are."""
        ...

    def fill(self, pool: Pool, advance: Advance) -> None:
        """Get the documents of a pool ready; of several processes all call this."""
        ...

    def prepare(self, pool: Pool, start: int) -> None:
        """Get the shard of a pool that begins at this row ready for all who fill it later."""
        ...

    def queries(self, texts: Sequence[str], prompts: Sequence[str]) -> Any:
        """Queries, each after its prompt."""
        ...

    def nearest(self, queries: Any, pool: Pool, k: int) -> Hits:
        """The ``k`` nearest documents of each query, best first; -1 where there are no more."""
        ...

    def scores(
        self,
        queries: Any,
        owners: Int64[np.ndarray, "pairs"],
        pool: Pool,
        rows: Int64[np.ndarray, "pairs"],
    ) -> Float32[np.ndarray, "pairs"]:
        """The score of query ``owners[i]`` with document ``rows[i]``, for each ``i``."""
        ...

    def close(self) -> None:
        """Give back what is held for this mining alone."""
        ...
