"""How much memory a training step may take, and how much its graphs and vectors need."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from tercet import distributed
from tercet.kinds import Kind
from tercet.models.choices import LayerSettings
from tercet.models.embedder import Embedder
from tercet.models.network.attention import KEPT_LENGTH, keeps_weights
from tercet.models.network.backbone import Backbone
from tercet.segments import Packed

SHARE: Final = 0.25  # of free memory; the rest is for the model's states, files and neighbours
COPIES: Final = 6  # of a batch's vectors: by chunk, joined, in order, as queries; and gradients
_NUMBER: Final = 4  # bytes; vectors are float32 whatever the products are in
_PAIR: Final = 16  # bytes a pair and kind: scores, their softmax and gradients
_WEIGHT: Final = 12  # bytes a head and pair of tokens: attention weights, dropout's mask, both
_CAPPED: Final = 20  # with capped scores or sinks: the scores before and after as well
_WINNER: Final = 16  # bytes a query token and document: the largest product, its place, gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """The memory that a step may take, and what its parts need of it, in bytes.

    Excludes temporary buffers of one layer and chunk, above all the attention weights of texts
    longer than ``KEPT_LENGTH``: about 0.2 GB, or what the heads of one key take if that is more
    (0.8 to 1.3 GB for 8192 tokens and heads that share no keys). Leave that free.
    """

    total: float
    token_graph: int  # of one token
    pair_graph: int = 0  # of one token, in addition, for each token of its text
    kinds: tuple[Kind, ...]  # of the vectors that the loss sees
    dim: int  # of a text's vector
    width: int | None  # of a token's

    def graph_tokens(self, texts: Packed) -> int:
        """Return how many tokens of the shortest texts have graphs that fit beside all vectors.

        The graphs of the shortest texts are kept (``tercet.models.network.chunked``).
        """
        left = self.total - COPIES * self.vectors(len(texts), len(texts.ids))
        tokens = 0
        for length in sorted(texts.lengths):
            left -= length * self.graph(length)
            if left < 0:
                break
            tokens += length
        return tokens

    def graph(self, length: int) -> int:
        """Return the bytes of the graph of each token of a text of this length."""
        return self.token_graph + (self.pair_graph * length if length <= KEPT_LENGTH else 0)

    def vectors(self, texts: float | int, tokens: float | int) -> float:
        """Return the bytes of the vectors of some texts with this many tokens together."""
        dense = texts * self.dim * _NUMBER if "dense" in self.kinds else 0.0
        sparse = tokens * (8 + _NUMBER) if "sparse" in self.kinds else 0.0
        multi = tokens * (self.width or self.dim) * _NUMBER if "multi" in self.kinds else 0.0
        return float(dense + sparse + multi)

    def scores(self, queries: float | int, query_tokens: float | int, docs: float | int) -> float:
        """Return the bytes of the scores of some queries, with these tokens, and documents."""
        winners = query_tokens * docs * _WINNER if "multi" in self.kinds else 0.0
        return float(queries * docs * _PAIR * len(self.kinds) + winners)


def memory_budget(
    embedder: Embedder,
    kinds: tuple[Kind, ...],
    memory_gb: float | None,
    *,
    half: bool = False,
    recomputed: bool = False,
) -> MemoryBudget:
    """Return the budget of a step with a loss over these kinds of vectors.

    ``memory_gb`` None takes a quarter of the free memory.
    """
    backbone, layer = embedder.backbone, embedder.settings.layer
    return MemoryBudget(
        total=memory_for(embedder.device, memory_gb),
        token_graph=graph_bytes(backbone, layer=layer, half=half, recomputed=recomputed),
        pair_graph=0 if recomputed else pair_bytes(backbone),
        kinds=kinds,
        dim=embedder.dim,
        width=embedder.heads.width,
    )


def graph_bytes(
    backbone: Backbone,
    *,
    layer: LayerSettings | None = None,
    half: bool = False,
    recomputed: bool = False,
) -> int:
    """Estimate the bytes that the graph of one token takes until its backward.

    By the widths of the layers, on the safe side: 221 kB for MiniLM in float32 (measured: 170 kB);
    for four layers of SmolLM2 in bfloat16 132 kB (127 kB), with LoRA, whose dropout keeps inputs a
    second time, 225 kB (204 kB). Attention weights are not included: see :func:`pair_bytes`.
    ``recomputed`` layers keep only their inputs, in float32.
    """
    config = backbone.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * backbone.hidden
    of_hidden, of_inner = (16, 5) if backbone.is_decoder else (12, 3)  # gated, more norms
    if backbone.has_lora:
        of_hidden, of_inner = of_hidden + 10, of_inner + 4
    if recomputed:
        of_hidden, of_inner = 1, 0
    numbers = config.num_hidden_layers * (of_hidden * backbone.hidden + of_inner * inner)
    if layer is not None:
        head = layer.size_of_head(backbone.hidden)
        numbers += 24 * backbone.hidden + layer.heads * (3 * head + 2 * layer.latents)
    of_half = 2.0 if backbone.is_decoder else 2.5
    return round(numbers * (of_half if half and not recomputed else 4))


def pair_bytes(backbone: Backbone) -> int:
    """Estimate the bytes that the graph of one token takes for each token of a short text.

    Zero with a fused kernel, which keeps no attention weights. Otherwise they are up to half of a
    graph (measured for multilingual E5 small in bfloat16: 220 of 430 kB, at 128 tokens).
    """
    config = backbone.config.get_text_config()
    dropout = backbone.attention_dropout
    if dropout is None:
        dropout = backbone.usual_dropout
    sinks = any(name.endswith("sinks") for name, _ in backbone.named_parameters())
    capped = sinks or getattr(config, "attn_logit_softcapping", None) is not None
    if not capped and not keeps_weights(backbone.device, dropout):
        return 0
    return config.num_hidden_layers * config.num_attention_heads * (_CAPPED if capped else _WEIGHT)


def memory_for(device: torch.device, memory_gb: float | None = None) -> float:
    """Return the bytes that a step may take: those asked for, or a quarter of the free memory."""
    return _free_bytes(device) * SHARE if memory_gb is None else memory_gb * 1e9


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() // distributed.local_world_size()


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that are free, in this container if it has a limit.

    ``root`` is where the file systems of the kernel are.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: assume that half of the memory is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    groups = root / "sys/fs/cgroup"
    for name in _groups_of_process(root):
        try:
            limit = int((groups / name / "memory.max").read_text())
            used = int((groups / name / "memory.current").read_text())
            parts = (groups / name / "memory.stat").read_text().splitlines()
            cached = dict(part.split() for part in parts).get("inactive_file", "0")
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        free = min(free, max(0, limit - used + int(cached)))
    return free


def _groups_of_process(root: Path) -> list[str]:
    """Return the control groups (version 2) that this process belongs to, the innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    inner = next((line[len("0::/") :] for line in lines if line.startswith("0::/")), "")
    path = Path(inner)
    return [str(each) for each in (path, *path.parents)]
