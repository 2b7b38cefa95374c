"""A stage's batches: the recipe counts in tokens, files in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

import numpy as np
import torch

from tercet import distributed
from tercet.data.batches.collate import Collator, PromptOf
from tercet.data.batches.sampler import BatchPlan, Drawable, Sampler
from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.models.tokens import Tokens
from tercet.train.lengths import PRESETS, Costs, Groups, Shape, fitted, usual_edges
from tercet.train.memory import Room
from tercet.train.recipe import Stage
from tercet.types import Role

SAMPLE: Final = 64  # examples of a source whose tokens are counted


def sampler_of(
    stage: Stage,
    drawn: Sequence[Drawable],
    seed: int,
    embedder: Embedder,
    groups: Groups | None = None,
) -> Sampler:
    """The sampler that hands out a stage's batches, with the batch sizes of these length groups.

    A row's length is that of its longest text, in tokens: its bytes, by the bytes a token of its
    source has (a few rows of each source are counted), so that a source in Korean and one in
    English are measured alike.

    Raises:
        RecipeError: when the data cannot form such batches.
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
    sources = _of_examples(stage, drawn)
    longest = longest_of(stage, embedder)
    counted = [in_tokens(source, embedder, longest) for source in sources]
    if groups is not None:
        return Sampler(counted, replace(plan, length_edges=groups.edges, batch_sizes=groups.sizes))
    edges, budget = stage.length_edges, stage.token_budget
    return Sampler(counted, replace(plan, length_edges=edges, size_budget=budget))


def collator_of(embedder: Embedder, stage: Stage, prompt_of: PromptOf) -> Collator:
    """What makes a stage's batches of examples, cut to the stage's own lengths."""

    def tokenize(texts: Sequence[str], role: Role, prompts: Sequence[str]) -> Tokens:
        return embedder.tokenize(texts, role, prompts, max_tokens_of(stage, embedder, role))

    return Collator(
        tokenize=tokenize,
        prompt_of=prompt_of,
        positives=stage.positives,
        negatives=stage.negatives,
        in_batch=stage.in_batch,
        mask_duplicates=stage.mask_duplicates,
        shuffle_segments=stage.shuffle_segments,
        shuffle_at=stage.shuffle_at,
    )


def groups_of(
    stage: Stage, drawn: Sequence[Drawable], embedder: Embedder, room: Room, chunk_tokens: int
) -> Groups | None:
    """The length groups of a stage that has a batch size for each, over all processes.

    A table counts examples a device, and is multiplied by the number of processes. A fit takes
    what the process with the least memory can take.

    Raises:
        RecipeError: when not even the smallest batch fits into memory.
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
        costs=Costs(
            shape=shape_of(sources, stage, embedder),
            room=replace(room, total=_least(room.total)),
            chunk_tokens=chunk_tokens,
            processes=processes,
        ),
        at_most=stage.batch_size,
    )


def max_tokens_of(stage: Stage, embedder: Embedder, role: Role) -> int:
    """The length at which a stage cuts texts of this role; never more than the model takes."""
    own = stage.query_tokens if role == "query" else stage.document_tokens
    return min(own or embedder.settings.max_tokens(role), embedder.backbone.max_tokens)


def longest_of(stage: Stage, embedder: Embedder) -> int:
    """The length at which every text is cut."""
    return max(max_tokens_of(stage, embedder, role) for role in get_args(Role))


def in_tokens(source: Source, embedder: Embedder, longest: int) -> Source:
    """The source with its sizes in tokens, about; a longer text is cut to ``longest``."""
    tokens = np.ceil(source.sizes / bytes_per_token([source], embedder))
    return replace(source, sizes=np.clip(tokens, 1, longest).astype(np.int32))


def bytes_per_token(sources: Sequence[Source], embedder: Embedder) -> float:
    """Bytes of the longest text of an example for each of its tokens, of a few of each source."""
    samples = [sample for source in sources for sample in _sampled(source, embedder)]
    return sum(sample.bytes for sample in samples) / sum(max(s.lengths) for s in samples)


def shape_of(sources: Sequence[Source], stage: Stage, embedder: Embedder) -> Shape:
    """What a stage takes of an example on average, of a few of each source.

    A stage that mines its negatives is taken to have as many as it asks for.
    """
    documents = tokens = queries = longest = 0.0
    samples = [sample for source in sources for sample in _sampled(source, embedder)]
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
    return Shape(
        documents=documents / len(samples), tokens=tokens / longest, query_tokens=queries / longest
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """An example whose tokens were counted."""

    bytes: int  # of its longest text
    lengths: list[int]  # tokens of its query, positives and negatives, not cut
    positives: int


def _sampled(source: Source, embedder: Embedder) -> list[_Sample]:
    rows = np.linspace(0, len(source) - 1, num=min(len(source), SAMPLE)).astype(int).tolist()
    found: list[_Sample] = []
    for row, example in zip(rows, source.examples(rows), strict=True):
        texts = [example.query, *example.positives, *example.negatives]
        lengths = embedder.tokenizer(texts, 1_000_000).lengths
        found.append(_Sample(int(source.sizes[row]), lengths, len(example.positives)))
    return found


def _of_examples(stage: Stage, drawn: Sequence[Drawable]) -> list[Source]:
    sources = [source for source in drawn if isinstance(source, Source)]
    if len(sources) < len(drawn):
        raise RecipeError(
            f"the stage {stage.name} counts in blocks of tokens; it has no length groups and no "
            "token budget: leave them out"
        )
    return sources


def _least(own: float) -> float:
    """The smallest value of all processes."""
    if distributed.world() == 1:
        return own
    return float(distributed.gather_ints(torch.tensor([int(own)])).min())
