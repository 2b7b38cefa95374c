"""Files of examples: checked once, read by row in any order, and written whole or not at all.

A file is never held in memory. Opening it as a ``Source`` checks every record once and keeps
eight bytes for the place of a record and four for its size.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.data.files.examples import (
    SCORE,
    TEXT1,
    TEXT2,
    ExampleFields,
    example_record,
    parse_example,
)
from tercet.data.files.inputs import local_path
from tercet.data.files.readers import WINDOW_BLOCKS, Reader, ShardReader, changed
from tercet.data.files.scan import (
    EXAMPLE_FORMAT,
    FileFacts,
    Parse,
    ReadableRows,
    RecordFormat,
    ReportProgress,
    add_prompts,
    example_format,
    joined_sizes,
    scan,
)
from tercet.errors import DataError
from tercet.files.artifacts import fingerprint
from tercet.files.atomic import replacing_file
from tercet.files.forms import bare_name
from tercet.files.records import known_suffix, parsed
from tercet.types import Example

ROWS_PER_GROUP: Final = 4096  # of a parquet file we write
INSTEAD: Final = "make examples of such pairs with: tercet convert scores"


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Examples of one file, or of one language of a folder's shards, readable in any order.

    All of them were checked. A source can be pickled, and read from several threads: a reader
    holds no open file.
    """

    path: Path  # the file, or the folder of the shards
    name: str  # in messages, weights and records: ``nq``, or ``nq/de``
    weight: float | int  # how often each example is used per epoch
    sizes: np.ndarray  # [rows] int32, UTF-8 bytes of the longest text, a stand-in for its tokens
    blocks: np.ndarray  # [blocks] int64, the first row of each block that is cheap to read whole
    window: int  # blocks that are cheap to read in turns
    fingerprint: str  # of the content of the records, and of fields that were named
    reader: Reader
    parse: Parse
    prompts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # task, role: the first
    without_negatives: int = 0  # examples that have none
    scored: int = 0  # pairs of texts with a similarity score; other rows are examples
    taught: int = 0  # examples with a teacher's scores of two documents or more
    lang: str = ""  # of all its examples; empty: unknown, or several
    task: str = ""  # of examples that name none; empty: the name

    def __len__(self) -> int:
        return len(self.sizes)

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Return the examples of these rows, in this order.

        Raises:
            DataError: if the file has changed since it was opened.
        """
        task = self.task or self.name
        try:
            found = [self.parse(record, task) for record in self.reader.read(indices)]
        except ValueError as error:
            raise changed(self.path) from error
        return [in_language(example, self.lang) for example in found] if self.lang else found


def in_language(example: Example, lang: str) -> Example:
    """Return the example, with this language if it names none."""
    return example if example.lang or not lang else replace(example, lang=lang)


def iter_examples(
    path: Path | str,
    task: str | None = None,
    *,
    fields: ExampleFields | None = None,
    scored: bool = False,
) -> Iterator[Example]:
    """Yield the examples of a file; ``task`` is the name for those that give none.

    Pairs with a similarity score are yielded only if ``scored`` is set.

    Raises:
        DataError: at the first record that is not an example, naming the line.
    """
    path, form = local_path(path), example_format(fields)
    name = bare_name(path) if task is None else task
    for record in form.records(path):
        example = parsed(path, record, lambda it: form.parse(it.value, name))
        if example.score is not None and not scored:
            what = "a pair with a similarity score is not an example"
            raise DataError(path, record.line, f"{what}; {INSTEAD}")
        yield example


def refuse_scored(sources: Iterable[Source], what: str) -> None:
    """Refuse pairs with a similarity score, whose texts need not match, where these cannot be used.

    Args:
        sources: what is read.
        what: who needs examples instead, such as "mining".

    Raises:
        DataError: naming the file of the first source that has any.
    """
    for source in sources:
        if source.scored:
            raise DataError(
                source.path,
                None,
                f"{source.scored:,} of {len(source):,} rows are pairs with a similarity score, and "
                f"{what} needs queries and what answers them; {INSTEAD}",
            )


def open_source(
    path: Path | str,
    *,
    name: str | None = None,
    weight: float | int = 1.0,
    progress: ReportProgress | None = None,
    fields: ExampleFields | None = None,
    record_format: RecordFormat = EXAMPLE_FORMAT,
) -> Source:
    """Check every example of a file, and make them readable by row.

    The file is .jsonl, .csv, .tsv (also .gz or .zst) or .parquet, a folder of BEIR with judgements
    to train on, ``-`` for standard input, or ``hf://datasets/OWNER/NAME/FILE``. It is read once
    from end to end. Languages stay together: ``open_sources`` separates them, and opens folders.

    Args:
        path: the file.
        name: the source's name; None takes the file's.
        weight: how often an epoch uses each example.
        progress: called with the share of the file that is read, from 0 to 1.
        fields: names of the columns, where they are not recognised.
        record_format: what a record holds; examples, unless it is given.

    Raises:
        DataError: at the first record that is not an example, naming the line.

    Examples:
        >>> len(open_source("pairs.jsonl"))
        2
    """
    path = local_path(path)
    name = bare_name(path) if name is None else name
    record_format = record_format if fields is None else example_format(fields)
    pieces = scan(path, record_format, FileFacts(name), progress).readable(record_format)
    return joined_source(pieces, path=path, name=name, weight=weight, parse=record_format.parse)


def joined_source(
    pieces: Sequence[ReadableRows],
    *,
    path: Path,
    name: str,
    weight: float | int,
    parse: Parse,
    task: str = "",
) -> Source:
    """Join rows of one language, of one file after the other, to a source."""
    parts = [piece.rows for piece in pieces]
    reader, blocks, window = pieces[0].reader, pieces[0].blocks, pieces[0].window
    sizes, joined = parts[0].sizes, parts[0].fingerprint
    if len(pieces) > 1:
        firsts = np.cumsum([0, *(len(part.sizes) for part in parts[:-1])], dtype=np.int64)
        reader = ShardReader(tuple(piece.reader for piece in pieces), firsts)
        blocks = np.concatenate([p.blocks + first for p, first in zip(pieces, firsts, strict=True)])
        # A file of one block does not show how many blocks are cheap to read in turns.
        window = min((p.window for p in pieces if len(p.blocks) > 1), default=WINDOW_BLOCKS)
        joined = fingerprint(" ".join(part.fingerprint for part in parts))
        sizes = joined_sizes([part.sizes for part in parts], joined)
    prompts: dict[str, dict[str, str]] = {}
    for part in parts:
        for name_of_task, given in part.prompts.items():
            add_prompts(prompts.setdefault(name_of_task, {}), given)
    return Source(
        path=path,
        name=name,
        weight=weight,
        sizes=sizes,
        blocks=blocks,
        window=window,
        fingerprint=joined,
        reader=reader,
        parse=parse,
        prompts=prompts,
        without_negatives=sum(part.without_negatives for part in parts),
        scored=sum(part.scored for part in parts),
        taught=sum(part.taught for part in parts),
        lang=parts[0].lang,
        task=task,
    )


def write_examples(path: Path | str, examples: Iterable[Example]) -> None:
    """Write a .jsonl or .parquet file that reads back as these examples; it appears when complete.

    Args:
        path: the file; its suffix decides the format.
        examples: what to write, in this order.

    Raises:
        DataError: if an example could not be read back.
        StorageError: if the disk refuses; the old file is still there then.

    Examples:
        >>> write_examples("pairs.jsonl", [Example("web server", ("nginx serves files",))])
    """
    write_records(path, map(example_record, examples), {})


def write_records(
    path: Path | str,
    records: Iterable[dict[str, Any]],
    more: Mapping[str, pa.DataType],
    *,
    private: bool = False,
) -> None:
    """Write records of examples with ``more`` columns; see :func:`write_examples`."""
    path = Path(path)
    write = partial(_write_parquet, more=more) if known_suffix(path) == ".parquet" else _write_jsonl
    with replacing_file(path, private=private) as unfinished:
        write(unfinished, _checked_records(path, records))


def _checked_records(path: Path, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    kinds: set[bool] = set()  # whether a record is a pair with a score
    for row, record in enumerate(records, start=1):
        kinds.add(TEXT1[0] in record)
        if len(kinds) > 1 and path.suffix == ".parquet":
            raise DataError(
                path,
                None,
                "cannot hold both examples and pairs with a similarity score; write a .jsonl "
                "file, or each to a file",
            )
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
    first = next(records, None)
    scored = first is not None and TEXT1[0] in first
    if scored:
        texts = {TEXT1[0]: text, TEXT2[0]: text, SCORE[0]: number}
    else:
        texts = {
            "query": text,
            "positives": pa.list_(text),
            "negatives": pa.list_(text),
            "positive_scores": pa.list_(number),
            "negative_scores": pa.list_(number),
        }
    schema = pa.schema(
        {
            **texts,
            "query_prompt": text,
            "document_prompt": text,
            "task": text,
            "in_batch": text,
            "lang": text,
            **more,
        }
    )
    rest = records if first is None else chain([first], records)
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rest, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema))
