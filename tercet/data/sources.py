"""Files of examples: checked once, read by row in any order, and written whole or not at all.

A file is never held in memory. Opening it as a ``Source`` checks every record once and keeps
eight bytes for where a record begins and four for its size.
"""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.data.examples import (
    EXAMPLE_FIELDS,
    POSITIVES,
    QUERY,
    example_record,
    parse_example,
)
from tercet.data.records import (
    Record,
    columns_of,
    iter_records,
    known_suffix,
    open_parquet,
    parsed,
    readable,
)
from tercet.errors import DataError
from tercet.files import replacing_file
from tercet.types import Example

ROWS_PER_GROUP: Final = 4096  # of a parquet file we write
CACHED_BYTES: Final = 1 << 28  # 256 MiB of row groups in memory; at least two groups
WINDOW_BLOCKS: Final = 8  # so many are shuffled together, if two such windows fit in the cache
ROWS_PER_REPORT: Final = 1000  # how often progress is told
MAX_TASKS: Final = 1000  # of one file, whose prompts are remembered

Stamp: TypeAlias = tuple[int, int]
Parse: TypeAlias = Callable[[object, str], Example]
"""A record and the task of one that names none, to the example it holds, or a ValueError."""


@runtime_checkable
class Reader(Protocol):
    """Gives the records of some rows, in the order asked for."""

    def read(self, rows: Sequence[int]) -> list[object]:
        """The records of these rows."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The examples of one file, checked, and readable in any order.

    It can be pickled, and read from several threads: a reader holds no open file.
    """

    path: Path
    name: str  # the task of examples that name none
    weight: float | int  # how often each example is used an epoch
    sizes: np.ndarray  # [rows] int32, UTF-8 bytes of the longest text; stands for its tokens
    blocks: np.ndarray  # [blocks] int64, the first row of each block that is cheap to read whole
    window: int  # blocks that are cheap to read in turns
    fingerprint: str  # of what the records say
    reader: Reader
    parse: Parse
    prompts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # task, role: the first
    without_negatives: int = 0  # examples that bring none

    def __len__(self) -> int:
        return len(self.sizes)

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """The examples of these rows, in this order.

        Raises:
            DataError: if the file is no longer the one that was opened.
        """
        try:
            return [self.parse(record, self.name) for record in self.reader.read(indices)]
        except ValueError as error:
            raise _changed(self.path) from error


def iter_examples(path: Path | str, task: str | None = None) -> Iterator[Example]:
    """The examples of a file from first to last; ``task`` names those that name none.

    Raises:
        DataError: at the first record that is not an example, naming the line.
    """
    path = Path(path)
    name = path.stem if task is None else task
    for record in example_records(path):
        yield parsed(path, record, lambda it: parse_example(it.value, name))


def example_records(path: Path) -> Iterator[Record]:
    """The records of a file that should hold examples."""
    return iter_records(path, EXAMPLE_FIELDS, needs=(QUERY, POSITIVES))


@dataclass(frozen=True, slots=True)
class Kind:
    """What the records of a file are, and how they are read."""

    records: Callable[[Path], Iterator[Record]] = example_records
    parse: Parse = parse_example
    fields: tuple[str, ...] = EXAMPLE_FIELDS  # columns of a parquet file that are read
    decode: Callable[[str], object] = json.loads  # a line of any other file


EXAMPLES: Final = Kind()


def open_source(
    path: Path | str,
    *,
    name: str | None = None,
    weight: float | int = 1.0,
    progress: Callable[[float], None] | None = None,
    kind: Kind = EXAMPLES,
) -> Source:
    """Check every example of a .jsonl or .parquet file, and make them readable by row.

    Reads the file once from end to end. ``progress`` is told the part that is done, up to 1.
    Files of another ``kind`` are opened by ``tercet.data.texts.open_texts``.

    Raises:
        DataError: at the first record that is not an example, naming the line.
    """
    path = Path(path)
    name = path.stem if name is None else name
    with readable(path):
        stamp = _stamp(path)
    offsets, sizes = array("q"), array("i")
    prompts: dict[str, dict[str, str]] = {}
    bare = 0
    digest = hashlib.blake2b(digest_size=16)
    for record in kind.records(path):
        example = parsed(path, record, lambda it: kind.parse(it.value, name))
        offsets.append(record.offset)
        sizes.append(longest_text_bytes(example))
        _note_prompts(prompts, example)
        bare += not example.negatives
        digest.update(record.content)
        if progress is not None and len(sizes) % ROWS_PER_REPORT == 0:
            progress(record.done)
    if progress is not None:
        progress(1.0)
    _check_stamp(path, stamp)
    if path.suffix == ".parquet":
        blocks, window = _row_groups(path)
        reader: Reader = ParquetReader(path, stamp, blocks, kind.fields)
    else:
        blocks, window = np.zeros(1, np.int64), 1
        reader = LineReader(path, stamp, np.frombuffer(offsets, np.int64), kind.decode)
    return Source(
        path=path,
        name=name,
        weight=weight,
        sizes=np.frombuffer(sizes, np.int32),
        blocks=blocks,
        window=window,
        fingerprint=digest.hexdigest(),
        reader=reader,
        parse=kind.parse,
        prompts=prompts,
        without_negatives=bare,
    )


def _note_prompts(prompts: dict[str, dict[str, str]], example: Example) -> None:
    """Remember the first prompt that a task's examples bring for each role, an empty one last."""
    given = {"query": example.query_prompt, "document": example.document_prompt}
    found = {role: prompt for role, prompt in given.items() if prompt is not None}
    if found and (example.task in prompts or len(prompts) < MAX_TASKS):
        of_task = prompts.setdefault(example.task, {})
        of_task.update({role: prompt for role, prompt in found.items() if not of_task.get(role)})


def longest_text_bytes(example: Example) -> int:
    """UTF-8 bytes of the longest text of an example, prompts not counted."""
    texts = (example.query, *example.positives, *example.negatives)
    return max(len(text.encode()) for text in texts)


def write_examples(path: Path | str, examples: Iterable[Example]) -> None:
    """Write a .jsonl or .parquet file that reads back as these examples.

    The file appears under its name when it is complete, and not before.

    Raises:
        DataError: if an example could not be read back.
        StorageError: when the disk refuses; what was there before is still there.
    """
    write_records(path, map(example_record, examples), {})


def write_records(
    path: Path | str,
    records: Iterable[dict[str, Any]],
    more: Mapping[str, pa.DataType],
) -> None:
    """Write records of examples, as :func:`write_examples` does, with ``more`` columns in each.

    Raises:
        DataError: if an example could not be read back.
        StorageError: when the disk refuses; what was there before is still there.
    """
    path = Path(path)
    write = partial(_write_parquet, more=more) if known_suffix(path) == ".parquet" else _write_jsonl
    with replacing_file(path) as unfinished:
        write(unfinished, _checked_records(path, records))


@dataclass(frozen=True, slots=True, eq=False)
class LineReader:
    """Reads lines by seeking to where they begin."""

    path: Path
    stamp: Stamp
    offsets: np.ndarray  # [rows] int64
    decode: Callable[[str], object] = json.loads

    def read(self, rows: Sequence[int]) -> list[object]:
        """The records of these lines; read in the order of the file."""
        _check_stamp(self.path, self.stamp)
        wanted = np.asarray(rows, np.int64)
        lines = [b""] * len(wanted)
        with readable(self.path), self.path.open("rb") as file:
            for place in np.argsort(wanted, kind="stable").tolist():
                file.seek(int(self.offsets[wanted[place]]))
                lines[place] = file.readline()
        return [self.decode(line.decode("utf-8")) for line in lines]


class ParquetReader:
    """Reads row groups, and keeps the ones used last: up to 256 MiB, and at least two."""

    def __init__(
        self, path: Path, stamp: Stamp, blocks: np.ndarray, fields: Sequence[str] = EXAMPLE_FIELDS
    ) -> None:
        self.path, self.stamp, self.blocks, self.fields = path, stamp, blocks, fields
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> tuple[Path, Stamp, np.ndarray, Sequence[str]]:
        return self.path, self.stamp, self.blocks, self.fields

    def __setstate__(self, state: tuple[Path, Stamp, np.ndarray, Sequence[str]]) -> None:
        self.__init__(*state)

    def read(self, rows: Sequence[int]) -> list[object]:
        """The records of these rows; each row group is touched once."""
        _check_stamp(self.path, self.stamp)
        wanted = np.asarray(rows, np.int64)
        groups = np.searchsorted(self.blocks, wanted, side="right") - 1
        records: list[object] = [None] * len(wanted)
        with self._lock, readable(self.path):
            for group in np.unique(groups).tolist():
                places = np.flatnonzero(groups == group)
                table = self._group(group)
                found = table.take(pa.array(wanted[places] - self.blocks[group])).to_pylist()
                for place, record in zip(places.tolist(), found, strict=True):
                    records[place] = record
        return records

    def _group(self, group: int) -> pa.Table:
        if group not in self._kept:
            with open_parquet(self.path) as file:
                columns = columns_of(file, self.fields)
                self._kept[group] = file.read_row_group(group, columns=columns, use_threads=False)
        self._kept.move_to_end(group)
        while len(self._kept) > 2 and sum(t.nbytes for t in self._kept.values()) > CACHED_BYTES:
            self._kept.popitem(last=False)
        return self._kept[group]


def _row_groups(path: Path) -> tuple[np.ndarray, int]:
    """The first row of each row group, and how many groups a window of the shuffle spans."""
    with readable(path):
        metadata = pq.read_metadata(path)
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    first_rows = np.concatenate(([0], np.cumsum([group.num_rows for group in groups[:-1]])))
    largest = max(group.total_byte_size for group in groups)
    window = min(max(CACHED_BYTES // 2 // max(largest, 1), 1), WINDOW_BLOCKS)
    return first_rows.astype(np.int64), window


def _checked_records(path: Path, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row, record in enumerate(records, start=1):
        try:
            parse_example(record, "")
        except ValueError as error:
            raise DataError(path, row, f"cannot be written: {error}") from error
        yield record


def _write_jsonl(path: Path, records: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_parquet(
    path: Path, records: Iterator[dict[str, Any]], more: Mapping[str, pa.DataType]
) -> None:
    text, number = pa.string(), pa.float64()
    schema = pa.schema(
        {
            "query": text,
            "positives": pa.list_(text),
            "negatives": pa.list_(text),
            "positive_scores": pa.list_(number),
            "negative_scores": pa.list_(number),
            "query_prompt": text,
            "document_prompt": text,
            "task": text,
            "in_batch": text,
            "lang": text,
            **more,
        }
    )
    with pq.ParquetWriter(path, schema) as writer:
        for first in records:
            group = list(chain([first], islice(records, ROWS_PER_GROUP - 1)))
            writer.write_table(pa.Table.from_pylist(group, schema))


def _stamp(path: Path) -> Stamp:
    """What tells that a file was written to, without reading it: its size and its time."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _check_stamp(path: Path, stamp: Stamp) -> None:
    with readable(path):
        now = _stamp(path)
    if now != stamp:
        raise _changed(path)


def _changed(path: Path) -> DataError:
    return DataError(path, None, "has changed since it was opened; start the command again")
