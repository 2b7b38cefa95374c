"""The errors a user of this package can cause, and no others.

Anything else that escapes (an AssertionError, a torch RuntimeError) is a bug in the package.
"""

from pathlib import Path
from typing import Final

BROKEN_MODEL: Final = "the model is broken, or it was run in a precision too low for it"
"""The end of a message about NaN or infinity in vectors or scores."""


class TercetError(Exception):
    """Base of every error below; the command line prints its message and exits with status 2."""


class DataError(TercetError):
    """A data file has invalid content; the message starts with ``file:line:``."""

    def __init__(self, path: Path | str, line: int | None, problem: str) -> None:
        where = str(path) if line is None else f"{path}:{line}"
        super().__init__(f"{where}: {problem}")


class TextError(TercetError, TypeError, ValueError):
    """A text to encode is not a string of valid Unicode; the message names its row."""


class RecipeError(TercetError):
    """A recipe or a run asks for something impossible, such as a batch larger than its data."""


class ModelError(TercetError):
    """A model folder is incomplete, of another version, or a model that cannot be packed."""


class IndexFolderError(TercetError):
    """An index folder is incomplete, or belongs to another model."""


class MissingExtraError(TercetError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs an extra package; install it: pip install 'tercet[{extra}]'"
        )


class StorageError(TercetError):
    """A file or folder could not be written; the old one is still there."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path}: could not be written: {problem}; nothing was changed there. "
            "Make room or choose another place, and run the same command again"
        )


class TrainingError(TercetError):
    """Training cannot continue, such as after a NaN loss; the checkpoint is kept."""


class ServerError(TercetError):
    """A server refused a request, or cannot be reached.

    Attributes:
        status: of HTTP; None if no answer came.
        code: the server's name of the error.
        field: of the request that is wrong.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        field: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message if status is None else f"{message} (status {status})")
        self.status, self.code = status, code
        self.field, self.retry_after = field, retry_after
