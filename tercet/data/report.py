"""What files of training data hold, by source and language, and what would spoil a training."""

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from tercet.data.batches.mixture import batches_of
from tercet.data.files.beir import is_judged_folder, training_files
from tercet.data.files.examples import USUAL_FIELDS, ExampleFields
from tercet.data.files.folders import Shard, find_groups
from tercet.data.files.scan import RecordFormat, ReportProgress, example_format
from tercet.data.files.sources import in_language
from tercet.data.files.texts import EvenSample, text_key
from tercet.errors import DataError
from tercet.files.forms import Content, known_form
from tercet.files.parquet import open_parquet
from tercet.files.records import BOM, FieldNames, parsed, readable
from tercet.types import Example, Role

MAX_ERRORS: Final = 20  # enough to repair at a time
TOKEN_SAMPLE: Final = 1024  # at most: examples of a source whose tokens are counted
SHOWN_SAMPLES: Final = 3
MAX_SEEN: Final = 1000  # sets of columns of a file that are remembered
SHOWN_COLUMNS: Final = 20  # of a file that nothing reads
QUANTILES: Final = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)

CountTokens: TypeAlias = Callable[[Sequence[str], Role], list[int]]
"""The number of tokens of each text, with its prompt and before truncation."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Quantiles of the lengths of texts."""

    least: float | int
    p25: float | int
    median: float | int
    p75: float | int
    p95: float | int
    most: float | int


@dataclass(frozen=True, slots=True)
class TextReport:
    """How long the texts of one role are. Tokens are those of a sample, if they were counted."""

    words: Lengths  # separated by spaces: they say little about Chinese or Thai
    bytes: Lengths  # UTF-8
    tokens: Lengths | None = None
    truncated: float | int | None = None  # share of the sample that is longer than the limit


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source and language, or all of them. A pair is a query and one of its positives."""

    source: str
    lang: str
    rows: int
    share: float | int  # of all rows
    batches: int  # per epoch, at the given batch size
    pairs: int
    duplicate_pairs: int  # exact, beyond the first of each
    scored_pairs: int  # rows that are pairs with a similarity score
    with_negatives: int  # rows that have mined negatives
    distinct_queries: int
    distinct_documents: int
    queries_as_positive: int  # rows whose query is one of its positives
    negatives_as_positive: int  # negatives that are a positive of the same row
    blank_negatives: int
    queries: TextReport
    documents: TextReport  # positives and negatives
    overlap: Mapping[str, int]  # evaluation set: rows whose query or a positive is in it

    @property
    def name(self) -> str:
        """The source with its language, as weights name it."""
        return f"{self.source}/{self.lang}" if self.lang else self.source

    @property
    def positives_per_query(self) -> float:
        """The mean number of positives of a row."""
        return self.pairs / self.rows


@dataclass(frozen=True, slots=True)
class FileReport:
    """A file or a folder of BEIR, as it was understood."""

    path: str
    format: str  # such as "CSV, gzip"
    encoding: str  # empty: it is not text
    columns: Mapping[str, str]  # field of an example: the columns that were taken for it
    unread: tuple[str, ...]  # columns that nothing reads, the first ones
    rows: int  # valid ones


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was found; where there are errors, the counts are of the valid rows."""

    sources: tuple[SourceReport, ...]
    total: SourceReport | None  # None if there is no valid row; without tokens
    samples: tuple[Example, ...]  # up to three, from begin to end
    errors: tuple[str, ...]  # "file:line: problem", the first 20
    warnings: tuple[str, ...]  # what to think about before training
    files: tuple[FileReport, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """What is counted besides the rows themselves."""

    batch_size: int = 256
    tokens: CountTokens | None = None
    query_tokens: int | None = None  # where queries will be truncated
    document_tokens: int | None = None
    against: Mapping[str, Collection[int]] = field(default_factory=dict)  # keys of texts by set
    fields: ExampleFields = USUAL_FIELDS  # where they are not recognised


def check_data(
    paths: Iterable[Path],
    options: CheckOptions = CheckOptions(),
    progress: ReportProgress | None = None,
) -> DataReport:
    """Read files and folders of examples and report what each source holds in each language.

    Nothing is raised for invalid data: up to 20 errors of all files are collected, to be repaired
    in one go. Texts are not kept: a text costs 16 bytes, a pair 8.
    """
    tallies: dict[tuple[str, str], _Tally] = {}
    errors: list[str] = []
    samples = EvenSample[Example](8)
    shards = _shards(paths, errors)
    record_format, files = example_format(options.fields), list[FileReport]()
    for number, shard in enumerate(shards):
        if len(errors) >= MAX_ERRORS:
            break
        columns, valid = _Columns(options.fields), 0
        for row in _valid_rows(shard, record_format, columns, errors):
            tallies.setdefault((shard.source, row.lang), _Tally()).add(row, options)
            samples.add(row)
            valid += 1
        if valid:
            files.append(_file_report(shard.path, columns, valid))
        if progress is not None:
            progress((number + 1) / len(shards))
    rows = sum(tally.rows for tally in tallies.values())
    sources = tuple(_source_report(key, [tallies[key]], rows, options) for key in sorted(tallies))
    total = None
    if sources:
        total = _source_report(("all", ""), list(tallies.values()), rows, options)
        total = replace(total, batches=sum(source.batches for source in sources))
    places = np.linspace(0, len(samples.kept) - 1, min(SHOWN_SAMPLES, len(samples.kept))).round()
    return DataReport(
        sources=sources,
        total=total,
        samples=tuple(samples.kept[place] for place in places.astype(int).tolist()),
        errors=tuple(errors),
        warnings=tuple(_warnings(total, len(errors))),
        files=tuple(files),
    )


def _shards(paths: Iterable[Path], errors: list[str]) -> list[Shard]:
    found: list[Shard] = []
    for path in paths:
        try:
            found += [shard for group in find_groups(path) for shard in group.shards]
        except DataError as error:
            errors.append(str(error))
    return found


class _Columns:
    """The columns that were taken for each field, and those that nothing reads."""

    def __init__(self, fields: ExampleFields) -> None:
        self.taken: dict[str, dict[str, None]] = {}
        self.unread: dict[str, None] = {}
        of_fields = [FieldNames.of(names) for names in fields.columns]
        usual = [FieldNames.of(names).names[0] for names in USUAL_FIELDS.columns]
        self._fields = dict(zip(usual, of_fields, strict=True))
        self._seen: set[tuple[str, ...]] = set()

    def add(self, names: Iterable[str]) -> None:
        """Add the columns of a record, unless another record had the same."""
        keys = tuple(names)
        if keys in self._seen:
            return
        if len(self._seen) < MAX_SEEN:
            self._seen.add(keys)
        read = {name: group.among(keys) for name, group in self._fields.items()}
        for field_name, columns in read.items():
            if columns:
                self.taken.setdefault(field_name, {}).update(dict.fromkeys(columns))
        known = {name for columns in read.values() for name in columns}
        for name in keys:
            if name not in known and len(self.unread) < SHOWN_COLUMNS:
                self.unread[name] = None


def _file_report(path: Path, columns: _Columns, rows: int) -> FileReport:
    if is_judged_folder(path):
        corpus, queries, judgements = (str(file.relative_to(path)) for file in training_files(path))
        taken = {"query": queries, "positives": f"{corpus} by {judgements}"}
        return FileReport(str(path), "folder of BEIR", "UTF-8", taken, (), rows)
    form, encoding = known_form(path), ""
    with readable(path):
        if form is not None and form.kind == "parquet":
            with open_parquet(path) as file:
                columns.add(file.schema_arrow.names)
        else:
            with Content(path).buffered() as file:
                encoding = "UTF-8 with BOM" if file.read(len(BOM)) == BOM else "UTF-8"
    taken = {name: ", ".join(found) for name, found in columns.taken.items()}
    described = "" if form is None else form.described
    return FileReport(str(path), described, encoding, taken, tuple(columns.unread), rows)


def _valid_rows(
    shard: Shard, record_format: RecordFormat, columns: _Columns, errors: list[str]
) -> Iterable[Example]:
    try:
        for record in record_format.records(shard.path):
            if isinstance(record.value, dict):
                columns.add(record.value)
            try:
                row = parsed(
                    shard.path, record, lambda it: record_format.parse(it.value, shard.source)
                )
            except DataError as error:
                errors.append(str(error))
                if len(errors) >= MAX_ERRORS:
                    return
                continue
            yield in_language(row, shard.lang)
    except DataError as error:  # of the file as a whole: missing, damaged, empty
        errors.append(str(error))


@dataclass(slots=True)
class _TextTally:
    """Hashes and lengths of the texts of one role; 16 bytes per text."""

    hashes: array = field(default_factory=lambda: array("q"))
    words: array = field(default_factory=lambda: array("I"))
    bytes: array = field(default_factory=lambda: array("I"))

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.hashes.append(hash(text))
            self.words.append(len(text.split()))
            self.bytes.append(len(text.encode()))


@dataclass(slots=True)
class _Tally:
    """Counts of the rows of one source and language so far."""

    rows: int = 0
    scored_pairs: int = 0
    with_negatives: int = 0
    queries_as_positive: int = 0
    negatives_as_positive: int = 0
    blank_negatives: int = 0
    queries: _TextTally = field(default_factory=_TextTally)
    documents: _TextTally = field(default_factory=_TextTally)
    pairs: array = field(default_factory=lambda: array("q"))
    overlap: Counter[str] = field(default_factory=Counter)
    sample: EvenSample[Example] = field(default_factory=lambda: EvenSample(TOKEN_SAMPLE))

    def add(self, row: Example, options: CheckOptions) -> None:
        self.rows += 1
        self.scored_pairs += row.score is not None
        self.with_negatives += bool(row.negatives)
        self.queries_as_positive += row.score is None and row.query in row.positives
        self.negatives_as_positive += sum(text in row.positives for text in row.negatives)
        self.blank_negatives += sum(not text.strip() for text in row.negatives)
        self.queries.add((row.query,))
        self.documents.add((*row.positives, *row.negatives))
        self.pairs.extend(hash((row.query, text)) for text in row.positives)
        if options.against:
            keys = {text_key(text) for text in (row.query, *row.positives)}
            for name, known in options.against.items():
                self.overlap[name] += any(key in known for key in keys)
        if options.tokens is not None:
            self.sample.add(row)


def _source_report(
    key: tuple[str, str], tallies: Sequence[_Tally], all_rows: int, options: CheckOptions
) -> SourceReport:
    rows = sum(tally.rows for tally in tallies)
    sample = tallies[0].sample.kept if len(tallies) == 1 else []
    pairs = _numbers([tally.pairs for tally in tallies])
    overlap: Counter[str] = Counter()
    for tally in tallies:
        overlap.update(tally.overlap)
    queries, documents = [t.queries for t in tallies], [t.documents for t in tallies]
    return SourceReport(
        source=key[0],
        lang=key[1],
        rows=rows,
        share=rows / all_rows,
        batches=batches_of(rows, 1.0, options.batch_size),
        pairs=len(pairs),
        duplicate_pairs=len(pairs) - len(np.unique(pairs)),
        scored_pairs=sum(tally.scored_pairs for tally in tallies),
        with_negatives=sum(tally.with_negatives for tally in tallies),
        distinct_queries=len(np.unique(_numbers([texts.hashes for texts in queries]))),
        distinct_documents=len(np.unique(_numbers([texts.hashes for texts in documents]))),
        queries_as_positive=sum(tally.queries_as_positive for tally in tallies),
        negatives_as_positive=sum(tally.negatives_as_positive for tally in tallies),
        blank_negatives=sum(tally.blank_negatives for tally in tallies),
        queries=_text_report(queries, [row.query for row in sample], "query", options),
        documents=_text_report(
            documents, [row.positives[0] for row in sample], "document", options
        ),
        overlap=dict(overlap),
    )


def _text_report(
    tallies: Sequence[_TextTally], sample: Sequence[str], role: Role, options: CheckOptions
) -> TextReport:
    known = TextReport(
        words=_lengths(_numbers([tally.words for tally in tallies])),
        bytes=_lengths(_numbers([tally.bytes for tally in tallies])),
    )
    if options.tokens is None or not sample:
        return known
    tokens = np.asarray(options.tokens(sample, role))
    limit = options.query_tokens if role == "query" else options.document_tokens
    truncated = None if limit is None else float((tokens > limit).mean())
    return replace(known, tokens=_lengths(tokens), truncated=truncated)


def _warnings(total: SourceReport | None, errors: int) -> Iterable[str]:
    if errors >= MAX_ERRORS:
        yield (
            f"reading stopped after {MAX_ERRORS} errors; repair them and check again, "
            "the counts are of the rows before"
        )
    if total is None:
        return
    if total.rows == 1:
        yield "one example alone cannot form a batch; add examples"
    if total.duplicate_pairs:
        yield (
            f"{total.duplicate_pairs} (query, positive) pairs are duplicates; remove them, "
            "or they are trained on more often than the rest"
        )
    if total.queries_as_positive:
        yield (
            f"{total.queries_as_positive} queries are their own positive; remove those "
            "examples, there is nothing to learn from equal texts"
        )
    if total.negatives_as_positive:
        yield (
            f"{total.negatives_as_positive} negatives equal a positive of the same example; "
            "training ignores them, so remove them and mine others in their place"
        )
    if total.blank_negatives:
        yield (
            f"{total.blank_negatives} negatives are blank; remove them, a model learns nothing "
            "from them"
        )


def _numbers(parts: Sequence[array]) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in parts])


def _lengths(numbers: np.ndarray) -> Lengths:
    return Lengths(*np.quantile(numbers, QUANTILES).tolist())
