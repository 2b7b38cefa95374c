"""Indexes that a server offers, by name."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tercet.serve.served import ServedModel

ModelOf = Callable[[str, str], ServedModel]  # a model's source and the type of its weights


class Indexes:
    """The open indexes of a server."""

    def close(self) -> None:
        """Close all of them."""


def open_indexes(folders: Mapping[str, Path], model_of: ModelOf) -> Indexes:
    """Open index folders, each with its model."""
    return Indexes()
