"""Options that several commands share, and what their values mean."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import typer

from tercet.errors import RecipeError
from tercet.files.console import say
from tercet.kinds import KINDS, Kind, Weights, parse_kinds

if TYPE_CHECKING:
    from tercet.data.files.scan import RecordFormat, ReportProgress
    from tercet.data.files.sources import Source

Number = TypeVar("Number", int, float)

_PARTS: Final = 1000  # of a progress bar

ModelName = Annotated[str, typer.Argument(help="Zoo name, folder or hub id (see: tercet models).")]
Precision = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="bfloat16 is faster where the chip has it.")
]
ReadingOption = Annotated[
    Literal["causal", "bidirectional"] | None,
    typer.Option("--attention", help="How a decoder reads; None: as it was trained to."),
]
PoolingOption = Annotated[
    Literal["mean", "weighted_mean", "first", "last"] | None,
    typer.Option("--pooling", help="None: the model's own."),
]
Echo = Annotated[
    bool, typer.Option("--echo", help="Read each text twice and pool the second time.")
]
KindsOption = Annotated[
    str | None,
    typer.Option("--kinds", help="Of vectors, such as dense,sparse; None: all the model makes."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Of dense, sparse and multi scores, such as 1,0.3,1; None: those of the model.",
    ),
]
DimsOption = Annotated[
    list[int] | None,
    typer.Option("--dims", help="Coordinates to keep; may be repeated. None: those trained for."),
]
RunnerOption = Annotated[
    Literal["auto", "loop", "daft", "ray"],
    typer.Option(
        "--runner", help="Who hands out the work; auto: a loop, or Daft for several --workers."
    ),
]
WorkersOption = Annotated[int, typer.Option("--workers", help="Processes on each machine.")]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Of a Ray cluster: HOST:PORT of its head, or auto.")
]


def load(model: str, precision: str, **how: Any) -> Any:
    """Load an embedder; ``how`` sets attention, pooling and echo, None keeps the model's own."""
    import torch

    from tercet.models.embedder import Embedder
    from tercet.models.network.cpu import warning_of

    wanted = {name: value for name, value in how.items() if value}
    dtype, device = getattr(torch, precision), "cuda" if torch.cuda.is_available() else "cpu"
    if (warning := warning_of(dtype, device)) is not None:
        say(f"tercet: note: {warning}")
    return Embedder.load(model, dtype=dtype, **wanted).to(device)


def where(model: str) -> str:
    """Return the full path of a model, so that an index finds it from any working directory."""
    from tercet.models.zoo import zoo

    is_name = zoo.find(model) is not None or not Path(model).exists()
    return model if is_name else str(Path(model).resolve())


def kinds_of(named: str | None) -> tuple[Kind, ...] | None:
    """Return the kinds of vectors that ``--kinds`` names; None if it is not given."""
    return None if named is None else parse_kinds(named)


def weights_of(named: str | None) -> Weights | None:
    """Return the weights of kinds that ``--weights`` gives; None if it is not given."""
    if named is None:
        return None
    weights = Weights.parse(named)
    if not any(weights.of(kind) for kind in KINDS):
        raise RecipeError(f"weights are {named!r}; give one of them a number above 0")
    return weights


def whole_numbers(flag: str, named: str | None) -> tuple[int, ...]:
    """Return the whole numbers of a flag, separated by commas; empty if not given.

    Raises:
        RecipeError: if one is negative, not whole, or given twice.
    """
    parts = [part.strip() for part in (named or "").split(",")] if named is not None else []
    fits = all(part.isascii() and part.isdigit() for part in parts)
    numbers = tuple(int(part) for part in parts) if fits else ()
    if not fits or len(set(numbers)) < len(numbers):
        raise RecipeError(
            f"--{flag} {named}: give whole numbers from 0 up with commas between, each once, such "
            "as 0,2,8"
        )
    return numbers


def opened(
    path: Path, *, weight: float = 1.0, record_format: "RecordFormat | None" = None
) -> "list[Source]":
    """Open the sources of a file or a folder, with a progress bar; None reads examples.

    Raises:
        DataError: at the first invalid record.
    """
    from tercet.data.files.folders import open_sources
    from tercet.data.files.scan import EXAMPLE_FORMAT

    record_format = record_format or EXAMPLE_FORMAT
    with shown_progress(f"read {path.name}") as progress:
        return open_sources(path, weight=weight, progress=progress, record_format=record_format)


def weighted(path: Path) -> tuple[Path, float]:
    """Split ``pairs.jsonl:0.5`` into the file and its weight; without one the weight is 1."""
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
    """Return the numbers by name of a flag such as ``--weight news=2``.

    Raises:
        RecipeError: for a value of another form, or a name that occurs twice.
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
def shown_progress(label: str) -> "Iterator[ReportProgress]":
    """Show a bar for a job that reports the share of it that is done."""
    from tercet import distributed
    from tercet.files.progress import bar

    with bar(label, _PARTS, shown=distributed.is_main()) as advance:
        done = 0

        def report(part: float) -> None:
            nonlocal done
            now = int(part * _PARTS)
            advance(now - done)
            done = now

        yield report
