"""All commands under one name, imported when they are run, and what happens to their errors."""

import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand

from tercet.cli.help import SETTINGS, Group, show_help, single
from tercet.errors import TercetError
from tercet.files.console import COMMAND, QUIET, Notes, complain, make_encodable, results
from tercet.files.secrets import redacted
from tercet.files.signals import SIGNALS, listening

_NOTHING: Final = "nothing was left half done, and the same command starts again"
_UNITS: Final = "what is finished is kept, and the same command goes on with the rest"


class LazyCommand(NamedTuple):
    """A command by name: its panel and line in the overview, and where its function is."""

    panel: str
    where: str
    summary: str
    kept: str = _NOTHING  # when a signal ends it
    settings: Mapping[str, Any] = {}  # of its click context


_REST: Final = {"ignore_unknown_options": True, "allow_interspersed_args": False}  # a file's
_START, _TRAIN, _DATA = "Start", "Train", "Data"
_MEASURE, _SEARCH, _MODELS = "Measure", "Search", "Models"

COMMANDS: Final[Mapping[str, LazyCommand]] = {
    "demo": LazyCommand(
        _START, "tercet.cli.data:demo", "Train on real texts and measure, in minutes."
    ),
    "check": LazyCommand(
        _START, "tercet.cli.data:check", "Report what a data file or folder holds."
    ),
    "train": LazyCommand(
        _TRAIN,
        "tercet.cli.train:train",
        "Train an embedder by a recipe.",
        kept="the last checkpoint is kept, if there is one, and the same command goes on from it",
    ),
    "study": LazyCommand(
        _TRAIN,
        "tercet.cli.study:study",
        "Compare trainings that differ in one thing each.",
        _UNITS,
        _REST,
    ),
    "mine": LazyCommand(
        _DATA, "tercet.cli.mine:mine", "Add hard negatives to training pairs.", _UNITS
    ),
    "score": LazyCommand(
        _DATA, "tercet.cli.mine:score", "Add a teacher's scores to training rows.", _UNITS
    ),
    "filter": LazyCommand(
        _DATA, "tercet.cli.data:filter_pairs", "Drop bad training pairs.", _UNITS
    ),
    "synthesize": LazyCommand(
        _DATA,
        "tercet.cli.synthesize:synthesize",
        "Let a language model write questions.",
        kept="answers so far are kept, and the same command asks for the rest",
    ),
    "convert": LazyCommand(
        _DATA, "tercet.cli.convert:convert", "Convert other data to training rows."
    ),
    "decontaminate": LazyCommand(
        _DATA, "tercet.cli.convert:decontaminate", "Drop training rows that are in a test set."
    ),
    "eval": LazyCommand(
        _MEASURE,
        "tercet.cli.evaluate:evaluate",
        "Measure a model on test sets.",
        kept="sets that were measured are kept in --out, and the same command goes on",
    ),
    "diagnose": LazyCommand(
        _MEASURE, "tercet.cli.insight:diagnose", "Show what a decoder's states know."
    ),
    "probe": LazyCommand(
        _MEASURE, "tercet.cli.insight:probe", "Classify words by a model's states."
    ),
    "index": LazyCommand(_SEARCH, "tercet.cli.search:index", "Make documents searchable.", _UNITS),
    "search": LazyCommand(_SEARCH, "tercet.cli.search:search", "Search an index."),
    "serve": LazyCommand(
        _SEARCH,
        "tercet.cli.search:serve",
        "Serve vectors and search over HTTP.",
        kept="documents whose upsert was answered are on the disk",
    ),
    "encode": LazyCommand(
        _SEARCH,
        "tercet.cli.encode:encode",
        "Turn texts into vectors.",
        kept="files that are finished in a folder are kept, and the same command goes on",
    ),
    "list-models": LazyCommand(
        _MODELS, "tercet.cli.models:list_models", "List the models that come in packages."
    ),
    "inspect": LazyCommand(
        _MODELS, "tercet.cli.models:inspect", "Describe a model and how it was made."
    ),
    "tune": LazyCommand(
        _MODELS,
        "tercet.cli.models:tune",
        "Choose weights of kinds, or ranges of 8, 4 and 1 bits.",
    ),
    "merge": LazyCommand(
        _MODELS, "tercet.cli.models:merge", "Merge adapters into their base model."
    ),
    "retokenize": LazyCommand(
        _MODELS, "tercet.cli.models:retokenize", "Give a model another tokenizer."
    ),
    "quantize": LazyCommand(
        _MODELS, "tercet.cli.models:quantize", "Give a model 8-bit weights, to encode on a CPU."
    ),
}


class LazyGroup(Group):
    """A group that imports a command when it is run: help and typing errors need no torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, in the order of the overview."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import one command; None if there is none of this name."""
        self.commands = dict.fromkeys(COMMANDS)  # pyright: ignore  # names for "did you mean"
        if cmd_name not in COMMANDS:
            return None
        entry = COMMANDS[cmd_name]
        module, _, attribute = entry.where.partition(":")
        found = getattr(import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            found = single(cmd_name, found, entry.settings)
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the overview without importing any command."""
        show_help(self._summaries(), ctx)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Return the commands that a word may become, without importing any."""
        ctx.command = self._summaries()
        return ctx.command.shell_complete(ctx, incomplete)

    def _summaries(self) -> Group:
        """Return a group of the same commands that can only be listed."""
        listed: dict[str, Any] = {
            name: TyperCommand(name, help=command.summary, rich_help_panel=command.panel)
            for name, command in COMMANDS.items()
        }
        return Group(name=self.name, commands=listed, help=self.help, params=self.params)


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, **{**SETTINGS, "add_completion": True})


def _show_version(wanted: bool | None) -> None:
    if wanted:
        results().print(f"tercet {version('tercet')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show results and errors only: no progress, no notes.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what is done, and warnings of libraries.")
    ] = False,
) -> None:
    """Make a text embedder of your own: train, measure, search.

    Example: tercet demo
    """


def main(argv: list[str] | None = None) -> None:
    """Run a command, and exit: 0 when done, 2 when the user can fix what went wrong.

    After Ctrl-C the status is 130, and after SIGTERM 143; one line says what is kept.
    """
    make_encodable()
    _let_threads_sleep()
    words = _set_loudness(sys.argv[1:] if argv is None else argv)
    COMMAND.set(shlex.join(["tercet", *words]))
    with listening(in_command=True):
        try:
            sys.exit(app(words, prog_name="tercet", standalone_mode=False) or 0)
        except _UsageError as error:
            _show_usage_error(error, words)
            sys.exit(getattr(error, "exit_code", 2))
        except TercetError as error:
            complain(f"tercet: {error}")
            sys.exit(2)
        except SystemExit as end:
            if end.code in _BY_SIGNAL and not getattr(end, "line", ""):
                command = COMMANDS.get(next((word for word in words if word[:1] != "-"), ""))
                complain(f"tercet: stopped; {_NOTHING if command is None else command.kept}")
            if end.code in _BY_SIGNAL and argv is None:
                # Python would wait for calls of an endpoint, and Daft's threads would abort it.
                sys.stdout.flush()
                os._exit(end.code)
            raise
        except Exception as error:
            strange = next((word for word in words if not _is_text(word)), None)
            if isinstance(error, UnicodeEncodeError) and strange is not None:
                encoding = sys.getfilesystemencoding()
                complain(
                    f"tercet: the argument {strange!r} is not in {encoding}; rename the file, or "
                    "set PYTHONUTF8=1 if it is UTF-8"
                )
                sys.exit(2)
            sys.excepthook = _show_without_keys
            raise


# ---- slips in the words of a command -------------------------------------------------------------

_UsageError: Final[Any] = typer.BadParameter.__bases__[0]  # of click, or of typer's copy of it


def _show_usage_error(error: Any, words: Sequence[str]) -> None:
    """Print how the command is called, and in the last line what is wrong with the words."""
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help, printed already
        if error.message.strip():
            complain(error.message)
        return
    named = next((word for word in words if word in COMMANDS), "")
    command = f"tercet {named}".strip() if error.ctx is None else error.ctx.command_path
    if error.ctx is not None:
        complain(error.ctx.get_usage())
    hints = [_nearest_option(error), _nearest_choice(error), _model_first(error, command, words)]
    said = str(getattr(error, "message", "")) if hints[0] else error.format_message()
    said = said.replace("Value error, ", "")
    said = said if said.endswith(("?", ".")) else f"{said}."
    hint = next((f" {hint}" for hint in hints if hint), "")
    complain(f"tercet: {said}{hint} (see: {command} --help)")


def _nearest_option(error: Any) -> str:
    """Suggest the option that is nearest to one that does not exist."""
    name = str(getattr(error, "option_name", ""))
    if type(error).__name__ != "NoSuchOption" or error.ctx is None:
        return ""
    known = [each for one in error.ctx.command.get_params(error.ctx) for each in one.opts]
    near = get_close_matches(name, [each for each in known if each[:2] == "--"], 1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else ""


def _nearest_choice(error: Any) -> str:
    """Suggest the choice that is nearest to an invalid value."""
    wrong = re.search(r"'(.*?)' is not one of (.*)", str(getattr(error, "message", "")))
    near = get_close_matches(wrong[1], re.findall(r"'(.*?)'", wrong[2]), 1) if wrong else []
    return f"Did you mean {near[0]}?" if near else ""


def _model_first(error: Any, command: str, words: Sequence[str]) -> str:
    """Suggest --model, where the name of a model stands among the words without it."""
    if error.ctx is None or "--model" in words:
        return ""
    if not any("--model" in each.opts for each in error.ctx.command.get_params(error.ctx)):
        return ""
    from tercet.models.zoo import zoo

    rest = [word for word in words if word not in command.split()]
    for word in rest:
        if zoo.find(word) or (Path(word) / "config.json").is_file():
            others = [each for each in rest if each is not word]
            return f"Did you mean: {command} {shlex.join([*others, '--model', word])}?"
    return ""


_LOUDNESS: Final = ("--quiet", "--verbose")


def _set_loudness(words: Sequence[str]) -> list[str]:
    """Do what --quiet and --verbose say, which may stand anywhere, and return the other words."""
    end = words.index("--") if "--" in words else len(words)
    given = set(words[:end]) & {*_LOUDNESS}
    os.environ.pop(QUIET, None)
    if "--quiet" in given:
        os.environ[QUIET] = "1"
    logger = logging.getLogger("tercet")
    logger.handlers = [Notes()]
    logger.setLevel(logging.INFO if "--verbose" in given else logging.NOTSET)
    if "--verbose" not in given:
        _quiet_libraries()
    return [*(word for word in words[:end] if word not in given), *words[end:]]


def _let_threads_sleep() -> None:
    """Let torch's threads wait for each other asleep, not spinning, unless the user has chosen.

    While another process uses a core, two threads that spin at the end of each operation take three
    times the time of one. GNU's OpenMP, which reads this as torch is imported, spins as briefly by
    itself where it has more threads than cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _is_text(word: str) -> bool:
    """Whether an argument is text: most libraries take no other path."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def _show_without_keys(*error: Any) -> None:
    """Print the traceback of a bug."""
    sys.stderr.write(redacted("".join(traceback.format_exception(*error))))


_BY_SIGNAL: Final = tuple(128 + number for number in SIGNALS)


def _quiet_libraries() -> None:
    """Turn off warnings and bars of other libraries, also of those that are imported later."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # it has read these variables already
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
