"""Checksums: taken when a file is made, and compared when it is trusted again.

- A JSON object carries its own, under ``checksum``.
- A folder that appears whole has ``checksums.json``, and a single array ``NAME.sum`` beside it.
- Archives (.pt, .npz) have it in their comment, as zip files may.
- A manifest that names files holds theirs.

What earlier versions wrote has none, and is used with one note for a folder.
"""

import json
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from tercet.files.atomic import replacing_file
from tercet.files.limits import read_text, unreadable

KEY: Final = "checksum"  # in a JSON object, of all the rest
FILE: Final = "checksums.json"
_SUFFIX: Final = ".sum"
_COMMENT: Final = b"tercet "
_COMMENT_BYTES: Final = len(_COMMENT) + 8
_BLOCK: Final = 1 << 18  # bytes that stay in the processor's cache
_WORDS: Final = 256  # of 8 bytes, in a row of a block
_BAD_ZIP: Final = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, IndexError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)

log = logging.getLogger("tercet")
_noted: set[Path] = set()  # folders of earlier versions, with a note each


def checksum(path: Path, size: int | None = None) -> str:
    """Return the length and checksum of a file, or of its first ``size`` bytes.

    It is read once, block by block; a ValueError says why it may not be.

    Words of 8 bytes are added up by row and by column of each block; the checksum is the CRC-32 of
    these sums. It changes with any byte, and takes half the time of a CRC-32 of all bytes.
    """
    block = bytearray(_BLOCK)
    bytes_of, words = memoryview(block), np.frombuffer(block, "<u8").reshape(-1, _WORDS)
    if problem := unreadable(path):
        raise ValueError(problem)
    done = found = 0
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size if size is None else size
        while read := file.readinto(bytes_of[: min(left, _BLOCK)]):
            bytes_of[read:] = bytes(_BLOCK - read)
            done, left = done + read, left - read
            for axis in (0, 1):
                found = zlib.crc32(np.add.reduce(words, axis=axis), found)
    return f"{done}-{found:08x}"


def checksums(folder: Path, *names: str) -> dict[str, str]:
    """Return the checksums of these files, and of all in these folders; of the folder by default.

    Those of hidden files and of ``checksums.json`` are left out.
    """
    found: dict[str, str] = {}
    for top in [folder / name for name in names] or [folder]:
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.name != FILE and not path.name.startswith("."):
                found[path.relative_to(folder).as_posix()] = checksum(path)
    return found


def altered(folder: Path, expected: Mapping[str, str]) -> Path | None:
    """Return the first file that is gone or has another content, or None."""
    for name, was in expected.items():
        path = folder / name
        try:
            if path.stat().st_size != int(was.partition("-")[0]) or checksum(path) != was:
                return path
        except (OSError, ValueError):
            return path
    return None


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum."""
    return {**value, KEY: _of_json(value)}


def unsealed(value: Any) -> Any:
    """Return a JSON object without its checksum; other values as they are.

    Raises:
        ValueError: if it does not have this checksum.
    """
    if not isinstance(value, dict) or KEY not in value:
        return value
    rest = {name: part for name, part in value.items() if name != KEY}
    if value[KEY] != _of_json(rest):
        raise ValueError("its checksum is of another content")
    return rest


def _of_json(value: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(value))  # as it will be read: tuples have become lists
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"


def seal(path: Path, name: str | None = None) -> None:
    """Write the checksums of a folder into it, or that of a file beside it.

    ``name`` is the one that a folder will have; in another place it counts as damaged.
    """
    files = checksums(path) if path.is_dir() else checksums(path.parent, path.name)
    with replacing_file(_place(path)) as fresh:
        about = sealed({"of": name or path.name, "files": files})
        fresh.write_text(json.dumps(about) + "\n", encoding="utf-8")


def damage(path: Path) -> Path | None:
    """Return a file that was sealed and is not as it was, or None."""
    place = _place(path)
    try:
        about = unsealed(json.loads(read_text(place)))
        return place if about["of"] != path.name else altered(place.parent, about["files"])
    except FileNotFoundError:
        note_absence(path.parent)
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return place


def _place(path: Path) -> Path:
    return path / FILE if path.is_dir() else path.with_name(path.name + _SUFFIX)


def note_absence(folder: Path) -> None:
    """Say, once for each folder, that it has files without a checksum."""
    if (folder := folder.absolute()) not in _noted:
        _noted.add(folder)
        log.warning(
            "%s: holds files of an earlier version, which have no checksums; they are used "
            "unchecked",
            folder,
        )


def note_damage(path: Path) -> None:
    """Say that a damaged file is made again."""
    log.warning("%s: is damaged, and is made again", path)


def seal_archive(path: Path) -> None:
    """Write the checksum of a zip file without a comment, such as .pt and .npz, as its comment."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # a zip file ends with the length of its comment
        file.write(_COMMENT_BYTES.to_bytes(2, "little"))
    comment = _COMMENT + checksum(path).rpartition("-")[2].encode()
    with path.open("ab") as file:
        file.write(comment)


def is_whole_archive(path: Path) -> bool:
    """Return whether a zip file is as it was sealed; one of an earlier version, by its members."""
    if unreadable(path):
        return False
    try:
        with path.open("rb") as file:
            size = file.seek(-_COMMENT_BYTES, os.SEEK_END)
            comment = file.read()
            if comment.startswith(_COMMENT):
                return comment[len(_COMMENT) :].decode() == checksum(path, size).rpartition("-")[2]
            with zipfile.ZipFile(file) as archive:
                # torch would take a folder's content from anywhere.
                folders = any(member.external_attr for member in archive.infolist())
                return not folders and archive.testzip() is None
    except _BAD_ZIP:
        return False
