"""How many activations may be kept for the backward pass."""

import os
from typing import Final

import torch

from tercet import distributed
from tercet.nn.backbone import Backbone
from tercet.nn.layer import Layer

SHARE: Final = 0.5  # of free memory


def graph_tokens_that_fit(
    backbone: Backbone,
    memory_gb: float | None = None,
    *,
    layer: Layer | None = None,
    half: bool = False,
) -> int:
    """Tokens whose graphs fit into ``memory_gb``, or into half of the memory that is free now.

    An estimate by the widths of the layers, on the safe side: 221 kB a token for MiniLM in
    float32, where 170 kB were measured; for four layers of SmolLM2 in bfloat16 132 kB (127), and
    225 kB (204) with low-rank updates, whose dropout keeps inputs a second time. What is beyond it
    is encoded a second time, so a wrong estimate costs time or memory, never a different gradient.
    """
    free = _free_bytes(backbone.device) * SHARE if memory_gb is None else memory_gb * 1e9
    config = backbone.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * backbone.hidden
    of_hidden, of_inner = (16, 5) if backbone.is_decoder else (12, 3)  # gated, more norms
    if backbone.has_lora:
        of_hidden, of_inner = of_hidden + 10, of_inner + 4
    numbers = config.num_hidden_layers * (of_hidden * backbone.hidden + of_inner * inner)
    if layer is not None:
        head = layer.size_of_head(backbone.hidden)
        numbers += 24 * backbone.hidden + layer.heads * (3 * head + 2 * layer.latents)
    return int(free / (numbers * (2 if half else 4)))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024 // distributed.beside()
    except (OSError, KeyError):  # not Linux: assume that half of the memory is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
