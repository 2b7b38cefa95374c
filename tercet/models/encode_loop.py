"""The loop of encoding: texts through a model batch by batch, and results in their order."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tercet.errors import BROKEN_MODEL, ModelError
from tercet.files.console import shortened
from tercet.models.network.words import Words, word_means
from tercet.models.tokens import Tokens
from tercet.segments import Packed, batches_by_length
from tercet.vectors import Vectors

_WINDOW_OF_TEXTS: Final = 50_000  # texts tokenized and sorted by length at a time

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One batch of texts, and the states of its tokens."""

    rows: list[int]  # positions of these texts among all
    texts: Packed
    states: Float[Tensor, "tokens hidden"]
    spans: list[np.ndarray]  # as in Tokens, of these texts; empty if not requested
    read: list[int]
    all_texts: Sequence[str]

    def require_finite(self, finite: list[bool] | Tensor) -> None:
        """Check the vectors of these texts.

        Raises:
            ModelError: if one is not finite, with the row and the beginning of its text.
        """
        fine = np.asarray(finite, dtype=bool) if isinstance(finite, list) else finite.cpu().numpy()
        if not fine.all():
            row = min(row for row, is_fine in zip(self.rows, fine, strict=True) if not is_fine)
            text = shortened(self.all_texts[row], 60)
            raise ModelError(
                f"the vector of text {row + 1}, {text!r}, holds NaN or infinity; {BROKEN_MODEL}"
            )


def batch_by_batch(
    states_of: Callable[[Packed], Tensor],
    device: torch.device,
    texts: Sequence[str],
    tokenize: Callable[[Sequence[str]], Tokens],
    batch_tokens: int,
    advance: Callable[[int], None] | None = None,
) -> Iterator[Step]:
    """Yield the states of all texts, in batches of similar length."""
    for start in range(0, len(texts), _WINDOW_OF_TEXTS):
        tokens = tokenize(texts[start : start + _WINDOW_OF_TEXTS])
        for batch in batches_by_length(tokens.lengths, batch_tokens):
            packed = tokens.pack(batch).to(device)
            yield Step(
                [start + i for i in batch],
                packed,
                states_of(packed),
                [tokens.spans[i] for i in batch] if tokens.spans else [],
                [tokens.read[i] for i in batch] if tokens.read else [],
                texts,
            )
            if advance is not None:
                advance(len(batch))


def text_vectors(
    steps: Iterable[Step], finished: Callable[[Step], Vectors], nothing: Vectors
) -> Vectors:
    """Return the vectors of all texts in the order given, on the CPU; ``nothing`` if no texts."""
    parts, rows = [], []
    for step in steps:
        vectors = finished(step).to("cpu")
        step.require_finite(~vectors.not_finite())
        parts.append(vectors)
        rows += step.rows
    return Vectors.join(parts).take(torch.tensor(rows).argsort()) if parts else nothing


def token_states(steps: Iterable[Step], texts: int, width: int) -> list[np.ndarray]:
    """Return the states of each text's pooled tokens."""
    found: list[np.ndarray] = [np.empty((0, width), np.float32)] * texts
    for step in steps:
        states = step.states[:, :width].float().cpu().split(step.texts.lengths)
        pooled = step.texts.pooled.cpu().split(step.texts.lengths)
        for row, of_text, chosen in zip(step.rows, states, pooled, strict=True):
            found[row] = of_text[chosen].numpy()
        step.require_finite([bool(np.isfinite(found[row]).all()) for row in step.rows])
    return found


def word_states(
    steps: Iterable[Step], words: Sequence[Words], width: int, *, predictor: bool = False
) -> list[np.ndarray]:
    """Return the mean state of each word of each text, up to where the text was cut."""
    found: list[np.ndarray] = [np.empty((0, width), np.float32)] * len(words)
    for step in steps:
        kept = [words[row].within(read) for row, read in zip(step.rows, step.read, strict=True)]
        means = word_means(step.states[:, :width], step.spans, kept, predictor=predictor)
        for row, of_text in zip(step.rows, means, strict=True):
            found[row] = of_text.cpu().numpy()
        step.require_finite([bool(np.isfinite(found[row]).all()) for row in step.rows])
    every = sum(map(len, words))
    lost = every - sum(map(len, found))
    if lost:
        log.warning("%d of %d words were cut off and have no vector", lost, every)
    return found
