"""The loop of encoding: texts through a model batch by batch, and results in their order."""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tercet.ahead import done_ahead, usual_workers
from tercet.errors import BROKEN_MODEL, ModelError
from tercet.files.console import shortened
from tercet.models.network.words import Words, word_means
from tercet.models.tokens import Tokens
from tercet.segments import Packed, batches_by_length
from tercet.vectors import Vectors

_WINDOW_OF_TEXTS: Final = 50_000  # texts tokenized and sorted by length at a time
_FIRST_WINDOW: Final = 2_000  # on a GPU, which would wait for them

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
) -> Generator[Step, None, None]:
    """Yield the states of all texts, in batches of similar length.

    A thread tokenizes the next window of texts while the batches of one run. Windows are the same
    for all calls on a CPU, where the last bits of a vector may depend on the size of its batch.
    """

    def tokenized(window: range) -> tuple[int, Tokens]:
        return window.start, tokenize(texts[window.start : window.stop])

    calls = (partial(tokenized, window) for window in _windows(len(texts), device))
    several = next(_windows(len(texts), device), range(0)).stop < len(texts)
    workers = min(1, usual_workers(device)) if several else 0
    with closing(done_ahead(calls, workers, spare=0)) as windows:
        for start, tokens in windows:
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


def _windows(texts: int, device: torch.device) -> Iterator[range]:
    """Yield which texts are tokenized together; on a GPU the first windows are small."""
    size = _FIRST_WINDOW if device.type == "cuda" else _WINDOW_OF_TEXTS
    start = 0
    while start < texts:
        yield range(start, min(start + size, texts))
        start, size = start + size, min(2 * size, _WINDOW_OF_TEXTS)


def on_host(steps: Iterable[tuple[Step, Vectors]]) -> Iterator[tuple[Step, Vectors]]:
    """Yield vectors on the CPU; those of a GPU one batch late, so that it need not wait."""
    late: tuple[Step, Vectors, Any] | None = None
    for step, vectors in steps:
        device = step.states.device
        if device.type != "cuda":
            yield step, vectors.to("cpu")
            continue
        copies = vectors.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream(device).record_event()
        if late is not None:
            yield _arrived(*late)
        late = replace(step, states=step.states[:0]), copies, copied
    if late is not None:
        yield _arrived(*late)


def _arrived(step: Step, vectors: Vectors, copied: Any) -> tuple[Step, Vectors]:
    """Wait for copies, and take them out of pinned memory, of which there is little."""
    copied.synchronize()
    return step, vectors.with_tensors([numbers.clone() for numbers in vectors.tensors()])


def text_vectors(
    steps: Iterable[Step], finished: Callable[[Step], Vectors], nothing: Vectors
) -> Vectors:
    """Return the vectors of all texts in the order given, on the CPU; ``nothing`` if no texts."""
    parts, rows = [], []
    for step, vectors in on_host((step, finished(step)) for step in steps):
        step.require_finite(~vectors.not_finite())
        sparse = None if vectors.sparse is None else vectors.sparse.merged()
        parts.append(replace(vectors, sparse=sparse))
        rows += step.rows
    return Vectors.join(parts).take(torch.tensor(rows).argsort()) if parts else nothing


def token_states(steps: Iterable[Step], texts: int, width: int) -> list[np.ndarray]:
    """Return the states of each text's pooled tokens."""
    found: list[np.ndarray] = [np.empty((0, width), np.float32)] * texts
    for step in steps:
        states = step.states[:, :width].float().cpu().split(step.texts.lengths)
        pooled = step.texts.host.pooled.split(step.texts.lengths)
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
