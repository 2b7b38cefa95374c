"""What a run reports: a JSON line per step, a warning about dying heads, sizes of comparisons."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Final

import numpy as np

from tercet import distributed
from tercet.data.files.sources import Source
from tercet.errors import MissingExtraError, RecipeError
from tercet.evaluate.measures.by_kind import EMPTY
from tercet.files.artifacts import parse_json
from tercet.files.atomic import clear_about, replacing_file
from tercet.files.limits import read_text
from tercet.files.secrets import redacted
from tercet.training.batches import Groups, sampled
from tercet.training.recipe import Stage
from tercet.types import Example

LOG: Final = "log.jsonl"
MESSAGES: Final = "messages.jsonl"
_FIRST: Final = 10  # steps after which it is clear whether anything is learned
_RECENT: Final = 32  # batches over which the share of empty vectors is averaged
_RISE: Final = 0.1  # of that mean; on a dev set, whose texts stay the same, EMPTY is enough
_DEVIATIONS: Final = 1.5  # standard deviations of single batches that a rise must exceed as well

log = logging.getLogger("tercet")


class Log:
    """Appends records to ``log.jsonl``; a resumed run drops those after its checkpoint."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG
        kept = [record for record in read(self.path) if record["step"] <= step and step > 0]
        with replacing_file(self.path) as fresh:
            lines = (json.dumps(record) + "\n" for record in kept)
            fresh.write_text("".join(lines), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder, step) if tensorboard else None

    def write(self, step: int, **values: Any) -> None:
        """Add a record; numbers also go to TensorBoard."""
        with clear_about(self.path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish writing."""
        with clear_about(self.path):  # what could not be written is tried once more
            self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, without a last line that a kill cut short."""
    if not path.exists():
        return []
    records = []
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        problem = f"{path}: this log of an earlier run cannot be read ({error}); delete the file"
        raise RecipeError(problem) from error
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


@contextmanager
def kept_messages(folder: Path, say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Append warnings, and lines that go to the function that is yielded, to ``messages.jsonl``.

    The lines are passed on. Those of earlier calls, of a run that goes on, stay.
    """

    def keep(kind: str, text: str) -> None:
        with suppress(OSError), (folder / MESSAGES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "text": redacted(text)}) + "\n")

    def keep_and_say(line: str) -> None:
        keep("note", line)
        say(line)

    handler = _Kept(keep)
    log.addHandler(handler)
    try:
        yield keep_and_say
    finally:
        log.removeHandler(handler)


def read_messages(folder: Path) -> list[dict[str, Any]]:
    """Return the messages of a run, each with its ``kind``, note or warning, and its ``text``."""
    return [each for each in read(folder / MESSAGES) if {"kind", "text"} <= each.keys()]


class _Kept(logging.Handler):
    def __init__(self, keep: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self.keep = keep

    def emit(self, record: logging.LogRecord) -> None:
        self.keep("warning", record.getMessage())


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("writing TensorBoard files", "tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)


@dataclass(slots=True)
class SparseAlarm:
    """Warns when a sparse head is dying: when more and more of its vectors are empty.

    A head that gives every token of a text less than zero gets no gradient from that text
    (FlagEmbedding issue 982). The share of empty vectors is compared with the lowest so far, for
    batches and for queries and documents of a dev set; each is reported once.
    """

    lowest: dict[str, float] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    batches: int = 0
    recent: float = 0.0  # the mean share of the last batches, older ones fading out
    variance: float = 0.0  # of their shares

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "SparseAlarm":
        """Return the alarm of a checkpoint; older ones call ``warned`` "told"."""
        return cls(**{"warned" if name == "told" else name: x for name, x in state.items()})

    def after_step(self, step: int, share: float | int) -> None:
        """Look at the share of empty sparse vectors among the documents of a batch.

        The mean of the last batches deviates by about an eighth of what single batches do, and the
        extremes of many such means by four times that: small batches need a larger rise.
        """
        self.batches += 1
        fading, before = 1 / min(self.batches, _RECENT), self.recent
        self.recent += (share - before) * fading
        self.variance += ((share - before) * (share - self.recent) - self.variance) * fading
        if self.batches >= _RECENT:
            rise = max(_RISE, _DEVIATIONS * sqrt(self.variance))
            self._compare(step, "documents in training", self.recent, rise)

    def after_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Look at the figures of ``tercet.evaluate.measures.by_kind.dev_score``."""
        for role in ("query", "document"):
            if (share := figures.get(f"dev_{role}_empty")) is not None:
                self._compare(step, f"{role} texts of the dev set", share, EMPTY)

    def _compare(self, step: int, what: str, share: float | int, rise: float) -> None:
        self.lowest[what] = min(share, self.lowest.get(what, share))
        if what in self.warned or share <= self.lowest[what] + rise:
            return
        self.warned.append(what)
        log.warning(
            "step %d: the share of %s without a sparse term has risen from %.1f %% to %.1f %%: the "
            "sparse head is dying; if that continues, start again with a lower learning rate or a "
            "lower weight of its loss, or with a dev set (--dev), which keeps the best weights",
            step,
            what,
            100 * self.lowest[what],
            100 * share,
        )


@dataclass(slots=True)
class FirstSteps:
    """Notices when the first steps of a stage teach nothing, or nothing of a teacher's scores.

    A single batch may have nothing to compare, such as pairs of equal scores.
    """

    done: int  # steps before this process began
    learned: bool = False  # whether a step had a gradient
    taught: bool = False  # whether a teacher's scores were compared

    def __post_init__(self) -> None:
        self.learned = self.taught = self.done > 0  # what came before is not known

    def after_step(self, last: int, norm: float, losses: Mapping[str, float]) -> str | None:
        """Return why nothing is learned, once that is clear; ``last`` is the stage's last step."""
        self.done += 1
        self.learned |= norm > 0
        parts = [value for name, value in losses.items() if name.endswith("taught")]
        self.taught |= not parts or any(parts)
        if self.done != min(_FIRST, last):
            return None
        if not self.taught:
            log.warning(
                "the first %d steps compared no teacher's scores: no query had two documents with "
                "scores in its batch, so the distil loss teaches nothing; score the negatives too "
                "(tercet score), and take more of them (negatives) or of the positives",
                self.done,
            )
        if self.learned:
            return None
        if losses.get("ignored") == 1:
            return "ignore_rule ignored every document; set an ignore_value that ignores fewer"
        return (
            f"no weight got a gradient in {self.done} steps, so nothing is learned; examples need "
            "something to compare, such as documents of other examples or scores that differ"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The average number of documents that a query is compared with in a contrastive step."""

    positives: float
    negatives: float  # its own
    others: float  # that each other example in the batch adds

    @classmethod
    def of(cls, stage: Stage, sources: Sequence[Source]) -> "Candidates | None":
        """Return the averages over a few examples of each source, weighted by their number.

        A stage that mines its negatives is assumed to have as many as it asks for. None if all rows
        are pairs with a similarity score, which are not counted: no query is compared.
        """
        sampling = [
            [_counts(stage, example) for _, example in sampled(source) if example.score is None]
            for source in sources
        ]
        found = [np.array(counts).mean(axis=0) for counts in sampling if counts]
        if not found:
            return None
        weights = [
            (len(source) - source.scored) * source.weight
            for source, counts in zip(sources, sampling, strict=True)
            if counts
        ]
        positives, negatives, others = np.average(found, axis=0, weights=weights).tolist()
        if stage.mixing == "blended":  # the pairs of a batch add no document
            others *= sum(weights) / sum(len(source) * source.weight for source in sources)
        return cls(positives=positives, negatives=negatives, others=others)

    def in_batch(self, size: int) -> float:
        """Return the documents of each query of a batch of ``size`` examples."""
        return self.positives + self.negatives + (size - 1) * self.others

    def summary(self, groups: Groups) -> str:
        """Return all of it for people; documents that answer two queries are counted twice."""
        counts = [round(self.in_batch(size)) for size in groups.sizes]
        first, last = f"{counts[0]:,}", f"{counts[-1]:,}"
        total = first if first == last else f"{first} (short texts) to {last} (long)"
        world = distributed.world()
        where = f" in all {world} processes" if world > 1 else ""
        others = f"those of the other queries{where}" if self.others else "none of other queries"
        return (
            f"each query is compared with about {total} documents: {self.positives:.3g} positive, "
            f"{self.negatives:.3g} mined negatives, and {others}"
        )


def _counts(stage: Stage, example: Example) -> tuple[int, int, int]:
    positives = min(len(example.positives), stage.positives)
    mined = stage.negatives if stage.refresh else min(len(example.negatives), stage.negatives)
    policy = (example.in_batch or "all") if stage.in_batch == "per_row" else stage.in_batch
    return positives, mined, {"all": positives + mined, "positives": positives}.get(policy, 0)
