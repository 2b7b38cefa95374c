"""Every command's help, and that flags have the same meaning in all of them."""

import shlex
from collections import defaultdict
from typing import Any

import pytest
import typer

from tercet.cli.app import COMMANDS, app
from tercet.cli.help import examples_of

MOST_LINES = 100
ANY_TYPE = ("dims", "text_field")  # one, or several where several make sense
TWO = ("min_characters", "max_characters")  # of passages; or of queries and documents


def commands() -> dict[str, Any]:
    """Every command and group by its words."""
    root: Any = typer.main.get_command(app)
    found: dict[str, Any] = {}

    def walk(command: Any, words: str) -> None:
        found[words] = command
        context = typer.Context(command)
        for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
            walk(command.get_command(context, name), f"{words} {name}".strip())

    walk(root, "")
    return found


ALL = commands()
LEAVES = {words: each for words, each in ALL.items() if not hasattr(each, "list_commands")}


def options_of(command: Any) -> list[Any]:
    return [each for each in command.params if each.opts[0].startswith("-")]


@pytest.mark.parametrize("words", ALL)
def test_help_fits_on_a_page_and_ends_with_examples_to_paste(tercet, words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    ended = tercet(*words.split(), "--help")
    assert (ended.status, ended.err) == (0, "")
    assert f"Usage: tercet {words}".rstrip() in ended.out
    assert len(ended.out.splitlines()) <= MOST_LINES
    examples = examples_of(ALL[words].help)
    assert examples and examples[0].startswith(f"tercet {words}".rstrip())
    assert all(f"   {line}\n" in ended.out for line in examples)


@pytest.mark.parametrize("words", LEAVES)
def test_the_examples_of_a_help_are_understood(words):
    for line in "\n".join(examples_of(ALL[words].help)).replace("\\\n", "").splitlines():
        name, *rest = shlex.split(line)
        assert name == "tercet"
        assert rest[: len(words.split())] == words.split()
        if words != "study":  # it would read the file
            ALL[words].make_context(words, rest[len(words.split()) :])


@pytest.mark.parametrize("words", LEAVES)
def test_each_option_has_a_panel_and_a_whole_sentence_of_help(words):
    for each in options_of(LEAVES[words]):
        if each.name != "help":
            assert each.rich_help_panel, each.opts
            assert each.help and each.help[0].isalnum() and each.help[-1] == ".", each.opts
            assert "None:" not in each.help and "comma" not in each.help, each.opts


def test_an_option_has_the_same_type_in_every_command():
    types: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for words, command in LEAVES.items():
        for each in options_of(command):
            kind = (each.metavar or each.display_type_rich(ctx=typer.Context(command))).strip("<>")
            kind = kind.replace(" range", "").removeprefix("[STAGE=]")
            if each.name in ANY_TYPE:
                kind = kind.removeprefix("list[").removesuffix("]")
            if each.name not in TWO:
                types[each.opts[0]][kind].append(words)
    assert {name: dict(found) for name, found in types.items() if len(found) > 1} == {}


def test_the_overview_names_every_command_in_its_panel(tercet):
    lines = tercet("--help").out.splitlines()
    panels = {
        line.strip("╭╮─ "): number for number, line in enumerate(lines) if line.startswith("╭")
    }
    assert list(panels)[1:] == ["Start", "Train", "Data", "Measure", "Search", "Models"]
    for name, command in COMMANDS.items():
        (place,) = [n for n, line in enumerate(lines) if line.startswith(f"│ {name} ")]
        above = max((at, panel) for panel, at in panels.items() if at < place)[1]
        assert above == command.panel and command.summary in lines[place]
