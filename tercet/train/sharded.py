"""An embedder whose network is spread over the processes while a stage is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.models.network.backbone import Backbone
from tercet.models.network.checkpointing import layers_of
from tercet.sharding import Sharded
from tercet.train.recipe import Stage


class Spread:
    """Spreads the network's weights over the processes, and puts them together again.

    Heads and a trained layer are small and stay whole in each process. Their gradients are summed
    as usual.
    """

    def __init__(self, embedder: Embedder, device: torch.device) -> None:
        self.embedder = embedder
        backbone = embedder.backbone
        self._sharded = Sharded(backbone.model, blocks_of(backbone), device)
        self._move_the_rest(device)

    @contextmanager
    def whole(self, *, main_alone: bool) -> Iterator[None]:
        """The embedder as a plain one for a while, in every process or in the first alone.

        In the others it is still spread, and must not be run.
        """
        backbone = self.embedder.backbone
        plain = self._sharded.whole(self.embedder.device, main_alone=main_alone)
        try:
            if plain is not None:
                backbone.model = plain
            yield
        finally:
            backbone.model = self._sharded.model

    def put_together(self) -> None:
        """Make the embedder a plain one again, on the CPU, where a large one has room."""
        host = torch.device("cpu")
        self.embedder.backbone.model = self._sharded.whole(host)
        self._move_the_rest(host)

    def _move_the_rest(self, device: torch.device) -> None:
        for part in self.embedder.children():
            if part is not self.embedder.backbone:
                part.to(device)


def blocks_of(backbone: Backbone) -> list[nn.Module]:
    """The token table and the layers: parts that are not needed at the same time.

    Of a model that runs one layer several times, none: its weights are few, and are gathered
    together.
    """
    layers = layers_of(backbone)
    return [backbone.model.get_input_embeddings(), *layers] if layers else []


def require_shardable(stage: Stage) -> None:
    """Refuse a stage whose objective cannot be trained with sharded weights.

    Raises:
        RecipeError: if the objective says that it is not ``shardable``.
    """
    if not stage.objective.traits.shardable:
        raise RecipeError(
            f"the stage {stage.name} cannot be trained with shard_weights, which "
            f"{type(stage.objective).__name__} does not support; train it in a separate run "
            "without, and use its model as the base of the other stages"
        )
