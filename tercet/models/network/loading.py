"""Reading model files: errors of other libraries as one line, JSON, and weights that must fit."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from tercet.errors import ModelError
from tercet.files.artifacts import read_json

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

REMEDY: Final = "is the download complete?"
_SHOWN: Final = 3  # weights of each kind in a message
# What transformers and peft raise at a missing or damaged file, an unknown or contradictory config,
# or weights of other shapes has no common class.
_UNLOADABLE: Final = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,  # and RecursionError, of JSON
    SafetensorError,
    ArithmeticError,
)


@contextmanager
def loading(problem: str, hint: str = "") -> Iterator[None]:
    """Load a config, model, adapter or tokenizer of another library in this context.

    Raises:
        ModelError: if that fails: ``problem``, the first line of the reason, and ``hint``.
    """
    try:
        yield
    except _UNLOADABLE as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"{problem}: {line}{hint}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries that load models, except for errors: something is missing on purpose."""
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


def read_value(path: Path) -> Any:
    """Return the JSON value in a model's file.

    Raises:
        ModelError: if the file is missing or damaged.
    """
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is missing; {REMEDY}") from error
    except (OSError, ValueError) as error:  # neither UTF-8 nor JSON
        raise ModelError(f"{path}: is not JSON ({error}); {REMEDY}") from error


def read_object(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the JSON object in a model's file; empty if the file is ``optional`` and missing.

    Raises:
        ModelError: if the file is missing or damaged, or holds another value.
    """
    return {} if optional and not path.is_file() else as_object(path, read_value(path))


def as_object(path: Path, value: Any) -> dict[str, Any]:
    """Return ``value``, read from ``path``, if it is a JSON object.

    Raises:
        ModelError: if it is another value.
    """
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object; got {type(value).__name__}; {REMEDY}")
    return value


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of each weight."""
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def misfits(found: Shapes, expected: Shapes) -> str:
    """Return which weights are missing, unknown or of another size, in words; "" if all fit."""
    wrong = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another size": [
            f"{name} ({_size(shape)}, expected {_size(expected[name])})"
            for name, shape in found.items()
            if name in expected and shape != expected[name]
        ],
    }
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"
        for what, names in wrong.items()
        if names
    )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
