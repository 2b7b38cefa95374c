"""Reading model files: errors of other libraries as one line, JSON, and weights that must fit."""

import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from tercet.errors import ModelError
from tercet.files.artifacts import read_json
from tercet.files.console import shortened

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

PICKLED: Final = (
    "a file of weights holds other Python objects, which could run code, so it is not read; save "
    "the weights as safetensors with the program that wrote them"
)
_OURS: Final = "tercet.json"  # beside a network that transformers' own code read when it was saved
REMEDY: Final = "is the download complete?"
_SHOWN: Final = 3  # weights of each kind in a message
# What transformers and peft raise at a missing or damaged file, an unknown or contradictory config,
# or weights of other shapes has no common class.
_UNLOADABLE: Final = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)


@contextmanager
def loading(problem: str, hint: str = "") -> Iterator[None]:
    """Load a config, model, adapter or tokenizer of another library in this context.

    Raises:
        ModelError: if that fails: ``problem``, the first line of the reason, and ``hint``.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ModelError(f"{problem}: {PICKLED}") from error
    except _UNLOADABLE as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"{problem}: {line}{hint}") from error


def refuse_code(place: str | Path, *names: str) -> None:
    """Raise if these files of a model's folder name Python code; no such code is ever run.

    ``trust_remote_code=False`` alone is not enough: where transformers has an architecture of the
    same name, it is taken instead, whose network may be another one (a decoder that is causal).

    Raises:
        ModelError: if one does: an ``auto_map``, or an attention that is loaded from the hub.
    """
    folder = Path(place)
    for name in names if not (folder / _OURS).is_file() else ():
        refuse_code_in(f"{folder}: its {name}", read_object(folder / name, optional=True))


def refuse_code_in(what: str, config: Mapping[str, Any]) -> None:
    """Raise if a config, ``what`` of a message, names code; see :func:`refuse_code`."""
    code = _code_named_in(config)
    if code is not None:
        raise ModelError(
            f"{what} names code of its own ({code}), which tercet never runs; use a model whose "
            "architecture transformers itself has"
        )


def _code_named_in(config: Mapping[str, Any]) -> str | None:
    """Return the first mention of code in a config and what is nested in it; None if there is none.

    Older releases of transformers ask whether to run it, also that of a part.
    """
    waiting: list[Any] = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            if part.get("auto_map"):
                return f'"auto_map": {shortened(str(part["auto_map"]))}'
            for name in ("attn_implementation", "_attn_implementation"):
                if "/" in str(part.get(name)):
                    return f'"{name}": {shortened(str(part[name]))}'
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    return None


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
    except ValueError as error:  # neither UTF-8 nor JSON
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
