"""Progress on standard error: a bar on a terminal, else a plain line every minute."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol, TypeAlias, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tercet.files.console import quiet, say

FIRST_SECONDS: Final = 15.0  # before the first line: a job that is done by then prints none
EVERY_SECONDS: Final = 60.0  # between two


@runtime_checkable
class Advance(Protocol):
    """Reports that ``count`` more are done, and a note to show after the bar."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Move the bar."""
        ...


Bars: TypeAlias = Callable[..., AbstractContextManager[Advance]]
"""A function that shows progress, given a label and a total: ``bar``, or ``notes`` of a bar."""


@contextmanager
def bar(
    label: str, total: int | None, done: int = 0, *, shown: bool = True, unit: str = ""
) -> Iterator[Advance]:
    """Show the progress of a long job; the time left is estimated from its speed so far.

    ``unit`` is what a line without a terminal calls what is counted, as in "step ".
    """
    if not shown or quiet():
        yield _silent
        return
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(f"{label}: {unit}", total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total, completed=done, note="")

        def advance(count: int = 1, note: str = "") -> None:
            progress.update(task, advance=count, note=note)

        yield advance


def _silent(count: int = 1, note: str = "") -> None:
    """Show nothing."""


class _Lines:
    """Prints how far a job is, where there is no terminal."""

    def __init__(self, about: str, total: int | None, done: int) -> None:
        self._about, self._total, self._done = about, total, done
        self._due = time.monotonic() + FIRST_SECONDS
        self._first: tuple[float, int] | None = None  # when the first were done, and how many

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Count, and print a line if it is time."""
        self._done += count
        now = time.monotonic()
        began, before = self._first = self._first or (now, self._done)
        if now < self._due:
            return
        self._due = now + EVERY_SECONDS
        parts = [f"{self._about}{self._done:,}", *([note] if note else [])]
        if self._total is not None:
            parts[0] += f" of {self._total:,}"
            if self._done > before:
                seconds = (now - began) / (self._done - before) * max(0, self._total - self._done)
                parts.append(f"about {time_text(seconds)} left")
        say(", ".join(parts))


def time_text(seconds: float | int) -> str:
    """Return a time for people, as in "2 h 5 min"."""
    if seconds < 99:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 99 else f"{minutes // 60} h {minutes % 60} min"


def notes(advance: Advance) -> Bars:
    """Return bars for jobs inside a longer one, shown as notes after its bar."""

    @contextmanager
    def note_of(label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        so_far = done

        def report(count: int = 1, note: str = "") -> None:
            nonlocal so_far
            so_far += count
            advance(0, f"{label} {so_far:,}" + (f" of {total:,}" if total else ""))

        yield report

    return note_of
