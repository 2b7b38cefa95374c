"""Batches of a stage: who makes them, and how many examples each has.

A recipe counts in tokens, files in bytes; their ratio is measured on a few examples of each source.
Short texts make large batches, long ones small batches (arXiv 2402.03216, sec. 3.4 and table 9):
the sizes come from the paper's table, or from what fits into this machine's memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

import numpy as np

from tercet import distributed
from tercet.curate.mining.guide import Guide
from tercet.data.batches.collate import Collator, PromptOf
from tercet.data.batches.sampler import BatchPlan, Drawable, Sampler
from tercet.data.batches.token_cache import CachedTokens, stored_tokens
from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.files.artifacts import fingerprint
from tercet.models.embedder import Embedder
from tercet.models.network.attention import KEPT_LENGTH
from tercet.models.tokens import Tokens
from tercet.models.zoo.zoo import cache_folder
from tercet.training.memory import COPIES, MemoryBudget, least_of_all
from tercet.training.recipe import LEAST, Batching, Run, Stage
from tercet.types import Example, Role

SAMPLE: Final = 64  # examples of a source that are looked at

# Where the paper's length groups end, in tokens; the last one ends at the model's limit.
_EDGES: Final = (500, 1000, 2000, 3000, 4000, 5000, 6000, 7000)
_SHORT_EDGES: Final = (64, 128, 256)  # before them, if sizes are fitted


@dataclass(frozen=True, slots=True)
class Groups:
    """Length groups: where each but the last ends, in tokens, and its batch size."""

    edges: tuple[int, ...]
    sizes: tuple[int, ...]  # examples a batch, over all processes unless stated otherwise

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.edges) + 1, "a group below each edge, one above the last"

    def times(self, processes: int) -> "Groups":
        """Return the groups with batches ``processes`` times as large."""
        return Groups(self.edges, tuple(size * processes for size in self.sizes))

    @property
    def summary(self) -> str:
        """The sizes for people, that of the shortest texts first."""
        first, last = self.sizes[0], self.sizes[-1]
        return str(first) if len(set(self.sizes)) == 1 else f"{first} (short) to {last} (long)"


# Examples a device and step: table 9 has the totals over 96 and 24 devices.
PRESETS: Final[dict[Batching, Groups]] = {
    "bge-m3-pairs-80gb": Groups(_EDGES, (700, 570, 388, 288, 224, 180, 157, 128, 104)),
    "bge-m3-finetune-80gb": Groups(_EDGES, (48, 32, 20, 18, 14, 14, 12, 10, 8)),  # 8 documents each
}
assert set(PRESETS) == set(get_args(Batching)) - {"fit"}


# ---- who makes batches -----------------------------------------------------------------------


def sampler_of(
    stage: Stage,
    drawn: Sequence[Drawable],
    seed: int,
    embedder: Embedder,
    groups: Groups | None = None,
) -> Sampler:
    """Return the sampler of a stage's batches, with the batch sizes of these length groups.

    The length of a row is that of its longest text in tokens, estimated from its bytes by the
    bytes per token of its source, so that sources in Korean and in English are measured alike.

    Raises:
        RecipeError: if the data cannot form such batches.
    """
    smallest = stage.batch_size if groups is None else min(groups.sizes)
    if smallest < distributed.world():
        raise RecipeError(
            f"a batch of {smallest} has no example for each of {distributed.world()} "
            "processes; raise the batch size or start fewer processes"
        )
    plan = BatchPlan(
        batch_size=stage.batch_size,
        seed=seed,
        epochs=stage.epochs if stage.steps is None else stage.steps,  # an epoch has a batch or more
        mixing=stage.mixing,
    )
    if groups is None and stage.token_budget is None and not stage.length_edges:
        return Sampler(drawn, plan)
    longest = longest_of(stage, embedder)
    counted = [in_tokens(source, embedder, longest) for source in _of_examples(stage, drawn)]
    if groups is not None:
        return Sampler(counted, replace(plan, length_edges=groups.edges, batch_sizes=groups.sizes))
    edges, budget = stage.length_edges, stage.token_budget
    return Sampler(counted, replace(plan, length_edges=edges, size_budget=budget))


def collator_of(embedder: Embedder, stage: Stage, prompt_of: PromptOf) -> Collator:
    """Return what makes a stage's batches from examples, cut to the stage's lengths."""

    def tokenize(texts: Sequence[str], role: Role, prompts: Sequence[str]) -> Tokens:
        return embedder.tokenize(texts, role, prompts, max_tokens_of(stage, embedder, role))

    return Collator(
        tokenize=tokenize,
        prompt_of=prompt_of,
        positives=stage.positives,
        negatives=stage.negatives,
        in_batch=stage.in_batch,
        mask_duplicates=stage.mask_duplicates,
        ignoring=stage.ignoring,
        shuffle_segments=stage.shuffle_segments,
        shuffle_at=stage.shuffle_at,
    )


def with_cached_tokens(
    collate: Collator, embedder: Embedder, stage: Stage, sources: Sequence[Source]
) -> Collator:
    """Return a collator that reads tokens from disk, after tokenizing what is not there yet.

    All processes have to call this. If the stage's objective is not ``cacheable``, the collator is
    returned unchanged.

    Raises:
        StorageError: if the disk refuses.
    """
    if not stage.objective.traits.cacheable:
        return collate
    tokenizer = fingerprint(embedder.tokenizer.stock.backend_tokenizer.to_str())

    def made_with(role: Role) -> str:
        limit = max_tokens_of(stage, embedder, role)
        return f"{tokenizer} {embedder.settings.form(role)!r} {limit}"

    stored = stored_tokens(sources, made_with, collate.tokenize, collate.prompt_of)
    return replace(collate, tokenize=CachedTokens(collate.tokenize, stored))


def guide_of(name: str, sources: Sequence[Source], run: Run) -> tuple[Guide, dict[str, str]]:
    """Return a guide that has encoded all texts, and the fingerprint of its weights by name.

    All processes have to call this.

    Raises:
        ModelError: if there is no such model, or a vector of it contains NaN or infinity.
        StorageError: if the disk refuses.
    """
    model = Embedder.load(name).to(run.find_device())
    return Guide(model, sources, cache_folder() / "guide"), {
        "weights of guide": model.fingerprint()
    }


def max_tokens_of(stage: Stage, embedder: Embedder, role: Role) -> int:
    """Return where a stage cuts texts of this role; never more than the model takes."""
    own = stage.query_tokens if role == "query" else stage.document_tokens
    return min(own or embedder.settings.max_tokens(role), embedder.backbone.max_tokens)


def longest_of(stage: Stage, embedder: Embedder) -> int:
    """Return the largest number of tokens that a text can have in a stage."""
    return max(max_tokens_of(stage, embedder, role) for role in get_args(Role))


# ---- how large they are ----------------------------------------------------------------------


def groups_of(
    stage: Stage,
    drawn: Sequence[Drawable],
    embedder: Embedder,
    budget: MemoryBudget,
    chunk_tokens: int,
) -> Groups | None:
    """Return a stage's length groups with sizes over all processes; None if it has one size.

    A table counts examples a device, and is multiplied by the number of processes. A fit takes
    what the process with the least memory can take.

    Raises:
        RecipeError: if not even the smallest batch fits into memory.
    """
    if stage.batch_sizes:
        return Groups(stage.length_edges, stage.batch_sizes)
    if stage.batching is None:
        return None
    sources = _of_examples(stage, drawn)
    processes, longest = distributed.world(), longest_of(stage, embedder)
    if stage.batching in PRESETS:
        return PRESETS[stage.batching].times(processes)
    return fitted(
        stage.length_edges or usual_edges(longest),
        longest,
        costs=StepCosts(
            shape=shape_of(sources, stage, embedder),
            budget=replace(budget, total=least_of_all(budget.total)),
            chunk_tokens=chunk_tokens,
            processes=processes,
        ),
        at_most=stage.batch_size,
    )


def usual_edges(longest: int) -> tuple[int, ...]:
    """Return the edges of the length groups that sizes are fitted to, up to this length."""
    return tuple(edge for edge in (*_SHORT_EDGES, *_EDGES) if edge < longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleShape:
    """Averages over examples."""

    documents: float | int  # of one query
    tokens: float | int  # of all texts, divided by those of the longest one
    query_tokens: float | int  # of the query, divided by those of the longest text


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """What a step takes of the memory of each process."""

    shape: ExampleShape
    budget: MemoryBudget
    chunk_tokens: int
    processes: int = 1

    def of_step(self, own: int, length: int) -> float:
        """Estimate the bytes that ``own`` examples in each process take, by their longest texts.

        Counted are the vectors of all texts and their copies, the scores, and the graph of one
        chunk: of one text of ``length`` tokens, or of shorter ones, whose tokens may cost more.
        """
        shape, budget = self.shape, self.budget
        docs, query_tokens = own * shape.documents, own * shape.query_tokens * length
        tokens = own * shape.tokens * length
        vectors = COPIES * budget.vectors(own + docs, tokens)
        # The others' documents arrive whole, and so does their gradient.
        of_others = 2 * (self.processes - 1) * budget.vectors(docs, tokens - query_tokens)
        scores = budget.scores(own, query_tokens, self.processes * docs)
        shorter = self.chunk_tokens * budget.graph(min(length, KEPT_LENGTH))
        return vectors + of_others + scores + max(shorter, length * budget.graph(length))


def fitted(edges: Sequence[int], longest: int, *, costs: StepCosts, at_most: int) -> Groups:
    """Return the largest batches whose step fits into the memory of each process.

    ``at_most`` and the sizes are over all processes, which take equal shares.

    Raises:
        RecipeError: if not even ``LEAST`` examples of some group fit.
    """
    limits = [edge for edge in edges if edge < longest]
    sizes = [_fitted_size(length, costs, at_most) for length in (*limits, longest)]
    return Groups(tuple(limits), tuple(sizes))


def _fitted_size(length: int, costs: StepCosts, at_most: int) -> int:
    processes, total = costs.processes, costs.budget.total
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
    """Return the largest number from ``low``, which fits, to ``high`` that fits."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# ---- what examples look like -----------------------------------------------------------------


def in_tokens(source: Source, embedder: Embedder, longest: int) -> Source:
    """Return the source with estimated sizes in tokens, at most ``longest``."""
    tokens = np.ceil(source.sizes / bytes_per_token([source], embedder))
    return replace(source, sizes=np.clip(tokens, 1, longest).astype(np.int32))


def bytes_per_token(sources: Sequence[Source], embedder: Embedder) -> float:
    """Return the mean bytes per token of the longest texts of some examples of each source."""
    samples = [sample for source in sources for sample in _counted(source, embedder)]
    return sum(sample.bytes for sample in samples) / sum(max(s.lengths) for s in samples)


def shape_of(sources: Sequence[Source], stage: Stage, embedder: Embedder) -> ExampleShape:
    """Return what a stage takes of an example on average, from some examples of each source.

    A stage that mines its negatives is assumed to have as many as it asks for.
    """
    documents = tokens = queries = longest = 0.0
    samples = [sample for source in sources for sample in _counted(source, embedder)]
    cut_query, cut_document = (max_tokens_of(stage, embedder, role) for role in get_args(Role))
    for sample in samples:
        query = min(sample.lengths[0], cut_query)
        lengths = np.minimum(sample.lengths[1:], cut_document)
        positives, mined = lengths[: sample.positives], lengths[sample.positives :]
        taken = min(len(positives), stage.positives)
        others = min(len(mined), stage.negatives) if stage.refresh is None else stage.negatives
        documents += taken + others
        of_others = mined if len(mined) else positives
        tokens += query + taken * positives.mean() + others * of_others.mean()
        queries += query
        longest += max(query, lengths.max())
    return ExampleShape(
        documents=documents / len(samples), tokens=tokens / longest, query_tokens=queries / longest
    )


def sampled(source: Source) -> list[tuple[int, Example]]:
    """Return the rows and examples of a few places all over a source."""
    rows = np.linspace(0, len(source) - 1, num=min(len(source), SAMPLE)).astype(int).tolist()
    return list(zip(rows, source.examples(rows), strict=True))


@dataclass(frozen=True, slots=True)
class _CountedExample:
    bytes: int  # of its longest text
    lengths: list[int]  # tokens of its query, positives and negatives, not cut
    positives: int


def _counted(source: Source, embedder: Embedder) -> list[_CountedExample]:
    found: list[_CountedExample] = []
    for row, example in sampled(source):
        texts = [example.query, *example.positives, *example.negatives]
        lengths = embedder.tokenizer(texts, 1_000_000).lengths
        found.append(_CountedExample(int(source.sizes[row]), lengths, len(example.positives)))
    return found


def _of_examples(stage: Stage, drawn: Sequence[Drawable]) -> list[Source]:
    sources = [source for source in drawn if isinstance(source, Source)]
    if len(sources) < len(drawn):
        raise RecipeError(
            f"the stage {stage.name} counts in blocks of tokens, which have no length groups and "
            "no token budget; remove these settings"
        )
    return sources
