"""A progress bar on standard error, shown on a terminal only."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeAlias, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@runtime_checkable
class Advance(Protocol):
    """Reports that ``count`` more are done, and a note to show after the bar."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Move the bar."""
        ...


Bars: TypeAlias = Callable[..., AbstractContextManager[Advance]]
"""A function that shows progress, given a label and a total: ``bar``, or ``notes`` of a bar."""


@contextmanager
def bar(label: str, total: int | None, done: int = 0, *, shown: bool = True) -> Iterator[Advance]:
    """Show the progress of a long job; the time left is estimated from its speed so far."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task(label, total=total, completed=done, note="")

        def advance(count: int = 1, note: str = "") -> None:
            progress.update(task, advance=count, note=note)

        yield advance


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
