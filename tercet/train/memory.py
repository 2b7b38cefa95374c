"""What a training step may keep in memory: graphs of tokens, and the vectors of a whole batch."""

import os
from dataclasses import dataclass
from typing import Final

import torch

from tercet import distributed
from tercet.nn.backbone import Backbone
from tercet.nn.layer import Layer
from tercet.types import Packed
from tercet.vectors import Kind

SHARE: Final = 0.5  # of free memory
COPIES: Final = 6  # of a batch's vectors: by chunk, joined, in order, as queries; and gradients
_NUMBER: Final = 4  # bytes; vectors are float32 whatever the products are in
_PAIR: Final = 16  # bytes a pair and kind: scores, their softmax and gradients
_WINNER: Final = 16  # bytes a query token and document: the largest product, its place, gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory that a step may take, and what its parts take of it, in bytes."""

    total: float
    token_graph: int  # of one token
    kinds: tuple[Kind, ...]  # of the vectors that the loss sees
    dim: int  # of a text's vector
    width: int | None  # of a token's

    def graph_tokens(self, texts: Packed) -> int:
        """Tokens whose graphs fit beside the vectors of these texts."""
        left = self.total - COPIES * self.vectors(len(texts), len(texts.ids))
        return max(0, int(left / self.token_graph))

    def vectors(self, texts: float | int, tokens: float | int) -> float:
        """Bytes of the vectors of so many texts that have so many tokens together."""
        dense = texts * self.dim * _NUMBER if "dense" in self.kinds else 0.0
        sparse = tokens * (8 + _NUMBER) if "sparse" in self.kinds else 0.0
        multi = tokens * (self.width or self.dim) * _NUMBER if "multi" in self.kinds else 0.0
        return float(dense + sparse + multi)

    def scores(self, queries: float | int, query_tokens: float | int, docs: float | int) -> float:
        """Bytes of the scores of queries, which have so many tokens together, and documents."""
        winners = query_tokens * docs * _WINNER if "multi" in self.kinds else 0.0
        return float(queries * docs * _PAIR * len(self.kinds) + winners)


def graph_tokens_that_fit(
    backbone: Backbone,
    memory_gb: float | None = None,
    *,
    layer: Layer | None = None,
    half: bool = False,
) -> int:
    """Tokens whose graphs fit into ``memory_gb``, or into half of the memory that is free now."""
    free = memory_for(backbone.device, memory_gb)
    return int(free / graph_bytes(backbone, layer=layer, half=half))


def graph_bytes(backbone: Backbone, *, layer: Layer | None = None, half: bool = False) -> int:
    """Bytes that the graph of one token takes until its backward.

    An estimate by the widths of the layers, on the safe side: 221 kB a token for MiniLM in
    float32, where 170 kB were measured; for four layers of SmolLM2 in bfloat16 132 kB (127), and
    225 kB (204) with low-rank updates, whose dropout keeps inputs a second time. What is beyond it
    is encoded a second time, so a wrong estimate costs time or memory, never a different gradient.
    """
    config = backbone.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * backbone.hidden
    of_hidden, of_inner = (16, 5) if backbone.is_decoder else (12, 3)  # gated, more norms
    if backbone.has_lora:
        of_hidden, of_inner = of_hidden + 10, of_inner + 4
    numbers = config.num_hidden_layers * (of_hidden * backbone.hidden + of_inner * inner)
    if layer is not None:
        head = layer.size_of_head(backbone.hidden)
        numbers += 24 * backbone.hidden + layer.heads * (3 * head + 2 * layer.latents)
    return numbers * (2 if half else 4)


def memory_for(device: torch.device, memory_gb: float | None = None) -> float:
    """Bytes that a step may take: as many as were asked for, or half of what is free now."""
    return _free_bytes(device) * SHARE if memory_gb is None else memory_gb * 1e9


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024 // distributed.beside()
    except (OSError, KeyError):  # not Linux: assume that half of the memory is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
