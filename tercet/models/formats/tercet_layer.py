# SPDX-License-Identifier: Apache-2.0
"""A trained layer between the transformer and the pooling of a sentence-transformers model.

This file travels inside the folder of a model that tercet wrote, and needs torch and safetensors
only. ``SentenceTransformer(folder, trust_remote_code=True)`` runs it; read it before you allow
that. Beside it, in ``1_Layer``, are the sizes (``config.json``), the weights
(``model.safetensors``), and, where prompts are not part of a vector, the token ids of the prompts
(``prompts.json``): a prompt's last token may join the text, and only ids tell where it did.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class Layer(nn.Module):
    """Attention to a trained dictionary, or to the text itself, then a gated feed-forward."""

    def __init__(self, sizes: dict[str, Any], prompts: list[list[int]] | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        self.prompts = prompts or []
        hidden, heads = sizes["hidden"], sizes["heads"]
        width = heads * (sizes["head_size"] or hidden // heads)
        if sizes["kind"] == "latent":
            self.latents = nn.Parameter(torch.randn(sizes["latents"], hidden))
        self.norm_query = nn.LayerNorm(hidden)
        self.norm_context = nn.LayerNorm(hidden)
        self.to_q = nn.Linear(hidden, width, bias=False)
        self.to_kv = nn.Linear(hidden, 2 * width, bias=False)  # keys first
        self.to_out = nn.Linear(width, hidden, bias=False)
        self.norm_ff = nn.LayerNorm(hidden)
        self.ff_in = nn.Linear(hidden, 8 * hidden)  # values first, then gates
        self.ff_out = nn.Linear(4 * hidden, hidden)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """The features with new states of the tokens; those handed in stay as they are."""
        features = _padded(features) if "cu_seq_lens_q" in features else dict(features)
        states = features["token_embeddings"]  # [texts, tokens, hidden]
        mask = features["attention_mask"].bool()
        states = states + self._attend(states, mask)
        value, gate = self.ff_in(self.norm_ff(states)).chunk(2, dim=-1)
        features["token_embeddings"] = states + self.ff_out(value * F.gelu(gate))
        if self.prompts and features.get("prompt_length") is not None:
            pooled = self._without_prompt(features, mask)
            features["attention_mask"] = pooled.to(features["attention_mask"].dtype)
            del features["prompt_length"]  # the pooling would count for itself
        return features

    def _attend(self, states: Tensor, mask: Tensor) -> Tensor:
        own = self.sizes["kind"] == "self_attention"
        context = self.norm_context(states if own else self.latents)
        query, key, value = (
            x.unflatten(-1, (self.sizes["heads"], -1)).transpose(-3, -2)
            for x in (self.to_q(self.norm_query(states)), *self.to_kv(context).chunk(2, dim=-1))
        )  # [texts, heads, tokens or latents, head_size], without texts for those of latents
        key, value = (x.expand(len(states), *x.shape[-3:]) for x in (key, value))
        seen = mask[:, None, None, :] if own else None
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.to_out(found.transpose(1, 2).flatten(2))

    def _without_prompt(self, features: dict[str, Any], mask: Tensor) -> Tensor:
        """Leave out the tokens that a text shares with its prompt, and nothing of the text."""
        length = features["prompt_length"]  # tokens of the prompt alone, with what goes before it
        length = int(length[0]) if isinstance(length, Tensor) else int(length)
        place = mask.cumsum(1) - 1  # in its text, whichever side is padded
        shared = torch.zeros_like(mask)
        for prompt in (prompt for prompt in self.prompts if len(prompt) == length):
            ids = torch.tensor(prompt, device=mask.device)[place.clamp(0, length - 1)]
            same = (ids == features["input_ids"]) & (place < length)
            shared |= (same | ~mask).cumprod(1).bool() & mask
        unknown = shared.sum(1, keepdim=True) < length - 1  # not one of ours: as it was counted
        left_out = torch.where(unknown, place < length, shared)
        pooled = mask & ~left_out
        return torch.where(pooled.any(1, keepdim=True), pooled, mask)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the layer's folder, and this file beside it, without which nobody can load it."""
        folder = Path(output_path)
        (folder / "config.json").write_text(json.dumps(self.sizes, indent=2) + "\n", "utf-8")
        if self.prompts:
            (folder / "prompts.json").write_text(json.dumps(self.prompts) + "\n", "utf-8")
        weights = {name: weight.contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        shutil.copyfile(__file__, folder.parent / Path(__file__).name)

    @classmethod
    def load(cls, input_path: str) -> "Layer":
        """Read what :meth:`save` wrote."""
        folder = Path(input_path)
        known = folder / "prompts.json"
        prompts = json.loads(known.read_text("utf-8")) if known.is_file() else None
        layer = cls(json.loads((folder / "config.json").read_text("utf-8")), prompts)
        layer.load_state_dict(load_file(folder / "model.safetensors"))
        return layer


def _padded(features: dict[str, Any]) -> dict[str, Any]:
    """Texts that lie end to end, as flash attention takes them, in a row each."""
    lengths = features["cu_seq_lens_q"].diff().tolist()
    states, ids = (
        pad_sequence(features[name].squeeze(0).split(lengths), batch_first=True)
        for name in ("token_embeddings", "input_ids")
    )
    place = torch.arange(ids.shape[1], device=ids.device)
    mask = (place < torch.tensor(lengths, device=ids.device)[:, None]).long()
    kept = {name: x for name, x in features.items() if not name.startswith("cu_seq_lens")}
    return {**kept, "token_embeddings": states, "input_ids": ids, "attention_mask": mask}
