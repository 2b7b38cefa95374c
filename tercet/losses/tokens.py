"""Cross entropy over a vocabulary, only at the places that are predicted.

A block of places holds its whole rows of logits, so its loss and all its gradients are computed at
once and the block is dropped: there is never a matrix of all tokens and the vocabulary.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tercet.losses.info_nce import block_bytes, finished


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Turns a state into a logit for each token: ``cap(scale * (state @ weight.T + bias))``.

    ``softcap`` c maps a logit x to c * tanh(x / c), as Gemma 2 does (arXiv 2408.00118, sec. 2).
    """

    weight: Float[Tensor, "vocabulary hidden"]
    bias: Float[Tensor, "vocabulary"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, states: Float[Tensor, "places hidden"]) -> Float[Tensor, "places vocabulary"]:
        """Return the logits in at least float32; the product is in the dtype of ``states``."""
        logits = F.linear(states, self.weight.to(states.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def next_token_loss(
    states: Float[Tensor, "places hidden"],
    tokens: Int[Tensor, "places"],
    head: Head,
    *,
    total: int,
    block: int | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the sum of -log softmax(head(state))[token] over ``total``, and the number of hits.

    ``total`` counts the places of the whole batch, of which this may be a part. A place is a hit if
    its largest logit is that of its token. ``block`` is the number of places held at a time; it
    changes memory, not the result.
    """
    at_once = block or max(1, block_bytes(states.device) // (4 * len(head.weight)))
    sweep = _TokenSweep(states, head, total)
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        for start in range(0, len(states), at_once):
            sweep.add(slice(start, start + at_once), tokens)
    inputs = [states, head.weight, *([] if head.bias is None else [head.bias])]
    gradients = [sweep.by_states, sweep.by_weight, *([] if head.bias is None else [sweep.by_bias])]
    return finished(sweep.loss, inputs, gradients), sweep.right


class _TokenSweep:
    """The running sums of a loss over blocks of places."""

    def __init__(self, states: Tensor, head: Head, total: int) -> None:
        wide = torch.promote_types(states.dtype, torch.float32)
        learns = torch.is_grad_enabled()
        device = states.device.type
        autocast = torch.is_autocast_enabled(device)
        product = torch.get_autocast_dtype(device) if autocast else states.dtype
        weight = head.weight.detach().to(product)  # once, not for each block
        self.states, self.head = states.detach().to(product), replace(head, weight=weight)
        self.total = total
        self.loss = states.new_zeros((), dtype=wide)
        self.right = states.new_zeros((), dtype=torch.int64)
        self.by_states = torch.empty_like(states) if learns and states.requires_grad else None
        trained = learns and head.weight.requires_grad
        self.by_weight = torch.zeros_like(head.weight) if trained else None
        with_bias = head.bias is not None and learns and head.bias.requires_grad
        self.by_bias = torch.zeros_like(head.bias) if with_bias else None  # pyright: ignore

    def add(self, places: slice, tokens: Tensor) -> None:
        """Add a block's share of the loss and of the gradients."""
        states, wanted = self.states[places], tokens[places, None]
        logits = self.head.logits(states)
        self.right += (logits.argmax(1, keepdim=True) == wanted).sum()
        norm = logits.logsumexp(1, keepdim=True)
        self.loss += (norm - logits.gather(1, wanted)).sum() / self.total
        if self.by_states is None and self.by_weight is None and self.by_bias is None:
            return
        steep = self._derivative(logits)
        slope = logits.sub_(norm).exp_()  # softmax, and from here the gradient by the logits
        slope.scatter_add_(1, wanted, slope.new_full((1, 1), -1.0).expand_as(wanted))
        slope *= steep / self.total
        narrow = slope.to(states.dtype)
        if self.by_states is not None:
            self.by_states[places] = narrow @ self.head.weight
        if self.by_weight is not None:
            self.by_weight += narrow.T @ states
        if self.by_bias is not None:
            self.by_bias += slope.sum(0)

    def _derivative(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of a logit by its product of state and weight."""
        if self.head.softcap is None:
            return self.head.scale
        return self.head.scale * (1 - (logits / self.head.softcap).square())
