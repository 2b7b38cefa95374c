"""How much memory a training step may take, and how much its graphs and vectors need."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from tercet import distributed
from tercet.kinds import Kind
from tercet.models import devices
from tercet.models.choices import LayerSettings
from tercet.models.embedder import Embedder
from tercet.models.frozen import linear_numbers
from tercet.models.network.attention import KEPT_LENGTH, keeps_weights
from tercet.models.network.backbone import Backbone
from tercet.models.network.checkpointing import recomputable
from tercet.models.network.layers import layers_of
from tercet.segments import Packed
from tercet.sharding import is_sharded, numbers_here
from tercet.training.recipe import Lora, Run

SHARE: Final = 0.25  # of free memory; the rest is for the model's states, files and neighbours
SHARE_OF_GPU: Final = 0.6  # where states are counted; the rest is for one layer, and for gaps
COPIES: Final = 6  # of a batch's vectors: by chunk, joined, in order, as queries; and gradients
_NUMBER: Final = 4  # bytes; vectors are float32 whatever the products are in
_PAIR: Final = 16  # bytes a pair and kind: scores, their softmax and gradients
_WEIGHT: Final = 12  # bytes a head and pair of tokens: attention weights, dropout's mask, both
_CAPPED: Final = 20  # with capped scores or sinks: the scores before and after as well
_STATES: Final = 12  # bytes a trained number: its gradient, and the two moments of AdamW
_IN_HALF: Final = 2  # bytes a number in bfloat16
_SHORT: Final = 128  # tokens of a usual text, for what grows with its length
_LEAST: Final = 256  # tokens of the smallest chunk
_PARTS: Final = 4  # chunks whose graphs fit into a GPU together, so that most are kept
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """What a step may take of the memory, and how a batch is encoded to fit into it."""

    budget: MemoryBudget
    chunk_tokens: int  # encoded together
    recomputed: bool  # whether layers keep only their inputs
    device: torch.device

    def line(self, dtype: str | None) -> str:
        """Describe for people what was chosen."""
        name = str(self.device)
        if self.device.type == "cuda":
            name += f" ({torch.cuda.get_device_name(self.device)})"
        again = ", layers computed again in the backward" if self.recomputed else ""
        return f"{name} in {dtype}, {self.chunk_tokens:,} tokens encoded together{again}"


def step_memory(
    embedder: Embedder, kinds: tuple[Kind, ...], run: Run, *, lora: Lora | None = None
) -> StepMemory:
    """Choose how many tokens are encoded together, and whether layers are computed again.

    What ``run`` sets is taken. Otherwise a GPU gets as many tokens as are worth it for a model of
    this size and as fit into its memory, of which what the optimizer and gradients will take is
    subtracted; a CPU gets ``devices.ON_CPU``. Layers are computed again only where the graph of the
    smallest useful chunk does not fit. ``lora`` is what will still be added to the model. Processes
    whose weights are sharded have to call this together.

    Raises:
        RecipeError: if layers are to be computed again, and the model has no list of them.
    """
    backbone, layer, half = embedder.backbone, embedder.settings.layer, run.dtype == "bfloat16"
    device, on_gpu = run.find_device(), run.find_device().type == "cuda"
    to_come = states_to_come(embedder, run, lora)
    free = max(0.0, devices.free_bytes(device) - to_come)
    room = free * (SHARE_OF_GPU if on_gpu else 1 - SHARE)
    if on_gpu and run.memory_gb is not None:
        room = min(room, run.memory_gb * 1e9)
    if any(map(is_sharded, embedder.parameters())):  # all have to run the same layers again
        room = least_of_all(room)
    has_lora = lora is not None or backbone.has_lora

    def budget_of(*, recomputed: bool) -> MemoryBudget:
        return MemoryBudget(
            total=memory_for(device, run.memory_gb, to_come=to_come),
            token_graph=graph_bytes(
                backbone, layer=layer, half=half, recomputed=recomputed, lora=has_lora
            ),
            pair_graph=0 if recomputed else pair_bytes(backbone, half=half),
            kinds=kinds,
            dim=embedder.dim,
            width=embedder.heads.width,
        )

    kept = budget_of(recomputed=False)
    of_token = kept.graph(_SHORT)
    usual = devices.usual_tokens(device, devices.layer_numbers(backbone.model))
    smallest = run.chunk_tokens or min(usual, devices.LEAST_ON_GPU)
    recomputed = run.checkpoint_activations
    if recomputed is None:
        possible = bool(layers_of(backbone)) and not run.compile_layers
        recomputed = possible and smallest * of_token > room
    elif recomputed:
        recomputable(backbone)  # raises
    budget = budget_of(recomputed=True) if recomputed else kept
    if recomputed:  # the graph of one layer is there at a time
        layers = backbone.config.get_text_config().num_hidden_layers
        of_token = budget.graph(_SHORT) + of_token // layers
    chunk = run.chunk_tokens or usual
    if run.chunk_tokens is None and on_gpu:
        fitting = max(room / _PARTS / of_token, min(smallest, room / of_token), _LEAST)
        chunk = devices.power_of_two(min(usual, fitting))
    return StepMemory(budget=budget, chunk_tokens=chunk, recomputed=recomputed, device=device)


def states_to_come(embedder: Embedder, run: Run, lora: Lora | None = None) -> float:
    """Return the bytes of a device that gradients, optimizer and copies of weights will take.

    In bfloat16 each trained weight has a copy for the products while a step is taken, and frozen
    ones of linear layers lose half of their size; neither is so for sharded weights.
    """
    trained = trained_numbers(embedder, lora)
    states = float(_STATES * trained)
    if embedder.device.type != run.find_device().type:  # the weights have still to get there
        states += _NUMBER * sum(map(numbers_here, embedder.parameters()))
    if run.shards_weights:
        parted = any(map(is_sharded, embedder.parameters()))
        return states if parted else states / distributed.world()
    if run.dtype != "bfloat16":
        return states
    frozen = linear_numbers(embedder.backbone.model, frozen=lora is None)
    on_gpu = run.find_device().type == "cuda"  # on a CPU the exact ones stay beside them
    return states + _IN_HALF * (trained - frozen if on_gpu else trained + frozen)


def trained_numbers(embedder: Embedder, lora: Lora | None = None) -> int:
    """Return how many numbers this process trains; with ``lora``, once the model has it."""
    backbone, parts = embedder.backbone.model, list(embedder.children())
    if lora is not None:
        parts.remove(embedder.backbone)
    weights = (p for part in parts for p in part.parameters() if p.requires_grad)
    linear = [m for m in backbone.modules() if lora is not None and isinstance(m, nn.Linear)]
    rank = 0 if lora is None else lora.rank
    return sum(map(numbers_here, weights)) + sum(
        rank * (each.in_features + each.out_features) for each in linear
    )


def graph_bytes(
    backbone: Backbone,
    *,
    layer: LayerSettings | None = None,
    half: bool = False,
    recomputed: bool = False,
    lora: bool | None = None,
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
    if backbone.has_lora if lora is None else lora:
        of_hidden, of_inner = of_hidden + 10, of_inner + 4
    if recomputed:
        of_hidden, of_inner = 1, 0
    numbers = config.num_hidden_layers * (of_hidden * backbone.hidden + of_inner * inner)
    if layer is not None:
        head = layer.size_of_head(backbone.hidden)
        numbers += 24 * backbone.hidden + layer.heads * (3 * head + 2 * layer.latents)
    of_half = 2.0 if backbone.is_decoder else 2.5
    return round(numbers * (of_half if half and not recomputed else 4))


def pair_bytes(backbone: Backbone, *, half: bool = False) -> int:
    """Estimate the bytes that the graph of one token takes for each token of a short text.

    Zero with a fused kernel, which keeps no attention weights. Otherwise they are up to half of a
    graph (measured for multilingual E5 small in bfloat16: 220 of 430 kB, at 128 tokens).
    """
    config = backbone.config.get_text_config()
    dropout = backbone.attention_dropout
    if dropout is None:
        dropout = backbone.usual_dropout - (backbone.dropout_left_out if half else 0)
    changed = backbone.changes_scores
    if not changed and not keeps_weights(backbone.device, dropout):
        return 0
    return config.num_hidden_layers * config.num_attention_heads * (_CAPPED if changed else _WEIGHT)


def memory_for(
    device: torch.device, memory_gb: float | None = None, *, to_come: float = 0.0
) -> float:
    """Return the bytes that a step may take: those asked for, or a share of the free memory.

    ``to_come`` are bytes that a GPU's states will take before; on a CPU the share covers them.
    """
    if memory_gb is not None:
        return memory_gb * 1e9
    free = devices.free_bytes(device)
    return max(0.0, free - to_come) * SHARE_OF_GPU if device.type == "cuda" else free * SHARE


def least_of_all(own: float) -> float:
    """Return the smallest value of all processes."""
    if distributed.world() == 1:
        return own
    return float(distributed.gather_ints(torch.tensor([int(own)])).min())
