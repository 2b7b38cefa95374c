"""Build the documentation site, and fail on a warning, a dead link or a resource from outside.

``make docs`` runs this file. Two pages are generated from the code at each build: the commands and
the settings of the recipes. They are not committed, so they can never be out of date.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tercet.cli.app import app
from tercet.cli.train import shown
from tercet.recipes.catalog import RECIPES
from tercet.recipes.settings import Setting, settings_of

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs/reference"
SITE = ROOT / "site"
# What a browser would fetch while it shows a page; links that a reader follows are not among them.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=[\"']?(?:https?:)?//[^\s\"'>]+"
    r"|<link\b(?![^>]*rel=[\"']?(?:canonical|alternate))[^>]*?\bhref=[\"']?(?:https?:)?//[^\s\"'>]+"
    r"|@import\s+(?:url\()?[\"']?(?:https?:)?//[^\s\"')]+"
    r"|url\([\"']?(?:https?:)?//[^\s\"')]+"
)


def plain(text: object) -> str:
    """Return a text in one line of Markdown, without markup of its own."""
    return re.sub(r"([*_<\[\]])", r"\\\1", " ".join(str(text).split()))


def default_of(option: Any) -> str:
    """Return the default as users would write it, or nothing."""
    value = option.default
    if option.required:
        return "Required."
    if value is None or value == [] or value == () or callable(value) or "UNSET" in repr(value):
        return ""
    if isinstance(value, bool):
        return "Default: on." if value else ""
    return f"Default: `{getattr(value, 'value', value)}`."


def value_of(option: Any, ctx: Any) -> str:
    """Return what an option takes: a kind of value or its choices, and whether it repeats."""
    if option.is_flag:
        return ""
    taken = str(option.metavar or option.display_type(ctx)).strip("<>").removesuffix(" range")
    taken = re.sub(r"^list\[(.*)\]$", r"\1", taken).replace("|", " or ")
    return f"{taken}, repeatable" if option.multiple else taken


def option_lines(options: list[Any], ctx: Any) -> Iterator[str]:
    """Yield a list of options: names, what they take, meaning, default."""
    for option in options:
        names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
        value = value_of(option, ctx)
        taken = f" *{plain(value)}*" if value else ""
        meaning = plain(option.help or "")
        default = default_of(option)
        known = "default" in meaning.lower() or not default
        yield f"- {names}{taken}: {meaning}" + ("" if known else f" {default}")
    yield ""


def command_section(command: Any, ctx: Any, level: int) -> Iterator[str]:
    """Yield what one command does, its arguments and its options by group."""
    path = ctx.command_path
    yield f"{'#' * level} {path}"
    yield ""
    yield from paragraphs(command.help or "")
    shown = [param for param in command.params if not getattr(param, "hidden", False)]
    arguments = [param for param in shown if param.param_type_name == "argument"]
    options = [
        param for param in shown if param.param_type_name == "option" and "--help" not in param.opts
    ]
    for argument in arguments:
        meaning = plain(getattr(argument, "help", None) or "")
        yield f"- `{argument.metavar or argument.name}`: {meaning}"
    yield ""
    groups: dict[str, list[Any]] = {}
    for option in options:
        groups.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    for name, members in groups.items():
        yield from (f"**{name}**", "")
        yield from option_lines(members, ctx)


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a help text; an example becomes a block of code."""
    for paragraph in re.split(r"\n\s*\n", text.replace("\b", "").strip()):
        line = " ".join(paragraph.split())
        if found := re.fullmatch(r"Examples?: (tercet .*)", line):
            yield from ("```sh", *re.split(r" (?=tercet )", found[1]), "```", "")
        elif line:
            yield from (plain(line), "")


def commands_page() -> str:
    """Return the page of all commands, read from the commands themselves."""
    root: Any = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        "Generated from `tercet COMMAND --help`. Options of all commands:",
        "",
    ]
    main = typer.Context(root, info_name="tercet")
    lines += [*option_lines([p for p in root.params if p.param_type_name == "option"], main)]

    def walk(group: Any, ctx: Any, level: int) -> None:
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            inner = typer.Context(command, info_name=name, parent=ctx)
            lines.extend(command_section(command, inner, level))
            if hasattr(command, "list_commands"):
                walk(command, inner, level + 1)

    walk(root, main, 2)
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Return the page of all settings of the recipes, as ``--explain`` has them."""
    lines = [
        "# Settings of the recipes",
        "",
        "Generated from `tercet train RECIPE --explain`. A setting is given by `--set NAME=VALUE`,",
        "in a TOML file (`--recipe run.toml`), or as a parameter in Python, with `_` for the dot.",
        "",
    ]
    machine: dict[str, str] = {}  # the same for each recipe
    for name, entry in RECIPES.items():
        parts: dict[str, list[str]] = {}
        for setting in settings_of(entry).values():
            if setting.part == "run":
                machine[setting.name] = setting_line(setting)
            else:
                title = f"Stage {setting.part}" if setting.part else "The whole run"
                parts.setdefault(title, []).append(setting_line(setting))
        lines += [f"## {name}", "", f"{plain(entry.summary).capitalize()}.", ""]
        for title, settings in parts.items():
            lines += [f"**{title}**", "", *settings, ""]
    lines += ["## Every recipe: how it runs", "", *machine.values(), ""]
    return "\n".join(lines)


def setting_line(setting: Setting) -> str:
    """Return a list entry: name, unit, meaning, default."""
    unit = f" ({setting.unit})" if setting.unit else ""
    default = shown(setting.default)
    known = "" if default == "-" else f" Default: `{default}`."
    return f"- `{setting.name}`{unit}: {plain(setting.full_meaning)}{known}"


def fetched_from_outside(site: Path) -> list[str]:
    """Return what the built pages and styles would fetch from another host."""
    return [
        f"{path.relative_to(site)}: {found}"
        for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")])
        for found in FETCHED.findall(path.read_text(errors="replace"))
    ]


def main() -> int:
    """Write the generated pages, build, and check the result."""
    (REFERENCE / "commands.md").write_text(commands_page())
    (REFERENCE / "settings.md").write_text(settings_page())
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    if code := subprocess.run(build, cwd=ROOT).returncode:
        return code
    for line in (outside := fetched_from_outside(SITE)):
        sys.stderr.write(f"fetched from outside: {line}\n")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
