"""RetroMAE: a vector is good if its text can be rebuilt from it (arXiv 2205.12035).

The encoder reads the text with a few masked words, and predicts these. From its vector, and from
random parts of the text, a decoder of one layer predicts every token. The decoder is too weak to
do that without the vector, which therefore has to carry the text. Decoder and output layer are
dropped afterwards.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from tercet.data.batches.blocks import token_blocks
from tercet.data.batches.collate import Collator
from tercet.data.batches.masking import Masking, mask_id
from tercet.data.batches.sampler import BatchRows
from tercet.data.batches.whole_words import marked_pieces, unmarked
from tercet.data.files.sources import Source
from tercet.distributed import gather_ints
from tercet.errors import ModelError, RecipeError
from tercet.losses.tokens import next_token_loss
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks, Losses, own_random_state
from tercet.models.network.pooling import POOLINGS
from tercet.objectives.mntp import NO_LABEL, end_to_end, packed, seeded_texts
from tercet.objectives.objective import Traits
from tercet.objectives.retromae_decoder import Decoder, inner_places
from tercet.objectives.token_heads import MaskedHead, find_masked_head
from tercet.segments import Packed, batches_by_length, moved
from tercet.types import Vocabulary

_DRAW: Final = 0x4E74  # keeps masks apart from other uses of the same seed
_PARTS: Final = "retromae"  # the name of what is added to the embedder during training

log = logging.getLogger("tercet")


@dataclass(frozen=True, kw_only=True)
class RetroMAE:
    """The loss of the encoder's masked words plus that of the decoder's tokens.

        L_enc = -mean over masked i   of log softmax(W t(H[i]))[x[i]]
        L_dec = -mean over 0 < i < n-1 of log softmax(W t(D[i]))[x[i]]

    H are the encoder's states of the text with a share ``encoder_mask`` of its words masked, D the
    decoder's, a row for each token, which sees the vector and all but a share ``decoder_mask`` of
    the other tokens (sec. 3.1 to 3.3; the shares are the reference code's). The vector is the
    embedder's, with its pooling; the paper pools the first token.

    W is the token table and t a transform, both the same in the two losses. ``head`` names a model
    to take t from; None, or a model without one, makes a new one, and so does one that cannot be
    used, unless ``head_needed``. ``vocabulary`` "seen" leaves tokens that never occur in the data
    out of the softmax: the denominator loses only their share, and the cost is that of the
    languages in the data instead of those in the vocabulary.
    """

    encoder_mask: float = 0.3
    decoder_mask: float = 0.5
    max_tokens: int = 512  # of a block; a longer text is cut into several
    vocabulary: Vocabulary = "seen"
    head: str | None = None
    head_needed: bool = True

    def __post_init__(self) -> None:
        Masking(probability=self.encoder_mask)  # checks it
        if not 0 <= self.decoder_mask < 1:
            raise RecipeError(
                f"decoder_mask is {self.decoder_mask}; give a share, from 0 to below 1"
            )
        if self.max_tokens < 8:
            raise RecipeError(f"max_tokens is {self.max_tokens}; give 8 or more")
        if self.vocabulary not in get_args(Vocabulary):
            known = ", ".join(get_args(Vocabulary))
            raise RecipeError(f"vocabulary is {self.vocabulary!r}; choose from {known}")

    @property
    def traits(self) -> Traits:
        """No vectors are compared; the token table is read outside the network as well."""
        return Traits(block_tokens=self.max_tokens)

    def start(
        self, embedder: Embedder, sources: Sequence[Source], collate: Collator
    ) -> "RetroMAEWork":
        """Bind the objective to an embedder and all texts of the data; ``collate`` is not used.

        Tokenizes the data, and adds the decoder and the transform to the embedder, to be trained.

        Raises:
            RecipeError: if the token table is not as wide as the states.
            ModelError: if the tokenizer has no mask token, or a needed ``head`` cannot be used.
        """
        return RetroMAEWork(self, embedder, sources)


@dataclass(frozen=True, slots=True, eq=False)
class RetroMAEBatch:
    """Texts with masked words, the original texts, and the seeds of the decoder's masks."""

    texts: Packed
    labels: Int[Tensor, "tokens"]  # the masked token, or NO_LABEL
    originals: Int[Tensor, "tokens"]
    seeds: Int[Tensor, "texts"]
    truncated: int = 0


class RetroMAEWork:
    """Makes masked blocks of texts, and computes both losses chunk by chunk."""

    def __init__(self, objective: RetroMAE, embedder: Embedder, sources: Sequence[Source]) -> None:
        self.objective, self.embedder, self.sources = objective, embedder, sources
        stock = embedder.tokenizer.stock
        self._masking = Masking(probability=objective.encoder_mask)
        self._mask = mask_id(stock, "blank")
        self._special = np.array(sorted(stock.all_special_ids), dtype=np.int32)
        table = self._table
        if table.shape[1] != embedder.backbone.hidden:
            raise RecipeError(
                f"the model's token table is {table.shape[1]} wide and its states "
                f"{embedder.backbone.hidden}; RetroMAE predicts tokens by that table, so use a "
                "model where both are equal"
            )
        self._drawn_tokens = min(len(stock), len(table))  # random tokens are drawn from these
        self._max_tokens = min(objective.max_tokens, embedder.backbone.max_tokens)
        self.unit = f"blocks of {self._max_tokens} tokens"

        def marked(texts: Sequence[str]) -> list[np.ndarray]:
            return marked_pieces(embedder.tokenizer, list(texts), self._max_tokens)

        self.drawn = [  # all texts of the data, tokenized once, with marks at the starts of words
            token_blocks(source, marked, self._max_tokens, every_text=True) for source in sources
        ]
        self._known = self._known_tokens()
        self.head = self._make_head()
        self.decoder = Decoder(embedder.backbone, objective.decoder_mask)
        parts = nn.ModuleDict({"head": self.head, "decoder": self.decoder})
        embedder.add_module(_PARTS, parts.to(table.device, table.dtype))

    @property
    def _table(self) -> nn.Parameter:
        return self.embedder.backbone.model.get_input_embeddings().weight

    def batch(self, rows: BatchRows, seed: Sequence[int]) -> RetroMAEBatch:
        """Return the texts of these blocks, with words masked depending on block and seed."""
        gaps, labels, originals, seeds = [], [], [], []
        for rng, marked in seeded_texts(self.drawn, rows, [_DRAW, *seed]):
            ids, words = unmarked(marked)
            masked, chosen = self._masking(
                ids,
                ~np.isin(ids, self._special),
                rng,
                mask=self._mask,
                vocabulary=self._drawn_tokens,
                words=words,
            )
            gaps.append(masked)
            labels.append(np.where(chosen, ids, NO_LABEL))
            originals.append(ids)
            seeds.append(int(rng.integers(1 << 62)))
        drawn = torch.tensor(seeds, dtype=torch.int64)
        return RetroMAEBatch(packed(gaps), end_to_end(labels), end_to_end(originals), drawn)

    def backward(self, batch: RetroMAEBatch, chunks: Chunks, step: int = 0) -> Losses:
        """Run the texts chunk by chunk; each chunk's losses are parts of the sums."""
        lengths = batch.texts.lengths
        named = torch.tensor([sum(max(length - 2, 0) for length in lengths)])
        masked = (batch.labels != NO_LABEL).sum().reshape(1)
        counts = gather_ints(torch.stack([masked, named], 1))
        totals = [max(1, total) for total in counts.sum(0).tolist()]
        batch = replace(batch, texts=batch.texts.to(self.embedder.device))
        sums = torch.zeros(4, device=self.embedder.device)  # the two losses, and numbers of hits
        # One gather of the table's rows a step: its gradient is as large as the table.
        rows = self._table if self._known is None else self._table[self._known]
        leaf = rows.detach().requires_grad_(rows.requires_grad)
        for number, members in enumerate(batches_by_length(lengths, chunks.max_tokens)):
            with own_random_state(batch.texts, chunks.seed, number):
                parts = self._losses(batch, members, leaf, totals)
            if parts[0].requires_grad:
                parts[0].backward()
            sums += torch.stack([part.detach().to(sums.dtype) for part in parts[1:]])
        if leaf.grad is not None:
            rows.backward(leaf.grad)
        return {
            "loss": sums[0] + sums[1],
            "encoder_loss": sums[0],
            "decoder_loss": sums[1],
            "encoder_accuracy": sums[2] / totals[0],
            "decoder_accuracy": sums[3] / totals[1],
        }

    def finish(self) -> None:
        """Drop decoder and output layer, which are not part of an embedder."""
        delattr(self.embedder, _PARTS)

    def _losses(
        self, batch: RetroMAEBatch, members: list[int], rows: Tensor, totals: list[int]
    ) -> list[Tensor]:
        """For some texts: the sum of both losses, each of them, and the number of hits of each."""
        texts, host = batch.texts.take(members), batch.texts.host
        labels, originals = (
            Packed(ids, host.offsets, host.pooled).take(members).ids
            for ids in (batch.labels, batch.originals)
        )
        states = self.embedder.states(texts)
        vectors = POOLINGS[self.embedder.settings.pooling](states, texts)
        output = self.head.output(rows)
        (masked,) = (labels != NO_LABEL).nonzero(as_tuple=True)
        hidden, wanted = moved(masked, states.device), moved(labels[masked], states.device)
        encoder, right = next_token_loss(
            self.head(states[hidden]), self._place(wanted), output, total=totals[0]
        )
        known = self._place(moved(originals, states.device))
        seeds = batch.seeds[members].tolist()
        rebuilt = self.decoder(
            vectors, F.embedding(known, rows), texts, seeds, self.embedder.backbone
        )
        named = moved(inner_places(texts), known.device)
        decoder, guessed = next_token_loss(
            self.head(rebuilt), known[named], output, total=totals[1]
        )
        return [encoder + decoder, encoder, decoder, right, guessed]

    def _known_tokens(self) -> Tensor | None:
        """The ids that the softmax runs over, in order; None for all."""
        if self.objective.vocabulary == "all":
            return None
        ids = [np.unique(blocks.ids >> 1) for blocks in self.drawn]
        known = np.unique(np.concatenate([*ids, self._special])).astype(np.int64)
        return torch.from_numpy(known[known < len(self._table)]).to(self.embedder.device)

    def _make_head(self) -> MaskedHead:
        if (found := self._find_head()) is not None:
            return found if self._known is None else found.narrowed(self._known.cpu())
        table = self._table.detach()
        counts = np.zeros(len(table), np.int64)
        for blocks in self.drawn:
            counts += np.bincount(blocks.ids >> 1, minlength=len(table))
        counts = torch.from_numpy(counts)
        return MaskedHead.new(table, counts if self._known is None else counts[self._known.cpu()])

    def _find_head(self) -> MaskedHead | None:
        source = self.objective.head
        if source is None:
            return None
        try:
            found = find_masked_head(source)
        except ModelError as error:
            if self.objective.head_needed:
                raise
            log.warning("a new masked-language head is made: %s", error)
            return None
        if found is None:
            log.info("%s: has no masked-language head; a new one is made", source)
        return found

    def _place(self, ids: Int[Tensor, "some"]) -> Int[Tensor, "some"]:
        """The place of each token among those that the softmax runs over."""
        return ids if self._known is None else torch.searchsorted(self._known, ids)
