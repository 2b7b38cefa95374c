"""Whether an output may be written: never over an input, nor over what tercet did not make.

A folder of tercet holds a small file, ``.tercet``, which says what it is. Where the folder is
replaced as a whole, it also lists the files that tercet wrote: nothing else may be among them then.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from tercet.errors import RecipeError, StorageError, TercetError
from tercet.files.artifacts import read_json, write_json

MARK: Final = ".tercet"
_WITHOUT_WORTH: Final = (MARK, ".lock", ".DS_Store", "Thumbs.db", "desktop.ini")
_ALL: Final = ("*", "*/*")
_UNFINISHED: Final = (".new-", ".old-")  # see tercet.files.atomic


@dataclass(frozen=True, slots=True)
class FolderKind:
    """A kind of folder that tercet writes.

    Attributes:
        name: what such a folder is, such as "a model".
        own: patterns of the paths in it that tercet writes, such as "a.txt" and "b/*" for all that
            is below b; without any, the marker lists the files of a folder that is replaced.
        shared: whether other files may be beside them, which stay as they are; false: the folder
            is replaced as a whole.
        is_data: whether tercet reads such folders, so that one inside an input becomes part of it.
        is_older: whether a folder without a marker is one of an earlier version.
        error: the class of the error for a folder of another kind.
    """

    name: str
    own: tuple[str, ...] = ()
    shared: bool = False
    is_data: bool = False
    is_older: Callable[[Path], bool] = lambda folder: False
    error: type[TercetError] = RecipeError


def check_output(
    out: Path | str,
    inputs: Iterable[Path | str | None] = (),
    kind: FolderKind | None = None,
    *,
    flag: str = "--out",
    adds: bool = False,
) -> None:
    """Raise, before any work, unless ``out`` may be written; without ``kind`` it is a file.

    Inputs that are no files or folders, such as names of models, are passed over, and so is None.
    ``adds`` leaves
    it to the caller to judge what is in the folder, since nothing of it is replaced.

    Raises:
        RecipeError: if it is an input, is a file inside one, or would replace one; links count as
            what they lead to. Also, or the error of ``kind``, for a folder that holds things that
            tercet did not make.
        StorageError: if it exists, and is a folder where a file is due, or the reverse.
    """
    out = Path(out)
    own = kind.own if kind is not None and (kind.shared or adds) else ()
    inside = out.exists() if kind is None else kind.is_data
    for each in inputs:
        if each is not None and Path(each).exists():
            _refuse_input(out, Path(each), own or _ALL, inside=inside, flag=flag)
    if kind is None and out.exists() and not out.is_file():
        raise StorageError(out, "it is not a file")
    if kind is not None and kind.shared and out.exists() and not out.is_dir():
        raise StorageError(out, "a file is where a folder has to be")
    if kind is not None and out.exists() and not adds:
        _refuse_foreign(out, kind)


def check_files(inputs: Iterable[Path | str | None], **outputs: Path | None) -> None:
    """Check the files of several flags, such as ``json=``, and that no two are the same."""
    inputs = list(inputs)
    seen: dict[Path, str] = {}
    for flag, out in outputs.items():
        if out is None:
            continue
        check_output(out, inputs, flag=f"--{flag}")
        other = seen.setdefault(_real(out), flag)
        if other != flag:
            raise RecipeError(f"{out}: --{other} and --{flag} name the same file; give two")


def mark(folder: Path, kind: FolderKind) -> None:
    """Write the marker of a folder that tercet has made, or begins to fill."""
    record: dict[str, Any] = {"made": kind.name}
    if not kind.shared and not kind.own:
        record["files"] = sorted(_files_in(folder))
    write_json(folder / MARK, record, indent=None)


def holds_only(folder: Path, patterns: Iterable[str]) -> bool:
    """Whether all files in a folder have paths of these patterns; see :class:`FolderKind`."""
    patterns = list(patterns)
    return all(_fits(path, patterns) for path in _files_in(folder))


def json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if it holds none or cannot be read."""
    with suppress(OSError, ValueError):
        found = read_json(path)
        return found if isinstance(found, dict) else {}
    return {}


# ---- inputs ------------------------------------------------------------------------------------


def _refuse_input(out: Path, given: Path, own: tuple[str, ...], *, inside: bool, flag: str) -> None:
    """Raise if ``out`` is an input, is ``inside`` one, or has it where its ``own`` files are."""
    target = _real(out)
    for path in _places_of(given, target):
        if path == target or _same(path, target):
            raise RecipeError(f"{out}: is an input; give another {flag}")
        if inside and path in target.parents and path.is_dir():
            raise RecipeError(f"{out}: is inside the input {given}; give another {flag}")
        if target in path.parents and _fits(path.relative_to(target).as_posix(), own):
            raise RecipeError(f"{out}: is or contains the input {given}; give another {flag}")


def _places_of(given: Path, target: Path) -> Iterator[Path]:
    """Yield the real place of an input, and of links in a folder; of all its files if they count.

    They count where the output has other names too, of which one may be in the folder.
    """
    yield _real(given)
    if not given.is_dir():
        return
    every = target.is_file() and target.stat().st_nlink > 1
    for folder, folders, files in os.walk(given):
        for name in (*folders, *files):
            path = Path(folder, name)
            if every or path.is_symlink():
                yield _real(path)


def _real(path: Path | str) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, of a loop of links too


def _same(path: Path, target: Path) -> bool:
    with suppress(OSError):
        return path.samefile(target)
    return False


# ---- what a folder holds -------------------------------------------------------------------------


def _refuse_foreign(out: Path, kind: FolderKind) -> None:
    if out.is_dir() and not any(map(_has_worth, os.listdir(out))):
        return
    made = json_object(out / MARK)
    if made.get("made") != kind.name if made else not kind.is_older(out):
        raise kind.error(
            f"{out}: is not {kind.name} and would be overwritten; choose another folder, or an "
            "empty one"
        )
    if kind.shared or not made:
        return
    own = list(kind.own) or [str(name) for name in made.get("files", ())]
    fits = (lambda path: _fits(path, own)) if kind.own else set(own).__contains__
    if other := next((path for path in _files_in(out) if not fits(path)), None):
        raise kind.error(
            f"{out}: holds {other}, which tercet did not write, and would be replaced as a whole; "
            "move it away, or choose another folder"
        )


def _files_in(folder: Path) -> Iterator[str]:
    """Yield the paths of all files in a folder but those that nobody would miss."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in sorted((*files, *links)):
            if _has_worth(name):
                yield Path(place, name).relative_to(folder).as_posix()


def _has_worth(name: str) -> bool:
    unfinished = name.startswith(".") and any(part in name for part in _UNFINISHED)
    return name not in _WITHOUT_WORTH and not unfinished


def _fits(path: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern fits; one without / is of the folder's own files, not of those below."""
    return any(fnmatchcase(path, each) for each in patterns if "/" in each or "/" not in path)
