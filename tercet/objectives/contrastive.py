"""Pull a query towards the documents that answer it, away from those that do not."""

from dataclasses import dataclass
from math import inf

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tercet.data.collate import Batch
from tercet.distributed import gather_rows
from tercet.errors import RecipeError
from tercet.losses.contrastive import info_nce


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """InfoNCE of cosines, over the full width and each of ``dims`` alike (Matryoshka).

    In several processes each takes its own queries against the documents of all, and divides by
    the number of positive pairs of all: summed gradients are those of the whole batch.
    """

    temperature: float = 0.05
    dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.temperature < inf:
            raise RecipeError(f"temperature is {self.temperature}; give a number above 0")
        if len(set(self.dims)) < len(self.dims) or min(self.dims, default=1) < 1:
            raise RecipeError(f"dims are {self.dims}; give lengths of 1 or more, each once")

    def __call__(self, vectors: Float[Tensor, "texts dim"], batch: Batch) -> dict[str, Tensor]:
        """The loss under ``"loss"``: this process's share of it, where there are several."""
        queries, documents = vectors[: batch.queries], vectors[batch.queries :]
        width = vectors.shape[1]
        shorter = [dim for dim in self.dims if dim < width]
        if not shorter:  # scaled once, instead of every block of scores
            queries, documents = F.normalize(queries, dim=1), F.normalize(documents, dim=1)
        loss = info_nce(
            queries,
            gather_rows(documents),
            batch.relation.gathered(),
            self.temperature,
            dims=(*sorted(shorter), width) if shorter else None,
        )
        return {"loss": loss}
