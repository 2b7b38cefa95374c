"""What a file of training data holds, and what in it would spoil a training."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from tercet.data.files.examples import parse_example
from tercet.data.files.scan import example_records
from tercet.errors import DataError
from tercet.files.records import parsed
from tercet.types import Example

MOST_ERRORS: Final = 20  # enough to mend at a time
SAMPLES: Final = 3
QUANTILES: Final = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)

Quantiles: TypeAlias = tuple[float, ...]  # one number for each of QUANTILES; none for no texts


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long texts are. Words are parted by spaces, so they say little of Chinese or Thai."""

    words: Quantiles
    characters: Quantiles


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was found in a file. Where there are errors, the counts are of the good examples."""

    examples: int
    with_negatives: int  # examples that bring mined negatives
    positives_per_query: float  # mean
    distinct_queries: int
    distinct_documents: int
    duplicate_pairs: int  # (query, positive) pairs beyond the first of their kind
    queries_as_positive: int  # examples whose query is one of its positives
    negatives_as_positive: int  # negatives that are a positive of the same example
    blank_negatives: int
    query_lengths: Lengths
    document_lengths: Lengths
    samples: tuple[Example, ...]  # up to three, spread over the file
    errors: tuple[str, ...]  # "file:line: problem", the first 20
    warnings: tuple[str, ...]  # what to think about before training, in plain words


def check_examples(path: Path | str) -> DataReport:
    """Read a .jsonl or .parquet file of examples and tell what is in it, errors included.

    Nothing is raised for bad data: up to 20 errors are collected, so that they can be mended in
    one go. Texts are not kept, only 8 bytes of hash each.
    """
    path = Path(path)
    tally = _Tally()
    errors: list[str] = []
    try:
        for record in example_records(path):
            try:
                tally.add(parsed(path, record, lambda it: parse_example(it.value, path.stem)))
            except DataError as error:
                errors.append(str(error))
            if len(errors) == MOST_ERRORS:
                break
    except DataError as error:  # of the file as a whole: missing, damaged, empty
        errors.append(str(error))
    return tally.report(errors)


@dataclass(slots=True)
class _Texts:
    """Hashes and lengths of texts; 16 bytes each."""

    hashes: array = field(default_factory=lambda: array("q"))
    words: array = field(default_factory=lambda: array("I"))
    characters: array = field(default_factory=lambda: array("I"))

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.hashes.append(hash(text))
            self.words.append(len(text.split()))
            self.characters.append(len(text))

    def distinct(self) -> int:
        return _distinct(self.hashes)

    def lengths(self) -> Lengths:
        return Lengths(_quantiles(self.words), _quantiles(self.characters))


@dataclass(slots=True)
class _Spread:
    """Examples evenly spread over a stream of unknown length: every ``step``-th, at most eight.

    When there is no place left, every other one goes and the step doubles.
    """

    kept: list[Example] = field(default_factory=list)
    step: int = 1
    seen: int = 0

    def add(self, example: Example) -> None:
        if self.seen % self.step == 0:
            self.kept.append(example)
        if len(self.kept) > 8:
            self.kept, self.step = self.kept[::2], self.step * 2
        self.seen += 1

    def samples(self) -> tuple[Example, ...]:
        count = min(SAMPLES, len(self.kept))
        places = np.linspace(0, len(self.kept) - 1, count).round().astype(int)
        return tuple(self.kept[place] for place in places.tolist())


@dataclass(slots=True)
class _Tally:
    """Counts of the examples seen so far."""

    examples: int = 0
    with_negatives: int = 0
    queries_as_positive: int = 0
    negatives_as_positive: int = 0
    blank_negatives: int = 0
    queries: _Texts = field(default_factory=_Texts)
    documents: _Texts = field(default_factory=_Texts)
    pairs: array = field(default_factory=lambda: array("q"))
    spread: _Spread = field(default_factory=_Spread)

    def add(self, example: Example) -> None:
        """Count one more example."""
        self.examples += 1
        self.with_negatives += bool(example.negatives)
        self.queries_as_positive += example.query in example.positives
        self.negatives_as_positive += sum(t in example.positives for t in example.negatives)
        self.blank_negatives += sum(not text.strip() for text in example.negatives)
        self.queries.add((example.query,))
        self.documents.add((*example.positives, *example.negatives))
        self.pairs.extend(hash((example.query, text)) for text in example.positives)
        self.spread.add(example)

    def report(self, errors: list[str]) -> DataReport:
        """What the counts amount to."""
        return DataReport(
            examples=self.examples,
            with_negatives=self.with_negatives,
            positives_per_query=len(self.pairs) / max(self.examples, 1),
            distinct_queries=self.queries.distinct(),
            distinct_documents=self.documents.distinct(),
            duplicate_pairs=len(self.pairs) - _distinct(self.pairs),
            queries_as_positive=self.queries_as_positive,
            negatives_as_positive=self.negatives_as_positive,
            blank_negatives=self.blank_negatives,
            query_lengths=self.queries.lengths(),
            document_lengths=self.documents.lengths(),
            samples=self.spread.samples(),
            errors=tuple(errors),
            warnings=tuple(self._warnings(len(errors))),
        )

    def _warnings(self, errors: int) -> Iterable[str]:
        if errors >= MOST_ERRORS:
            yield (
                f"reading stopped after {MOST_ERRORS} errors; mend them and check again, "
                "the counts are of what came before"
            )
        if self.examples == 1:
            yield "one example alone cannot form a batch; add examples"
        if twice := len(self.pairs) - _distinct(self.pairs):
            yield (
                f"{twice} (query, positive) pairs are there more than once; remove the copies, "
                "or they are trained on more often than the rest"
            )
        if self.queries_as_positive:
            yield (
                f"{self.queries_as_positive} queries are their own positive; remove those "
                "examples, there is nothing to learn from equal texts"
            )
        if self.negatives_as_positive:
            yield (
                f"{self.negatives_as_positive} negatives equal a positive of the same example; "
                "training ignores them, so remove them and mine others in their place"
            )
        if self.blank_negatives:
            yield (
                f"{self.blank_negatives} negatives are blank; remove them, they are told from a "
                "positive without reading"
            )


def _distinct(hashes: array) -> int:
    return len(np.unique(np.frombuffer(hashes, np.int64))) if hashes else 0


def _quantiles(lengths: array) -> Quantiles:
    if not lengths:
        return ()
    return tuple(np.quantile(np.frombuffer(lengths, np.uint32), QUANTILES).tolist())
