"""The forward of BERT-like networks as plain calls on a row of tokens.

A text of a few words needs 3 ms of matrix products in MiniLM, and calling the modules around them
takes longer. So networks of BERT's form (BERT, RoBERTa, XLM-RoBERTa) have their layers written out
here. The operations are the same, so states are equal to those of the modules, bit by bit, but for
products of a few rows in bfloat16.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import BertModel, RobertaModel, XLMRobertaModel
from transformers.activations import ACT2CLS

from tercet.models.network.attention import Layout, attend

_KINDS = (BertModel, RobertaModel, XLMRobertaModel)
_ACTIVATIONS = tuple(each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values())

_Call = Callable[[Tensor], Tensor]


class _Layer(NamedTuple):
    """What one layer calls."""

    attention: nn.Module
    query: _Call
    key: _Call
    value: _Call
    output: _Call
    attention_norm: _Call
    up: _Call
    activation: _Call
    down: _Call
    norm: _Call


class DirectForward:
    """The forward of one network in inference mode, whose modules and parameters stay the same."""

    def __init__(self, model: Any) -> None:
        embeddings = model.embeddings
        self._words, self._types, self._places = (
            table.weight
            for table in (
                embeddings.word_embeddings,
                embeddings.token_type_embeddings,
                embeddings.position_embeddings,
            )
        )
        self._norm = _norm(embeddings.LayerNorm)
        self._layers = [_layer(layer) for layer in model.encoder.layer]

    @staticmethod
    def of(model: nn.Module) -> "DirectForward | None":
        """Return the forward of a network; None if its form is not exactly BERT's."""
        return DirectForward(model) if _is_usual(model) else None

    def __call__(
        self, ids: Int[Tensor, "tokens"], places: Int[Tensor, "tokens"], layout: Layout
    ) -> Float[Tensor, "tokens hidden"]:
        """Return the states after the last layer."""
        x = F.embedding(ids, self._words) + self._types[0] + F.embedding(places, self._places)
        x = self._norm(x)
        for layer in self._layers:
            attention: Any = layer.attention
            heads = (1, len(x), -1, attention.attention_head_size)
            q, k, v = (
                call(x).view(heads).transpose(1, 2)
                for call in (layer.query, layer.key, layer.value)
            )
            found, _ = attend(attention, q, k, v, layout=layout, scaling=attention.scaling)
            x = layer.attention_norm(layer.output(found.reshape(len(x), -1)) + x)
            x = layer.norm(layer.down(layer.activation(layer.up(x))) + x)
        return x


def _layer(layer: Any) -> _Layer:
    attention, output = layer.attention.self, layer.attention.output
    return _Layer(
        attention,
        _linear(attention.query),
        _linear(attention.key),
        _linear(attention.value),
        _linear(output.dense),
        _norm(output.LayerNorm),
        _linear(layer.intermediate.dense),
        layer.intermediate.intermediate_act_fn.forward,
        _linear(layer.output.dense),
        _norm(layer.output.LayerNorm),
    )


def _linear(layer: nn.Linear) -> _Call:
    if "forward" in layer.__dict__:  # another kernel
        return layer.forward
    weight, bias = layer.weight, layer.bias
    if weight.dtype == torch.bfloat16:  # faster this way round, for few rows
        column = bias[:, None]
        return lambda x: torch.addmm(column, weight, x.t()).t().contiguous()
    return lambda x: F.linear(x, weight, bias)


def _norm(norm: nn.LayerNorm) -> _Call:
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)


def _is_usual(model: nn.Module) -> bool:
    """Whether every module is the stock one, without hooks, and the network is an encoder."""
    if type(model) not in _KINDS or model.config.is_decoder:  # pyright: ignore
        return False
    return all(map(_is_stock, model.modules()))


def _is_stock(module: nn.Module) -> bool:
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if kind in (nn.Linear, *_ACTIVATIONS):  # called by their forward, which may be replaced
        return True
    known = kind.__module__.startswith(("torch.nn.modules.", "transformers."))
    return known and "forward" not in module.__dict__
