"""Results kept in files: JSON, fingerprints, rows of arrays, and results found by a key."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from tercet.files.atomic import replacing_file, replacing_folder
from tercet.files.checksums import damage, is_whole_archive, note_damage, seal, seal_archive
from tercet.files.limits import ARRAY_ERRORS, read_text, unreadable

_FACTS: Final = "facts"  # the name of a result's JSON part inside its .npz file
_NAME: Final = "name"  # and of the file's name, by which another one in its place is noticed
_FACTS_FILE: Final = "about.json"  # and inside its folder

Arrays = Mapping[str, np.ndarray]


def json_text(
    value: Any, *, indent: int | None = 2, default: Callable[[Any], Any] | None = None
) -> str:
    """Return ``value`` as JSON with a final line break; letters of all scripts stay readable."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=default) + "\n"


def write_json(
    path: Path, value: Any, *, indent: int | None = 2, default: Callable[[Any], Any] | None = None
) -> None:
    """Write ``value`` as a JSON file that appears whole or not at all."""
    with replacing_file(path) as fresh:
        fresh.write_text(json_text(value, indent=indent, default=default), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; an OSError or ValueError is the caller's to explain."""
    return parse_json(read_text(path))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; any that cannot be read is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def fingerprint(*parts: Any, size: int = 16) -> str:
    """Return ``size`` bytes, in hexadecimal, that change when any part does.

    A string or bytes count as they are, anything else by its ``repr``. Several parts are framed by
    their lengths, so that ``("ab", "c")`` and ``("a", "bc")`` differ.
    """
    return _digest(parts, size).hex()


def fingerprint_number(*parts: Any) -> int:
    """Return a fingerprint as an unsigned 64-bit number."""
    return int.from_bytes(_digest(parts, 8), "little")


def _digest(parts: tuple[Any, ...], size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        text = part if isinstance(part, str | bytes) else repr(part)
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if len(parts) > 1:
            digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.digest()


def fingerprint_of_file(path: Path) -> str:
    """Return a fingerprint of the content of a file, or of all files in a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not each.is_dir() and not unreadable(each):
            with each.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def fingerprint_of_ends(path: Path, size: int) -> str:
    """Return a fingerprint of the first and last ``size`` bytes of a file of any length."""
    with path.open("rb") as file:
        begin = file.read(size)
        file.seek(max(0, path.stat().st_size - size))
        return fingerprint(begin + file.read())


def write_npy_header(file: BinaryIO, shape: tuple[int, ...], dtype: Any) -> None:
    """Write the header of a ``.npy`` file; its length does not depend on the number of rows."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays as an ``.npz`` file that appears whole or not at all."""
    content: dict[str, Any] = dict(arrays)
    with replacing_file(path) as fresh:
        with fresh.open("wb") as file:
            np.savez(file, **content)
        seal_archive(fresh)


class KeptResults:
    """A folder of computed results, found again by all that they depend on.

    A result is arrays and one JSON object, and appears whole or not at all. Its name is a
    fingerprint of its key, so a result for another key is never taken for it. It is an ``.npz``
    file, or, if ``mapped``, a folder of ``.npy`` files that are read from disk when they are used.
    """

    def __init__(self, folder: Path, *depends_on: Any, mapped: bool = False) -> None:
        self._folder, self._depends_on, self._mapped = folder, depends_on, mapped

    def path(self, *key: Any) -> Path:
        """Return the file or folder that holds the result of a key."""
        name = fingerprint((*self._depends_on, *key))
        return self._folder / (name if self._mapped else f"{name}.npz")

    def find(self, *key: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Return the JSON object and the arrays of a key; None if missing or damaged."""
        path = self.path(*key)
        if not path.exists():
            return None
        try:
            return _map(path) if self._mapped else _load(path)
        except (KeyError, *ARRAY_ERRORS):
            note_damage(path)
            return None

    def keep(self, facts: Mapping[str, Any], arrays: Arrays, *key: Any) -> None:
        """Write the result of a key."""
        if self._mapped:
            with replacing_folder(self.path(*key)) as folder:
                for name, values in arrays.items():
                    np.save(folder / f"{name}.npy", values)
                (folder / _FACTS_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
                seal(folder, self.path(*key).name)
            return
        about = {_FACTS: np.array(json.dumps(facts)), _NAME: np.array(self.path(*key).name)}
        write_arrays(self.path(*key), {**about, **arrays})


def _load(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not is_whole_archive(path):
        raise ValueError("it is damaged")
    # Opened here: numpy does not close a file that it cannot read.
    with path.open("rb") as file, np.load(file) as found:
        if _NAME in found.files and str(found[_NAME]) != path.name:
            raise ValueError("it is another result")
        arrays = {name: found[name] for name in found.files if name not in (_FACTS, _NAME)}
        return parse_json(str(found[_FACTS])), arrays


def _map(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if damage(folder) is not None:
        raise ValueError("it is damaged")
    arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
    facts = folder / _FACTS_FILE  # which a folder that was filled by its maker may lack
    return read_json(facts) if facts.exists() or not arrays else {}, arrays
