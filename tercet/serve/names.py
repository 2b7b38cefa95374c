"""Names of the models and indexes that a command offers: NAME=SOURCE, or the name of the source."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tercet.errors import IndexFolderError, RecipeError

_PLAIN: Final = ("model", "index", "best")  # folders inside of a run, whose name says more


def named_models(given: Iterable[str]) -> dict[str, str]:
    """Return sources of models by name.

    Raises:
        RecipeError: if two have the same name.
    """
    return _named(given, "models")


def named_indexes(given: Iterable[str]) -> dict[str, Path]:
    """Return folders of indexes by name.

    Raises:
        RecipeError: if two have the same name.
        IndexFolderError: if a folder does not exist.
    """
    found = {name: Path(source) for name, source in _named(given, "indexes").items()}
    for folder in found.values():
        if not folder.is_dir():
            raise IndexFolderError(f"{folder}: is not an index folder; make one with: tercet index")
    return found


def name_of(source: str) -> str:
    """Return the name of a model or an index: of its folder, or of the run that it is in.

    Examples:
        >>> name_of("runs/mine/model"), name_of("minilm")
        ('mine', 'minilm')
    """
    if not Path(source).exists():
        return source  # of a package, or on the hub
    path = Path(source).resolve()
    return path.parent.name if path.name in _PLAIN else path.name


def _named(given: Iterable[str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        name, equals, source = each.partition("=")
        if not equals or not source or Path(each).exists() or "/" in name:
            name, source = name_of(each), each
        if name in found:
            raise RecipeError(
                f'two {what} are named "{name}": {found[name]} and {source}; give one another '
                f"name: {name}-2={source}"
            )
        found[name] = source
    return found
