"""One reading of a file from end to end: every record checked, and what has to be known of it."""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from tercet.data.files.examples import EXAMPLE_FIELDS, POSITIVES, QUERY, parse_example
from tercet.data.files.readers import (
    WINDOW_BLOCKS,
    ChosenReader,
    LineReader,
    ParquetReader,
    Reader,
    Stamp,
    blocks_among,
    check_stamp,
    line_blocks,
    row_groups,
    stamp_of,
)
from tercet.errors import DataError
from tercet.files.records import Record, iter_records, parsed
from tercet.types import Example

ROWS_PER_REPORT: Final = 1000  # how often progress is told
MAX_TASKS: Final = 1000  # of one file, whose prompts are remembered
MAX_LANGUAGES: Final = 1000  # of one file

Parse: TypeAlias = Callable[[object, str], Example]
"""A record and the task of one that names none, to the example it holds, or a ValueError."""

ReportProgress: TypeAlias = Callable[[float], None]
"""Is told the part that is done, up to 1."""


def example_records(path: Path) -> Iterator[Record]:
    """The records of a file that should hold examples."""
    return iter_records(path, EXAMPLE_FIELDS, needs=(QUERY, POSITIVES))


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """What the records of a file are, and how they are read."""

    about: str = "examples"  # differs where another kind would make other examples of a file
    records: Callable[[Path], Iterator[Record]] = example_records
    parse: Parse = parse_example
    fields: tuple[str, ...] = EXAMPLE_FIELDS  # columns of a parquet file that are read
    plain: Callable[[str], object] | None = None  # a line of a .txt file, if such are read

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The endings of files that may hold such records."""
        return (".jsonl", ".parquet") if self.plain is None else (".jsonl", ".parquet", ".txt")

    def decode(self, path: Path) -> Callable[[str], object]:
        """What a line of this file says."""
        return json.loads if self.plain is None or path.suffix != ".txt" else self.plain


EXAMPLE_FORMAT: Final = RecordFormat()


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The rows of one language of a file, or all of them where languages are not told apart."""

    lang: str
    where: np.ndarray  # [rows] int64, ascending: the byte of each line, or the row of a parquet
    sizes: np.ndarray  # [rows] int32, UTF-8 bytes of the longest text
    fingerprint: str  # of what the records say
    prompts: Mapping[str, Mapping[str, str]]  # task, role: the first
    without_negatives: int  # examples that bring none


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """What one reading of a file told."""

    path: Path
    stamp: Stamp
    parts: tuple[Part, ...]  # by language

    def pieces(self, record_format: RecordFormat) -> "list[Piece]":
        """Each part with what reads it."""
        if self.path.suffix != ".parquet":
            return [_lines(self, part, record_format) for part in self.parts]
        blocks, window = row_groups(self.path)
        whole = ParquetReader(self.path, self.stamp, blocks, record_format.fields)
        if len(self.parts) == 1:
            return [Piece(self.parts[0], whole, blocks, window)]
        return [
            Piece(part, ChosenReader(whole, part.where), blocks_among(part.where, blocks), window)
            for part in self.parts
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of a file, and how it is read."""

    part: Part
    reader: Reader
    blocks: np.ndarray  # [blocks] int64, the first row of each block that is cheap to read whole
    window: int  # blocks that are cheap to read in turns


def _lines(found: Scan, part: Part, record_format: RecordFormat) -> Piece:
    blocks = line_blocks(part.where)
    reader = LineReader(found.path, found.stamp, part.where, record_format.decode(found.path))
    return Piece(part, reader, blocks, 1 if len(blocks) == 1 else WINDOW_BLOCKS)


@dataclass(slots=True)
class _Growing:
    """What is known of a part so far; 12 bytes a row."""

    where: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("i"))
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)
    bare: int = 0
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def add(self, record: Record, place: int, example: Example) -> None:
        self.where.append(place)
        self.sizes.append(longest_text_bytes(example))
        _note_prompts(self.prompts, example)
        self.bare += not example.negatives
        self.digest.update(record.content)

    def part(self, lang: str) -> Part:
        return Part(
            lang=lang,
            where=np.frombuffer(self.where, np.int64),
            sizes=np.frombuffer(self.sizes, np.int32),
            fingerprint=self.digest.hexdigest(),
            prompts=self.prompts,
            without_negatives=self.bare,
        )


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a file before it is read."""

    task: str  # of examples that name none
    lang: str = ""  # of examples that name none
    by_language: bool = False  # whether each language is a part of its own


def scan(
    path: Path, record_format: RecordFormat, told: Told, progress: ReportProgress | None = None
) -> Scan:
    """Read a file once and check every record.

    Raises:
        DataError: at the first record that is not what it should be, naming the line.
    """
    stamp = stamp_of(path)
    growing: dict[str, _Growing] = {}
    rows, is_parquet = 0, path.suffix == ".parquet"
    for record in record_format.records(path):
        example = parsed(path, record, lambda it: record_format.parse(it.value, told.task))
        lang = (example.lang or told.lang) if told.by_language else ""
        if lang not in growing:
            _check_language(path, record, lang, len(growing))
            growing[lang] = _Growing()
        growing[lang].add(record, rows if is_parquet else record.offset, example)
        rows += 1
        if progress is not None and rows % ROWS_PER_REPORT == 0:
            progress(record.done)
    if progress is not None:
        progress(1.0)
    check_stamp(path, stamp)
    return Scan(path, stamp, tuple(growing[lang].part(lang) for lang in sorted(growing)))


def longest_text_bytes(example: Example) -> int:
    """UTF-8 bytes of the longest text of an example, prompts not counted."""
    texts = (example.query, *example.positives, *example.negatives)
    return max(len(text.encode()) for text in texts)


def _note_prompts(prompts: dict[str, dict[str, str]], example: Example) -> None:
    """Remember the first prompt that a task's examples bring for each role, an empty one last."""
    given = {"query": example.query_prompt, "document": example.document_prompt}
    found = {role: prompt for role, prompt in given.items() if prompt is not None}
    if found and (example.task in prompts or len(prompts) < MAX_TASKS):
        of_task = prompts.setdefault(example.task, {})
        of_task.update({role: prompt for role, prompt in found.items() if not of_task.get(role)})


def _check_language(path: Path, record: Record, lang: str, known: int) -> None:
    if known == MAX_LANGUAGES:
        raise DataError(
            path,
            record.line,
            f'"lang" names more than {MAX_LANGUAGES} languages, the last one {lang[:20]!r}; each '
            "is a source of its own, so give the language of the texts and nothing else",
        )
