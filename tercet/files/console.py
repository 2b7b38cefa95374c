"""Output for users: results on standard output, all else in plain lines on standard error."""

import logging
import os
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import IO, Any, Final

from rich.console import Console
from rich.table import Table

from tercet.errors import TercetError
from tercet.files.secrets import redacted

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


QUIET: Final = "TERCET_QUIET"  # the environment variable that ``--quiet`` sets
COMMAND: Final = ContextVar("command", default="")
"""The command that runs, as it was given, for reports; empty if there is none."""

CLOSED: Final = 141  # a shell's status of a program that writes to a pipe without a reader


class OutputError(TercetError):
    """Standard output cannot be written to, as where a disk is full."""


class _Plain(Console):
    """A console without markup. Nothing is printed any more once a stream has failed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; a failing standard output ends the program, a failing standard error nothing."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            _to_nowhere(self.file)
            if self.stderr:
                return
            if isinstance(error, BrokenPipeError):  # as with ``| head``
                raise SystemExit(CLOSED) from None
            raise OutputError(f"standard output cannot be written to: {error.strerror}") from error

    def on_broken_pipe(self) -> None:
        """Raise what rich would end the program for."""
        raise


def make_encodable() -> None:
    """Have standard output and error show characters that their encoding lacks as escapes.

    A stream that is closed, as after ``>&-``, becomes one that goes nowhere.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def results() -> Console:
    """Return standard output, without markup; lines are not wrapped in a pipe."""
    return _Plain(width=None if sys.stdout.isatty() else 10_000)


def say(line: str) -> None:
    """Print a note to standard error, unless ``--quiet`` was given."""
    if not quiet():
        complain(line)


def complain(line: str) -> None:
    """Print an error to standard error; long lines are not wrapped, so that paths can be copied."""
    _Plain(stderr=True).print(redacted(line), soft_wrap=True)


def quiet() -> bool:
    """Whether notes and progress are left out, also in processes that this one starts."""
    return bool(os.environ.get(QUIET))


def _to_nowhere(stream: IO[str]) -> None:
    """Send what is still in a stream's buffer nowhere: Python would try again at its end."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # not a file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def columns(*header: str) -> Table:
    """Return a table without boxes, for ``awk`` and ``sort``."""
    return Table(*header, box=None, pad_edge=False, header_style="bold")


def count_table(what: str, number: str, counts: Mapping[str, int | str]) -> Table:
    """Return a table with a line for each name and count."""
    table = columns(what, number)
    for name, count in counts.items():
        table.add_row(one_line(name), count if isinstance(count, str) else f"{count:,}")
    return table


def one_line(text: str) -> str:
    """Return the text in one line, without control characters."""
    return " ".join(CONTROL.sub(" ", text).split())


def shortened(text: str, width: int = 90) -> str:
    """Return the beginning of a text, in one line."""
    line = one_line(text)
    return line if len(line) <= width else line[: width - 1] + "…"


class Notes(logging.Handler):
    """Prints log records of the package like its errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record; an error also where notes are left out."""
        show = complain if record.levelno >= logging.ERROR else say
        show(f"tercet: note: {record.getMessage()}")
