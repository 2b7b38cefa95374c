"""A trained layer between backbone and pooling: latent attention or self-attention, and an MLP.

Latent attention pooling (NV-Embed, arXiv 2405.17428, sec. 3.1) is this layer and then the mean:
each state looks up a small trained dictionary, the latents. The paper's self-attention pooling uses
the states of the text instead of latents, without a causal mask.

With d the hidden width, e the width of a head, X the states and Z the latents (or X)::

    Q = LN_q(X) Wq^T,  K, V = halves of LN_c(Z) Wkv^T
    Y = X + concat_h softmax(Q_h K_h^T / sqrt(e)) V_h  Wo^T
    out = Y + W2 (a * gelu(g)) + b2,  a, g = halves of W1 LN_f(Y) + b1

Keys and values of latents depend on parameters alone. So what turns a state into scores, and
weights into a state, is multiplied out once (:class:`Folded`): less work if heads are wide.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tercet.errors import ModelError, RecipeError
from tercet.files.artifacts import read_json, write_json
from tercet.files.atomic import replacing_folder
from tercet.models.choices import LayerSettings
from tercet.models.network.attention import Layout, attend
from tercet.models.network.fingerprints import WeightCache
from tercet.models.network.loading import loading, misfits, shapes_of
from tercet.segments import Packed

FOLDER: Final = "1_Layer"  # inside a model's folder
CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
_BLOCKS: Final = {"cpu": 512, "cuda": 8_192}  # tokens at a time; on a CPU 512 and 1,024 are fastest


def folding_pays(latents: int, hidden: int, head_size: int) -> bool:
    """Whether the folded form is less work per token and head than cached keys and values."""
    return latents * hidden < head_size * (hidden + latents)


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """Attention to latents as ``Y = X + sum_h softmax(X' G_h^T + c_h) H_h``.

    X' are the states, normalized without the norm's weight, which ``G_h = K_h Wq_h / sqrt(e)``
    carries, nor its bias, which ``c_h`` carries; ``H_h = V_h Wo_h^T``. The heads are stacked.
    """

    to_scores: Float[Tensor, "entries hidden"]  # entries: the latents of each head
    bias: Float[Tensor, "entries"]
    to_states: Float[Tensor, "entries hidden"]
    latents: int
    eps: float  # of the queries' norm

    def __call__(self, states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Return the states plus what they take from the latents."""
        scaled = F.layer_norm(states, states.shape[-1:], eps=self.eps)
        scores = F.linear(scaled, self.to_scores, self.bias).unflatten(1, (-1, self.latents))
        weights = _softmax(scores).to(scores.dtype)  # [tokens, heads, latents]
        return states + weights.flatten(1) @ self.to_states


def _softmax(scores: Float[Tensor, "*any latents"]) -> Float[Tensor, "*any latents"]:
    """Return weights that sum to one, in at least float32, also under autocast."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


class AttentionLayer(nn.Module):
    """States in, states out. Made by :func:`build_layer`.

    Without gradients, in eval mode, what depends on parameters alone is computed once and kept:
    keys and values of the latents, or the folded form where that is less work.
    """

    def __init__(self, layer: LayerSettings, hidden: int) -> None:
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
        self._kept: WeightCache[Folded | tuple[Tensor, Tensor]] = WeightCache()
        if layer.init == "identity":
            for weight in (self.to_out.weight, self.ff_out.weight, self.ff_out.bias):
                nn.init.zeros_(weight)

    def forward(
        self, states: Float[Tensor, "tokens hidden"], texts: Packed
    ) -> Float[Tensor, "tokens hidden"]:
        """Return the states after attention and feed-forward, in the layer's dtype or wider.

        Without gradients, in eval mode, tokens are computed in blocks, so that the wide states
        inside never exist for a whole batch.
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
        """Return the latents as keys, divided by the root of their width, and as values."""
        both = self.to_kv(self.norm_context(self.latents))
        keys, values = both.unflatten(1, (2, self.layer.heads, -1)).permute(1, 2, 0, 3)
        return keys * keys.shape[-1] ** -0.5, values

    def latent_weights(
        self, states: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "heads tokens latents"]:
        """Return attention weights in float32; they sum to one per head and token."""
        return self._weights(states.to(self.to_q.weight.dtype), self.keys_values()[0])

    def train(self, mode: bool = True) -> "AttentionLayer":
        """Set the mode as in torch; training frees what was kept for inference."""
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
        return _softmax(scores)

    def _read_each_text(self, states: Tensor, texts: Packed) -> Tensor:
        """Add self-attention inside each text."""
        queries = self.to_q(self.norm_query(states))
        keys, values = self.to_kv(self.norm_context(states)).chunk(2, dim=-1)
        q, k, v = (
            x.unflatten(1, (self.layer.heads, -1)).transpose(0, 1)[None]
            for x in (queries, keys, values)
        )  # [1, heads, tokens, size]
        layout = Layout(texts)
        found, _ = attend(self, q, k, v, layout=layout, is_causal=False)
        return states + self.to_out(found[0].flatten(1))

    def _look_up(self) -> Folded | tuple[Tensor, Tensor]:
        parts = (self.norm_context, self.norm_query, self.to_q, self.to_kv, self.to_out)
        weights = [self.latents, *(weight for part in parts for weight in part.parameters())]
        with torch.autocast(self.latents.device.type, enabled=False):
            return self._kept.get(weights, self._fold if self.folds else self.keys_values)

    def _fold(self) -> Folded:
        """Multiply out the folded form, in float32 whatever the dtype of the weights."""
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


def build_layer(layer: LayerSettings, hidden: int) -> AttentionLayer:
    """Return a new layer behind a backbone of width ``hidden``, with random weights.

    Raises:
        RecipeError: if heads do not share the width evenly.
    """
    return AttentionLayer(layer, hidden)


def save_layer(folder: Path, module: AttentionLayer) -> None:
    """Write the folder ``1_Layer`` into a model's folder, replacing an older one.

    Raises:
        StorageError: if the disk refuses; the old folder is still there then.
    """
    config = {**asdict(module.layer), "hidden": module.hidden}
    with replacing_folder(folder / FOLDER) as fresh:
        write_json(fresh / CONFIG, config)
        save_file(module.state_dict(), fresh / WEIGHTS)


def load_layer(folder: Path, hidden: int, dtype: torch.dtype) -> AttentionLayer | None:
    """Return the layer of the model in ``folder``, in eval mode; None if it has none.

    Raises:
        ModelError: if it is incomplete, damaged, or made for a backbone of another width.
    """
    folder = folder / FOLDER
    if not folder.is_dir():
        return None
    layer = _read_config(folder / CONFIG, hidden)
    path = folder / WEIGHTS
    with loading(f"{path}: cannot be read", "; copy or download it again"):
        weights = load_file(path)
    with torch.device("meta"):  # no random weights that are thrown away at once
        module = AttentionLayer(layer, hidden)
    if problems := misfits(shapes_of(weights), shapes_of(module.state_dict())):
        raise ModelError(
            f"{path}: its tensors are not those of the layer in {CONFIG}: {problems}; "
            "copy or download the model again"
        )
    module.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    return module.eval()


def _read_config(path: Path, hidden: int) -> LayerSettings:
    try:
        config = read_json(path)
        width = config.pop("hidden")
        layer = LayerSettings(**config)
        layer.size_of_head(width)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
        raise ModelError(
            f"{path}: does not describe a layer that tercet can build ({error}); save the model "
            "again"
        ) from error
    if width != hidden:
        raise ModelError(
            f"{path}: the layer was made for a backbone {width} wide, and this one is {hidden} "
            "wide; copy the model's folder again, whole"
        )
    return layer


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
