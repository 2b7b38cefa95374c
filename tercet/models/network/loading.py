"""Reading model files: errors of other libraries as one line, JSON, and weights that must fit."""

import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

from tercet.errors import ModelError
from tercet.files.artifacts import read_json
from tercet.files.console import shortened

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

PICKLED: Final = (
    "a file of weights holds other Python objects, which could run code, so it is not read; save "
    "the weights as safetensors with the program that wrote them"
)
_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
_HEADS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads")
_WIDTHS: Final = ("hidden_size", "d_model", "n_embd", "embedding_size", "head_dim")
_TABLES: Final = ("vocab_size", "intermediate_size", "d_ff", "ffn_dim")
_OPTIONAL: Final = ("type_vocab_size", "num_experts", "num_local_experts", "n_routed_experts")
_MOST: Final = {  # of each size in a config
    **dict.fromkeys(_LAYERS, 1_000),
    **dict.fromkeys(_HEADS, 10_000),
    **dict.fromkeys(_WIDTHS, 1_000_000),
    **dict.fromkeys(_OPTIONAL, 10_000),
    **dict.fromkeys(_TABLES, 100_000_000),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1_000_000_000),
}

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
    IndexError,
    ImportError,
    RuntimeError,  # and RecursionError, of JSON
    SafetensorError,
    ArithmeticError,
    MemoryError,
    EOFError,  # of torch, for an empty file
)


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


def check_sizes(folder: Path) -> None:
    """Check that sizes in a folder's config.json are possible, before anything is made of them.

    Raises:
        ModelError: if one is not a number, below one, or far beyond that of any model.
    """
    path = folder / "config.json"
    waiting: list[Any] = [read_object(path, optional=True)]
    while waiting:
        part = waiting.pop()
        for name, value in part.items():
            waiting += [each for each in (value, *_list(value)) if isinstance(each, dict)]
            most = _MOST.get(name)
            if most is None or value is None:
                continue
            least = int(name not in _OPTIONAL)
            if type(value) is not int or not least <= value <= most:
                raise ModelError(
                    f"{path}: {name} must be a whole number from {least} to {most:,}; got "
                    f"{shortened(repr(value))}; copy or download the file again"
                )


def check_weights(folder: Path, config: Any) -> None:
    """Check that a folder holds as many bytes of weights as the network of its config has numbers.

    Raises:
        ModelError: if it holds fewer: they would be made up, however many the config asks for.
    """
    files = [each for each in folder.glob("*") if each.suffix in (".safetensors", ".bin")]
    held = sum(each.stat().st_size for each in files)
    if not held:  # on the hub, or missing, which whoever loads them reports
        return
    try:
        with torch.device("meta"):
            network = AutoModel.from_config(config, trust_remote_code=False)
    except AssertionError as error:  # of torch, such as for a padding token beyond its table
        raise ModelError(f"{folder}: config.json describes no network ({error})") from error
    wanted = sum(weight.numel() for weight in network.parameters())
    numbers_a_byte = 8 if getattr(config, "quantization_config", None) else 1
    if wanted > numbers_a_byte * held:
        raise ModelError(
            f"{folder}: cannot be loaded: config.json describes a network of {wanted:,} numbers, "
            f"and the files of weights hold {held:,} bytes; copy or download both again"
        )


def check_network(folder: Path) -> None:
    """Check the sizes and the weights of a folder, if it is one; see the functions above."""
    if folder.is_dir():
        check_sizes(folder)
        check_weights(folder, AutoConfig.from_pretrained(folder, trust_remote_code=False))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


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
