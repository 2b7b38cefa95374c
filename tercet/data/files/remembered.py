"""What reading a large file told, kept in a cache, so that it is opened in no time again.

Where rows begin and how long they are lies there as plain arrays, which are mapped: the memory of
a process does not grow with rows. An entry holds for a file of the same size, time, beginning and
end. The cache is ``$TERCET_CACHE/sources``, or ``~/.cache/tercet/sources``, and may be deleted.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from tercet.data.files.readers import stamp_of
from tercet.data.files.scan import Part, RecordFormat, ReportProgress, Scan, Told, scan
from tercet.errors import StorageError
from tercet.files.atomic import replacing_file, replacing_folder
from tercet.files.records import readable
from tercet.models.zoo.zoo import cache_folder

LARGE_BYTES: Final = 1 << 23  # 8 MiB: a file of fewer is read as quickly as it is looked up
LARGE_ROWS: Final = 1 << 20  # of a source of several files, whose sizes are put together
_ENDS: Final = 1 << 16  # bytes of the beginning and of the end that have to be the same
_VERSION: Final = 1  # raise it when another reading of the same file tells something else
_ABOUT: Final = "about.json"

log = logging.getLogger("tercet")


def scanned(
    path: Path, record_format: RecordFormat, told: Told, progress: ReportProgress | None = None
) -> Scan:
    """What :func:`tercet.data.files.scan.scan` tells, from the cache where the file is known.

    Raises:
        DataError: at the first record that is not what it should be, naming the line.
    """
    if stamp_of(path)[0] < LARGE_BYTES:
        return scan(path, record_format, told, progress)
    named = repr((_VERSION, str(path.resolve()), record_format.about, asdict(told)))
    folder = cache_folder() / "sources" / _digest(named.encode())
    found = _read(folder, path)
    if found is None:
        found = scan(path, record_format, told, progress)
        try:
            _write(folder, found)
        except StorageError as error:  # it is a cache: what was read is here
            log.warning("%s is read again the next time: %s", path, error)
        return _read(folder, path) or found
    if progress is not None:
        progress(1.0)
    return found


def joined_sizes(parts: Sequence[np.ndarray], fingerprint: str) -> np.ndarray:
    """The sizes of several files' rows, one after the other; mapped where they are many.

    The fingerprint is that of the rows together.
    """
    rows = sum(map(len, parts))
    if rows < LARGE_ROWS:
        return np.concatenate(parts)
    path = cache_folder() / "sources" / f"sizes-{fingerprint}.npy"
    try:
        if not path.exists():
            with replacing_file(path) as fresh, fresh.open("wb") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<i4", "fortran_order": False, "shape": (rows,)}
                )
                for part in parts:
                    file.write(np.ascontiguousarray(part, "<i4").tobytes())
        found = np.load(path, mmap_mode="r")
        if found.shape == (rows,) and found.dtype == np.int32:
            return found
    except (StorageError, OSError, ValueError) as error:
        log.warning("%s: cannot be used, so sizes are held in memory: %s", path, error)
    return np.concatenate(parts)


def _write(folder: Path, found: Scan) -> None:
    parts: list[dict[str, Any]] = []
    with replacing_folder(folder) as fresh:
        for number, part in enumerate(found.parts):
            np.save(fresh / f"{number}-where.npy", part.where)
            np.save(fresh / f"{number}-sizes.npy", part.sizes)
            parts.append(
                {
                    "lang": part.lang,
                    "fingerprint": part.fingerprint,
                    "prompts": part.prompts,
                    "without_negatives": part.without_negatives,
                }
            )
        about = {
            "path": str(found.path.resolve()),
            "stamp": list(found.stamp),
            "ends": _ends(found.path),
            "parts": parts,
        }
        (fresh / _ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")


def _read(folder: Path, path: Path) -> Scan | None:
    """What is known of the file as it is now; None if nothing is, or the entry is damaged."""
    stamp = stamp_of(path)
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if about["stamp"] != list(stamp) or about["ends"] != _ends(path):
            return None
        parts = [_part(folder, number, told) for number, told in enumerate(about["parts"])]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Scan(path, stamp, tuple(parts)) if parts else None


def _part(folder: Path, number: int, told: dict[str, Any]) -> Part:
    where = np.load(folder / f"{number}-where.npy", mmap_mode="r")
    sizes = np.load(folder / f"{number}-sizes.npy", mmap_mode="r")
    if where.dtype != np.int64 or sizes.dtype != np.int32 or where.shape != sizes.shape:
        raise ValueError("arrays that do not belong together")
    return Part(where=where, sizes=sizes, **told)


def _ends(path: Path) -> str:
    with readable(path), path.open("rb") as file:
        content = file.read(_ENDS)
        file.seek(max(0, path.stat().st_size - _ENDS))
        return _digest(content + file.read())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
