"""The attention to fixed latents as two products, and how long such a short cut may be kept.

Keys and values of a latent attention hang on parameters alone. So what turns a state into scores,
and weights into a state, can be multiplied out once: one matrix each for all heads. It is exact,
and for wide heads it is several times less work a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

T = TypeVar("T")

_SAMPLED: Final = 256  # entries of a weight that are compared to see whether it changed


def folding_pays(latents: int, hidden: int, head_size: int) -> bool:
    """Whether the folded form is less work a token and head than cached keys and values."""
    return latents * hidden < head_size * (hidden + latents)


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """``Y = X + sum_h softmax(X' G_h^T + c_h) H_h``, X' the states scaled without weights.

    ``G_h = K_h Wq_h / sqrt(e)`` carries the weight of the queries' norm, and ``c_h`` its bias;
    ``H_h = V_h Wo_h^T``. The heads lie below each other.
    """

    to_scores: Float[Tensor, "entries hidden"]  # entries: the latents of each head
    bias: Float[Tensor, "entries"]
    to_states: Float[Tensor, "entries hidden"]
    latents: int
    eps: float  # of the queries' norm

    def __call__(self, states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """The states, with what they found in the latents added."""
        scaled = F.layer_norm(states, states.shape[-1:], eps=self.eps)
        scores = F.linear(scaled, self.to_scores, self.bias).unflatten(1, (-1, self.latents))
        weights = softmax(scores).to(scores.dtype)  # [tokens, heads, latents]
        return states + weights.flatten(1) @ self.to_states


def softmax(scores: Float[Tensor, "*any latents"]) -> Float[Tensor, "*any latents"]:
    """Weights that sum to one, in at least float32, also under autocast."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


class Kept(Generic[T]):
    """Something that was made from weights, until they change. Copies and pickles begin empty."""

    def __init__(self) -> None:
        self._held: tuple[_Stamp, T] | None = None

    def get(self, weights: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What was made before, or is made now.

        A change is seen by place, dtype and version of a weight, and by a sample of its entries;
        that an entry was set through ``.data``, outside the sample, is not.
        """
        stamp = _Stamp.of(weights)
        held = self._held
        if held is None or not held[0].same_as(stamp):
            self._held = held = (stamp, make())
        return held[1]

    def drop(self) -> None:
        """Make it again at the next call."""
        self._held = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Kept, ()


@dataclass(frozen=True, slots=True, eq=False)
class _Stamp:
    """What tells whether some weights are the same as before."""

    facts: tuple[object, ...]
    sample: Tensor

    @staticmethod
    def of(weights: Sequence[Tensor]) -> "_Stamp":
        """Fused optimizers change a weight without counting up its version, so look inside too."""
        facts = tuple((w.data_ptr(), _version(w), w.dtype, w.device) for w in weights)
        return _Stamp(facts, torch.cat([_sample(weight) for weight in weights]))

    def same_as(self, other: "_Stamp") -> bool:
        return self.facts == other.facts and torch.equal(self.sample, other.sample)


def _version(weight: Tensor) -> int | None:
    """How often it was changed in place; unknown of one that was made in inference mode."""
    return None if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> Tensor:
    """Some hundred entries, in all columns: an optimizer's step moves nearly all."""
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLED) | 1].float()
