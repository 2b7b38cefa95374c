"""What several verbs share: which model, and how it is read."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tercet import zoo

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


def load(model: str, precision: str, **how: Any) -> Any:
    """The embedder of this name; ``how`` are attention, pooling and echo, None for its own."""
    import torch

    from tercet.nn.embedder import Embedder

    wanted = {name: value for name, value in how.items() if value}
    embedder = Embedder.load(model, dtype=getattr(torch, precision), **wanted)
    return embedder.to("cuda") if torch.cuda.is_available() else embedder


def where(model: str) -> str:
    """The full path of a folder or file, so that an index finds its model from anywhere."""
    is_name = zoo.find(model) is not None or not Path(model).exists()
    return model if is_name else str(Path(model).resolve())
