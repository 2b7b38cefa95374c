"""What the tokens of some texts take from a trained dictionary (NV-Embed, arXiv 2405.17428).

The paper's idea is that the latents keep what a plain mean dilutes. Two numbers a head show whether
they are looked up at all: how much of the dictionary all tokens together use, and how much of it a
single token does. Both are shares: the exponential of the entropy, over the number of latents. When
each token uses as much as all do, tokens take the same mixture, and the head only adds a constant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float64

from tercet.errors import ModelError, RecipeError
from tercet.evaluate.report.figures import HeatMap, MapLabels
from tercet.models.embedder import Embedder
from tercet.models.encode_loop import batch_by_batch
from tercet.types import Role

LABELS: Final = MapLabels(
    "head", "latent", "attention to a latent, over the largest of its head", "used"
)
_TOKENS_AT_ONCE: Final = 2_048


@dataclass(frozen=True, slots=True, eq=False)
class LatentUse:
    """The attention of pooled tokens to each latent, head by head."""

    mass: Float64[np.ndarray, "heads latents"]  # mean weight over the tokens; a head's sum is 1
    token_entropy: Float64[np.ndarray, "heads"]  # of one token's weights, their mean; in nats
    tokens: int  # that were looked at

    @property
    def entropy(self) -> Float64[np.ndarray, "heads"]:
        """Of the weights of all tokens together, in nats; never below ``token_entropy``."""
        return _entropy(self.mass)

    def rows(self) -> dict[str, dict[str, float]]:
        """A table: a row for each head, and one for the mean of their weights.

        ``used`` and ``used by a token`` are shares of the dictionary between ``1 / latents`` and 1,
        and ``largest`` is the mass of the latent that most is taken of.
        """
        mass = np.concatenate([self.mass, self.mass.mean(0, keepdims=True)])
        of_a_token = np.append(self.token_entropy, self.token_entropy.mean())
        names = [*(f"head {head + 1}" for head in range(len(self.mass))), "all heads"]
        columns = {
            "entropy": _entropy(mass),
            "entropy of a token": of_a_token,
            "used": np.exp(_entropy(mass)) / mass.shape[1],
            "used by a token": np.exp(of_a_token) / mass.shape[1],
            "largest": mass.max(1),
        }
        return {
            name: {column: float(values[row]) for column, values in columns.items()}
            for row, name in enumerate(names)
        }

    def heat_map(self) -> HeatMap:
        """Heads upwards, latents to the right, those that most is taken of first.

        A number is the mass over the largest of its head, since shares of hundreds of latents would
        all look alike; beside the map, the share of the dictionary that the head uses.
        """
        order = np.argsort(-self.mass.sum(0), kind="stable")
        scaled = self.mass[:, order] / self.mass.max(1, keepdims=True)
        used = np.exp(self.entropy) / self.mass.shape[1]
        return HeatMap([str(latent) for latent in order], scaled, used)


def latent_use(embedder: Embedder, texts: Sequence[str], role: Role = "document") -> LatentUse:
    """What the pooled tokens of these texts, after the model's own prompt, take of the latents.

    Raises:
        ModelError: for a model without a latent attention layer.
        RecipeError: when there is no token to look at.
    """
    layer = embedder.layer
    if layer is None or layer.layer.kind != "latent":
        raise ModelError(
            "the model has no latent attention layer, so there are no latents to look at; train "
            'one with layer=Layer(kind="latent")'
        )
    heads, latents = layer.layer.heads, layer.layer.latents
    mass = torch.zeros(heads, latents, dtype=torch.float64)
    entropy, count = torch.zeros(heads, dtype=torch.float64), 0
    training = embedder.training
    embedder.eval()
    try:
        with torch.inference_mode():
            for step in batch_by_batch(
                embedder.backbone,
                embedder.device,
                texts,
                lambda part: embedder.tokenize(part, role),
                embedder.batch_tokens,
            ):
                for states in step.states[step.texts.pooled].split(_TOKENS_AT_ONCE):
                    weights = layer.latent_weights(states)  # [heads, tokens, latents]
                    mass += weights.sum(1, dtype=torch.float64).cpu()
                    entropy += torch.special.entr(weights).sum((1, 2), dtype=torch.float64).cpu()
                    count += len(states)
    finally:
        embedder.train(training)
    if not count:
        raise RecipeError(f"{len(texts)} texts have no token that is pooled; give texts with words")
    return LatentUse((mass / count).numpy(), (entropy / count).numpy(), count)


def _entropy(mass: Float64[np.ndarray, "rows latents"]) -> Float64[np.ndarray, "rows"]:
    return -(mass * np.log(np.where(mass > 0, mass, 1.0))).sum(1)
