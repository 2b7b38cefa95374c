"""What a folder of sources holds, by source and language, before anything is trained on it."""

from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from tercet.data.batches.mixture import batches_of
from tercet.data.files.examples import parse_example
from tercet.data.files.folders import Group, Shard, find_groups
from tercet.data.files.scan import ReportProgress, example_records
from tercet.data.files.sources import in_language
from tercet.data.files.texts import text_key
from tercet.errors import DataError
from tercet.files.records import parsed
from tercet.types import Example, Role

MOST_ERRORS: Final = 20  # enough to mend at a time
SAMPLE: Final = 512  # examples of a source whose tokens are counted
QUANTILES: Final = (0.0, 0.5, 0.95)

CountTokens: TypeAlias = Callable[[Sequence[str], Role], list[int]]
"""The tokens of each text, prompt included and nothing cut."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """The least, the median and the 95 % quantile of a length."""

    least: float | int
    median: float | int
    p95: float | int


@dataclass(frozen=True, slots=True)
class TextReport:
    """How long the texts of one role are. Tokens are those of a sample, if they were counted."""

    words: Lengths  # parted by spaces: they say little of Chinese or Thai
    bytes: Lengths  # UTF-8
    tokens: Lengths | None = None
    truncated: float | int | None = None  # share of the sample that is longer than the limit


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source and language. A pair is a query and one of its positives."""

    source: str
    lang: str
    rows: int
    share: float | int  # of all rows
    batches: int  # an epoch, at the batch size that was asked for
    pairs: int
    duplicate_pairs: int  # exact, beyond the first of their kind
    queries: TextReport
    documents: TextReport  # positives
    overlap: Mapping[str, int]  # evaluation set: rows whose query or positive stands in it

    @property
    def name(self) -> str:
        """The source with its language, as weights name it."""
        return f"{self.source}/{self.lang}" if self.lang else self.source


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found; where there are errors, the counts are of the good rows."""

    sources: tuple[SourceReport, ...]
    errors: tuple[str, ...]  # "file:line: problem", the first 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting:
    """What is counted beside the rows themselves."""

    batch_size: int = 256
    tokens: CountTokens | None = None
    query_tokens: int | None = None  # where queries will be cut
    document_tokens: int | None = None
    against: Mapping[str, Collection[int]] = field(default_factory=dict)  # keys of texts by set

    def limit(self, role: Role) -> int | None:
        """Where texts of a role will be cut."""
        return self.query_tokens if role == "query" else self.document_tokens


def survey(
    paths: Iterable[Path], counting: Counting, progress: ReportProgress | None = None
) -> Survey:
    """Read files and folders of examples, and tell what each source holds in each language.

    Nothing is raised for bad data: up to 20 errors of all files are collected. Texts are not kept;
    a row costs about 30 bytes.
    """
    tallies: dict[tuple[str, str], _Tally] = {}
    errors: list[str] = []
    shards = [shard for group in _groups(paths, errors) for shard in group.shards]
    for number, shard in enumerate(shards):
        if len(errors) >= MOST_ERRORS:
            break
        _read(shard, tallies, errors, counting)
        if progress is not None:
            progress((number + 1) / len(shards))
    total = sum(tally.rows for tally in tallies.values())
    reports = [tallies[key].report(key, total, counting) for key in sorted(tallies)]
    return Survey(tuple(reports), tuple(errors))


def _groups(paths: Iterable[Path], errors: list[str]) -> list[Group]:
    found: list[Group] = []
    for path in paths:
        try:
            found += find_groups(path)
        except DataError as error:
            errors.append(str(error))
    return found


def _read(
    shard: Shard,
    tallies: "dict[tuple[str, str], _Tally]",
    errors: list[str],
    counting: Counting,
) -> None:
    try:
        for record in example_records(shard.path):
            try:
                row = parsed(shard.path, record, lambda it: parse_example(it.value, shard.source))
            except DataError as error:
                errors.append(str(error))
                if len(errors) >= MOST_ERRORS:
                    return
                continue
            row = in_language(row, shard.lang)
            tallies.setdefault((shard.source, row.lang), _Tally()).add(row, counting)
    except DataError as error:  # of the file as a whole: missing, damaged, empty
        errors.append(str(error))


@dataclass(slots=True)
class _Texts:
    """Lengths of the texts of one role; 8 bytes a text."""

    words: array = field(default_factory=lambda: array("I"))
    bytes: array = field(default_factory=lambda: array("I"))

    def add(self, text: str) -> None:
        self.words.append(len(text.split()))
        self.bytes.append(len(text.encode()))


@dataclass(slots=True)
class _Tally:
    """What is known of one source and language so far."""

    rows: int = 0
    queries: _Texts = field(default_factory=_Texts)
    documents: _Texts = field(default_factory=_Texts)
    pairs: array = field(default_factory=lambda: array("q"))
    overlap: dict[str, int] = field(default_factory=dict)
    sample: list[Example] = field(default_factory=list)
    step: int = 1  # every so many rows are in the sample

    def add(self, row: Example, counting: Counting) -> None:
        self.queries.add(row.query)
        for text in row.positives:
            self.documents.add(text)
            self.pairs.append(hash((row.query, text)))
        if counting.against:
            keys = {text_key(text) for text in (row.query, *row.positives)}
            for name, known in counting.against.items():
                self.overlap[name] = self.overlap.get(name, 0) + any(key in known for key in keys)
        if counting.tokens is not None and self.rows % self.step == 0:
            self.sample.append(row)
            if len(self.sample) > 2 * SAMPLE:
                self.sample, self.step = self.sample[::2], self.step * 2
        self.rows += 1

    def report(self, key: tuple[str, str], total: int, counting: Counting) -> SourceReport:
        distinct = len(np.unique(np.frombuffer(self.pairs, np.int64)))
        queries = [row.query for row in self.sample]
        documents = [row.positives[0] for row in self.sample]
        return SourceReport(
            source=key[0],
            lang=key[1],
            rows=self.rows,
            share=self.rows / total,
            batches=batches_of(self.rows, 1.0, counting.batch_size),
            pairs=len(self.pairs),
            duplicate_pairs=len(self.pairs) - distinct,
            queries=_report(self.queries, queries, "query", counting),
            documents=_report(self.documents, documents, "document", counting),
            overlap=dict(self.overlap),
        )


def _report(texts: _Texts, sample: Sequence[str], role: Role, counting: Counting) -> TextReport:
    known = TextReport(_lengths(texts.words), _lengths(texts.bytes))
    if counting.tokens is None:
        return known
    tokens, limit = np.asarray(counting.tokens(sample, role)), counting.limit(role)
    truncated = None if limit is None else float((tokens > limit).mean())
    return replace(known, tokens=_lengths(tokens), truncated=truncated)


def _lengths(numbers: "array | np.ndarray") -> Lengths:
    return Lengths(*np.quantile(np.asarray(numbers), QUANTILES).tolist())
