"""What several verbs share: which model, and how it is read."""

from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tercet.errors import RecipeError
from tercet.files.console import say
from tercet.kinds import KINDS, Kind, Weights
from tercet.models.zoo import zoo

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
    """The embedder of this name; ``how`` are attention, pooling and echo, None for its own."""
    import torch

    from tercet.models.embedder import Embedder
    from tercet.models.network.precision import warning_of

    wanted = {name: value for name, value in how.items() if value}
    dtype, device = getattr(torch, precision), "cuda" if torch.cuda.is_available() else "cpu"
    if (warning := warning_of(dtype, device)) is not None:
        say(f"tercet: note: {warning}")
    return Embedder.load(model, dtype=dtype, **wanted).to(device)


def where(model: str) -> str:
    """The full path of a folder or file, so that an index finds its model from anywhere."""
    is_name = zoo.find(model) is not None or not Path(model).exists()
    return model if is_name else str(Path(model).resolve())


def kinds_of(named: str | None) -> tuple[Kind, ...] | None:
    """The kinds of vectors that a flag names, in their usual order; None where it is not given.

    Raises:
        RecipeError: for a kind that does not exist.
    """
    if named is None:
        return None
    names = {name.strip() for name in named.split(",")}
    if unknown := names - set(KINDS):
        raise RecipeError(
            f"--kinds {named}: there is no kind {min(unknown)!r}; name some of {', '.join(KINDS)}"
        )
    return tuple(kind for kind in KINDS if kind in names)


def weights_of(named: str | None) -> Weights | None:
    """The weights that a flag gives, of dense, sparse and multi; None where it is not given.

    Raises:
        RecipeError: where these are not three numbers from 0 up, one of them above.
    """
    if named is None:
        return None
    try:
        numbers = [float(number) for number in named.split(",")]
    except ValueError:
        numbers = []
    fits = len(numbers) == len(KINDS) and all(0 <= number < inf for number in numbers)
    if not fits or not any(numbers):
        raise RecipeError(
            f"--weights {named}: give three numbers, of dense, sparse and multi, none below 0 and "
            "one above it, such as 1,0.3,1"
        )
    return Weights(*numbers)


def whole_numbers(flag: str, named: str | None) -> tuple[int, ...]:
    """The numbers that a flag gives with commas between, each once; none where it is not given.

    Raises:
        RecipeError: where one is no whole number from 0 up, or stands there twice.
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
