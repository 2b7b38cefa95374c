"""What transformers and peft raise at a folder that it cannot load, said in a line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from safetensors import SafetensorError

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
