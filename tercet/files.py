"""Files and folders that appear whole or not at all, whatever happens while they are written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tercet.errors import StorageError


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill; when all went well it takes the place of ``folder``.

    It lies beside ``folder``, so that the last step is a rename. A kill leaves the old folder as
    it was, or for a moment under the name ``.NAME.old``, from where the next write restores it.

    Raises:
        StorageError: when the disk refuses; what was there before is still there.
    """
    folder = Path(folder)
    fresh, old = _beside(folder, f"new-{os.getpid()}"), _beside(folder, "old")
    with _clear_about(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
    try:
        with _clear_about(folder):
            yield fresh
            for path in sorted(fresh.rglob("*")):
                _sync(path)
            _sync(fresh)
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
            _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    old = _beside(folder, "old")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; when all went well the file takes the place of ``path``.

    Raises:
        StorageError: when the disk refuses; what was there before is still there.
    """
    path = Path(path)
    fresh = _beside(path, f"new-{os.getpid()}")
    try:
        with _clear_about(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield fresh
            _sync(fresh)
            fresh.replace(path)
            _sync(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _clear_about(path: Path) -> Iterator[None]:
    """Name the path and the remedy when the disk is full or closed to us."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(path, getattr(error, "strerror", None) or str(error)) from error
    except RuntimeError as error:  # how torch.save reports a failed write
        if "PytorchStreamWriter" not in str(error) and "iostream" not in str(error):
            raise
        raise StorageError(path, str(error).splitlines()[0]) from error
