"""Activation checkpointing: layers that are computed again in the backward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tercet.errors import RecipeError
from tercet.models.network.attention import layout_in_force
from tercet.models.network.backbone import Backbone
from tercet.models.network.layers import layers_of


def recomputable(backbone: Backbone) -> list[nn.Module]:
    """Return the layers that :func:`recomputed` can run again.

    Raises:
        RecipeError: if the model has no such list.
    """
    layers = layers_of(backbone)
    if not layers:
        raise RecipeError(
            f"{type(backbone.model).__name__} has no list of layers to compute again; "
            "leave checkpoint_activations out"
        )
    return layers


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Keep only each layer's input for the backward, and run the layer again there.

    It costs one more forward, with the same dropout masks and the same gradient. Per token, a layer
    then keeps only its input state until the backward reaches it.
    """
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def _recomputed(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    layout = layout_in_force()  # during the backward it is no longer in force

    def run(*given: Any, **named: Any) -> Any:
        with nullcontext() if layout is None else layout.in_force():
            return forward(*given, **named)

    return checkpoint(run, *given, use_reentrant=False, **named)
