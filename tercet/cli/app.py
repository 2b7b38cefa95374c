"""All commands under one name, imported when they are run, and what happens to their errors."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperGroup

from tercet.errors import TercetError
from tercet.files.console import QUIET, Notes, complain, make_encodable, results
from tercet.files.secrets import redacted
from tercet.files.signals import SIGNALS, listening

_NOTHING: Final = "nothing was left half done, and the same command starts again"
_UNITS: Final = "what is finished is kept, and the same command goes on with the rest"


class LazyCommand(NamedTuple):
    """A command by name: the module and function that hold it, and its line in the overview."""

    where: str
    summary: str
    settings: Mapping[str, Any] = {}  # of its click context
    kept: str = _NOTHING  # when a signal ends it


_REST: Final = {"ignore_unknown_options": True, "allow_interspersed_args": False}  # a file's

COMMANDS: Final[Mapping[str, LazyCommand]] = {
    "demo": LazyCommand("tercet.cli.data:demo", "Train on real texts and measure, in minutes."),
    "check": LazyCommand("tercet.cli.data:check", "Report what a data file or folder holds."),
    "train": LazyCommand(
        "tercet.cli.train:train",
        "Train an embedder by a recipe.",
        kept="the last checkpoint is kept, if there is one, and the same command goes on from it",
    ),
    "eval": LazyCommand("tercet.cli.evaluate:evaluate", "Measure a model on test sets."),
    "encode": LazyCommand(
        "tercet.cli.encode:encode",
        "Turn texts into vectors.",
        kept="files that are finished in a folder are kept, and the same command goes on",
    ),
    "index": LazyCommand("tercet.cli.search:index", "Make documents searchable.", kept=_UNITS),
    "search": LazyCommand("tercet.cli.search:search", "Search an index."),
    "mine": LazyCommand(
        "tercet.cli.mine:mine", "Add hard negatives to training pairs.", kept=_UNITS
    ),
    "filter": LazyCommand("tercet.cli.data:filter_pairs", "Drop bad training pairs.", kept=_UNITS),
    "synthesize": LazyCommand(
        "tercet.cli.synthesize:synthesize",
        "Let a language model write questions.",
        kept="answers so far are kept, and the same command asks for the rest",
    ),
    "convert": LazyCommand("tercet.cli.convert:convert", "Convert other data to training rows."),
    "decontaminate": LazyCommand(
        "tercet.cli.convert:decontaminate", "Drop training rows that are in a test set."
    ),
    "models": LazyCommand("tercet.cli.models:models", "List the models that come in packages."),
    "inspect": LazyCommand("tercet.cli.models:inspect", "Describe a model and how it was made."),
    "merge": LazyCommand("tercet.cli.models:merge", "Merge adapters into their base model."),
    "retokenize": LazyCommand("tercet.cli.models:retokenize", "Give a model another tokenizer."),
    "diagnose": LazyCommand("tercet.cli.evaluate:diagnose", "Show what a decoder's states know."),
    "probe": LazyCommand("tercet.cli.evaluate:probe", "Classify words by a model's states."),
    "tune-weights": LazyCommand(
        "tercet.cli.evaluate:tune_weights", "Choose the weights of dense, sparse and multi scores."
    ),
    "calibrate": LazyCommand("tercet.cli.models:calibrate", "Choose the ranges of int8 and int4."),
    "sizes": LazyCommand("tercet.cli.evaluate:sizes", "Measure what smaller vectors cost."),
    "study": LazyCommand(
        "tercet.cli.study:study", "Compare trainings that differ in one thing each.", _REST, _UNITS
    ),
}


class LazyGroup(TyperGroup):
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
            single = typer.Typer(**_STYLE, add_completion=False)
            single.command(cmd_name, context_settings=dict(entry.settings))(found)
            found = single
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the overview without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])


_STYLE: Final[Mapping[str, Any]] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}

app = typer.Typer(cls=LazyGroup, no_args_is_help=True, **_STYLE)


def _show_version(wanted: bool | None) -> None:
    if wanted:
        results().print(f"tercet {version('tercet')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool | None,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
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
    words = _set_loudness(sys.argv[1:] if argv is None else argv)
    with listening(in_command=True):
        try:
            app(words, prog_name="tercet")
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
