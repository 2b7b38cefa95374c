"""What an objective is: numbers in a recipe that can be set to work on an embedder and its data."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from tercet.data.batches.collate import Collator
from tercet.data.batches.sampler import BatchRows, Drawable
from tercet.data.files.sources import Source
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks, Losses
from tercet.types import Packed


@runtime_checkable
class TextBatch(Protocol):
    """A step's texts; what else is in it is between an objective and itself."""

    @property
    def texts(self) -> Packed:
        """All texts in one row."""
        ...

    @property
    def truncated(self) -> int:
        """Texts that were cut."""
        ...


@runtime_checkable
class Work(Protocol):
    """An objective at work: it makes batches, and adds their gradients to the weights."""

    @property
    def unit(self) -> str:
        """What a batch is counted in, for people: examples, texts, blocks of 512 tokens."""
        ...

    @property
    def drawn(self) -> Sequence[Drawable]:
        """What batches are drawn of, one for each source."""
        ...

    def batch(self, rows: BatchRows, seed: Sequence[int]) -> TextBatch:
        """The share of a step that this process takes; the same for the same seed."""
        ...

    def backward(self, batch: Any, chunks: Chunks, step: int = 0) -> Losses:
        """Add this process's share of the gradient to the weights; return that of the losses.

        The sum over the processes is the loss of the whole batch. ``step`` counts the optimizer
        steps before this one, those before an interruption included.
        """
        ...

    def finish(self) -> None:
        """Leave the embedder as a user wants it."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A frozen dataclass of numbers; what it does begins with ``start``."""

    def start(self, embedder: Embedder, sources: Sequence[Source], collate: Collator) -> Work:
        """Set to work, before the optimizer is made.

        Raises:
            RecipeError: when the objective and the embedder or the data do not fit together.
        """
        ...
