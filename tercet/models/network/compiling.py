"""Compiled layers: torch joins the small operations of each layer into few kernels."""

import torch
from transformers import AttentionInterface

from tercet.models.network.attention import NAME, attend
from tercet.models.network.backbone import Backbone
from tercet.models.network.checkpointing import layers_of


def compile_layers(backbone: Backbone) -> int:
    """Compile each layer with torch.compile, for rows of any number of tokens; return their number.

    Attention stays outside, since it depends on where texts begin. Dropout draws the numbers that
    it draws without compilation, so a chunk that is embedded twice has the same masks. Copies for
    inference are not compiled. Compilation takes about a minute when the first chunk runs.
    """
    import torch._inductor.config as inductor  # slow to import

    AttentionInterface.register(NAME, torch.compiler.disable(attend))
    inductor.fallback_random = True
    layers = layers_of(backbone)
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
