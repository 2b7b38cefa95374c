"""Dense layers between pooling and normalization: ``act(W x + b)``, one after the other.

They are those of sentence-transformers, whose names and files they have. LaBSE ends with one,
EmbeddingGemma with two.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tercet.errors import ModelError
from tercet.models.choices import Activation, DenseSettings
from tercet.models.network.loading import Shapes, loading, misfits, shapes_of

WEIGHTS: Final = "model.safetensors"
OLD_WEIGHTS: Final = "pytorch_model.bin"
# With the parameters that torch gives them: the files name the function alone.
ACTIVATIONS: Final[dict[Activation, Callable[[Tensor], Tensor]]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
}


class DenseLayer(nn.Module):
    """One layer. A new one rotates or projects: its weight is orthogonal, its bias zero."""

    def __init__(self, settings: DenseSettings, inner: int) -> None:
        super().__init__()
        self.settings, width = settings, settings.width
        self.linear = nn.Linear(inner, width, bias=settings.bias)
        projected = settings.residual and inner != width
        self.residual = nn.Linear(inner, width, bias=False) if projected else None
        for linear in filter(None, (self.linear, self.residual)):
            nn.init.orthogonal_(linear.weight)
        if settings.bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "texts inner"]) -> Float[Tensor, "texts width"]:
        """Return the layer's output, multiplied in at least float32."""
        out = ACTIVATIONS[self.settings.activation](_product(self.linear, x))
        if not self.settings.residual:
            return out
        return out + (x if self.residual is None else _product(self.residual, x))


class DenseLayers(nn.ModuleList):
    """The dense layers of a model in order, perhaps none; ``inner`` is the width of the input."""

    def __init__(self, inner: int, layers: Sequence[DenseSettings] = ()) -> None:
        super().__init__()
        self.inner = inner
        self.drawn: tuple[int, ...] = ()  # new layers, by their place
        for layer in layers:
            self.add(layer)

    @property
    def width(self) -> int:
        """The width of what they return."""
        return self.settings[-1].width if len(self) else self.inner

    @property
    def settings(self) -> tuple[DenseSettings, ...]:
        """What describes each of them."""
        return tuple(layer.settings for layer in self if isinstance(layer, DenseLayer))

    def add(self, layer: DenseSettings, weights: dict[str, Tensor] | None = None) -> None:
        """Append a layer with these weights, or a new one."""
        if weights is None:
            self.drawn = (*self.drawn, len(self))
            self.append(DenseLayer(layer, self.width))
            return
        with torch.device("meta"):  # no random weights that are thrown away at once
            made = DenseLayer(layer, self.width)
        made.load_state_dict(weights, assign=True)
        self.append(made)

    def forward(self, vectors: Float[Tensor, "texts inner"]) -> Float[Tensor, "texts width"]:
        """Return the vectors after all layers, also under autocast in at least float32."""
        if not len(self):
            return vectors
        with torch.autocast(vectors.device.type, enabled=False):
            for layer in self:
                vectors = layer(vectors)
        return vectors


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return ``W x + b`` in the wider type of both, at least float32."""
    wide = torch.promote_types(torch.promote_types(x.dtype, linear.weight.dtype), torch.float32)
    bias = None if linear.bias is None else linear.bias.to(wide)
    return F.linear(x.to(wide), linear.weight.to(wide), bias)


def save_dense_layers(layers: DenseLayers, folders: Sequence[Path]) -> None:
    """Write the weights of each layer into its folder, which is made if missing."""
    for layer, folder in zip(layers, folders, strict=True):
        state = {name: weight.contiguous() for name, weight in layer.state_dict().items()}
        folder.mkdir(exist_ok=True)
        save_file(state, folder / WEIGHTS)


def load_dense_layers(
    folders: Sequence[Path], layers: Sequence[DenseSettings], hidden: int
) -> DenseLayers:
    """Read the layers of these settings from their folders, in float32.

    Raises:
        ModelError: if weights are missing, damaged or of other sizes; they are never replaced by
            random ones.
    """
    found = DenseLayers(hidden)
    for folder, layer in zip(folders, layers, strict=True):
        path, weights = _read(folder)
        if problems := misfits(shapes_of(weights), _shapes(layer, found.width)):
            raise ModelError(
                f"{path}: its tensors are not those of a dense layer from {found.width} to "
                f"{layer.width} numbers: {problems}; copy or download the model again"
            )
        found.add(layer, {name: weight.float() for name, weight in weights.items()})
    return found


def _read(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    path = folder / WEIGHTS
    if path.is_file():
        with loading(f"{path}: cannot be read", "; copy or download it again"):
            return path, load_file(path)
    path = folder / OLD_WEIGHTS
    if not path.is_file():
        raise ModelError(
            f"{folder}: has neither {WEIGHTS} nor {OLD_WEIGHTS}; copy or download the model again, "
            "whole"
        )
    with loading(f"{path}: cannot be read", "; copy or download it again"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(weights, dict) or not all(
            isinstance(x, Tensor) for x in weights.values()
        ):
            raise ValueError("it holds no weights by name")
    return path, weights


def _shapes(layer: DenseSettings, inner: int) -> Shapes:
    """Return the shapes of a layer's weights, without making them."""
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (layer.width, inner)}
    if layer.bias:
        shapes["linear.bias"] = (layer.width,)
    if layer.residual and layer.width != inner:
        shapes["residual.weight"] = (layer.width, inner)
    return shapes
