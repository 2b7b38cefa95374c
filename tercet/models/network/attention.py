"""Attention inside each text of a packed row: one function, registered with transformers.

An unmodified transformers model calls it in every layer. The row of tokens is cut where texts
begin, so only the future (when causal) and what lies outside a sliding window are masked.

Training in 16 bits, also under autocast, uses fused kernels, which do not keep attention weights.
They have no dropout, so the dropout that a model usually puts on its attention weights is left out
there. On a GPU one kernel for rows of varying length does the whole row at once. Where it cannot
run (float32, soft-capped scores, sinks, dropout that was asked for, a card before compute
capability 8) texts are attended in groups: those of one length without a mask, and on a GPU those
of similar lengths padded, where that costs less than one call more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, cached_property
from inspect import signature
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from tercet.errors import ModelError
from tercet.segments import Packed, moved, offsets_of

NAME: Final = "tercet"
KEPT_LENGTH: Final = 512  # longest text whose attention weights are kept for the backward
_PAIRS: Final = 1 << 23  # pairs of tokens of longer texts, whose weights exist at the same time
_WIDEST: Final = 256  # widest head that the kernel for rows of varying length supports
_CAPABILITY: Final = 8  # of the oldest cards that it supports
_CALL: Final = 2e9  # operations that a GPU could do while the host makes one call more (computed)


@dataclass(frozen=True, eq=False)
class Group:
    """Neighbouring texts that are attended together, padded to the length of the longest."""

    lengths: tuple[int, ...]  # no text is longer than the first

    @cached_property
    def longest(self) -> int:
        """The length that the texts are padded to."""
        return self.lengths[0]

    @cached_property
    def tokens(self) -> int:
        """The number of tokens of all texts."""
        return sum(self.lengths)

    @cached_property
    def is_padded(self) -> bool:
        """Whether the texts differ in length."""
        return min(self.lengths) < self.longest


@dataclass(frozen=True, slots=True, eq=False)
class Padding:
    """Where the tokens of a padded group are; places behind a text repeat its last token."""

    token: Int[Tensor, "texts longest"]  # of the group, at each place
    place: Int[Tensor, "tokens"]  # of each token, among texts * longest
    lengths: Int[Tensor, "texts"]


class Layout:
    """Where the texts of a row begin.

    It reaches :func:`attend` as a keyword of the model's forward. Some models do not pass keywords
    on to their attention (StableLM, Nemotron); for these it is ``in_force`` as a context.
    """

    def __init__(
        self,
        texts: Packed,
        *,
        dropout: float | None = None,  # of attention weights in training; None: the model's default
    ) -> None:
        self.dropout = dropout
        self.lengths = texts.lengths
        self.longest = max(self.lengths)
        self._texts = texts
        self._bounds: Tensor | None = None
        self._groups: list[Group] | None = None
        self._paddings: dict[Group, Padding] = {}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Make this the layout of attention that is called without one."""
        before = _IN_FORCE.set(self)
        try:
            yield
        finally:
            _IN_FORCE.reset(before)

    @property
    def bounds(self) -> Int[Tensor, "bounds"]:
        """The first token of each text, and the end of the last one, on the row's device."""
        if self._bounds is None:
            self._bounds = self._texts.offsets.to(torch.int32)
        return self._bounds

    def groups(self, width: int) -> list[Group]:
        """Return the groups of texts for heads that are ``width`` wide together."""
        if self._groups is None:
            on_gpu = self._texts.device.type == "cuda"
            self._groups = list(_groups(self.lengths, _CALL / (4 * width) if on_gpu else 0))
        return self._groups

    def padding(self, group: Group) -> "Padding":
        """Return where the tokens of a padded group are, on the row's device."""
        if group not in self._paddings:
            lengths = torch.tensor(group.lengths)
            inside, ends = torch.arange(group.longest), lengths[:, None]
            begins = offsets_of(lengths)[:-1, None]
            token = begins + torch.minimum(inside, ends - 1)
            place = (inside < ends).flatten().nonzero()[:, 0]
            parts = (moved(each, self._texts.device) for each in (token, place, lengths))
            self._paddings[group] = Padding(*parts)
        return self._paddings[group]


def _groups(lengths: Sequence[int], spare: float | int) -> Iterator[Group]:
    """Cut a row of texts where a longer one comes, or padding would cost more than one call.

    ``spare`` is how many more pairs of tokens than those of its texts a group may have. Texts
    longer than ``KEPT_LENGTH`` are not padded, since their mask would be large.
    """
    low, added = 0, 0
    for text, length in enumerate(lengths):
        added += lengths[low] ** 2 - length**2
        room = spare if lengths[low] <= KEPT_LENGTH else 0
        if added > room or length > lengths[low]:
            yield Group(tuple(lengths[low:text]))
            low, added = text, 0
    yield Group(tuple(lengths[low:]))


_IN_FORCE: Final[ContextVar[Layout | None]] = ContextVar("layout", default=None)


def layout_in_force() -> Layout | None:
    """Return the layout of attention that is called without one."""
    return _IN_FORCE.get()


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which tokens of a text attend to which, and how scores become weights."""

    causal: bool
    limit: int | None  # tokens see each other at distances below this
    scale: float | None
    dropout: float
    softcap: float | None = None
    sinks: Tensor | None = None  # a learned logit for each head that takes weight from all tokens


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kv_heads tokens width"],
    value: Float[Tensor, "1 kv_heads tokens v_width"],
    attention_mask: object = None,
    *,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "1 tokens heads v_width"], None]:
    """Attend inside each text; every layer of a packed model calls this.

    ``layout`` None takes the one in force. ``options`` are those of transformers: ``scaling``,
    ``dropout``, ``sliding_window``, ``is_causal``, ``softcap``, ``s_aux``.
    """
    layout = layout or _IN_FORCE.get()
    if layout is None:
        raise ModelError(
            f"{type(module).__name__} was called without a layout of texts; "
            "call the model through tercet.models.network.backbone.Backbone"
        )
    rule = _rule_of(module, options, layout.dropout)
    usual = rule.dropout == 0 or layout.dropout is None
    fused = usual and rule.softcap is None and rule.sinks is None
    if fused and module.training and _in_16_bits_on_cpu(query):
        # Torch's kernel has a backward pass in 16 bits that takes 4 times as long as in 32.
        wide = (x.float() for x in (query, key, value))
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        with torch.autocast("cpu", enabled=False):
            states, _ = attend(module, *wide, layout=layout, **options | {"dropout": 0.0})
        return states.to(dtype), None
    if query.is_cuda:
        # Under autocast, rotary positions and norms of heads leave queries and keys in float32.
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        q, k, v = (x if dtype is None else x.to(dtype) for x in (query, key, value))
        if _kernel_takes(q, k, v):
            if fused:
                return _attend_row(q, k, v, layout, rule)[None], None
    if len(layout.lengths) == 1:
        return _attend_run(query, key, value, rule).transpose(1, 2), None
    pieces, groups = [], layout.groups(query.shape[1] * query.shape[3])
    sizes = [group.tokens for group in groups]
    rows = zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True)
    for group, (q, k, v) in zip(groups, rows, strict=True):
        if not group.is_padded:
            q, k, v = (x.unflatten(1, (-1, group.longest)).transpose(0, 1) for x in (q, k, v))
            states = _attend_run(q, k, v, rule)  # [texts, heads, length, width]
            pieces.append(states.transpose(1, 2).flatten(0, 1))
        else:
            padding = layout.padding(group)
            q, k, v = (x[:, padding.token].transpose(0, 1) for x in (q, k, v))
            states = _attend_run(q, k, v, rule, padding.lengths)
            pieces.append(states.transpose(1, 2).flatten(0, 1)[padding.place])
    return torch.cat(pieces)[None] if len(pieces) > 1 else pieces[0][None], None


AttentionInterface.register(NAME, attend)  # without a mask: making one waits for the GPU


def _rule_of(module: nn.Module, options: dict[str, Any], dropout: float | None) -> _Rule:
    for name in ("position_bias", "attention_bias", "block_mask"):
        if options.get(name) is not None:
            raise ModelError(f"this model adds {name!r} to its attention, which cannot be packed")
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", False)
    return _Rule(
        causal=bool(causal),
        limit=_window_limit(module, options.get("sliding_window"), bool(causal)),
        scale=options.get("scaling"),
        dropout=options.get("dropout", 0.0) if dropout is None or not module.training else dropout,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )


def _window_limit(module: nn.Module, sliding_window: int | None, causal: bool) -> int | None:
    """Return the smallest distance that is masked."""
    if sliding_window is None:
        return None
    config: Any = module.config
    # Masks of transformers exclude the distance sliding_window when causal, and include it when
    # bidirectional; Gemma 3's own bidirectional switch has made its window exclusive already.
    if causal or getattr(config, "use_bidirectional_attention", False):
        return sliding_window
    return config.sliding_window + 1


def _attend_run(
    q: Float[Tensor, "texts heads length width"],
    k: Float[Tensor, "texts kv_heads length width"],
    v: Float[Tensor, "texts kv_heads length v_width"],
    rule: _Rule,
    lengths: Int[Tensor, "texts"] | None = None,
) -> Float[Tensor, "texts heads length v_width"]:
    """Attend in texts of one length; weights that a long one would keep are computed again.

    With ``lengths`` the texts are padded, and what is behind a text is not seen.
    """
    explicit = rule.softcap is not None or rule.sinks is not None
    length = q.shape[2]
    if length <= KEPT_LENGTH or not (explicit or keeps_weights(q.device, rule.dropout)):
        return _attend_equal(q, k, v, rule, lengths)
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    step = max(1, _PAIRS // (len(q) * group * length**2))  # also without a graph: one dropout
    pieces = []
    for low in range(0, kv_heads, step):
        own, shared = slice(low * group, (low + step) * group), slice(low, low + step)
        sinks = None if rule.sinks is None else rule.sinks[own]
        given = q[:, own], k[:, shared], v[:, shared], replace(rule, sinks=sinks), lengths
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_attend_equal, *given, use_reentrant=False))
        else:
            pieces.append(_attend_equal(*given))
    return torch.cat(pieces, dim=1)


def _in_16_bits_on_cpu(states: Tensor) -> bool:
    half = torch.is_autocast_enabled("cpu") or states.dtype in (torch.float16, torch.bfloat16)
    return half and states.device.type == "cpu"


def keeps_weights(device: torch.device, dropout: float) -> bool:
    """Whether attention weights of all pairs are kept: CPU kernels do not support dropout."""
    return device.type == "cpu" and dropout > 0


def _attend_equal(
    q: Float[Tensor, "texts heads length width"],
    k: Float[Tensor, "texts kv_heads length width"],
    v: Float[Tensor, "texts kv_heads length v_width"],
    rule: _Rule,
    lengths: Int[Tensor, "texts"] | None = None,
) -> Float[Tensor, "texts heads length v_width"]:
    """Attend in texts of one length; a mask is needed only if a window or padding cuts them."""
    length = q.shape[2]
    cut = lengths is not None or (rule.limit is not None and length > rule.limit)
    mask = _seen(length, rule, lengths, q.device) if cut else None
    if rule.softcap is not None or rule.sinks is not None:
        return _attend_explicit(q, k, v, mask, rule)
    if q.is_cuda and k.shape[1] != q.shape[1]:
        # For shared keys a GPU has two kernels: one takes no masks, the other keeps all scores.
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=rule.causal and mask is None,
        scale=rule.scale,
        dropout_p=rule.dropout,
        enable_gqa=k.shape[1] != q.shape[1],
    )


def _seen(
    length: int, rule: _Rule, lengths: Int[Tensor, "texts"] | None, device: torch.device
) -> Bool[Tensor, "*texts length length"]:
    """Return which tokens see which: inside the window, and inside the text if texts are padded."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    limit = rule.limit or length
    seen = (distance < limit) & (distance >= 0 if rule.causal else distance > -limit)
    if lengths is None:
        return seen
    inside = (place < lengths[:, None])[:, None, None]  # [texts, 1, 1, length]
    return seen & (inside | (distance == 0))  # a place behind a text sees itself: finite weights


def _attend_explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: _Rule) -> Tensor:
    """Attend by the plain formula, for models with soft-capped scores (Gemma 2) or sinks."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scale = q.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    scores = q @ k.transpose(-1, -2) * scale  # [texts, heads, length, length]
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is None and rule.causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(v.dtype), rule.dropout, training=rule.dropout > 0) @ v


def _kernel_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel for rows of varying length takes these types and widths on this card."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    width = q.shape[-1]
    fits = width == v.shape[-1] and kernel_takes_width(width)
    return fits and kernel_runs_on(q.device)


def kernel_takes_width(width: int) -> bool:
    """Whether the kernel for rows of varying length takes heads of this width."""
    return width % 8 == 0 and width <= _WIDEST


@cache
def kernel_runs_on(device: torch.device) -> bool:
    """Whether the kernel for rows of varying length runs on a device, in 16 bits."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _CAPABILITY


@cache
def _kernel_asks_for_groups() -> bool:
    """Whether the kernel has a switch for heads that share keys; in torch 2.11 it needs none."""
    return "enable_gqa" in signature(varlen.varlen_attn).parameters


def _attend_row(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: _Rule) -> Tensor:
    """Attend in all texts by one CUDA kernel, whose window is one less than the limit."""
    reach = -1 if rule.limit is None else rule.limit - 1
    rows, keys, values = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    bounds, longest = layout.bounds, layout.longest
    shared: dict[str, Any] = {"enable_gqa": k.shape[1] != q.shape[1]}
    states = varlen.varlen_attn(
        *(rows, keys, values, bounds, bounds, longest, longest),
        scale=rule.scale,
        window_size=(reach, 0 if rule.causal else reach),
        **(shared if _kernel_asks_for_groups() else {}),
    )
    assert isinstance(states, Tensor)
    return states
