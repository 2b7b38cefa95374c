"""What belongs to the machine and not to the recipe: it changes time and memory."""

from dataclasses import dataclass
from typing import Literal

import torch

from tercet import distributed
from tercet.errors import RecipeError
from tercet.train.recipe import above, at_least


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a recipe is run on this machine."""

    device: str | None = None  # None: a GPU if there is one
    precision: Literal["float32", "bfloat16"] = "float32"  # of the products; weights stay float32
    chunk_tokens: int | None = None  # encoded together; None: 2,048 on a CPU, 16,384 on a GPU
    memory_gb: float | None = None  # for kept activations; None: half of what is free
    save_minutes: float = 5.0  # between checkpoints
    save_steps: int | None = None  # between checkpoints, as well
    eval_steps: int | None = None  # between evaluations; None: ten times a stage
    shard_weights: bool = False  # over the processes, with gradients and optimizer (FSDP2)
    checkpoint_activations: bool = False  # layers are computed again instead of kept
    models_at: tuple[int, ...] = ()  # steps of the first stage after which its model is saved
    cache_tokens: bool = False  # training texts are tokenized once, and their tokens kept on disk
    tensorboard: bool = False
    show_progress: bool = True

    def __post_init__(self) -> None:
        above(0, self, "save_minutes")
        at_least(1, self, "chunk_tokens", "save_steps", "eval_steps")
        at_least(0, self, "memory_gb")
        if min(self.models_at, default=0) < 0:
            raise RecipeError(f"models_at is {list(self.models_at)}; give steps, 0 for the base")

    @property
    def shards_weights(self) -> bool:
        """Whether weights are spread over processes: one alone holds them all."""
        return self.shard_weights and distributed.world() > 1

    @property
    def home(self) -> torch.device:
        """Where an embedder is between stages: sharded, it may be too large for one device."""
        return torch.device("cpu") if self.shards_weights else self.find_device()

    def find_device(self) -> torch.device:
        """The device asked for, or a GPU if there is one.

        Raises:
            RecipeError: when there is no such device here.
        """
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.zeros(1, device=name).device
        # torch has no error of its own for this: a RuntimeError says that the name, the number or
        # the driver is unknown, an AssertionError that torch was built without such devices.
        except (RuntimeError, AssertionError) as error:
            raise RecipeError(
                f"the device {name!r} cannot be used here; leave it out to take a GPU if there is "
                "one, or else the CPU"
            ) from error
