"""Heads for sparse and multi vectors: linear layers on token states (arXiv 2402.03216, sec. 3.2).

Their files in a model's folder have the names and the content that FlagEmbedding gives them.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tercet.errors import ModelError
from tercet.files.atomic import replacing_file
from tercet.kinds import Kind
from tercet.models.network.loading import PICKLED
from tercet.segments import Packed, moved, offsets_of, row_of
from tercet.vectors import Terms, TokenRows

FILES: Final[Mapping[Kind, str]] = {"sparse": "sparse_linear.pt", "multi": "colbert_linear.pt"}
_FIRST_WEIGHT: Final = 0.1  # of every token before training


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the special tokens that a tokenizer puts around texts."""

    never_terms: tuple[int, ...]  # start, end, padding, unknown: never in a sparse vector
    starts: tuple[int, ...]  # at the begin of a text they have no token vector
    inserted: int | None = None  # a start token repeated inside texts; has no token vector

    @staticmethod
    def of(tokenizer: Any, *, inserted: bool = False) -> "SpecialIds":
        """Return those of a tokenizer; with ``inserted``, start tokens repeat inside texts."""
        names = ("cls", "bos", "eos", "sep", "pad", "unk")
        ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
        known = {name: int(number) for name, number in ids.items() if number is not None}
        starts = list(dict.fromkeys(known[name] for name in ("cls", "bos") if name in known))
        inner = starts[0] if inserted and starts else None
        return SpecialIds(tuple(sorted(set(known.values()))), tuple(starts), inner)


class Heads(nn.Module):
    """The linear layers for a model's sparse and multi vectors; either may be missing.

    A new sparse head gives every token the same weight, so that scores start as word overlap; a new
    multi head rotates or projects the states without scaling them.
    """

    def __init__(self, hidden: int, kinds: Sequence[Kind], multi_dim: int | None = None) -> None:
        super().__init__()
        self.sparse = nn.Linear(hidden, 1) if "sparse" in kinds else None
        self.multi = nn.Linear(hidden, multi_dim or hidden) if "multi" in kinds else None
        if self.sparse is not None:
            nn.init.zeros_(self.sparse.weight)
            nn.init.constant_(self.sparse.bias, _FIRST_WEIGHT)
        if self.multi is not None:
            nn.init.orthogonal_(self.multi.weight)
            nn.init.zeros_(self.multi.bias)
        self.drawn: tuple[Kind, ...] = tuple(kind for kind in FILES if kind in kinds)  # untrained

    @property
    def width(self) -> int | None:
        """The width of token vectors."""
        return None if self.multi is None else self.multi.out_features

    def terms(
        self, states: Float[Tensor, "tokens hidden"], texts: Packed, special: SpecialIds
    ) -> Terms:
        """Return the weight ``relu(W h + b)`` of each pooled token that is not special.

        In at least float32 (arXiv 2402.03216, sec. 3.2, lexical retrieval).
        """
        assert self.sparse is not None, "a model with a sparse head"
        host = texts.host
        kept = host.pooled & ~_among(host, special.never_terms)
        chosen = _places_of(kept, states.device)
        weights = self.sparse(states[chosen]).squeeze(1).relu()
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        return Terms(texts.ids[chosen], weights, _offsets_of_kept(host, kept))

    def rows(
        self, states: Float[Tensor, "tokens hidden"], texts: Packed, special: SpecialIds
    ) -> TokenRows:
        """Return a unit vector ``W h + b`` for each pooled token except the start token.

        In at least float32. A text without any other token keeps all of its tokens.
        """
        assert self.multi is not None, "a model with a multi head"
        host = texts.host
        first = torch.zeros_like(host.pooled)
        first[host.offsets[:-1]] = True
        kept = host.pooled & ~(first & _among(host, special.starts))
        if special.inserted is not None:
            kept &= host.ids != special.inserted
        some = torch.zeros(len(host), dtype=torch.bool)
        some[row_of(host.offsets)[kept]] = True
        if not bool(some.all()):
            kept |= ~some[row_of(host.offsets)]
        rows = self.multi(states[_places_of(kept, states.device)])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return TokenRows(F.normalize(rows, dim=1), _offsets_of_kept(host, kept))


def _among(texts: Packed, ids: Sequence[int]) -> Bool[Tensor, "tokens"]:
    return torch.isin(texts.ids, torch.tensor(ids, dtype=torch.int64))


def _places_of(kept: Bool[Tensor, "tokens"], device: torch.device) -> Tensor:
    return moved(kept.nonzero()[:, 0], device)


def _offsets_of_kept(texts: Packed, kept: Bool[Tensor, "tokens"]) -> Tensor:
    return offsets_of(kept.to(torch.int64))[texts.offsets]


# ---- files -----------------------------------------------------------------------------------


def heads_in(folder: Path) -> tuple[Kind, ...]:
    """Return the kinds whose layers are in a folder."""
    return tuple(kind for kind, name in FILES.items() if (folder / name).is_file())


def save_heads(folder: Path, heads: Heads, kinds: Sequence[Kind]) -> None:
    """Write the layer of each of these kinds as a file with its ``weight`` and ``bias``."""
    for kind, name in FILES.items():
        layer = getattr(heads, kind)
        if layer is not None and kind in kinds:
            state = layer.state_dict()
            plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            with replacing_file(folder / name) as fresh:
                torch.save(plain, fresh)


def load_heads(folder: Path, kinds: Sequence[Kind], hidden: int) -> Heads:
    """Load the trained layers of a folder.

    Raises:
        ModelError: if one is missing, damaged, or of another model's width; a missing layer is
            never replaced by random weights.
    """
    states = {kind: _read(folder, name, hidden) for kind, name in FILES.items() if kind in kinds}
    width = len(states["multi"]["weight"]) if "multi" in states else None
    heads = Heads(hidden, kinds, width)
    for kind, state in states.items():
        getattr(heads, kind).load_state_dict(state)
    heads.drawn = ()
    return heads


def _read(folder: Path, name: str, hidden: int) -> dict[str, Tensor]:
    path = folder / name
    if not path.is_file():
        raise ModelError(
            f"{folder}: the model makes sparse and multi vectors, and {name} is missing; copy or "
            "download the model again, whole, or load it for fewer kinds of vectors"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        pickled = isinstance(error, pickle.UnpicklingError)
        line = PICKLED if pickled else (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: cannot be read ({line}); copy the model again") from error
    fits = isinstance(state, Mapping) and {"weight", "bias"} <= set(state)
    if not fits or state["weight"].ndim != 2 or state["weight"].shape[1] != hidden:
        raise ModelError(
            f"{path}: must be a layer for states of width {hidden}; is it of another model?"
        )
    rows = 1 if name == FILES["sparse"] else len(state["weight"])
    if state["weight"].shape[0] != rows or state["bias"].shape != (rows,):
        raise ModelError(f"{path}: its weight and bias do not fit together; copy the model again")
    return {key: state[key].float() for key in ("weight", "bias")}
