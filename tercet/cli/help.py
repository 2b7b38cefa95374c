"""How help is shown: options in panels, then examples to paste, each on its own line."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from tercet.files.console import results

EXAMPLE: Final = re.compile(r"\n\s*Examples?:\s+")
"""What stands before the examples in the docstring of a command, at its end."""

_WIDEST: Final = 20  # column of types

SETTINGS: Final[Mapping[str, Any]] = {
    "rich_markup_mode": None,  # errors are plain lines
    "pretty_exceptions_enable": False,
    "add_completion": False,
}


def examples_of(text: str) -> list[str]:
    """Return the examples at the end of a command's docstring; one may go on after a backslash."""
    _, *parts = EXAMPLE.split(text, maxsplit=1)
    lines = [line.strip() for line in parts[0].splitlines()] if parts else []
    return "\n".join(lines).replace("\\\n", "\\\n    ").split("\n") if lines else []


class Command(TyperCommand):
    """A command whose help ends with its examples."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        show_help(self, ctx)


class Group(TyperGroup):
    """A group of commands whose help ends with its examples."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        show_help(self, ctx)


def show_help(shown: Any, ctx: Any) -> None:
    """Print what a command does, its options in panels, and its examples."""
    from typer.rich_utils import rich_format_help

    text = shown.help or ""
    shown.help = EXAMPLE.split(text, maxsplit=1)[0].strip()
    before = [(each, each.metavar, each.help, each.hidden) for each in shown.get_params(ctx)]
    for each, *_ in before:
        _make_narrow(each, ctx)
    try:
        rich_format_help(obj=shown, ctx=ctx, markup_mode="rich")
    finally:
        shown.help = text
        for each, metavar, words, hidden in before:
            each.metavar, each.help, each.hidden = metavar, words, hidden
    if lines := examples_of(text):
        out = results()
        out.print(" Example" if len(lines) == 1 else " Examples", style="bold")
        for line in lines:
            out.print(f"   {line}", soft_wrap=True)
        out.print()


def _make_narrow(option: Any, ctx: Any) -> None:
    """Leave room for help texts: no type of switches, long lists of choices as sentences."""
    if option.name == "help":
        option.hidden = True
    if option.metavar is not None or not hasattr(option, "display_type_rich"):
        return
    kind = str(option.display_type_rich(ctx=ctx) or "")
    if kind == "<bool>":
        option.metavar = " "
    elif "range" in kind:
        option.metavar = kind.replace(" range", "")
    elif "|" in kind and len(kind) > _WIDEST:
        option.metavar = "CHOICE"
        option.help = f"{option.help} One of: {kind.strip('<>').replace('|', ', ')}."


def group(about: Callable[..., None], *commands: tuple[str, Callable[..., None]]) -> typer.Typer:
    """Return a group of commands by name, which a function describes."""
    made = typer.Typer(cls=Group, no_args_is_help=True, **SETTINGS)
    made.callback()(about)
    for name, function in commands:
        made.command(name, cls=Command)(function)
    return made


def single(name: str, function: Callable[..., None], settings: Mapping[str, Any]) -> typer.Typer:
    """Return an app of one command."""
    made = typer.Typer(**SETTINGS)
    made.command(name, cls=Command, context_settings=dict(settings))(function)
    return made
