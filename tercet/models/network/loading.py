"""What transformers and peft raise at a folder that it cannot load, said in a line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from tercet.errors import ModelError

# A missing or damaged file, an unknown or contradictory config, and weights of other shapes: what
# transformers and peft raise at these is not of one class.
_UNLOADABLE: Final = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)


@contextmanager
def loading(problem: str, hint: str = "") -> Iterator[None]:
    """Load a config, a model, an adapter or a tokenizer of theirs inside of this.

    Raises:
        ModelError: when that fails: the problem, the first line of the reason, and the hint.
    """
    try:
        yield
    except _UNLOADABLE as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"{problem}: {line}{hint}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries that load models say nothing but errors: for what is missing on purpose."""
    loggers = [logging.getLogger(name) for name in ("transformers", "sentence_transformers")]
    levels = [logger.level for logger in loggers]
    shown = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()
