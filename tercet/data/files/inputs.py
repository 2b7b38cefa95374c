"""Where data come from, and files whose records can be read in any order.

Standard input is kept in a temporary file, and data sets of the Hugging Face hub in the cache:
every reader then has a file. What is packed, a table or a folder of BEIR cannot be read in any
order, so its records are written once, as lines, to ``$TERCET_CACHE/unpacked``; only their owner
may read these copies, and they may be deleted.
"""

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Final

from tercet.errors import DataError, StorageError
from tercet.files.artifacts import fingerprint, fingerprint_of_ends
from tercet.files.atomic import clear_about, replacing_file
from tercet.files.checksums import damage, seal
from tercet.files.forms import Content, form_of_content, known_form
from tercet.files.limits import MAX_RECORD_BYTES
from tercet.files.progress import bar
from tercet.files.records import FileRecord, readable
from tercet.models.zoo.zoo import cache_folder

STDIN: Final = "-"
HUB: Final = "hf:/"  # a Path leaves one slash of the two
_AT_ONCE: Final = 1 << 20
_ENDS: Final = 1 << 16  # bytes of the beginning and of the end that have to be the same
_GLOB: Final = frozenset("*?[")


def local_path(path: Path | str) -> Path:
    """Return the file or folder that holds what a path names: itself, but for ``-`` and ``hf://``.

    Raises:
        DataError: if standard input is empty, or the hub does not give the file.
        StorageError: if there is no room for it.
    """
    text = str(path)
    if text == STDIN:
        return _standard_input()
    return (
        _of_hub(f"{HUB}/{text.removeprefix(HUB).lstrip('/')}")
        if text.startswith(HUB)
        else Path(path)
    )


@cache
def _temporary() -> Path:
    folder, process = Path(tempfile.mkdtemp(prefix="tercet-")), os.getpid()

    def delete() -> None:
        if os.getpid() == process:  # not one that was forked from it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(delete)
    return folder


@cache
def _standard_input() -> Path:
    """Copy standard input to a file that is deleted when the process ends."""
    stream: BinaryIO = sys.stdin.buffer
    if sys.stdin.isatty():
        raise DataError(STDIN, None, "standard input is the terminal; write: COMMAND < pairs.jsonl")
    head = stream.read(_AT_ONCE)
    path = _temporary() / f"standard-input{form_of_content(head)}"
    since_line, lines = 0, path.suffix == ".jsonl"
    with clear_about(path), path.open("wb") as file:
        while head:
            file.write(head)
            last = head.rfind(b"\n")
            since_line = len(head) - last - 1 if last >= 0 else since_line + len(head)
            if lines and since_line > MAX_RECORD_BYTES:
                problem = f"a line is longer than {MAX_RECORD_BYTES:,} bytes"
                raise DataError(STDIN, None, f"{problem}; end the line of each record")
            head = stream.read(_AT_ONCE)
    if not path.stat().st_size:
        raise DataError(STDIN, None, "standard input is empty; write one JSON object per line")
    return path


def _of_hub(url: str) -> Path:
    """Return a copy of a file of the hub, or a folder with one source of all files of a pattern."""
    from fsspec.core import url_to_fs

    try:
        system, place = url_to_fs(url)
        is_pattern = bool(_GLOB & set(place))
        names = sorted(system.glob(place)) if is_pattern else [place]
        about = {name: system.info(name) for name in names}
    except Exception as error:  # whatever the hub, the network or the file system raises
        raise _not_found(url, error) from error
    if not names:
        raise DataError(url, None, "matches no file; list them on the page of the data set")
    if any(it.get("type") == "directory" for it in about.values()):
        raise DataError(url, None, "is a folder; name a file, or several with *: data/*.parquet")
    state = fingerprint(url, json.dumps(about, default=str, sort_keys=True))
    folder = path = cache_folder() / "hub" / state
    for name in names:
        _, _, data_set, *inside = name.split("/")  # datasets, owner, data set, path
        path = folder / data_set / "-".join(inside) if is_pattern else folder / inside[-1]
        if not path.exists():
            _download(system, name, path, url, about[name].get("size"))
    return path if len(names) == 1 and not is_pattern else folder


def _download(system: Any, name: str, path: Path, url: str, size: int | None) -> None:
    with replacing_file(path) as fresh, bar(f"download {path.name}", size) as advance:
        try:
            with system.open(name, "rb") as given, fresh.open("wb") as file:
                while block := given.read(_AT_ONCE):
                    with clear_about(path):
                        file.write(block)
                    advance(len(block))
        except StorageError:
            raise
        except Exception as error:  # whatever the hub, the network or the file system raises
            raise _not_found(url, error) from error


def _not_found(url: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        url,
        None,
        f"cannot be read from the hub: {reason[:300]}; check the name and the network, or download "
        "the file and give that",
    )


def lines_of(path: Path, parts: Iterable[Path], records: Iterable[FileRecord] | None) -> Path:
    """Return a file with the lines of a packed file, or with those of these records.

    It is written once for each state of the files that ``parts`` names. Its time is that of the
    newest, so that all processes that write it write the same.
    """
    parts = list(parts)
    with readable(path):
        states = [(each.stat(), fingerprint_of_ends(each, _ENDS)) for each in parts]
    state = fingerprint([(at.st_size, at.st_mtime_ns, ends) for at, ends in states], size=8)
    own = path.parent == _temporary() if _temporary.cache_info().currsize else False
    folder = path.parent if own else cache_folder() / "unpacked"
    begin = fingerprint(str(path.resolve()), size=8)
    copy = folder / f"{begin}-{state}.lines"
    if copy.exists() and copy.with_name(f"{copy.name}.sum").exists() and damage(copy) is None:
        return copy
    newest = max(at.st_mtime_ns for at, _ in states)
    with replacing_file(copy, private=True) as fresh:
        with fresh.open("wb") as file, readable(path):
            if records is None:
                with Content(path).buffered() as content:
                    shutil.copyfileobj(content, file, _AT_ONCE)
            else:
                file.writelines(record.content + b"\n" for record in records)
        os.utime(fresh, ns=(newest, newest))
    seal(copy)
    for older in folder.glob(f"{begin}-*"):
        if not older.name.startswith(copy.name):
            older.unlink(missing_ok=True)
    return copy


def is_packed(path: Path) -> bool:
    """Whether records of a file cannot be read in any order before they are unpacked."""
    form = known_form(path)
    return path.is_dir() or (form is not None and not form.is_seekable)
