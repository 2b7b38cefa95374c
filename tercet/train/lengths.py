"""Length groups: how many examples a batch holds, by the tokens of its longest texts.

Short texts make large batches, long ones small batches (arXiv 2402.03216, section 3.4 and table
9). The sizes come from the paper's table, or from what fits into this machine's memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from tercet.errors import RecipeError
from tercet.models.network.attention import KEPT_LENGTH
from tercet.train.memory import COPIES, Room

Batching: TypeAlias = Literal["fit", "bge-m3-pairs-80gb", "bge-m3-finetune-80gb"]
"""Where batch sizes come from: this machine's memory, or the paper's table a device of 80 GB."""

LEAST: Final = 2  # examples of a batch: with one there is nothing to contrast

# What the paper's groups end with, in tokens; the last one ends with the model's limit.
_EDGES: Final = (500, 1000, 2000, 3000, 4000, 5000, 6000, 7000)
_SHORT_EDGES: Final = (64, 128, 256)  # before them, where sizes are fitted


@dataclass(frozen=True, slots=True)
class Groups:
    """Length groups: where each but the last ends, in tokens, and its batch size."""

    edges: tuple[int, ...]
    sizes: tuple[int, ...]  # examples a batch; over all processes, unless it says otherwise

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.edges) + 1, "a group below each edge, one above the last"

    def times(self, processes: int) -> "Groups":
        """So many times the examples in each batch."""
        return Groups(self.edges, tuple(size * processes for size in self.sizes))

    @property
    def told(self) -> str:
        """The sizes for people, that of the shortest texts first."""
        first, last = self.sizes[0], self.sizes[-1]
        return str(first) if len(set(self.sizes)) == 1 else f"{first} (short) to {last} (long)"


# Examples a device and step: of table 9 the totals over 96 and 24 devices.
PRESETS: Final[dict[Batching, Groups]] = {
    "bge-m3-pairs-80gb": Groups(_EDGES, (700, 570, 388, 288, 224, 180, 157, 128, 104)),
    "bge-m3-finetune-80gb": Groups(_EDGES, (48, 32, 20, 18, 14, 14, 12, 10, 8)),  # 8 documents each
}
assert set(PRESETS) == set(get_args(Batching)) - {"fit"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What examples look like on average."""

    documents: float | int  # of one query
    tokens: float | int  # of all texts, by those of the longest one
    query_tokens: float | int  # of the query, by those of the longest text


def usual_edges(longest: int) -> tuple[int, ...]:
    """The length groups that sizes are fitted to: the paper's, and shorter ones."""
    return tuple(edge for edge in (*_SHORT_EDGES, *_EDGES) if edge < longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a step takes of the memory of each process."""

    shape: Shape
    room: Room
    chunk_tokens: int
    processes: int = 1

    def of_step(self, own: int, length: int) -> float:
        """About the bytes that ``own`` examples in each process take, with longest texts that long.

        Counted are the vectors of all texts and their copies, the scores, and the graph of one
        chunk; graphs of more chunks are kept where there is room for them, and need none. That
        chunk holds a text that long alone, or shorter ones, whose tokens may cost more.
        """
        shape, room = self.shape, self.room
        docs, query_tokens = own * shape.documents, own * shape.query_tokens * length
        tokens = own * shape.tokens * length
        vectors = COPIES * room.vectors(own + docs, tokens)
        # The others' documents arrive whole, and so does their gradient.
        of_others = 2 * (self.processes - 1) * room.vectors(docs, tokens - query_tokens)
        scores = room.scores(own, query_tokens, self.processes * docs)
        shorter = self.chunk_tokens * room.graph(min(length, KEPT_LENGTH))
        return vectors + of_others + scores + max(shorter, length * room.graph(length))


def fitted(edges: Sequence[int], longest: int, *, costs: Costs, at_most: int) -> Groups:
    """The largest batches whose step fits into the memory of each process.

    ``at_most`` and the sizes are over all processes, of which each takes as many.

    Raises:
        RecipeError: when not even two examples of some group fit.
    """
    limits = [edge for edge in edges if edge < longest]
    return Groups(
        tuple(limits), tuple(_fitted_size(length, costs, at_most) for length in (*limits, longest))
    )


def _fitted_size(length: int, costs: Costs, at_most: int) -> int:
    processes, total = costs.processes, costs.room.total
    least = -(-LEAST // processes)
    if (needed := costs.of_step(least, length)) > total:
        raise RecipeError(
            f"a batch of {least * processes} examples of {length} tokens takes about "
            f"{needed / 1e9:.3g} GB in each process, and {total / 1e9:.3g} GB may be taken; raise "
            "memory_gb, encode fewer tokens together (chunk_tokens), or cut texts shorter"
        )
    most = max(least, at_most // processes)
    return processes * _largest(lambda own: costs.of_step(own, length) <= total, least, most)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from ``low``, which fits, to ``high`` that fits."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
