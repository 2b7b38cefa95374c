"""An embedder whose network is sharded over the processes while a stage is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.models.network.backbone import Backbone
from tercet.models.network.layers import layers_of
from tercet.sharding import Sharded
from tercet.training.recipe import Stage


class ShardedEmbedder:
    """Shards the network's weights over the processes, and makes the embedder whole again.

    Heads, a trained layer and dense layers are small and stay whole in each process. Their
    gradients are summed as usual.
    """

    def __init__(self, embedder: Embedder, device: torch.device) -> None:
        self.embedder = embedder
        backbone = embedder.backbone
        self._sharded = Sharded(backbone.model, blocks_of(backbone), device)
        self._move_the_rest(device)

    @contextmanager
    def whole(self, *, main_alone: bool) -> Iterator[None]:
        """Make the embedder whole for a while, in every process or only in the first.

        In the others it is still sharded, and must not be run.
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
        """Make the embedder whole for good, on the CPU, where there is room for a large one."""
        host = torch.device("cpu")
        self.embedder.backbone.model = self._sharded.whole(host)
        self._move_the_rest(host)

    def _move_the_rest(self, device: torch.device) -> None:
        for part in self.embedder.children():
            if part is not self.embedder.backbone:
                part.to(device)


def blocks_of(backbone: Backbone) -> list[nn.Module]:
    """Return the token table and the layers, which are not needed at the same time.

    A model that runs one layer several times has no such blocks: its few weights are gathered
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
