"""A stage's batches: the recipe counts in tokens, the sampler in bytes of the files."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from tercet import distributed
from tercet.data.sampler import BatchPlan, Drawable, Sampler
from tercet.data.sources import Source
from tercet.errors import RecipeError
from tercet.nn.embedder import Embedder
from tercet.train.recipe import Stage

SAMPLE: Final = 64  # examples of a source whose tokens are counted


def sampler_of(stage: Stage, drawn: Sequence[Drawable], seed: int, embedder: Embedder) -> Sampler:
    """The sampler that hands out a stage's batches.

    Raises:
        RecipeError: when the data cannot form such batches.
    """
    if stage.batch_size < distributed.world():
        raise RecipeError(
            f"a batch of {stage.batch_size} has no example for each of {distributed.world()} "
            "processes; raise the batch size or start fewer processes"
        )
    plan = BatchPlan(
        batch_size=stage.batch_size,
        seed=seed,
        epochs=stage.epochs if stage.steps is None else stage.steps,  # an epoch has a batch or more
        mixing=stage.mixing,
    )
    if stage.token_budget is None and not stage.length_edges:
        return Sampler(drawn, plan)
    sources = [source for source in drawn if isinstance(source, Source)]
    if len(sources) < len(drawn):
        raise RecipeError(
            f"the stage {stage.name} counts in blocks of tokens; it has no length groups and no "
            "token budget: leave them out"
        )
    size = bytes_per_token(sources, embedder)
    edges = {max(1, round(edge * size)) for edge in stage.length_edges}
    budget = None if stage.token_budget is None else max(1, round(stage.token_budget * size))
    longest = max(1, round(max_tokens(embedder) * size))
    cut = [replace(source, sizes=np.minimum(source.sizes, longest)) for source in sources]
    return Sampler(cut, replace(plan, length_edges=tuple(sorted(edges)), size_budget=budget))


def max_tokens(embedder: Embedder) -> int:
    """The length at which every text is cut."""
    return max(embedder.settings.query_tokens, embedder.settings.document_tokens)


def bytes_per_token(sources: Sequence[Source], embedder: Embedder) -> float:
    """Bytes of the longest text of an example for each of its tokens, of a few of each source."""
    size = tokens = 0
    for source in sources:
        rows = np.linspace(0, len(source) - 1, num=min(len(source), SAMPLE)).astype(int)
        size += int(source.sizes[rows].sum())
        for example in source.examples(rows.tolist()):
            texts = [example.query, *example.positives, *example.negatives]
            tokens += max(embedder.tokenizer(texts, 1_000_000).lengths)
    return size / tokens
