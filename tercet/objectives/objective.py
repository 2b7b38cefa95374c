"""The interface between the training loop and an objective, which is all the loop knows of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tercet.data.batches.collate import Collator
from tercet.data.batches.sampler import BatchRows, Drawable
from tercet.data.files.sources import Source
from tercet.files.progress import Bars, bar
from tercet.kinds import Kind
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks, Losses
from tercet.segments import Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """Facts about an objective that the training loop acts on.

    The defaults are safe for every objective: they promise no ability.
    """

    kinds: tuple[Kind, ...] = ()  # vectors that its loss compares, and whose heads it trains
    dims: tuple[int, ...] = ()  # shorter widths of dense vectors that it trains as well
    contrasts: bool = False  # compares each query with the documents of its batch
    needs_scores: bool = False  # learns scores of the examples' documents; mined ones have none
    ranks_pairs: bool = False  # learns the order of pairs of texts with a similarity score
    block_tokens: int | None = None  # its batches count blocks of this length, not examples
    cacheable: bool = False  # takes its tokens from the collator, which may read them from disk
    shardable: bool = False  # honours Chunks.in_step, and uses weights by running the network only


@runtime_checkable
class TextBatch(Protocol):
    """The texts of a step; an objective may add fields that only it reads."""

    @property
    def texts(self) -> Packed:
        """All texts in one row."""
        ...

    @property
    def truncated(self) -> int:
        """Number of texts that were cut."""
        ...


@runtime_checkable
class Work(Protocol):
    """An objective bound to an embedder and data: makes batches and computes their gradients."""

    @property
    def unit(self) -> str:
        """What a batch is counted in, for messages: examples, texts, blocks of 512 tokens."""
        ...

    @property
    def drawn(self) -> Sequence[Drawable]:
        """The rows that batches are drawn from, one entry for each source."""
        ...

    def batch(self, rows: BatchRows, seed: Sequence[int]) -> TextBatch:
        """Return this process's share of a step; it depends on rows and seed only."""
        ...

    def backward(self, batch: Any, chunks: Chunks, step: int = 0) -> Losses:
        """Add this process's share of the gradient to the weights and return that of the losses.

        The sum over the processes is the loss of the whole batch. ``step`` is the number of
        optimizer steps before this one, including those before an interruption.
        """
        ...

    def finish(self) -> None:
        """Undo changes to the embedder that only training needs."""
        ...


@runtime_checkable
class PreparedWork(Work, Protocol):
    """Work that takes long before the first step, which is not done to plan a run."""

    @property
    def reads(self) -> Mapping[str, str]:
        """Fingerprints of what it reads besides data and weights; equal when a run goes on."""
        ...

    def prepare(self, bars: Bars = bar) -> None:
        """Do it; called in every process before steps are taken, also when a run goes on."""
        ...

    def settle(self) -> None:
        """Set what the embedder's settings get from this stage, even if that is finished."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A frozen dataclass of numbers, which ``start`` binds to an embedder and data."""

    @property
    def traits(self) -> Traits:
        """What the training loop has to know before it calls ``start``."""
        ...

    def start(self, embedder: Embedder, sources: Sequence[Source], collate: Collator) -> Work:
        """Bind the objective to an embedder and data, before the optimizer is made.

        Raises:
            RecipeError: if the objective does not fit the embedder or the data.
        """
        ...
