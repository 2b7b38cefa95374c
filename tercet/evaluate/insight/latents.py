"""How tokens use the latents of a latent attention layer (arXiv 2405.17428, section 3.1.2).

Two numbers for each head show whether its dictionary is used: how much of it all tokens together
attend to, and how much of it a single token does. Both are shares: the exponential of the entropy,
over the number of latents. If they are equal, all tokens get the same mixture, and the head only
adds a constant.
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
    """The attention of pooled tokens to each latent, by head."""

    mass: Float64[np.ndarray, "heads latents"]  # mean weight over the tokens; a head's sum is 1
    token_entropy: Float64[np.ndarray, "heads"]  # mean over tokens of their weights' entropy, nats
    tokens: int  # number of pooled tokens

    @property
    def entropy(self) -> Float64[np.ndarray, "heads"]:
        """The entropy of the mean weights, in nats; never below ``token_entropy``."""
        return _entropy(self.mass)

    def rows(self) -> dict[str, dict[str, float]]:
        """Return a table with a row for each head, and one for the mean of their weights.

        ``used`` and ``used by a token`` are shares of the dictionary between ``1 / latents`` and 1,
        and ``largest`` is the mass of the most used latent.
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
        """Return the mass of each latent over the largest of its head, most used latents first.

        The layer means are the shares of the dictionary that the heads use.
        """
        order = np.argsort(-self.mass.sum(0), kind="stable")
        scaled = self.mass[:, order] / self.mass.max(1, keepdims=True)
        used = np.exp(self.entropy) / self.mass.shape[1]
        return HeatMap([str(latent) for latent in order], scaled, used)


def latent_use(embedder: Embedder, texts: Sequence[str], role: Role = "document") -> LatentUse:
    """Measure the attention to the latents over the pooled tokens of texts with their prompt.

    Raises:
        ModelError: for a model without a latent attention layer.
        RecipeError: if the texts have no pooled token.
    """
    layer = embedder.layer
    if layer is None or layer.layer.kind != "latent":
        raise ModelError(
            "the model must have a latent attention layer; train one with "
            'layer=Layer(kind="latent")'
        )
    heads, latents = layer.layer.heads, layer.layer.latents
    mass = torch.zeros(heads, latents, dtype=torch.float64)
    entropy, count = torch.zeros(heads, dtype=torch.float64), 0
    with embedder.reading() as reader:
        for step in batch_by_batch(
            reader.backbone,
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
    if not count:
        raise RecipeError(f"{len(texts)} texts have no pooled token; give texts with words")
    return LatentUse((mass / count).numpy(), (entropy / count).numpy(), count)


def _entropy(mass: Float64[np.ndarray, "rows latents"]) -> Float64[np.ndarray, "rows"]:
    return -(mass * np.log(np.where(mass > 0, mass, 1.0))).sum(1)
