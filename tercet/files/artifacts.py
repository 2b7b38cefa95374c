"""Results kept in files: JSON, fingerprints, rows of arrays, and results found by a key."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final
from zipfile import BadZipFile

import numpy as np

from tercet.files.atomic import replacing_file

_FACTS: Final = "facts"  # the name of a result's JSON part inside its .npz file

Arrays = Mapping[str, np.ndarray]


def json_text(
    value: Any, *, indent: int | None = 2, default: Callable[[Any], Any] | None = None
) -> str:
    """Return ``value`` as JSON with a final line break; letters of all scripts stay readable."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=default) + "\n"


def write_json(
    path: Path,
    value: Any,
    *,
    indent: int | None = 2,
    default: Callable[[Any], Any] | None = None,
) -> None:
    """Write ``value`` as a JSON file that appears whole or not at all.

    Raises:
        StorageError: if the disk refuses; the old file is still there then.
    """
    with replacing_file(path) as fresh:
        fresh.write_text(json_text(value, indent=indent, default=default), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def fingerprint(*parts: Any, size: int = 16) -> str:
    """Return ``size`` bytes, in hexadecimal, that change when any part does.

    A string or bytes count as they are, anything else by its ``repr``. Several parts are framed by
    their lengths, so that ``("ab", "c")`` and ``("a", "bc")`` differ.
    """
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        text = part if isinstance(part, str | bytes) else repr(part)
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if len(parts) > 1:
            digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.hexdigest()


def fingerprint_number(*parts: Any) -> int:
    """Return a fingerprint as an unsigned 64-bit number."""
    return int.from_bytes(bytes.fromhex(fingerprint(*parts, size=8)), "little")


def fingerprint_of_file(path: Path) -> str:
    """Return a fingerprint of the content of a file, or of all files in a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not each.is_dir():
            with each.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def write_npy_rows(
    file: BinaryIO, shape: tuple[int, ...], dtype: str, blocks: Iterable[np.ndarray]
) -> None:
    """Write blocks of rows as one ``.npy`` array of ``shape`` without holding it in memory."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for block in blocks:
        file.write(np.ascontiguousarray(block, dtype).tobytes())


class KeptResults:
    """A folder of computed results, found again by all that they depend on.

    Each is an ``.npz`` file with arrays and one JSON object, and appears whole or not at all. Its
    name is a fingerprint of its key, so a result for another key is never taken for it.
    """

    def __init__(self, folder: Path, *depends_on: Any) -> None:
        self._folder = folder
        self._depends_on = depends_on

    def path(self, *key: Any) -> Path:
        """Return the file that holds the result of a key."""
        return self._folder / f"{fingerprint((*self._depends_on, *key))}.npz"

    def find(self, *key: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Return the JSON object and the arrays of a key; None if missing or damaged."""
        try:
            # Opened here: numpy does not close a file that it cannot read.
            with self.path(*key).open("rb") as file, np.load(file) as found:
                arrays = {name: found[name] for name in found.files if name != _FACTS}
                return json.loads(str(found[_FACTS])), arrays
        except (OSError, ValueError, KeyError, BadZipFile, EOFError):
            return None

    def keep(self, facts: Mapping[str, Any], arrays: Arrays, *key: Any) -> None:
        """Write the result of a key.

        Raises:
            StorageError: if the disk refuses.
        """
        content: dict[str, Any] = {_FACTS: np.array(json.dumps(facts)), **arrays}
        with replacing_file(self.path(*key)) as fresh, fresh.open("wb") as file:
            np.savez(file, **content)
