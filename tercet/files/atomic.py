"""Files and folders that appear whole or not at all, whatever happens while they are written.

What is not finished lies beside its place, under ``.NAME.new-HOST-PID-N``. A killed process cannot
sweep that away; the next one that writes the same name does.
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

_TURNED_UP: Final = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # or gone: another process did it
_TORCH_WRITES: Final = ("PytorchStreamWriter", "inline_container", "iostream")
_ATTEMPTS: Final = 50  # to put a folder in place while others do the same
_numbers: Final = itertools.count()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill; when all went well it takes the place of ``folder``.

    Its files get the mode that the umask gives, whatever the writer chose. A kill leaves the old
    folder as it was, or for a moment under the name ``.NAME.old-...``, from where the next write
    or :func:`recover_folder` takes it back. Of two processes that write at the same time, the
    later one to finish wins.

    Raises:
        StorageError: when the disk refuses; what was there before is still there.
    """
    folder = Path(folder).resolve()  # a link stays a link: what it points to is replaced
    fresh, old = _beside(folder, "new"), _beside(folder, "old")
    with suppress(OSError):  # one look, since another process may be renaming here
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise StorageError(folder, "it is a file, and a folder is to be written")
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
        if not folder.exists() and old.exists():  # the disk refused the second of two renames
            with suppress(OSError):  # unless another process has put its own in place by now
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
        except OSError as error:  # a living writer may have been quicker
            if error.errno not in _TURNED_UP:
                with clear_about(folder):
                    raise
    _sweep(folder, "old")


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Give an empty file to write to; when all went well it takes the place of ``path``.

    Raises:
        StorageError: when the disk refuses; what was there before is still there.
    """
    path = Path(path).resolve()
    fresh = _beside(path, "new")
    if path.exists() and not path.is_file():
        raise StorageError(path, "it is no file, and a file is to be written")
    _make_folder(path.parent)
    try:
        with clear_about(path):
            _sweep(path, "new")
            fresh.touch()  # a place that cannot be written to shows before the work is done
            yield fresh
            _sync(fresh)
            fresh.replace(path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            fresh.unlink()


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from doing the same in ``folder``; a killed one keeps nobody out.

    Raises:
        RecipeError: when another process is at it, saying which.
        StorageError: when the folder cannot be written to.
    """
    path = Path(folder) / ".lock"
    lock = FileLock(path, thread_local=False)  # any thread may let go of it
    _make_folder(path.parent)
    with clear_about(path.parent):
        holder = path.read_text(encoding="utf-8") if path.exists() else ""
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
    """Two renames. Between them another process may put its own folder in place: then again."""
    for attempt in range(_ATTEMPTS):
        try:
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            fresh.rename(folder)
            return
        except OSError as error:
            if attempt + 1 == _ATTEMPTS or error.errno not in _TURNED_UP:
                raise
            time.sleep(0.001 * attempt)  # let the others finish


def _beside(path: Path, kind: str) -> Path:
    """A name that no other process or thread uses, in the same folder, so that a rename is all."""
    return path.with_name(
        f".{path.name}.{kind}-{socket.gethostname()}-{os.getpid()}-{next(_numbers)}"
    )


def _leftovers(path: Path, kind: str) -> list[Path]:
    """What writers of ``path`` left beside it, or are still busy with; the newest first."""
    prefix = f".{path.name}.{kind}-"
    try:
        found = [entry for entry in os.scandir(path.parent) if entry.name.startswith(prefix)]
        found.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime, reverse=True)
    except OSError:  # no such folder, or it may not be listed, or another process sweeps too
        return []
    return [Path(entry.path) for entry in found]


def _sweep(path: Path, kind: str) -> None:
    """Delete what processes left that were killed on this machine."""
    for leftover in _leftovers(path, kind):
        if _of_a_dead_process(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
            with suppress(OSError):
                leftover.unlink()


def _of_a_dead_process(leftover: Path) -> bool:
    about, _, number = leftover.name.rpartition("-")
    about, _, process = about.rpartition("-")
    if not about.endswith(f"-{socket.gethostname()}") or not (process + number).isdecimal():
        return False  # of another machine, or not ours at all
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
    """Name the path and the remedy when the disk is full or closed to us."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(path, getattr(error, "strerror", None) or str(error)) from error
    except RuntimeError as error:  # torch.save reports a failed write in words that say little
        if not any(part in str(error) for part in _TORCH_WRITES):
            raise
        raise StorageError(path, "not all of it could be written; is the disk full?") from error
