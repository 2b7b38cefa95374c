"""One pass over a file that checks every record, and the cache of what large files hold.

Where rows begin and how long they are is kept in the cache as plain arrays, which are mapped: the
memory of a process does not grow with rows. An entry is used for a file of the same size, time,
beginning and end. The cache is ``$TERCET_CACHE/sources``, or ``~/.cache/tercet/sources``, and may
be deleted. Of a packed file, a table or a folder of BEIR, rows are read from a copy, see
:mod:`tercet.data.files.inputs`.
"""

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from tercet.data.files.beir import is_judged_folder, training_files, training_records
from tercet.data.files.examples import (
    EXAMPLE_FIELDS,
    OUR_FIELDS,
    SCORE,
    USUAL_FIELDS,
    ExampleFields,
    parse_example,
)
from tercet.data.files.inputs import is_packed, lines_of
from tercet.data.files.readers import (
    ChosenReader,
    FileStamp,
    LineReader,
    ParquetReader,
    Reader,
    blocks_among,
    check_stamp,
    line_blocks,
    row_groups,
    stamp_of,
)
from tercet.errors import DataError, StorageError
from tercet.files.artifacts import KeptResults, fingerprint, fingerprint_of_ends, write_npy_header
from tercet.files.atomic import replacing_file
from tercet.files.checksums import damage, seal
from tercet.files.forms import RECORDS, TEXTS, FormKind, known_form
from tercet.files.records import FileRecord, Names, iter_records, parsed, readable
from tercet.models.zoo.zoo import cache_folder
from tercet.types import Example

ROWS_PER_REPORT: Final = 1000  # how often progress is reported
MAX_TASKS: Final = 1000  # of one file, whose prompts are kept
MAX_LANGUAGES: Final = 1000  # of one file
LARGE_BYTES: Final = 1 << 23  # 8 MiB: a smaller file is read as quickly as it is looked up
LARGE_ROWS: Final = 1 << 20  # of a source of several files, whose sizes are joined on disk
_ENDS: Final = 1 << 16  # bytes of the beginning and of the end that have to be the same
_VERSION: Final = 3  # raise it when another reading of the same file gives other results
_COUNTS: Final = ("without_negatives", "scored", "taught")
_KEPT_FACTS: Final = ("lang", "fingerprint", "prompts", *_COUNTS)

log = logging.getLogger("tercet")

Parse: TypeAlias = Callable[[object, str], Example]
"""A record and the task of one that names none, to the example it holds, or a ValueError."""

ReportProgress: TypeAlias = Callable[[float], None]
"""Is called with the part that is done, up to 1."""


def example_records(path: Path, fields: ExampleFields = USUAL_FIELDS) -> Iterator[FileRecord]:
    """Yield the records of a file or folder of BEIR that should hold examples."""
    if is_judged_folder(path):
        return training_records(path)
    needs = fields.names[:2]
    return iter_records(path, fields.columns, needs=needs, known=OUR_FIELDS, null=SCORE)


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """What the records of a file are, and how they are read."""

    about: str = "examples"  # differs where another format makes other examples of a file
    records: Callable[[Path], Iterator[FileRecord]] = example_records
    parse: Parse = parse_example
    fields: tuple[Names, ...] = EXAMPLE_FIELDS  # columns of a parquet file that are read
    plain: Callable[[str], object] | None = None  # a line of a .txt file, if such are read
    named: str = ""  # fields that are read instead of the usual ones

    def fingerprint(self, content: str) -> str:
        """Return the fingerprint of rows whose records have this one: it changes with fields."""
        return fingerprint(content, self.named) if self.named else content

    @property
    def kinds(self) -> tuple[FormKind, ...]:
        """The kinds of files that may hold such records."""
        return RECORDS if self.plain is None else TEXTS

    def decode(self, path: Path) -> Callable[[str], object]:
        """Return the function that reads a line of this file."""
        form = known_form(path)
        is_text = self.plain is not None and form is not None and form.kind == "txt"
        return self.plain if is_text and self.plain is not None else json.loads


EXAMPLE_FORMAT: Final = RecordFormat()


def example_format(fields: ExampleFields | None) -> RecordFormat:
    """Return the format of examples whose fields have these names."""
    if fields is None or fields == USUAL_FIELDS:
        return EXAMPLE_FORMAT
    return RecordFormat(
        about=f"examples {fields}",
        records=partial(example_records, fields=fields),
        parse=partial(parse_example, names=fields),
        fields=fields.columns,
        named=f"examples {fields}",
    )


def files_of(path: Path) -> list[Path]:
    """Return the files that are read for a file, or for a folder of BEIR."""
    return list(training_files(path)) if is_judged_folder(path) else [path]


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What is known of a file before it is read."""

    task: str  # of examples that name none
    lang: str = ""  # of examples that name none
    by_language: bool = False  # whether each language is a source


@dataclass(frozen=True, slots=True, eq=False)
class LanguageRows:
    """The rows of one language of a file, or all rows where languages are not separated."""

    lang: str
    where: np.ndarray  # [rows] int64, ascending: the byte of each line, or the row of a parquet
    sizes: np.ndarray  # [rows] int32, UTF-8 bytes of the longest text
    fingerprint: str  # of the content of the records, and of fields that were named
    prompts: Mapping[str, Mapping[str, str]]  # task, role: the first
    without_negatives: int  # examples that have none
    scored: int  # pairs of texts with a similarity score, which are no examples
    taught: int  # examples with a teacher's scores of two documents or more


@dataclass(frozen=True, slots=True, eq=False)
class ReadableRows:
    """Rows of a file, and how they are read."""

    rows: LanguageRows
    reader: Reader
    blocks: np.ndarray  # [blocks] int64, the first row of each block that is cheap to read whole
    window: int  # blocks that are cheap to read in turns


@dataclass(frozen=True, slots=True, eq=False)
class FileScan:
    """The result of one pass over a file."""

    path: Path
    stamp: FileStamp
    parts: tuple[LanguageRows, ...]  # by language

    def readable(self, record_format: RecordFormat) -> list[ReadableRows]:
        """Return the rows of each language with their reader."""
        form, fingerprint_of = known_form(self.path), record_format.fingerprint
        parts = [replace(part, fingerprint=fingerprint_of(part.fingerprint)) for part in self.parts]
        if form is None or form.kind != "parquet":
            decode, lines, stamp = record_format.decode(self.path), self.path, self.stamp
            if is_packed(self.path):
                is_whole = form is not None and form.kind in ("jsonl", "txt")
                records = None if is_whole else _plain_records(self.path)
                lines = lines_of(self.path, files_of(self.path), records)
                stamp = stamp_of(lines)
            return [
                ReadableRows(
                    part, LineReader(lines, stamp, part.where, decode), *line_blocks(part.where)
                )
                for part in parts
            ]
        blocks, window = row_groups(self.path)
        whole = ParquetReader(self.path, self.stamp, blocks, record_format.fields)
        if len(parts) == 1:
            return [ReadableRows(parts[0], whole, blocks, window)]
        return [
            ReadableRows(
                part, ChosenReader(whole, part.where), blocks_among(part.where, blocks), window
            )
            for part in parts
        ]


@dataclass(slots=True)
class _GrowingRows:
    """The rows of one language so far; 12 bytes each."""

    where: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("i"))
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)
    without_negatives: int = 0
    scored: int = 0
    taught: int = 0
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def add(self, record: FileRecord, place: int, example: Example) -> None:
        self.where.append(place)
        texts = (example.query, *example.positives, *example.negatives)
        self.sizes.append(max(len(text.encode()) for text in texts))
        given = {"query": example.query_prompt, "document": example.document_prompt}
        found = {role: prompt for role, prompt in given.items() if prompt is not None}
        if found and (example.task in self.prompts or len(self.prompts) < MAX_TASKS):
            add_prompts(self.prompts.setdefault(example.task, {}), found)
        is_scored = example.score is not None
        self.scored += is_scored
        self.without_negatives += not example.negatives and not is_scored
        scores = (*(example.positive_scores or ()), *(example.negative_scores or ()))
        self.taught += len(scores) > 1
        self.digest.update(record.content)

    def finished(self, lang: str) -> LanguageRows:
        where, sizes = np.frombuffer(self.where, np.int64), np.frombuffer(self.sizes, np.int32)
        digest = self.digest.hexdigest()
        counts = {name: getattr(self, name) for name in _COUNTS}
        return LanguageRows(lang, where, sizes, digest, self.prompts, **counts)


def scan(
    path: Path, record_format: RecordFormat, facts: FileFacts, progress: ReportProgress | None
) -> FileScan:
    """Read a file once and check every record; a DataError names the first invalid line."""
    parts = files_of(path)
    stamp, form = stamp_of(path, parts), known_form(path)
    growing: dict[str, _GrowingRows] = {}
    rows, is_parquet = 0, form is not None and form.kind == "parquet"
    for record in record_format.records(path):
        example = parsed(path, record, lambda it: record_format.parse(it.value, facts.task))
        lang = (example.lang or facts.lang) if facts.by_language else ""
        if lang not in growing:
            if len(growing) == MAX_LANGUAGES:
                raise DataError(
                    path,
                    record.line,
                    f'"lang" names more than {MAX_LANGUAGES} languages, the last one {lang[:20]!r};'
                    " each is a source, so give the language of the texts and nothing else",
                )
            growing[lang] = _GrowingRows()
        growing[lang].add(record, rows if is_parquet else record.offset, example)
        rows += 1
        if progress is not None and rows % ROWS_PER_REPORT == 0:
            progress(record.done)
    if progress is not None:
        progress(1.0)
    check_stamp(path, stamp, parts)
    return FileScan(path, stamp, tuple(growing[lang].finished(lang) for lang in sorted(growing)))


def cached_scan(
    path: Path, record_format: RecordFormat, facts: FileFacts, progress: ReportProgress | None
) -> FileScan:
    """Return the result of :func:`scan`, from the cache where a large file is known."""
    if stamp_of(path, files_of(path))[0] < LARGE_BYTES:
        return scan(path, record_format, facts, progress)
    cache = KeptResults(cache_folder() / "sources", _VERSION, mapped=True)
    key = (str(path.resolve()), record_format.about, asdict(facts))
    if (known := _known(cache, key, path)) is not None:
        if progress is not None:
            progress(1.0)
        return known
    found = scan(path, record_format, facts, progress)
    try:
        _keep(cache, key, found)
    except StorageError as error:  # only a cache: the result itself is here
        log.warning("%s will be read again next time: %s", path, error)
    return _known(cache, key, path) or found


def joined_sizes(parts: Sequence[np.ndarray], fingerprint: str) -> np.ndarray:
    """Join the sizes of several files' rows, which have this fingerprint; mapped where many."""
    rows = sum(map(len, parts))
    if rows < LARGE_ROWS:
        return np.concatenate(parts)
    path = cache_folder() / "sources" / f"sizes-{fingerprint}.npy"
    try:
        if not path.exists() or damage(path) is not None:
            with replacing_file(path) as fresh, fresh.open("wb") as file:
                write_npy_header(file, (rows,), np.int32)
                for part in parts:
                    file.write(np.ascontiguousarray(part, np.int32).tobytes())
            seal(path)
        found = np.load(path, mmap_mode="r")
        if found.shape == (rows,) and found.dtype == np.int32:
            return found
    except (StorageError, OSError, ValueError) as error:
        log.warning("%s: cannot be used, so sizes are held in memory: %s", path, error)
    return np.concatenate(parts)


def add_prompts(known: dict[str, str], given: Mapping[str, str]) -> None:
    """Add the prompts of roles that are not known, or known to be empty only."""
    known.update({role: prompt for role, prompt in given.items() if not known.get(role)})


def _keep(cache: KeptResults, key: tuple[Any, ...], found: FileScan) -> None:
    arrays: dict[str, np.ndarray] = {}
    for number, part in enumerate(found.parts):
        arrays |= {f"{number}-where": part.where, f"{number}-sizes": part.sizes}
    facts = {
        "path": str(found.path.resolve()),
        "stamp": list(found.stamp),
        "ends": _ends(found.path),
        "parts": [{name: getattr(part, name) for name in _KEPT_FACTS} for part in found.parts],
    }
    cache.keep(facts, arrays, *key)


def _known(cache: KeptResults, key: tuple[Any, ...], path: Path) -> FileScan | None:
    """Return what the cache holds of the file; None if it has changed or the entry is damaged."""
    stamp, kept = stamp_of(path, files_of(path)), cache.find(*key)
    if kept is None:
        return None
    facts, arrays = kept
    try:
        if facts["stamp"] != list(stamp) or facts["ends"] != _ends(path):
            return None
        parts = [_kept_rows(arrays, number, part) for number, part in enumerate(facts["parts"])]
    except (ValueError, KeyError, TypeError):
        return None
    return FileScan(path, stamp, tuple(parts)) if parts else None


def _kept_rows(
    arrays: Mapping[str, np.ndarray], number: int, facts: dict[str, Any]
) -> LanguageRows:
    where, sizes = arrays[f"{number}-where"], arrays[f"{number}-sizes"]
    if where.dtype != np.int64 or sizes.dtype != np.int32 or where.shape != sizes.shape:
        raise ValueError("arrays that do not belong together")
    return LanguageRows(where=where, sizes=sizes, **facts)


def _ends(path: Path) -> str:
    with readable(path):
        ends = [fingerprint_of_ends(each, _ENDS) for each in files_of(path)]
    return ends[0] if len(ends) == 1 else fingerprint(*ends)


def _plain_records(path: Path) -> Iterator[FileRecord]:
    """Yield the records of a table or a folder of BEIR, whatever they hold."""
    if is_judged_folder(path):
        return training_records(path)
    return iter_records(path, (), needs=())
