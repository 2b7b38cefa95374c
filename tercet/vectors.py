"""Vectors of texts: up to three kinds for each text, without padding.

- *dense*: one vector per text;
- *sparse*: a weight for each of its tokens (lexical weights);
- *multi*: one vector per token, compared token by token (late interaction).

Offsets are on the host, wherever the numbers are: they decide sizes, and reading those from a GPU
would make the host wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tercet.kinds import KINDS, Kind
from tercet.segments import moved, offsets_of, ragged_places, row_of


@dataclass(frozen=True, slots=True)
class Terms:
    """Weighted tokens of texts, end to end.

    Weights are zero or more. A token may occur several times in a text: its largest weight
    counts. ``merged`` has each once.
    """

    ids: Int[Tensor, "terms"]
    weights: Float[Tensor, "terms"]
    offsets: Int[Tensor, "bounds"]  # text i is offsets[i]:offsets[i + 1]; on the host

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, texts: Int[Tensor, "chosen"]) -> "Terms":
        """Return these texts, in this order."""
        places, offsets = ragged_places(self.offsets[texts], self.offsets[texts + 1])
        places = moved(places, self.weights.device)
        return Terms(self.ids[places], self.weights[places], offsets)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Terms":
        """Return the same on another device."""
        ids, weights = (x.to(device, non_blocking=non_blocking) for x in (self.ids, self.weights))
        return Terms(ids, weights, self.offsets)

    def merged(self) -> "Terms":
        """Return each token of a text once, by ascending id, with its largest weight above zero."""
        row, weights = row_of(self.offsets, self.weights), self.weights
        size = int(self.ids.max()) + 1 if len(self.ids) else 1
        cells, place = (row * size + self.ids).unique(return_inverse=True)
        largest = weights.new_zeros(len(cells)).scatter_reduce(0, place, weights, "amax")
        (kept,) = (~(largest <= 0)).nonzero(as_tuple=True)  # NaN stays, to be noticed
        cells = cells[kept]
        counts = torch.bincount(cells // size, minlength=len(self))
        return Terms(cells % size, largest[kept], offsets_of(counts.cpu()))


@dataclass(frozen=True, slots=True)
class TokenRows:
    """One vector per token, the rows of all texts end to end."""

    vectors: Float[Tensor, "rows width"]
    offsets: Int[Tensor, "bounds"]  # on the host

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, texts: Int[Tensor, "chosen"]) -> "TokenRows":
        """Return these texts, in this order."""
        places, offsets = ragged_places(self.offsets[texts], self.offsets[texts + 1])
        return TokenRows(self.vectors[moved(places, self.vectors.device)], offsets)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TokenRows":
        """Return the same on another device."""
        return TokenRows(self.vectors.to(device, non_blocking=non_blocking), self.offsets)


@dataclass(frozen=True, slots=True)
class Vectors:
    """The vectors of some texts, of one kind or more."""

    dense: Float[Tensor, "texts dim"] | None = None
    sparse: Terms | None = None
    multi: TokenRows | None = None

    def __len__(self) -> int:
        present = [part for part in (self.dense, self.sparse, self.multi) if part is not None]
        return len(present[0]) if present else 0

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that are present."""
        return tuple(kind for kind in KINDS if getattr(self, kind) is not None)

    def only(self, kinds: Sequence[Kind]) -> "Vectors":
        """Return the vectors of these kinds only."""
        return Vectors(**{kind: getattr(self, kind) for kind in self.kinds if kind in kinds})

    def take(self, texts: Sequence[int] | slice | Tensor) -> "Vectors":
        """Return these texts, in this order."""
        chosen = torch.arange(*texts.indices(len(self))) if isinstance(texts, slice) else texts
        rows = torch.as_tensor(chosen, dtype=torch.int64, device="cpu")
        return Vectors(
            dense=None if self.dense is None else self.dense[moved(rows, self.dense.device)],
            sparse=None if self.sparse is None else self.sparse.take(rows),
            multi=None if self.multi is None else self.multi.take(rows),
        )

    def tensors(self) -> list[Tensor]:
        """Return the tensors with gradients: dense vectors, weights of terms, vectors of tokens."""
        found: list[Tensor] = []
        if self.dense is not None:
            found.append(self.dense)
        if self.sparse is not None:
            found.append(self.sparse.weights)
        if self.multi is not None:
            found.append(self.multi.vectors)
        return found

    def not_finite(self) -> Bool[Tensor, "texts"]:
        """Return which texts have a value that is NaN or infinite."""
        device = next((tensor.device for tensor in self.tensors()), None)
        found = torch.zeros(len(self), dtype=torch.bool, device=device)
        if self.dense is not None:
            found |= ~self.dense.isfinite().all(dim=1)
        if self.sparse is not None:
            bad = ~self.sparse.weights.isfinite()
            found[row_of(self.sparse.offsets, bad)[bad]] = True
        if self.multi is not None:
            bad = ~self.multi.vectors.isfinite().all(dim=1)
            found[row_of(self.multi.offsets, bad)[bad]] = True
        return found

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Vectors":
        """Return the same texts with other values, in the order of ``tensors()``."""
        rest = iter(tensors)
        dense = None if self.dense is None else next(rest)
        sparse = None if self.sparse is None else replace(self.sparse, weights=next(rest))
        multi = None if self.multi is None else replace(self.multi, vectors=next(rest))
        return Vectors(dense, sparse, multi)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Vectors":
        """Return the same on another device; ``non_blocking`` as in torch."""
        dense, sparse, multi = self.dense, self.sparse, self.multi
        return Vectors(
            dense=None if dense is None else dense.to(device, non_blocking=non_blocking),
            sparse=None if sparse is None else sparse.to(device, non_blocking=non_blocking),
            multi=None if multi is None else multi.to(device, non_blocking=non_blocking),
        )

    @staticmethod
    def of_nothing(kinds: Sequence[Kind], dim: int, width: int | None) -> "Vectors":
        """Return vectors of no text, with ``dim`` numbers (dense) and ``width`` (multi)."""
        start = torch.zeros(1, dtype=torch.int64)
        return Vectors(
            torch.empty(0, dim) if "dense" in kinds else None,
            Terms(start[:0], torch.empty(0), start) if "sparse" in kinds else None,
            TokenRows(torch.empty(0, width or 0), start) if "multi" in kinds else None,
        )

    @staticmethod
    def join(parts: Sequence["Vectors"]) -> "Vectors":
        """Return the texts of all parts, which have the same kinds, in order."""
        dense = [part.dense for part in parts if part.dense is not None]
        sparse = [part.sparse for part in parts if part.sparse is not None]
        multi = [part.multi for part in parts if part.multi is not None]
        return Vectors(
            torch.cat(dense) if dense else None,
            Terms(
                torch.cat([part.ids for part in sparse]),
                torch.cat([part.weights for part in sparse]),
                _joined([part.offsets for part in sparse]),
            )
            if sparse
            else None,
            TokenRows(
                torch.cat([part.vectors for part in multi]),
                _joined([part.offsets for part in multi]),
            )
            if multi
            else None,
        )


def _joined(offsets: Sequence[Tensor]) -> Tensor:
    return offsets_of(torch.cat([part.diff() for part in offsets]))
