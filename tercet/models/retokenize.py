"""A model with another model's tokenizer: initial embeddings of the new tokens.

A new token's embedding is the mean over its pieces by the old tokenizer; special tokens keep theirs
by function. Such a model has to be trained; Arctic-Embed 2.0 found no clear gain in it (arXiv
2412.04506, appendix: Llama 3's tokenizer, all weights initialized at random).
"""

from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tercet.errors import ModelError
from tercet.models.embedder import Embedder
from tercet.models.network.backbone import probe
from tercet.models.tokens import Tokenizer

TokenInit: TypeAlias = Literal["remap", "new"]
"""Initialize new tokens as the mean of their old pieces, or at random with the old spread."""

_ROLES: Final = ("pad_token_id", "unk_token_id", "mask_token_id")
_BEGINS: Final = ("cls_token_id", "bos_token_id")
_ENDS: Final = ("sep_token_id", "eos_token_id")
_BLOCK: Final = 8_192  # tokens that are looked up together


@torch.no_grad()
def with_tokenizer(embedder: Embedder, tokenizer: Any, *, rows: TokenInit = "remap") -> Embedder:
    """Return the embedder with its tokenizer replaced by this one of transformers.

    The network is changed in place: only its token table is new.

    Raises:
        ModelError: if the tokenizer has no fast form, or the model derives positions from the id of
            the padding token and the new tokenizer has another one; or if it has 8-bit weights.
    """
    backbone, old = embedder.backbone, embedder.tokenizer
    backbone.require_float("its tokenizer cannot be replaced")
    settings = embedder.settings
    new = Tokenizer(tokenizer, append_end=settings.ends)
    _refuse_moved_positions(embedder, tokenizer)
    table: Any = backbone.model.get_input_embeddings()
    fill: Callable[..., Tensor] = _remapped if rows == "remap" else _drawn
    weight = fill(table.weight, old, new).to(table.weight.dtype)
    padding = tokenizer.pad_token_id if getattr(table, "padding_idx", None) is not None else None
    fresh = nn.Embedding(len(weight), weight.shape[1], padding_idx=padding)
    fresh.weight = nn.Parameter(weight.contiguous(), requires_grad=table.weight.requires_grad)
    backbone.model.set_input_embeddings(fresh)
    config = backbone.config.get_text_config()
    config.vocab_size = len(weight)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if hasattr(config, name):
            setattr(config, name, getattr(tokenizer, name, None))
    probe(backbone)
    made = Embedder(
        backbone, tokenizer, settings, embedder.layer, embedder.heads, embedder.dense_layers
    )
    made.about = dict(embedder.about)
    return made


def _refuse_moved_positions(embedder: Embedder, tokenizer: Any) -> None:
    """Raise if a RoBERTa-like model, which counts positions from the padding id, would break."""
    offset, padding = embedder.backbone.position_offset, tokenizer.pad_token_id
    if offset and padding != offset - 1:
        raise ModelError(
            f"this model counts positions from its padding id, so the new tokenizer's must be "
            f"{offset - 1}; got {padding}; change it there, or take another base"
        )


def _remapped(
    table: Float[Tensor, "old hidden"], old: Tokenizer, new: Tokenizer
) -> Float[Tensor, "new hidden"]:
    """Return the mean over old pieces for each new token; without a text, that of all rows."""
    tokenizer, wide = new.stock, table.float()
    size = len(tokenizer)
    found = wide.mean(dim=0).repeat(size, 1)
    special = {*tokenizer.all_special_ids}
    ids = [i for i in range(size) if i not in special]
    for start in range(0, len(ids), _BLOCK):
        some = ids[start : start + _BLOCK]
        texts = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in some]
        pieces = [encoding.ids for encoding in old.bare(texts)]
        known = [(i, found_ids) for i, found_ids in zip(some, pieces, strict=True) if found_ids]
        if not known:
            continue
        flat = torch.tensor([piece for _, each in known for piece in each])
        counts = torch.tensor([len(each) for _, each in known])
        owner = torch.arange(len(known)).repeat_interleave(counts)
        sums = wide.new_zeros(len(known), wide.shape[1]).index_add_(0, owner, wide[flat])
        found[torch.tensor([i for i, _ in known])] = sums / counts[:, None]
    for role, place in _special(tokenizer).items():
        if (before := _special(old.stock).get(role)) is not None:
            found[place] = wide[before]
    return found


def _drawn(
    table: Float[Tensor, "old hidden"], old: Tokenizer, new: Tokenizer
) -> Float[Tensor, "new hidden"]:
    """Return random rows with the mean and spread of the old ones."""
    wide = table.float()
    return torch.randn(len(new.stock), wide.shape[1]) * wide.std(dim=0) + wide.mean(dim=0)


def _special(tokenizer: Any) -> dict[str, int]:
    """Return the ids of special tokens by function."""
    found = {name: getattr(tokenizer, name, None) for name in _ROLES}
    for role, names in (("begin", _BEGINS), ("end", _ENDS)):
        known = (getattr(tokenizer, name, None) for name in names)
        found[role] = next((i for i in known if i is not None), None)
    return {role: i for role, i in found.items() if i is not None}
