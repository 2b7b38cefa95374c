"""Pooling: from one hidden state per token to one vector per text.

A pooling is any function with the signature of :func:`mean`. Each uses the pooled tokens only; a
text without one (an empty text after an instruction) is pooled over all of its tokens.
"""

from typing import Final, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tercet import segments
from tercet.models.choices import PoolingName
from tercet.segments import Packed


@runtime_checkable
class Pooling(Protocol):
    """The signature of a pooling."""

    def __call__(
        self, hidden: Float[Tensor, "tokens hidden"], texts: Packed
    ) -> Float[Tensor, "texts hidden"]:
        """Return one vector per text, in at least float32."""
        ...


def mean(hidden: Float[Tensor, "tokens hidden"], texts: Packed) -> Float[Tensor, "texts hidden"]:
    """Average over the pooled tokens, summed in float32."""
    return _weighted(hidden, texts, _counted(texts).unsqueeze(1))


def weighted_mean(
    hidden: Float[Tensor, "tokens hidden"], texts: Packed, *, from_start: bool = False
) -> Float[Tensor, "texts hidden"]:
    """Average with weight j for the j-th pooled token (SGPT, arXiv 2202.08904, sec. 3.1).

    For causal models: later tokens have read more of the text. ``from_start`` counts all tokens of
    a text, as sentence-transformers does, not only those that are pooled.
    """
    counted = _counted(texts)
    running = (torch.ones_like(counted) if from_start else counted).cumsum(0)
    before = torch.cat([running.new_zeros(1), running])[texts.offsets[:-1]]
    place = (running - before[segments.row_of(texts.offsets, counted)]) * counted
    return _weighted(hidden, texts, place.unsqueeze(1))


def first(hidden: Float[Tensor, "tokens hidden"], texts: Packed) -> Float[Tensor, "texts hidden"]:
    """Return the first pooled token: BERT's ``[CLS]`` unless an instruction is left out."""
    tokens = torch.arange(len(texts.ids), device=texts.ids.device)
    place = torch.where(_counted(texts) > 0, tokens, len(texts.ids))
    return _picked(hidden, place, texts, "amin")


def last(hidden: Float[Tensor, "tokens hidden"], texts: Packed) -> Float[Tensor, "texts hidden"]:
    """Return the last pooled token, such as a decoder's end-of-text token."""
    tokens = torch.arange(len(texts.ids), device=texts.ids.device)
    return _picked(hidden, torch.where(_counted(texts) > 0, tokens, -1), texts, "amax")


def cls_mean(
    hidden: Float[Tensor, "tokens hidden"], texts: Packed, every: int
) -> Float[Tensor, "texts hidden"]:
    """Average over the CLS tokens that ``Form.cls_every`` put before each ``every`` tokens (MCLS).

    With one of them it is what :func:`first` gives (arXiv 2402.03216, sec. 3.4). They are found by
    place and id, since a text may hold the same token elsewhere. All count, whatever is pooled.
    """
    host = texts.host
    owner = segments.row_of(host.offsets)
    begin = host.offsets[:-1][owner]
    at_start = (host.places % (every + 1) == 0) & (host.ids == host.ids[begin])  # or at an end
    (chosen,) = at_start.nonzero(as_tuple=True)
    counts = segments.total(at_start.unsqueeze(1).float(), host.offsets)
    wide = hidden[segments.moved(chosen, hidden.device)]
    wide = wide.to(torch.promote_types(hidden.dtype, torch.float32))
    zeros = wide.new_zeros(len(texts), hidden.shape[1])
    owner, counts = (segments.moved(x, hidden.device) for x in (owner[chosen], counts))
    return zeros.index_add(0, owner, wide) / counts


POOLINGS: Final[dict[PoolingName, Pooling]] = {
    "mean": mean,
    "weighted_mean": weighted_mean,
    "first": first,
    "last": last,
}


def _counted(texts: Packed) -> Float[Tensor, "tokens"]:
    """Return 1 for each pooled token, and for all tokens of a text that has none."""
    pooled = texts.pooled.to(torch.float32)
    if bool(texts.host.pooled.all()):
        return pooled
    some = segments.total(pooled.unsqueeze(1), texts.offsets).squeeze(1) > 0  # [texts]
    return torch.where(some[segments.row_of(texts.offsets, pooled)], pooled, 1.0)


def _weighted(
    hidden: Float[Tensor, "tokens hidden"], texts: Packed, weights: Float[Tensor, "tokens 1"]
) -> Float[Tensor, "texts hidden"]:
    sums = segments.total(
        hidden.to(torch.promote_types(hidden.dtype, torch.float32)) * weights, texts.offsets
    )
    return sums / segments.total(weights, texts.offsets)


def _picked(
    hidden: Float[Tensor, "tokens hidden"],
    place: Int[Tensor, "tokens"],
    texts: Packed,
    best: Literal["amin", "amax"],
) -> Float[Tensor, "texts hidden"]:
    start = place.new_full((len(texts),), len(place) if best == "amin" else -1)
    token = start.scatter_reduce(0, segments.row_of(texts.offsets, place), place, best)
    return hidden[token].to(torch.promote_types(hidden.dtype, torch.float32))
