"""A teacher's scores of the documents in training rows, in parts, in any number of processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tercet.curate.jobs.job import DoUnit, UnitReport, WorkUnit, run_units
from tercet.curate.jobs.runners import LOOP, Runner
from tercet.data.files.sources import Source, refuse_scored, write_examples
from tercet.errors import ModelError, RecipeError
from tercet.files.outputs import check_output
from tercet.files.records import known_suffix
from tercet.kinds import KINDS, Kind, Weights
from tercet.models.embedder import Embedder
from tercet.models.pairs import score_pairs
from tercet.types import Example

ScoredBy: TypeAlias = Literal["dense", "sparse", "multi", "hybrid"]

PART: Final = 256  # rows; what a kill costs at most
_VERSION: Final = 1  # of the scores


@runtime_checkable
class Teacher(Protocol):
    """Scores pairs of texts, such as :class:`tercet.models.formats.cross_encoder.CrossEncoder`."""

    def fingerprint(self) -> str:
        """Return what changes with the scores."""
        ...

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> Float[Tensor, "pairs"]:
        """Return the score of each query with the document at its position."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class EmbedderTeacher:
    """An embedder that scores by one kind of vectors, or by their weighted sum ("hybrid").

    Texts get the model's own prompts.
    """

    embedder: Embedder
    by: ScoredBy | None = None  # None: the sum, or dense where there is no other kind
    changed: Mapping[Kind, float] | None = None  # weights in the sum; others are the model's

    def __post_init__(self) -> None:
        if (by := self._by) != "hybrid" and by not in self.embedder.kinds:
            raise RecipeError(
                f"the model makes no {by} vectors; it makes {', '.join(self.embedder.kinds)}"
            )
        if not self._summed:
            raise RecipeError("no kind of vectors has a weight in the sum; give one a weight")
        if self.changed and by != "hybrid":
            raise RecipeError(f"weights are of a sum of kinds, and the scores are by {by}")

    @property
    def _by(self) -> ScoredBy:
        return self.by or ("hybrid" if len(self.embedder.kinds) > 1 else "dense")

    @property
    def _weights(self) -> Weights:
        usual = self.embedder.settings.weights.get("", Weights())
        return replace(usual, **(self.changed or {}))

    @property
    def _summed(self) -> list[Kind]:
        made = self.embedder.kinds
        return [kind for kind in KINDS if kind in made and self._weights.of(kind)]

    def fingerprint(self) -> str:
        """Return what changes with the scores."""
        return f"{self.embedder.fingerprint()} {self._by} {self._weights}"

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> Float[Tensor, "pairs"]:
        """Return the score of each query with the document at its position."""
        found = score_pairs(self.embedder, queries, documents, weights=self._weights)
        if self._by != "hybrid":
            return found[self._by]
        (only, *others) = self._summed
        return found["+".join(self._summed)] if others else found[only] * self._weights.of(only)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """The job of scoring rows; its results are in the manifest."""

    load: Callable[[], Teacher]  # loads the model in each process; can be pickled
    fingerprint: str  # of the teacher
    sources: Sequence[Source]
    name: str = "score"

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the scores depend on, besides the rows."""
        return {"version": _VERSION, "teacher": self.fingerprint}

    def open(self) -> DoUnit:
        """Load the model."""
        return partial(self._do, self.load())

    def files(self, unit: WorkUnit) -> Sequence[Path]:
        """Return nothing: scores are small."""
        return []

    def units(self) -> list[WorkUnit]:
        """Cut the sources into parts."""
        return [
            WorkUnit(
                f"{number:03}-{start // PART:06}",
                {"of": number, "rows": [start, stop], "file": source.fingerprint},
                size=stop - start,
            )
            for number, source in enumerate(self.sources)
            for start in range(0, len(source), PART)
            for stop in [min(start + PART, len(source))]
        ]

    def examples(self, unit: WorkUnit) -> list[Example]:
        """Return the rows of a unit."""
        return self.sources[unit.reads["of"]].examples(range(*unit.reads["rows"]))

    def _do(self, teacher: Teacher, unit: WorkUnit) -> UnitReport:
        examples = self.examples(unit)
        queries = [e.query for e in examples for _ in (*e.positives, *e.negatives)]
        documents = [text for e in examples for text in (*e.positives, *e.negatives)]
        scores = teacher.score(queries, documents)
        if not bool(torch.isfinite(scores).all()):
            place = f"{self.sources[unit.reads['of']].path}, rows {unit.reads['rows']}"
            raise ModelError(
                f"{place}: the model's scores contain NaN or infinity; load it in float32 (--dtype)"
            )
        return {"scores": scores.tolist()}


@dataclass(slots=True)
class ScoreReport:
    """What the teacher found."""

    rows: int = 0
    documents: int = 0
    replaced: int = 0  # rows that had scores before
    negatives: int = 0
    first: int = 0  # rows whose best positive scores above all negatives; of those with negatives
    with_negatives: int = 0
    positive_sum: float = field(default=0.0, repr=False)
    negative_sum: float = field(default=0.0, repr=False)

    @property
    def positive(self) -> float:
        """The mean score of positives."""
        return self.positive_sum / max(self.documents - self.negatives, 1)

    @property
    def negative(self) -> float:
        """The mean score of negatives."""
        return self.negative_sum / max(self.negatives, 1)

    def add(self, old: Example, new: Example) -> None:
        """Count a row."""
        right, wrong = new.positive_scores or (), new.negative_scores or ()
        self.rows += 1
        self.documents += len(right) + len(wrong)
        self.negatives += len(wrong)
        self.replaced += old.positive_scores is not None or old.negative_scores is not None
        self.with_negatives += bool(wrong)
        self.first += bool(wrong) and max(right) > max(wrong)
        self.positive_sum += sum(right)
        self.negative_sum += sum(wrong)


def score_rows(job: ScoreJob, out: Path, work: Path, *, runner: Runner = LOOP) -> ScoreReport:
    """Write the rows of all sources, in order, with the teacher's scores of their documents.

    Parts that a run finished before it was killed are not scored again, as long as ``work`` is
    there. Scores that rows have already are replaced.

    Raises:
        DataError: for pairs with a similarity score, or if a source has changed.
        ModelError: if a score is not finite.
        RecipeError: if ``out`` is one of the sources.
        StorageError: if the disk refuses.
    """
    check_output(out, [source.path for source in job.sources])
    known_suffix(out)
    refuse_scored(job.sources, "scoring")
    report = ScoreReport()

    def rows() -> Iterator[Example]:
        for unit, found in run_units(job, job.units(), work / "scores", runner=runner):
            scores, place = found["scores"], 0
            for example in job.examples(unit):
                middle = place + len(example.positives)
                end = middle + len(example.negatives)
                scored = replace(
                    example,
                    positive_scores=tuple(scores[place:middle]),
                    negative_scores=tuple(scores[middle:end]) if example.negatives else None,
                )
                place = end
                report.add(example, scored)
                yield scored

    write_examples(out, rows())
    return report
