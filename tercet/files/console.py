"""What a user sees: results on standard output, all else in plain lines on standard error."""

import logging
import re
import sys
from typing import Final

from rich.console import Console
from rich.table import Table

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def results() -> Console:
    """Standard output, where texts stand as they are; a pipe has no width."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(highlight=False, markup=False, emoji=False, width=width)


def say(line: str) -> None:
    """Print to standard error; a long line is left to the terminal: a path can be copied."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(line, soft_wrap=True)


def columns(*header: str) -> Table:
    """A table without boxes, so that ``awk`` and ``sort`` can read it."""
    return Table(*header, box=None, pad_edge=False, header_style="bold")


def one_line(text: str) -> str:
    """The text in one line, without what could steer a terminal."""
    return " ".join(CONTROL.sub(" ", text).split())


def shortened(text: str, width: int = 90) -> str:
    """The beginning of a text, in one line."""
    line = one_line(text)
    return line if len(line) <= width else line[: width - 1] + "…"


class Notes(logging.Handler):
    """Says what the package has to remark, in the form of its errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record."""
        say(f"tercet: note: {record.getMessage()}")
