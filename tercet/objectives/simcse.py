"""Two views of one text agree, and differ from those of other texts (arXiv 2104.08821, eq. 4)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from tercet.data.batches.collate import Collator
from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.models.tokens import Tokens
from tercet.objectives.contrastive import Contrastive, PairWork
from tercet.objectives.objective import Traits
from tercet.types import Role

TRIED: Final = 4  # texts that are embedded twice before the training begins


@dataclass(frozen=True, kw_only=True)
class SimCSE:
    """InfoNCE between two dropouts of a text, against the other texts of the batch.

    Most decoders have a dropout of zero: that of attention weights is raised while this objective
    trains. Prompts are left out (arXiv 2404.05961, sec. 3.1).
    """

    temperature: float = 0.05
    attention_dropout: float = 0.3
    max_tokens: int = 128  # a longer text is cut

    def __post_init__(self) -> None:
        Contrastive(temperature=self.temperature)  # checks it
        if not 0 <= self.attention_dropout < 1:
            raise RecipeError(
                f"attention_dropout is {self.attention_dropout}; give a share, from 0 to below 1"
            )
        if self.max_tokens < 4:
            raise RecipeError(f"max_tokens is {self.max_tokens}; give 4 or more")

    @property
    def traits(self) -> Traits:
        """Dense vectors are compared; tokens are not the collator's, since prompts are left out."""
        return Traits(kinds=("dense",), contrasts=True, shardable=True)

    def start(self, embedder: Embedder, sources: Sequence[Source], collate: Collator) -> PairWork:
        """Bind the objective to an embedder and texts, each an example with itself as the answer.

        Raises:
            RecipeError: if two views of a text are equal: then there is nothing to learn.
        """

        def tokenize(texts: Sequence[str], role: Role, prompts: Sequence[str]) -> Tokens:
            return embedder.tokenizer(texts, min(self.max_tokens, embedder.backbone.max_tokens))

        def finish() -> None:
            embedder.backbone.attention_dropout = None

        embedder.backbone.attention_dropout = self.attention_dropout
        bare = replace(collate, tokenize=tokenize, prompt_of=lambda role, task: "", in_batch="all")
        loss = Contrastive(temperature=self.temperature).loss
        work = PairWork(loss, embedder, sources, bare, "texts, in two views each", finish)
        _require_two_views(embedder, work)
        return work


@torch.no_grad()
def _require_two_views(embedder: Embedder, work: PairWork) -> None:
    examples = work.drawn[0].examples(range(min(TRIED, len(work.drawn[0]))))
    texts = work.collate(examples, [0]).texts.to(embedder.device)
    training = embedder.training
    embedder.train()
    with torch.random.fork_rng([embedder.device] if embedder.device.type == "cuda" else []):
        first, second = embedder(texts).chunk(2)
    embedder.train(training)
    if torch.equal(first, second):
        raise RecipeError(
            "two views of a text are equal, so SimCSE has nothing to learn: this model has no "
            "dropout; raise attention_dropout above 0"
        )
