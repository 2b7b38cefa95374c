"""A trained layer between backbone and pooling: latent attention or self-attention, and an MLP.

Latent attention pooling (NV-Embed, arXiv 2405.17428, sec. 3.1) is this layer and then the mean:
each state looks up a small trained dictionary, the latents, before all are averaged. It is
token-wise, so it needs no mask, and no text knows of its neighbours. The paper's self-attention
pooling has the states themselves in the place of the latents, inside each text, both ways.

With d the hidden width, e the width of a head, X the states and Z the latents (or X)::

    Q = LN_q(X) Wq^T,  K, V = halves of LN_c(Z) Wkv^T
    Y = X + concat_h softmax(Q_h K_h^T / sqrt(e)) V_h  Wo^T
    out = Y + W2 (a * gelu(g)) + b2,  a, g = halves of W1 LN_f(Y) + b1
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tercet.errors import ModelError, RecipeError
from tercet.files.atomic import replacing_folder
from tercet.models.network.attention import Layout, attend
from tercet.models.network.folded import Folded, Kept, folding_pays, softmax
from tercet.types import Packed

LayerKind = Literal["latent", "self_attention"]
LayerInit = Literal["normal", "identity"]

FOLDER: Final = "1_Layer"  # inside a model's folder
CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
_BLOCKS: Final = {"cpu": 512, "cuda": 8_192}  # tokens at a time; on a CPU 512 and 1,024 are fastest
_SHOWN: Final = 3  # tensors of each kind in a message


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer's kind and sizes. NV-Embed's own: 512 latents, 8 heads, each as wide as the model."""

    kind: LayerKind = "latent"
    latents: int = 512  # entries of the dictionary; of no meaning for self-attention
    heads: int = 8
    head_size: int | Literal["hidden"] | None = None  # None: hidden / heads, as in a backbone's own
    init: LayerInit = "normal"  # "identity": leaves the states as they are, until trained

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
                raise RecipeError(f"a layer's {name} is {size!r}; give a whole number, at least 1")

    def size_of_head(self, hidden: int) -> int:
        """The width of one head, behind a backbone of this width.

        Raises:
            RecipeError: where it is left open and the heads do not share the width evenly.
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

    def same_sizes(self, other: "Layer", hidden: int) -> bool:
        """Whether weights of one fit the other, behind a backbone of this width."""
        latents = self.kind != "latent" or self.latents == other.latents
        sizes = self.size_of_head(hidden) == other.size_of_head(hidden)
        return latents and sizes and (self.kind, self.heads) == (other.kind, other.heads)


class AttentionLayer(nn.Module):
    """States in, states out. Made by :func:`build_layer`.

    Without gradients, in eval mode, what hangs on parameters alone is made once and kept: keys and
    values of the latents, or the folded form where that is less work
    (:mod:`tercet.models.network.folded`).
    """

    def __init__(self, layer: Layer, hidden: int) -> None:
        super().__init__()
        size = layer.size_of_head(hidden)
        self.layer = replace(layer, head_size=size) if layer.head_size == "hidden" else layer
        self.hidden = hidden
        if layer.kind == "latent":
            self.latents = nn.Parameter(torch.randn(layer.latents, hidden))
        self.norm_query = nn.LayerNorm(hidden)
        self.norm_context = nn.LayerNorm(hidden)
        self.to_q = nn.Linear(hidden, layer.heads * size, bias=False)
        self.to_kv = nn.Linear(hidden, 2 * layer.heads * size, bias=False)  # keys first
        self.to_out = nn.Linear(layer.heads * size, hidden, bias=False)
        self.norm_ff = nn.LayerNorm(hidden)
        self.ff_in = nn.Linear(hidden, 8 * hidden)  # values first, then gates
        self.ff_out = nn.Linear(4 * hidden, hidden)
        self.folds = layer.kind == "latent" and folding_pays(layer.latents, hidden, size)
        self._kept: Kept[Folded | tuple[Tensor, Tensor]] = Kept()
        if layer.init == "identity":
            for weight in (self.to_out.weight, self.ff_out.weight, self.ff_out.bias):
                nn.init.zeros_(weight)

    def forward(
        self, states: Float[Tensor, "tokens hidden"], texts: Packed
    ) -> Float[Tensor, "tokens hidden"]:
        """The states after attention and feed-forward, in the layer's own dtype or wider.

        Without gradients, in eval mode, tokens go through in blocks, so that the wide states inside
        are never there for a whole batch.
        """
        states = states.to(self.to_q.weight.dtype)
        inferring = not (self.training or torch.is_grad_enabled())
        look_up = None
        if self.layer.kind == "latent":
            look_up = self._look_up() if inferring else self.keys_values()
        else:
            states = self._read_each_text(states, texts)
        block = _BLOCKS.get(states.device.type, 512) if inferring else max(len(states), 1)
        done = [self._one_block(part, look_up) for part in states.split(block)]
        return torch.cat(done) if len(done) > 1 else done[0]

    def keys_values(
        self,
    ) -> tuple[Float[Tensor, "heads latents size"], Float[Tensor, "heads latents size"]]:
        """The latents as keys, divided by the root of their width, and as values."""
        both = self.to_kv(self.norm_context(self.latents))
        keys, values = both.unflatten(1, (2, self.layer.heads, -1)).permute(1, 2, 0, 3)
        return keys * keys.shape[-1] ** -0.5, values

    def latent_weights(
        self, states: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "heads tokens latents"]:
        """How much each token takes of each latent, in float32: sums of one a head and token."""
        return self._weights(states.to(self.to_q.weight.dtype), self.keys_values()[0])

    def train(self, mode: bool = True) -> "AttentionLayer":
        """As in torch; what was kept for inference is dropped, its memory too."""
        if mode:
            self._kept.drop()
        return super().train(mode)

    def _one_block(self, states: Tensor, look_up: Folded | tuple[Tensor, Tensor] | None) -> Tensor:
        if isinstance(look_up, Folded):
            states = look_up(states)
        elif look_up is not None:
            keys, values = look_up
            found = self._weights(states, keys).to(values.dtype) @ values
            states = states + self.to_out(found.transpose(0, 1).flatten(1))
        value, gate = self.ff_in(self.norm_ff(states)).chunk(2, dim=-1)
        return states + self.ff_out(value * F.gelu(gate))

    def _weights(self, states: Tensor, keys: Tensor) -> Tensor:
        queries = self.to_q(self.norm_query(states)).unflatten(1, (self.layer.heads, -1))
        scores = queries.transpose(0, 1) @ keys.mT  # [heads, tokens, latents]
        return softmax(scores)

    def _read_each_text(self, states: Tensor, texts: Packed) -> Tensor:
        """Self-attention. Encoding and chunks of a batch bring texts of one length side by side."""
        queries = self.to_q(self.norm_query(states))
        keys, values = self.to_kv(self.norm_context(states)).chunk(2, dim=-1)
        q, k, v = (
            x.unflatten(1, (self.layer.heads, -1)).transpose(0, 1)[None]
            for x in (queries, keys, values)
        )  # [1, heads, tokens, size]
        layout = Layout(texts.lengths, states.device)
        found, _ = attend(self, q, k, v, layout=layout, is_causal=False)
        return states + self.to_out(found[0].flatten(1))

    def _look_up(self) -> Folded | tuple[Tensor, Tensor]:
        parts = (self.norm_context, self.norm_query, self.to_q, self.to_kv, self.to_out)
        weights = [self.latents, *(weight for part in parts for weight in part.parameters())]
        with torch.autocast(self.latents.device.type, enabled=False):
            return self._kept.get(weights, self._fold if self.folds else self.keys_values)

    def _fold(self) -> Folded:
        """In float32, whatever the weights; a head's weights are there a second time in 16 bits."""
        heads, dtype = self.layer.heads, self.latents.dtype
        norm, other = self.norm_query, self.norm_context
        context = F.layer_norm(
            _wide(self.latents), (self.hidden,), _wide(other.weight), _wide(other.bias), other.eps
        )
        rows = self.to_kv.weight.chunk(2 * heads)  # [size, hidden] each
        pairs = zip(rows[:heads], self.to_q.weight.chunk(heads), strict=True)
        to_scores = torch.cat([context @ _wide(key).T @ _wide(query) for key, query in pairs])
        to_scores *= rows[0].shape[0] ** -0.5
        pairs = zip(rows[heads:], self.to_out.weight.chunk(heads, dim=1), strict=True)
        to_states = torch.cat([context @ _wide(value).T @ _wide(out).T for value, out in pairs])
        return Folded(
            to_scores=(to_scores * _wide(norm.weight)).to(dtype),
            bias=(to_scores @ _wide(norm.bias)).to(dtype),
            to_states=to_states.to(dtype),
            latents=self.layer.latents,
            eps=norm.eps,
        )


def build_layer(layer: Layer, hidden: int) -> AttentionLayer:
    """A new layer behind a backbone of this width, with random weights.

    Raises:
        RecipeError: where heads do not share the width evenly.
    """
    return AttentionLayer(layer, hidden)


def save_layer(folder: Path, module: AttentionLayer) -> None:
    """Write the layer's own folder, ``1_Layer``, into that of its model; an older one is replaced.

    Raises:
        StorageError: when the disk refuses; what was there before is still there.
    """
    config = {**asdict(module.layer), "hidden": module.hidden}
    with replacing_folder(folder / FOLDER) as fresh:
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(module.state_dict(), fresh / WEIGHTS)


def load_layer(folder: Path, hidden: int, dtype: torch.dtype) -> AttentionLayer | None:
    """The layer of the model in ``folder``, in eval mode; None where it has none.

    Raises:
        ModelError: when it is incomplete, damaged, or of a backbone of another width.
    """
    folder = folder / FOLDER
    if not folder.is_dir():
        return None
    layer = _read_config(folder / CONFIG, hidden)
    path = folder / WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; copy or download it again") from error
    with torch.device("meta"):  # no random weights that are thrown away at once
        module = AttentionLayer(layer, hidden)
    _check_fit(path, weights, module.state_dict())
    module.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    return module.eval()


def _read_config(path: Path, hidden: int) -> Layer:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        width = config.pop("hidden")
        layer = Layer(**config)
        layer.size_of_head(width)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
        raise ModelError(
            f"{path}: says nothing of a layer that tercet can build ({error}); save the model again"
        ) from error
    if width != hidden:
        raise ModelError(
            f"{path}: the layer was made for a backbone {width} wide, and this one is {hidden} "
            "wide; copy the model's folder again, whole"
        )
    return layer


def _check_fit(path: Path, weights: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    wrong = {
        "missing": [name for name in places if name not in weights],
        "unknown": [name for name in weights if name not in places],
        "of another size": [
            f"{name} ({_size(weight)}, expected {_size(places[name])})"
            for name, weight in weights.items()
            if name in places and weight.shape != places[name].shape
        ],
    }
    problems = [f"{len(names)} {what}: {_some(names)}" for what, names in wrong.items() if names]
    if problems:
        raise ModelError(
            f"{path}: its tensors are not those of the layer in {CONFIG}: {'; '.join(problems)}; "
            "copy or download the model again"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _size(weight: Tensor) -> str:
    return " x ".join(map(str, weight.shape))


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
