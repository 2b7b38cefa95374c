"""Files and folders that appear whole or not at all, whatever happens while they are written.

Unfinished ones are in the same folder, as ``.NAME.new-HOST-PID-N``. What a killed process left is
deleted by the next one that writes the same name.
"""

import errno
import itertools
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from tercet.errors import RecipeError, StorageError

_RACED: Final = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # another process was faster
_TORCH_WRITES: Final = ("PytorchStreamWriter", "inline_container", "iostream")
_ATTEMPTS: Final = 50  # to put a folder in place while others do the same
LOCK: Final = ".lock"  # a file that stays in a folder that had a writer
_numbers: Final = itertools.count()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which replaces ``folder`` if no error occurs.

    Its files get the mode that the umask gives, whatever the writer chose. If the process is
    killed, the old folder is unchanged, or for a moment called ``.NAME.old-...``; the next write
    or :func:`recover_folder` restores it. If two processes write at the same time, the last one
    to finish wins.

    Raises:
        StorageError: if the disk refuses; the old folder is still there then.
    """
    folder = Path(folder).resolve()  # a link stays a link: its target is replaced
    fresh, old = _beside(folder, "new"), _beside(folder, "old")
    with suppress(OSError):  # a single check, since another process may be renaming here
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise StorageError(folder, "it is a file, not a folder")
    _make_folder(folder.parent)
    with clear_about(folder):
        recover_folder(folder)
        _sweep(folder, "new")
        fresh.mkdir()
    try:
        with clear_about(folder):
            yield fresh
            mode = fresh.stat().st_mode & 0o666
            for path in sorted(fresh.rglob("*")):
                if path.is_file():
                    path.chmod(mode)
                _sync(path)
            _sync(fresh)
            _swap(fresh, folder, old)
            _sync(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if not folder.exists() and old.exists():  # the second of two renames failed
            with suppress(OSError):  # another process may have put its own in place
                old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    folder = Path(folder).resolve()
    for old in _leftovers(folder, "old"):
        if folder.exists():
            break
        try:
            old.rename(folder)
        except OSError as error:  # a running writer may have been faster
            if error.errno not in _RACED:
                with clear_about(folder):
                    raise
    _sweep(folder, "old")


@contextmanager
def replacing_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield an empty file to write to, which replaces ``path`` if no error occurs.

    Nobody but its owner may read a ``private`` one, also while it is written.

    Raises:
        StorageError: if the disk refuses; the old file is still there then.
    """
    path = Path(path).resolve()
    fresh = _beside(path, "new")
    if path.exists() and not path.is_file():
        raise StorageError(path, "it is not a file")
    _make_folder(path.parent)
    try:
        with clear_about(path):
            _sweep(path, "new")
            fresh.touch(
                0o600 if private else 0o666
            )  # fails before the work is done if the place cannot be written to
            yield fresh
            _sync(fresh)
            fresh.replace(path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            fresh.unlink()


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Lock a folder against other writers; the lock of a killed process is void.

    Raises:
        RecipeError: if another process holds the lock, naming it.
        StorageError: if the folder cannot be written to.
    """
    path = Path(folder) / LOCK
    lock = FileLock(path, thread_local=False)  # any thread may release it
    _make_folder(path.parent)
    with clear_about(path.parent):
        holder = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise RecipeError(
                f"{folder}: {holder.strip() or 'another process'} is writing there; "
                "wait until it is done, stop it, or give another folder"
            ) from None
    try:
        with clear_about(path):
            now = datetime.now().strftime("%Y-%m-%d %H:%M")
            about = f"process {os.getpid()} on {socket.gethostname()}, started {now},"
            path.write_text(about, encoding="utf-8")
        yield
    finally:
        lock.release()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(folder, "a file is where a folder has to be") from error
    except OSError as error:
        raise StorageError(folder, error.strerror or str(error)) from error


def _swap(fresh: Path, folder: Path, old: Path) -> None:
    """Rename twice; try again if another process puts its own folder in place in between."""
    for attempt in range(_ATTEMPTS):
        try:
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            fresh.rename(folder)
            return
        except OSError as error:
            if attempt + 1 == _ATTEMPTS or error.errno not in _RACED:
                raise
            time.sleep(0.001 * attempt)


def _beside(path: Path, kind: str) -> Path:
    """Return a unique name in the same folder, so that one rename puts a file in place."""
    return path.with_name(
        f".{path.name}.{kind}-{socket.gethostname()}-{os.getpid()}-{next(_numbers)}"
    )


def _leftovers(path: Path, kind: str) -> list[Path]:
    """Return what writers of ``path`` left, or are still writing, newest first."""
    prefix = f".{path.name}.{kind}-"
    try:
        found = [entry for entry in os.scandir(path.parent) if entry.name.startswith(prefix)]
        found.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime, reverse=True)
    except OSError:  # no such folder, or not readable, or another process deletes too
        return []
    return [Path(entry.path) for entry in found]


def _sweep(path: Path, kind: str) -> None:
    """Delete what was left by processes that were killed on this machine."""
    for leftover in _leftovers(path, kind):
        if _of_a_dead_process(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
            with suppress(OSError):
                leftover.unlink()


def _of_a_dead_process(leftover: Path) -> bool:
    about, _, number = leftover.name.rpartition("-")
    about, _, process = about.rpartition("-")
    if not about.endswith(f"-{socket.gethostname()}") or not (process + number).isdecimal():
        return False  # of another machine, or of another program
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def clear_about(path: Path) -> Iterator[None]:
    """Turn write errors into a ``StorageError`` with the path and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(path, getattr(error, "strerror", None) or str(error)) from error
    except RuntimeError as error:  # torch.save reports a failed write in unclear words
        if not any(part in str(error) for part in _TORCH_WRITES):
            raise
        raise StorageError(path, "it was written in part only; is the disk full?") from error
