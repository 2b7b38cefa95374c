"""What may be read: regular files only, up to a size; docs/data/limits.md lists the limits."""

import os
import stat
from pathlib import Path
from tokenize import TokenError
from typing import Final
from zipfile import BadZipFile

MAX_RECORD_BYTES: Final = 1 << 24  # 16 MiB: a line, or the texts of a row of parquet
MAX_JSON_BYTES: Final = 1 << 28  # 256 MiB: a file that is one JSON value, or a text read whole
MAX_UNPACKED: Final = 1 << 30  # bytes of a row group of parquet that takes, in its file, less ...
MAX_EXPANSION: Final = 100  # ... than a hundredth
MAX_VALUES: Final = 1 << 27  # of a column in a row group

_NEEDED: Final = (".json", ".safetensors", ".bin", ".model")  # files of a model
ARRAY_ERRORS: Final = (  # what numpy raises at a damaged file
    *(OSError, EOFError, ValueError, SyntaxError, TypeError),
    *(OverflowError, MemoryError, RecursionError, TokenError, BadZipFile),
)

_KINDS: Final = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def unreadable(path: Path) -> str | None:
    """Return why a path must not be opened; None if it may be, or is missing.

    A pipe or a device may never end, and opening a pipe waits for somebody who writes.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, which does not exist"
        return None
    except (OSError, ValueError):  # whoever opens it says why
        return None
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), None)
    return kind and f"is {kind}, not a file; write what it gives to a file and name that"


def unreadable_inside(folder: Path) -> str | None:
    """Return which file of a folder or of its folders must not be opened, and why; None if all may.

    Other libraries read such a folder, and would wait for a pipe. Of links that lead nowhere, only
    those count that such a library needs.
    """
    within = [folder, *(each for each in folder.iterdir() if each.is_dir())]
    for path in sorted(each for place in within for each in _entries(place)):
        problem = unreadable(path)
        if problem and (path.exists() or path.suffix in _NEEDED):
            return f"{path}: {problem}"
    return None


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:  # another process dropped it meanwhile
        return []


def read_text(path: Path) -> str:
    """Return the UTF-8 text of a file of bounded size; an OSError or ValueError is the caller's."""
    if problem := unreadable(path):
        raise ValueError(problem)
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"is larger than {MAX_JSON_BYTES:,} bytes")
    return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
