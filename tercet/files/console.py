"""Output for users: results on standard output, all else in plain lines on standard error."""

import logging
import re
import sys
from collections.abc import Mapping
from typing import Final

from rich.console import Console
from rich.table import Table

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def results() -> Console:
    """Return standard output, without markup; lines are not wrapped in a pipe."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(highlight=False, markup=False, emoji=False, width=width)


def say(line: str) -> None:
    """Print to standard error; long lines are not wrapped, so that paths can be copied."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(line, soft_wrap=True)


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
        """Print the record."""
        say(f"tercet: note: {record.getMessage()}")
