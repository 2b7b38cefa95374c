"""All verbs under one name, and what happens to their errors."""

import logging
import sys
import warnings
from typing import Final

import typer

from tercet.cli.convert import convert, decontaminate
from tercet.cli.data import check, demo
from tercet.cli.encode import encode
from tercet.cli.evaluate import diagnose, evaluate, probe, sizes, tune_weights
from tercet.cli.filter import filter_pairs
from tercet.cli.mine import mine
from tercet.cli.models import calibrate, inspect, merge, models, retokenize
from tercet.cli.search import index, search
from tercet.cli.study import study
from tercet.cli.synthesize import synthesize
from tercet.cli.train import recipes
from tercet.errors import TercetError
from tercet.files.console import Notes, say

INTERRUPTED: Final = 130  # what typer ends with at Ctrl-C

app = typer.Typer(
    help="Make a text embedder of your own: train, measure, search.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(recipes, name="train")
app.add_typer(convert, name="convert")
for verb in (demo, check, decontaminate, mine, synthesize, models, inspect, merge, retokenize):
    app.command()(verb)
for verb in (encode, index, search, diagnose, probe, calibrate, sizes):
    app.command()(verb)
app.command("eval")(evaluate)
app.command("filter")(filter_pairs)
app.command("tune-weights")(tune_weights)
_REST = {"allow_extra_args": True, "allow_interspersed_args": False}
app.command(context_settings=_REST)(study)


def main(argv: list[str] | None = None) -> None:
    """Run a verb, and exit: 0 when done, 2 when the user can fix what went wrong."""
    logging.getLogger("tercet").handlers = [Notes()]
    _quiet_libraries()
    try:
        app(argv, prog_name="tercet")
    except TercetError as error:
        say(f"tercet: {error}")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            say("tercet: stopped; a training goes on when the same command is given again")
        raise


def _quiet_libraries() -> None:
    """Our own progress is enough, and their warnings of what will change are not for users."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each retry
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
