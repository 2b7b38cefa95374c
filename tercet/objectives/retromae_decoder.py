"""One layer that rebuilds a text from its vector and from random parts of its tokens.

Enhanced decoding (RetroMAE, arXiv 2205.12035, sec. 3.3): the query of each row of the attention is
the vector plus a position; the row sees the vector and a random half of the other tokens, but never
the token that it predicts. So the vector has to carry what these tokens do not reveal.

Row masks are drawn where they are used, for a block of rows at a time, and drawn again for the
backward pass: a text of 8,192 tokens never has all of its 67 million entries in memory.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tercet.models.network.backbone import Backbone
from tercet.models.network.positions import input_layer
from tercet.segments import Packed, moved, row_of

MASK_ENTRIES: Final = 1 << 21  # of the row masks in memory at a time
_ODD: Final = 0x9E3779B97F4A7C15  # keeps the draws of neighbouring blocks apart
_ROTARY_BASE: Final = 10_000.0


class Decoder(nn.Module):
    """The layer, with attention inside each text; its new weights have their own fixed seed.

    If the backbone's embedding layer adds positions, it makes the inputs. Otherwise the decoder
    normalises them and rotates its queries and keys. Like BERT it adds first and normalises then.
    Attention weights have no dropout: the row masks serve as one.
    """

    def __init__(self, backbone: Backbone, mask: float) -> None:
        super().__init__()
        config = backbone.config.get_text_config()
        hidden = backbone.hidden
        self.mask = mask  # the share of tokens that a row does not see
        heads = int(getattr(config, "num_attention_heads", 1) or 1)
        self.heads = heads if hidden % (2 * heads) == 0 else 1  # each of an even width
        self.first_position = backbone.position_offset
        self.dropout = float(getattr(config, "hidden_dropout_prob", 0.0) or 0.0)
        self.rotary = input_layer(backbone) is None
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        self.to_q, self.to_out = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.to_kv = nn.Linear(hidden, 2 * hidden)  # keys first
        self.ff_in, self.ff_out = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.norm_attention, self.norm_ff = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.norm_in = nn.LayerNorm(hidden) if self.rotary else None
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(_ODD % 2**32)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        vectors: Float[Tensor, "texts hidden"],
        embeddings: Float[Tensor, "tokens hidden"],
        texts: Packed,
        seeds: Sequence[int],
        backbone: Backbone,
    ) -> Float[Tensor, "rows hidden"]:
        """Return a state for each token but the first and last of each text, in their order.

        ``embeddings`` are those of the token table, without positions; that of a text's first token
        is ignored. Row masks depend only on the text's seed and length.
        """
        places, owner = texts.places, row_of(texts.offsets, texts.ids)
        asked = moved(inner_places(texts), places.device)
        keys = self._inputs(embeddings, places, backbone)
        keys = torch.where((places == 0)[:, None], vectors.to(keys.dtype)[owner], keys)
        rows = self._inputs(vectors[owner[asked]], places[asked], backbone)
        k, v = self.to_kv(keys).chunk(2, dim=1)
        q = self._split(self.to_q(rows), places[asked])
        found = self._attend(q, self._split(k, places), self._split(v), texts.lengths, seeds)
        states = self.norm_attention(rows + self._drop(self.to_out(found)))
        return self.norm_ff(states + self._drop(self.ff_out(F.gelu(self.ff_in(states)))))

    def _inputs(self, x: Tensor, places: Tensor, backbone: Backbone) -> Tensor:
        layer = input_layer(backbone)
        if layer is None:
            assert self.norm_in is not None
            return self._drop(self.norm_in(x.to(self.norm_in.weight.dtype)))
        return layer(inputs_embeds=x[None], position_ids=places[None] + self.first_position)[0]

    def _split(self, x: Tensor, turned: Tensor | None = None) -> Tensor:
        """Split by heads, [heads, tokens, width]; rotated by the places ``turned`` if needed."""
        x = x.unflatten(1, (self.heads, -1)).transpose(0, 1)
        return x if turned is None or not self.rotary else _rotated(x, turned)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], seeds: Sequence[int]
    ) -> Float[Tensor, "rows hidden"]:
        """Attend with q [heads, rows, width] to k and v [heads, tokens, width]."""
        runs = list(_runs(lengths))
        counts = [max(length - 2, 0) * count for length, count in runs]
        sizes = [length * count for length, count in runs]
        parts = zip(q.split(counts, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
        found, text = [], 0
        for (length, count), (q_run, k_run, v_run) in zip(runs, parts, strict=True):
            mine = seeds[text : text + count]
            text += count
            if length < 3:
                continue
            q_run = q_run.unflatten(1, (count, length - 2)).transpose(0, 1)
            k_run, v_run = (x.unflatten(1, (count, length)).transpose(0, 1) for x in (k_run, v_run))
            states = self._attend_equal(q_run, k_run, v_run, mine)  # [texts, heads, rows, width]
            found.append(states.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(found) if found else q.new_zeros(0, q.shape[0] * q.shape[2])

    def _attend_equal(self, q: Tensor, k: Tensor, v: Tensor, seeds: Sequence[int]) -> Tensor:
        """Attend in texts of one length, one block of rows after the other."""
        rows, length = q.shape[2], k.shape[2]
        block = max(1, min(rows, MASK_ENTRIES // length))  # depends on the length alone
        # Masks are drawn from a given seed, so the state of random numbers need not be kept.
        again = partial(checkpoint, self._one_block, use_reentrant=False, preserve_rng_state=False)
        starts = range(0, rows, block)
        found = [again(q[:, :, start : start + block], k, v, seeds, start) for start in starts]
        return torch.cat(found, dim=2)

    def _one_block(
        self, q: Tensor, k: Tensor, v: Tensor, seeds: Sequence[int], start: int
    ) -> Tensor:
        size, length = q.shape[2], k.shape[2]
        seen = torch.stack([self.seen(seed, start, size, length, q.device) for seed in seeds])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])

    def seen(
        self, seed: int, start: int, rows: int, length: int, device: torch.device
    ) -> Bool[Tensor, "{rows} {length}"]:
        """Return which tokens of a text the rows from ``start`` on see; row 0 predicts token 1."""
        draw = torch.Generator(device).manual_seed((seed + start * _ODD) % 2**63)
        visible = torch.empty(rows, length, dtype=torch.bool, device=device)
        visible.bernoulli_(1 - self.mask, generator=draw)
        visible[:, 0] = True  # the vector
        row = torch.arange(rows, device=device)
        visible[row, start + 1 + row] = False  # its own token
        return visible


def inner_places(texts: Packed) -> Int[Tensor, "rows"]:
    """Return where the tokens are that are neither the first nor the last of their text."""
    inner = torch.ones(len(texts.ids), dtype=torch.bool)
    offsets = texts.host.offsets
    inner[offsets[:-1]] = False
    inner[offsets[1:] - 1] = False
    return inner.nonzero()[:, 0]


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield runs of equal lengths and their sizes, limited by the memory of their masks."""
    for length, run in groupby(lengths):
        count = len(list(run))
        together = max(1, MASK_ENTRIES // length**2)
        yield from ((length, min(together, count - i)) for i in range(0, count, together))


def _rotated(
    x: Float[Tensor, "heads tokens width"], places: Int[Tensor, "tokens"]
) -> Float[Tensor, "heads tokens width"]:
    """Rotate by place, with the two halves as pairs (RoFormer, arXiv 2104.09864, eq. 34)."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    speeds = _ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angles = places[:, None] * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
