"""Data on the command line: files and folders, with a weight behind them or by name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from tercet import distributed
from tercet.data.files.folders import open_sources
from tercet.data.files.scan import EXAMPLE_FORMAT, RecordFormat, ReportProgress
from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.files.progress import bar

Number = TypeVar("Number", int, float)

_PARTS: Final = 1000  # of a bar


def opened(
    path: Path, *, weight: float = 1.0, record_format: RecordFormat = EXAMPLE_FORMAT
) -> list[Source]:
    """The sources of a file or a folder; a bar shows how far they are read.

    Raises:
        DataError: at the first record that is not what it should be.
    """
    with shown_progress(f"read {path.name}") as progress:
        return open_sources(path, weight=weight, progress=progress, record_format=record_format)


def weighted(path: Path) -> tuple[Path, float]:
    """``pairs.jsonl:0.5`` is that file at half its weight."""
    name, colon, weight = str(path).rpartition(":")
    if not colon:
        return path, 1.0
    try:
        return Path(name), float(weight)
    except ValueError:
        return path, 1.0


def numbers_of(
    given: Sequence[str] | None, flag: str, number: Callable[[str], Number]
) -> dict[str, Number]:
    """The numbers by name of a flag such as ``--weight news=2``.

    Raises:
        RecipeError: for one that is not so written, or a name that is there twice.
    """
    found: dict[str, Number] = {}
    for text in given or ():
        name, _, value = text.rpartition("=")
        if name in found:
            raise RecipeError(f"--{flag} names {name!r} twice; leave one of them out")
        with suppress(ValueError):
            found[name] = number(value)
        if not name or name not in found:
            raise RecipeError(f"--{flag} is {text!r}; write NAME=NUMBER, as in news/de=2")
    return found


@contextmanager
def shown_progress(label: str) -> Iterator[ReportProgress]:
    """A bar for a job that tells the part of it that is done."""
    with bar(label, _PARTS, shown=distributed.is_main()) as advance:
        done = 0

        def tell(part: float) -> None:
            nonlocal done
            now = int(part * _PARTS)
            advance(now - done)
            done = now

        yield tell
