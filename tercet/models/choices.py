"""The choices that make up a model besides its weights: direction, windows, pooling, layers."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from tercet.errors import RecipeError

Attention: TypeAlias = Literal["causal", "bidirectional"]
Window: TypeAlias = Literal["keep", "full"]
PoolingName: TypeAlias = Literal["mean", "weighted_mean", "first", "last"]
WhichLayers: TypeAlias = Literal["first", "even"]
"""Which layers of a network are kept: the first ones, or some at equal distances."""
LayerKind: TypeAlias = Literal["latent", "self_attention"]
LayerInit: TypeAlias = Literal["normal", "identity"]
Activation: TypeAlias = Literal[
    "identity", "tanh", "relu", "gelu", "sigmoid", "silu", "elu", "selu", "softplus", "leaky_relu"
]


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Kind and sizes of a trained layer between backbone and pooling.

    NV-Embed has 512 latents and 8 heads, each as wide as the model (arXiv 2405.17428, sec. 3.1).
    """

    kind: LayerKind = "latent"
    latents: int = 512  # entries of the dictionary; not used by self-attention
    heads: int = 8
    head_size: int | Literal["hidden"] | None = None  # None: hidden / heads, as in a backbone
    init: LayerInit = "normal"  # "identity": leaves the states unchanged until trained

    def __post_init__(self) -> None:
        for name, choices in (("kind", LayerKind), ("init", LayerInit)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise RecipeError(f"no such layer {name}: {getattr(self, name)!r}; choose {known}")
        sizes = {"latents": self.latents, "heads": self.heads, "head_size": self.head_size}
        for name, size in sizes.items():
            if name == "head_size" and size in (None, "hidden"):
                continue
            if type(size) is not int or size < 1:
                raise RecipeError(
                    f"a layer's {name} must be a whole number of at least 1; got {size!r}"
                )

    def size_of_head(self, hidden: int) -> int:
        """Return the width of one head behind a backbone of width ``hidden``.

        Raises:
            RecipeError: if ``head_size`` is None and ``hidden`` is not a multiple of ``heads``.
        """
        if self.head_size == "hidden":
            return hidden
        if self.head_size is not None:
            return self.head_size
        if hidden % self.heads:
            raise RecipeError(
                f"a layer of {self.heads} heads does not share {hidden} columns evenly; give a "
                "head_size, or a number of heads that divides them"
            )
        return hidden // self.heads

    def same_sizes(self, other: "LayerSettings", hidden: int) -> bool:
        """Whether weights of one fit the other, behind a backbone of width ``hidden``."""
        latents = self.kind != "latent" or self.latents == other.latents
        sizes = self.size_of_head(hidden) == other.size_of_head(hidden)
        return latents and sizes and (self.kind, self.heads) == (other.kind, other.heads)


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """A dense layer after the pooling: ``act(W x + b)``, plus x, or a projection of it."""

    width: int  # of its output
    activation: Activation = "identity"
    bias: bool = False
    residual: bool = False  # the input is added, projected if its width is another

    def __post_init__(self) -> None:
        if type(self.width) is not int or self.width < 1:
            raise RecipeError(
                f"a dense layer's width must be a whole number of at least 1; got {self.width!r}"
            )
        if self.activation not in get_args(Activation):
            known = ", ".join(get_args(Activation))
            raise RecipeError(
                f"a dense layer's activation must be one of {known}; got {self.activation!r}"
            )
        for name, value in (("bias", self.bias), ("residual", self.residual)):
            if not isinstance(value, bool):
                raise RecipeError(f"a dense layer's {name} must be true or false; got {value!r}")
