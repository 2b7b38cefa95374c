"""A progress bar on standard error, and nothing at all where nobody looks at one."""

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
    """Say that ``count`` more are done, and what to show beside the bar."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Move the bar."""
        ...


Bars: TypeAlias = Callable[..., AbstractContextManager[Advance]]
"""What shows how far a job is, by its label and its total: ``bar``, or ``notes`` on another bar."""


@contextmanager
def bar(label: str, total: int | None, done: int = 0, *, shown: bool = True) -> Iterator[Advance]:
    """Show how far a long job is; the time left is an estimate of the job's own speed."""
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
    """Jobs inside of a longer one show how far they are beside its bar."""

    @contextmanager
    def beside(label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        so_far = done

        def tell(count: int = 1, note: str = "") -> None:
            nonlocal so_far
            so_far += count
            advance(0, f"{label} {so_far:,}" + (f" of {total:,}" if total else ""))

        yield tell

    return beside
