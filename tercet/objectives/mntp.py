"""Masked next-token prediction: guess a masked token from the state before it.

A decoder's head was trained to predict, at each token, the next one. It still does, but the model
now reads both ways and the token itself is masked (arXiv 2404.05961, sec. 2.2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from tercet.data.batches.blocks import TokenBlocks, token_blocks
from tercet.data.batches.collate import Collator
from tercet.data.batches.masking import Masking, MaskToken, add_mask_token, mask_id
from tercet.data.batches.sampler import BatchRows
from tercet.data.files.sources import Source
from tercet.distributed import gather_ints
from tercet.errors import RecipeError
from tercet.losses.tokens import Head, next_token_loss
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import (
    Chunks,
    Losses,
    as_many_as_others,
    one_token,
    own_random_state,
)
from tercet.objectives.objective import Traits
from tercet.objectives.token_heads import load_head
from tercet.segments import Packed, batches_by_length, moved, offsets_of

NO_LABEL: Final = -1  # of a token that is not predicted
_DRAW: Final = 0x3A5C  # keeps masks apart from other uses of the same seed
_UNLIMITED: Final = 1 << 30


@dataclass(frozen=True, kw_only=True)
class MNTP:
    """Cross entropy of chosen tokens, each predicted from the state one place before it.

        loss = -(1 / |M|) * sum over i in M of log softmax(W h[i-1])[x[i]]

    ``head`` names the model whose language-model head W predicts; it is frozen, since it is not
    part of the trained embedder. ``train_head`` trains it nevertheless, and ``concatenated`` lets
    texts of a block see each other: both as the reference code does.
    """

    head: str
    masking: Masking = field(default_factory=Masking)
    mask_token: MaskToken = "blank"
    block_tokens: int = 512
    concatenated: bool = False
    train_head: bool = False

    def __post_init__(self) -> None:
        if self.block_tokens < 4:
            raise RecipeError(f"block_tokens is {self.block_tokens}; give 4 or more")

    @property
    def traits(self) -> Traits:
        """No vectors are compared."""
        return Traits(block_tokens=self.block_tokens, shardable=True)

    def start(self, embedder: Embedder, sources: Sequence[Source], collate: Collator) -> "MNTPWork":
        """Bind the objective to an embedder and texts; ``collate`` is not used.

        Raises:
            RecipeError: for an encoder.
            ModelError: for a tokenizer without the mask token.
        """
        if not embedder.backbone.is_decoder:
            raise RecipeError(
                f"masked next-token prediction is for decoders, and {self.head} is an encoder, "
                "which reads both ways already; leave this stage out"
            )
        if self.mask_token == "new" and add_mask_token(embedder.tokenizer.stock):
            embedder.tokenizer.refresh()
            _room_for_one_more(embedder)
        work = MNTPWork(self, embedder, sources)
        if self.train_head:
            embedder.add_module("language_head", nn.ParameterList(work.trained_head()))
        return work


@dataclass(frozen=True, slots=True, eq=False)
class MaskedBatch:
    """Texts with masked tokens, and what these were."""

    texts: Packed
    labels: Int[Tensor, "tokens"]  # the masked token, or NO_LABEL
    truncated: int = 0


class MNTPWork:
    """Makes masked blocks of tokens, and computes their loss chunk by chunk."""

    def __init__(self, objective: MNTP, embedder: Embedder, sources: Sequence[Source]) -> None:
        self.objective, self.embedder, self.sources = objective, embedder, sources
        stock = embedder.tokenizer.stock
        self._mask = mask_id(stock, objective.mask_token)
        self._vocabulary = len(stock)  # random tokens are drawn from it
        self._special = np.array(sorted(stock.all_special_ids), dtype=np.int32)
        self._block_tokens = min(objective.block_tokens, embedder.backbone.max_tokens)
        self.unit = f"blocks of {self._block_tokens} tokens"

    @property
    def drawn(self) -> list[TokenBlocks]:
        """The texts of each source in blocks."""
        return self._blocks

    @cached_property
    def _blocks(self) -> list[TokenBlocks]:
        """Blocks are tokenized when the first batch is needed."""

        def ids_of(texts: Sequence[str]) -> list[np.ndarray]:
            return self.embedder.tokenizer(texts, _UNLIMITED).ids

        joined = self.objective.concatenated
        return [
            token_blocks(source, ids_of, self._block_tokens, concatenated=joined)
            for source in self.sources
        ]

    @cached_property
    def head(self) -> Head:
        """The head that predicts, on the model's device."""
        head = load_head(self.objective.head)
        device = self.embedder.device
        bias = None if head.bias is None else head.bias.to(device)
        found = Head(head.weight.to(device), bias, head.scale, head.softcap)
        hidden = self.embedder.backbone.hidden
        if found.weight.shape[1] != hidden:
            raise RecipeError(
                f"the head of {self.objective.head} takes states of {found.weight.shape[1]} "
                f"numbers, but the model's have {hidden}; name the model it came from"
            )
        return found

    def trained_head(self) -> list[nn.Parameter]:
        """Return the head's weights as parameters, to be trained as well."""
        head = self.head
        weights = [nn.Parameter(w) for w in (head.weight, head.bias) if w is not None]
        self.head = Head(weights[0], weights[1] if weights[1:] else None, head.scale, head.softcap)
        return weights

    def batch(self, rows: BatchRows, seed: Sequence[int]) -> MaskedBatch:
        """Return the texts of these blocks, masked in a way that depends on block and seed."""
        gaps, labels = [], []
        for rng, ids in seeded_texts(self.drawn, rows, [_DRAW, *seed]):
            allowed = ~np.isin(ids, self._special)
            allowed[0] = False  # nothing comes before it
            masked, chosen = self.objective.masking(
                ids, allowed, rng, mask=self._mask, vocabulary=self._vocabulary
            )
            gaps.append(masked)
            labels.append(np.where(chosen, ids, NO_LABEL))
        return MaskedBatch(packed(gaps), end_to_end(labels))

    def backward(self, batch: MaskedBatch, chunks: Chunks, step: int = 0) -> Losses:
        """Run the texts chunk by chunk; each chunk's loss is a part of the sum."""
        device = self.embedder.device
        counts = gather_ints((batch.labels != NO_LABEL).sum().reshape(1))
        total = max(1, int(counts.sum()))
        loss, right = torch.zeros((), device=device), torch.zeros((), device=device)
        texts = batch.texts.to(device)
        answers = Packed(batch.labels, batch.texts.offsets, batch.texts.pooled)
        every = batches_by_length(texts.lengths, chunks.max_tokens)
        every = as_many_as_others(every) if chunks.in_step else every
        for number, members in enumerate(every):
            tokens = answers.take(members).ids
            places = (tokens != NO_LABEL).nonzero().squeeze(1)
            if not len(places) and not chunks.in_step:
                continue
            read = texts.take(members) if members else one_token(texts)
            with own_random_state(texts, chunks.seed, number):
                states = self.embedder.backbone(read)
            before, wanted = moved(places - 1, device), moved(tokens[places], device)
            part, found = next_token_loss(states[before], wanted, self.head, total=total)
            part.backward()
            loss += part.detach()
            right += found
        return {"loss": loss, "accuracy": right / total}

    def finish(self) -> None:
        """Drop the head, which is not part of an embedder."""
        if self.objective.train_head:
            del self.embedder.language_head


def seeded_texts(
    drawn: Sequence[TokenBlocks], rows: BatchRows, seed: Sequence[int]
) -> Iterator[tuple[np.random.Generator, np.ndarray]]:
    """Yield the texts of these blocks, each with the random generator of its block."""
    blocks = rows.read([source.read for source in drawn])
    for source, row, block in zip(rows.source.tolist(), rows.row.tolist(), blocks, strict=True):
        rng = np.random.default_rng([*seed, source, row])
        yield from ((rng, text) for text in block)


def packed(texts: list[np.ndarray]) -> Packed:
    """Return texts of token ids, all of which are pooled, as one row."""
    ids = end_to_end(texts)
    offsets = offsets_of(torch.tensor([len(text) for text in texts], dtype=torch.int64))
    return Packed(ids, offsets, torch.ones_like(ids, dtype=torch.bool))


def end_to_end(pieces: list[np.ndarray]) -> Int[Tensor, "tokens"]:
    """Return the numbers of all pieces in one row."""
    return torch.from_numpy(np.concatenate([*pieces, np.empty(0, np.int64)]).astype(np.int64))


def _room_for_one_more(embedder: Embedder) -> None:
    """Add a row to the token table for a new token, the mean of the others, if none is left."""
    model, needed = embedder.backbone.model, len(embedder.tokenizer.stock)
    table = model.get_input_embeddings().weight
    if needed > len(table):
        mean = table.detach().mean(0)
        model.resize_token_embeddings(needed, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[-1] = mean
