"""Folders of training data: each file or sub-folder is a source, and so is each of its languages.

A file ``news.parquet`` of a folder is the source ``news``, and so is a folder ``news`` with shards
in it, at any depth. The language of a row is its field ``lang``, or else that of a part of its
path such as ``lang=de``. The rows of a language are the source ``news/de``; those without one are
``news``. Batches are made, and rows counted, by source and language. A folder of BEIR is a source.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from tercet.data.files.beir import corpus_of, is_judged_folder
from tercet.data.files.examples import ExampleFields
from tercet.data.files.inputs import local_path
from tercet.data.files.readers import stamp_of
from tercet.data.files.scan import (
    EXAMPLE_FORMAT,
    FileFacts,
    ReadableRows,
    RecordFormat,
    ReportProgress,
    cached_scan,
    example_format,
    files_of,
)
from tercet.data.files.sources import Source, in_language, iter_examples, joined_source
from tercet.errors import DataError
from tercet.files.forms import A_MODEL, bare_name, is_model_folder, is_of, listed
from tercet.files.records import readable
from tercet.types import Example

LANGUAGE: Final = "lang="  # begins the part of a path that names a language
SHOWN: Final = 3  # files that are not read, in a message

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a source."""

    path: Path
    source: str  # the name of the source, without a language
    lang: str = ""  # named by its path; the language of a row takes precedence


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The files of one source, in the order of their names."""

    name: str
    path: Path  # of the source: its file, or its folder
    shards: tuple[Shard, ...]


def find_groups(
    path: Path | str, record_format: RecordFormat = EXAMPLE_FORMAT
) -> list[SourceFiles]:
    """Return the sources that a file or a folder holds, by name; nothing is opened.

    A folder whose children are ``lang=de``, ``lang=fr`` is one source. Names that begin with a dot
    or an underscore are skipped.

    Raises:
        DataError: if there is no file to read, or two sources would have one name.
    """
    path = local_path(path)
    if not path.is_dir() or is_judged_folder(path):
        name = path.resolve().name if path.is_dir() else bare_name(path)
        return [_group(name, path, record_format, [], given=True)]
    unread: list[Path] = []
    with readable(path):
        groups = [_group(*named, record_format, unread) for named in _named_children(path)]
    groups = sorted((group for group in groups if group.shards), key=lambda group: group.name)
    if not groups:
        if is_model_folder(path):
            raise DataError(path, None, A_MODEL)
        kinds = listed(record_format.kinds)
        raise DataError(path, None, f"is a folder that holds no {kinds} file; put data into it")
    if unread:
        names = ", ".join(str(each.relative_to(path)) for each in unread[:SHOWN])
        more = f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else ""
        log.warning("%s: skipped files of other types: %s%s", path, names, more)
    for one, other in pairwise(groups):
        if one.name == other.name:
            raise DataError(
                path,
                None,
                f"two sources are called {one.name!r}; rename one of them: "
                f"{one.path.name}, {other.path.name}",
            )
    return groups


def open_sources(
    path: Path | str,
    *,
    weight: float | int = 1.0,
    progress: ReportProgress | None = None,
    fields: ExampleFields | None = None,
    record_format: RecordFormat = EXAMPLE_FORMAT,
) -> list[Source]:
    """Check the sources of a file or a folder, and open one for each language of each.

    Every file is read once from end to end.

    Args:
        path: a file, or a folder whose children are sources.
        weight: how often an epoch uses each example.
        progress: called with the share that is read, from 0 to 1.
        fields: names of the columns, where they are not recognised.
        record_format: what a record holds; examples, unless it is given.

    Raises:
        DataError: at the first record that is not an example, naming file and line, and if a
            folder holds nothing to read.

    Examples:
        >>> [source.name for source in open_sources("sources/")]
        ['news/de', 'news/en']
    """
    record_format = record_format if fields is None else example_format(fields)
    groups = find_groups(path, record_format)
    shards = [shard.path for group in groups for shard in group.shards]
    sizes = {shard: stamp_of(shard, files_of(shard))[0] for shard in shards}
    total, done = max(sum(sizes.values()), 1), 0
    sources: list[Source] = []
    for group in groups:
        found: dict[str, list[ReadableRows]] = {}
        for shard in group.shards:
            share = sizes[shard.path] / total
            report = progress and _part_of(progress, done / total, share)
            facts = FileFacts(group.name, shard.lang, by_language=True)
            scan = cached_scan(shard.path, record_format, facts, report)
            for piece in scan.readable(record_format):
                found.setdefault(piece.rows.lang, []).append(piece)
            done += sizes[shard.path]
        sources += [
            joined_source(
                found[lang],
                path=group.path,
                name=f"{group.name}/{lang}" if lang else group.name,
                weight=weight,
                parse=record_format.parse,
                task=group.name,
            )
            for lang in sorted(found)
        ]
    return sources


def shard_examples(shard: Shard, fields: ExampleFields | None = None) -> Iterator[Example]:
    """Yield the examples of one file of a source, with their task and language."""
    for example in iter_examples(shard.path, shard.source, fields=fields, scored=True):
        yield in_language(example, shard.lang)


def _named_children(folder: Path) -> list[tuple[str, Path]]:
    """Return the sources of a folder by name; the folder itself if its children are languages."""
    children = sorted(child for child in folder.iterdir() if not _is_hidden(child))
    if any(child.name.startswith(LANGUAGE) for child in children):
        return [(folder.resolve().name, folder)]
    return [(child.name if child.is_dir() else bare_name(child), child) for child in children]


def _group(
    name: str, path: Path, record_format: RecordFormat, unread: list[Path], *, given: bool = False
) -> SourceFiles:
    """Collect the files of a source; files of other types are added to ``unread``.

    A file that was ``given`` is in it, whatever its name: its reader says what is wrong.
    """
    if is_judged_folder(path):
        of_texts = record_format.plain is not None
        return SourceFiles(name, path, (Shard(corpus_of(path) if of_texts else path, name),))
    if given:
        return SourceFiles(name, path, (Shard(path, name),))
    files = sorted(_files(path))
    kinds = record_format.kinds
    unread += [file for file in files if not is_of(file, kinds)]
    return SourceFiles(
        name,
        path,
        tuple(
            Shard(file, name, _language(file.relative_to(path.parent)))
            for file in files
            if is_of(file, kinds)
        ),
    )


def _files(path: Path, inside: frozenset[Path] = frozenset()) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    place = path.resolve()
    if place in inside:
        raise DataError(path, None, "is a link to a folder that it is in; remove the link")
    for child in path.iterdir():
        if not _is_hidden(child):
            yield from _files(child, inside | {place})


def _language(path: Path) -> str:
    """Return the language that the innermost ``lang=de`` of a path names."""
    named = [part for part in path.parts if part.startswith(LANGUAGE)]
    return named[-1].removeprefix(LANGUAGE).partition(".")[0] if named else ""


def _is_hidden(path: Path) -> bool:
    return path.name.startswith((".", "_"))


def _part_of(progress: ReportProgress, begin: float, share: float) -> ReportProgress:
    return lambda done: progress(begin + done * share)
