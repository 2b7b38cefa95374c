"""More positions for encoders with a learned table of positions, so that they read longer texts.

The extended table is to be trained on long texts. How BGE-M3's was made, from 512 to 8,192 tokens,
the paper does not say (arXiv 2402.03216).
"""

import inspect
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tercet.errors import ModelError, RecipeError
from tercet.models.network.backbone import Backbone, probe

Fill: TypeAlias = Literal["cyclic", "interpolated"]
"""Repeat the old positions from the first, or stretch them over the new length."""

_BUFFERS: Final = ("position_ids", "token_type_ids")  # one number a place, where there are any


@torch.no_grad()
def extend_positions(backbone: Backbone, max_tokens: int, *, fill: Fill = "cyclic") -> None:
    """Extend the backbone's table of positions to texts of ``max_tokens``, in place.

    With ``cyclic``, texts that were short enough before keep their states to the last bit. Call it
    before an optimizer is made. The config is changed too, so a saved folder is an ordinary one.

    Raises:
        RecipeError: if the table is long enough already, or ``fill`` is unknown.
        ModelError: if the model has no such table: rotary positions need none.
    """
    if fill not in get_args(Fill):
        raise RecipeError(f"fill must be one of {', '.join(get_args(Fill))}; got {fill!r}")
    name, layer = type(backbone.model).__name__, _layer_with_table(backbone.model)
    if layer is None:
        raise ModelError(
            f"{name}: has no table of positions to extend; if they are rotary, raise the limit, "
            "max_position_embeddings, in its config.json"
        )
    if max_tokens <= backbone.max_tokens:
        raise RecipeError(
            f"{name}: max_tokens must be above the present {backbone.max_tokens}; got {max_tokens}"
        )
    old, unused = layer.position_embeddings, backbone.position_offset
    rows = torch.cat([old.weight[:unused], _filled(old.weight[unused:], max_tokens, fill)])
    layer.position_embeddings = _as(old, rows)
    for buffer in _BUFFERS:
        if isinstance(getattr(layer, buffer, None), Tensor):
            setattr(layer, buffer, _longer(getattr(layer, buffer), len(rows), buffer))
    backbone.config.get_text_config().max_position_embeddings = len(rows)
    probe(backbone)


def input_layer(backbone: Backbone) -> Any | None:
    """Return the module that adds positions to embeddings and normalizes them, as BERT's; or None.

    It is called with ``inputs_embeds`` and ``position_ids``.
    """
    layer = _layer_with_table(backbone.model)
    takes = () if layer is None else inspect.signature(layer.forward).parameters
    return layer if {"inputs_embeds", "position_ids"} <= set(takes) else None


def _layer_with_table(model: nn.Module) -> Any | None:
    found = (getattr(module, "position_embeddings", None) for module in model.modules())
    tables = zip(model.modules(), found, strict=True)
    return next((module for module, table in tables if isinstance(table, nn.Embedding)), None)


def _filled(
    rows: Float[Tensor, "places hidden"], count: int, fill: Fill
) -> Float[Tensor, "more hidden"]:
    if fill == "cyclic":
        return rows[torch.arange(count, device=rows.device) % len(rows)]
    wide = rows.T[None].to(torch.promote_types(rows.dtype, torch.float32))
    stretched = F.interpolate(wide, count, mode="linear", align_corners=True)
    return stretched[0].T.to(rows.dtype)


def _as(old: nn.Embedding, rows: Tensor) -> nn.Embedding:
    """Return a table with these rows that is otherwise like the old one."""
    table = nn.Embedding(len(rows), rows.shape[1], old.padding_idx, _weight=rows.contiguous())
    table.weight.requires_grad_(old.weight.requires_grad)
    return table.train(old.training)


def _longer(buffer: Tensor, size: int, name: str) -> Tensor:
    """Return a longer buffer, [1, places]: the places themselves, or token types of zero."""
    if name == "position_ids":
        return torch.arange(size, device=buffer.device).expand(1, -1)
    return buffer.new_zeros(1, size)
