"""Index folders: which engine one belongs to, and what its vectors were made with.

``index.json`` is all that is read here; the engine keeps its own files in a folder beside it, or
its records on a server.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from tercet.errors import IndexFolderError, RecipeError, TercetError
from tercet.files import recover_folder, replacing_file, replacing_folder, sole_writer
from tercet.search.engine import Engine
from tercet.search.exact_engine import ExactEngine

EngineName: TypeAlias = Literal["exact", "qdrant", "cluster"]

FILE: Final = "index.json"
VERSION: Final = 2
API_KEY: Final = "QDRANT_API_KEY"  # of a server; in the environment, never in the folder


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What an index is."""

    settings: Mapping[str, Any]  # what the vectors were made with: model, fingerprint, kinds
    engine: EngineName = "exact"
    url: str | None = None  # of the server where the records are, and their collection there
    collection: str | None = None
    complete: bool = field(default=True, compare=False)  # false: the documents are not all there
    version: int = VERSION

    def setting(self, folder: Path | str, name: str) -> Any:
        """What the index in this folder was made with.

        Raises:
            IndexFolderError: when the index does not say.
        """
        if name not in self.settings:
            raise IndexFolderError(
                f"{folder}: does not say with which {name} it was made; "
                "build it again with: tercet index --fresh"
            )
        return self.settings[name]


def about_index(folder: Path | str) -> About:
    """What an index folder is.

    Raises:
        IndexFolderError: when it is none, of another version, or damaged.
    """
    folder = Path(folder)
    recover_folder(folder)
    try:
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "is not an index" if folder.exists() else "no such folder"
        raise IndexFolderError(f"{folder}: {what}; build one with: tercet index") from error
    except (OSError, ValueError) as error:
        raise _unusable(folder, f"{FILE} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise _unusable(folder, f"{FILE} is not of version {VERSION}")
    if (
        set(about) != set(asdict(About(settings={})))
        or not isinstance(about["settings"], dict)
        or about["engine"] not in get_args(EngineName)
    ):
        raise _unusable(folder, f"{FILE} does not say what it should")
    return About(**about)


def write_about(folder: Path | str, about: About) -> None:
    """Write what an index folder is, whole or not at all."""
    with replacing_file(Path(folder) / FILE) as fresh:
        fresh.write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")


def require(folder: Path | str, about: About, expected: Mapping[str, Any]) -> None:
    """Check that an index was made with these settings, such as the model's fingerprint.

    Raises:
        IndexFolderError: naming the first setting that differs.
    """
    for name, value in expected.items():
        if about.settings.get(name) != value:
            raise IndexFolderError(
                f"{folder}: was built with {name} {about.settings.get(name)!r}, not {value!r}; use "
                "it with what it was built with, or build it again with: tercet index --fresh"
            )


def make_engine(folder: Path | str, about: About, *, fresh: bool = False) -> Engine:
    """Open an index to write documents to, a new one or one that was made with the same settings.

    ``fresh`` empties one that is there, whatever it was made with.

    Raises:
        IndexFolderError: when the folder holds other things, was made with other settings, or the
            collection on the server has records that nothing is known of.
        RecipeError: when another process is at it.
    """
    folder = Path(folder)
    known = (folder / FILE).is_file()
    if known and not fresh:
        found = about_index(folder)
        places = [(it.engine, it.url, it.collection) for it in (found, about)]
        if places[0] != places[1]:
            raise IndexFolderError(
                f"{folder}: is an index of the engine {found.engine!r}"
                f"{f' at {found.url}, {found.collection}' if found.url else ''}; choose another "
                "folder, or build it again with: tercet index --fresh"
            )
        require(folder, found, about.settings)
        engine = open_engine(folder)  # which refuses where another process is at it
        write_about(folder, replace(found, complete=False))
        return engine
    if not known and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise IndexFolderError(
            f"{folder}: is not an index and would be overwritten; choose another folder"
        )
    for name in ("exact", "qdrant"):
        if known and (folder / name).is_dir():
            with sole_writer(folder / name):
                pass  # nobody else is at it
    with replacing_folder(folder) as empty:
        write_about(empty, replace(about, complete=False))
    try:
        engine = open_engine(folder)
    except TercetError:
        if not known:  # nothing of this call stays, such as a server's mistyped address
            shutil.rmtree(folder)
        raise
    if records := engine.stats().records:
        if not fresh:
            engine.close()
            raise IndexFolderError(
                f"{about.url}: the collection {about.collection} holds {records:,} records, and "
                "nothing says what made them; choose another name, or replace them with: "
                "tercet index --fresh"
            )
        engine.delete([record.id for record in engine.scan()])
    return engine


def open_engine(folder: Path | str, *, read_only: bool = False) -> Engine:
    """The engine of an index folder; ``read_only`` lets several processes search an exact one.

    Raises:
        IndexFolderError: when the folder is no index, or damaged.
        RecipeError: when another process has it open.
        MissingExtraError: when the engine's package is not installed.
    """
    folder = Path(folder)
    about = about_index(folder)
    if about.engine == "qdrant":
        from tercet.search.qdrant_edge import EdgeEngine

        return EdgeEngine(folder / "qdrant")
    if about.engine == "cluster":
        from tercet.search.qdrant_cluster import ClusterEngine

        if about.url is None or about.collection is None:
            raise RecipeError("an index on a server needs its URL and the name of its collection")
        key = os.environ.get(API_KEY)
        return ClusterEngine(about.url, about.collection, api_key=key)
    return ExactEngine(folder / "exact", read_only=read_only)


def _unusable(folder: Path, problem: str) -> IndexFolderError:
    return IndexFolderError(
        f"{folder}: the index cannot be used ({problem}); build it again with: tercet index --fresh"
    )
