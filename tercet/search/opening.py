"""Index folders: ``index.json`` records the engine and what the vectors were made with.

The engine keeps its files in a folder beside it, or its records on a server.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args
from uuid import uuid4

from tercet.errors import IndexFolderError, RecipeError, TercetError
from tercet.files.artifacts import read_json, write_json
from tercet.files.atomic import recover_folder, replacing_folder, sole_writer
from tercet.files.limits import unreadable_inside
from tercet.files.outputs import FolderKind, check_output, holds_only, json_object, mark
from tercet.kinds import KINDS
from tercet.models.devices import NUMBER_TYPES, NumberType
from tercet.rank.quantized import STORED, Stored
from tercet.search.engine.engine import Engine
from tercet.search.exact.exact_engine import ExactEngine
from tercet.search.qdrant.points import check_stored
from tercet.search.qdrant.qdrant_engine import QdrantEngine

EngineName: TypeAlias = Literal["exact", "qdrant", "cluster"]

log = logging.getLogger("tercet")

FILE: Final = "index.json"
VERSION: Final = 2
API_KEY: Final = "QDRANT_API_KEY"  # of a server; in the environment, never in the folder


_SOUND: Final[Mapping[str, Callable[[Any], bool]]] = {  # what a setting may be
    "model": lambda value: isinstance(value, str),
    "kinds": lambda value: bool(value) and type(value) is list and all(k in KINDS for k in value),
    "task": lambda value: value is None or isinstance(value, str),
    "dims": lambda value: value is None or type(value) is int,
    "precision": lambda value: value in ("float32", "bfloat16", *STORED),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Description of an index, as in ``index.json``."""

    settings: Mapping[str, Any]  # what the vectors were made with: model, fingerprint, kinds
    engine: EngineName = "exact"
    url: str | None = None  # of the server where the records are, and their collection there
    collection: str | None = None
    mark: str | None = field(default=None, compare=False)  # on the collection, of this index
    complete: bool = field(default=True, compare=False)  # whether all documents are in it
    version: int = VERSION

    def setting(self, folder: Path | str, name: str) -> Any:
        """Return one setting that the index in this folder was made with.

        Raises:
            IndexFolderError: when the setting is missing or invalid.
        """
        if name not in self.settings:
            raise IndexFolderError(
                f"{folder}: does not say with which {name} it was made; "
                "build it again with: tercet index --fresh"
            )
        value = self.settings[name]
        if name in _SOUND and not _SOUND[name](value):
            raise _unusable(Path(folder), f"{FILE} says that its {name} is {value!r}")
        return value


def about_index(folder: Path | str) -> About:
    """Return the description of an index folder.

    Raises:
        IndexFolderError: when it is not an index, of another version, or damaged.
    """
    folder = Path(folder)
    recover_folder(folder)
    try:
        about = read_json(folder / FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "is not an index" if folder.exists() else "no such folder"
        raise IndexFolderError(f"{folder}: {what}; build one with: tercet index") from error
    except (OSError, ValueError) as error:
        raise _unusable(folder, f"{FILE} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise _unusable(folder, f"{FILE} is not of version {VERSION}")
    if not _is_sound(about):
        raise _unusable(folder, f"{FILE} has invalid content")
    return About(**about)


def _is_sound(about: Mapping[str, Any]) -> bool:
    places = [about.get(name) for name in ("url", "collection", "mark")]
    on_server = about.get("engine") == "cluster"
    return (
        set(about) | {"mark"} == set(asdict(About(settings={})))  # older ones have no mark
        and isinstance(about["settings"], dict)
        and isinstance(about["complete"], bool)
        and about["engine"] in get_args(EngineName)
        and all(isinstance(place, str) if on_server else place is None for place in places)
    )


def write_about(folder: Path | str, about: About) -> None:
    """Write the description of an index folder, whole or not at all."""
    write_json(Path(folder) / FILE, asdict(about))


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


def _is_older(folder: Path) -> bool:
    """Whether a folder without a marker holds an index and nothing else; it may be damaged."""
    manifest = json_object(folder / "exact/manifest.json").keys()
    of_ours = {"version", "settings"} <= json_object(folder / FILE).keys()
    of_engine = {"version", "segments"} <= manifest or (folder / "qdrant/points").is_dir()
    return (of_ours or of_engine) and holds_only(folder, INDEX.own)


INDEX: Final = FolderKind(
    "an index",
    own=(FILE, "exact/manifest.json", "exact/segment-*", "exact/deleted-*", "qdrant/*"),
    is_older=_is_older,
    error=IndexFolderError,
)


def check_index_place(folder: Path, inputs: Iterable[Path | str], *, fresh: bool) -> None:
    """Raise, before any work, unless an index may be written, or one that is there continued.

    Raises:
        IndexFolderError: when the folder holds other files, or an index that cannot be used.
        RecipeError: when it is an input, or would replace one.
    """
    continued = (folder / FILE).is_file() and not fresh
    check_output(folder, inputs, INDEX, adds=continued)
    if continued:
        about_index(folder)


@contextmanager
def building(
    folder: Path | str, about: About, *, fresh: bool, say: Callable[[str], None]
) -> Iterator[Engine]:
    """Open an index to write documents to, and mark it as complete at the end.

    A ``fresh`` one is built beside a complete one and takes its place at the end; after a kill the
    same call goes on. On a server it replaces the old one at once. Errors are those of
    :func:`make_engine`.
    """
    folder = Path(folder)
    beside = fresh and about.engine != "cluster" and _is_worth_keeping(folder)
    place = folder.resolve().with_name(f".{folder.resolve().name}.fresh") if beside else folder
    if beside:
        _require_unused(folder)
        say(f"{folder} stays until the new index is whole; it is built in {place}")
    engine: Engine | None = None
    if beside and _is_begun(place, about):
        with suppress(IndexFolderError):  # if it is damaged, it is begun again
            engine = make_engine(place, about)
    with closing(engine or make_engine(place, about, fresh=fresh)) as engine:
        yield engine
    write_about(place, replace(about_index(place), complete=True))
    if beside:
        _require_unused(folder)
        with replacing_folder(folder) as empty:
            for entry in list(place.iterdir()):
                entry.rename(empty / entry.name)
        place.rmdir()


def _is_worth_keeping(folder: Path) -> bool:
    """Whether a folder holds a complete index, which is not on a server."""
    with suppress(IndexFolderError):
        found = about_index(folder)
        return found.complete and found.engine != "cluster"
    return False


def _is_begun(folder: Path, about: About) -> bool:
    """Whether a folder holds a part of this very index."""
    with suppress(IndexFolderError):
        found = about_index(folder)
        return _place_of(found) == _place_of(about) and found.settings == about.settings
    return False


def _require_unused(folder: Path) -> None:
    """Raise RecipeError if another process writes to an index."""
    for name in ("exact", "qdrant"):
        if (folder / name).is_dir():
            with sole_writer(folder / name):
                pass


def make_engine(folder: Path | str, about: About, *, fresh: bool = False) -> Engine:
    """Open a new index, or an existing one of the same settings, to write documents to.

    ``fresh`` empties an existing one. A collection on a server is emptied only if it carries the
    mark of this folder; one that the index no longer uses stays on its server, with a warning.

    Raises:
        IndexFolderError: when the folder holds other files, was made with other settings, or the
            collection on the server belongs to another index.
        RecipeError: when another process has it open.
        MissingExtraError: when the engine's package is not installed; nothing is replaced then.
    """
    folder = Path(folder)
    if about.engine != "exact":
        check_stored(_stored_of(about))
    check_index_place(folder, (), fresh=fresh)
    found: About | None = None
    with suppress(IndexFolderError):
        found = about_index(folder)
    known = (folder / FILE).is_file()
    if known and not fresh:
        return _continued(folder, about)
    if known:
        _require_unused(folder)
    if about.engine == "cluster":
        engine = _begun_on_server(folder, about, found)
    else:
        engine = _begun_here(folder, about, known=known)
    if found is not None and found.url is not None and _place_of(found) != _place_of(about):
        log.warning(
            "%s: its collection %s stays on the server %s; it may be deleted there",
            folder,
            found.collection,
            found.url,
        )
    return engine


def _continued(folder: Path, about: About) -> Engine:
    """Open an existing index, if it is in the same place and has the same settings."""
    found = about_index(folder)
    if _place_of(found) != _place_of(about):
        raise IndexFolderError(
            f"{folder}: is an index of the engine {found.engine!r}"
            f"{f' at {found.url}, {found.collection}' if found.url else ''}; choose another "
            "folder, or build it again with: tercet index --fresh"
        )
    require(folder, found, about.settings)
    engine = open_engine(folder)  # raises if another process has it open
    write_about(folder, replace(found, complete=False))
    return engine


def _begun_here(folder: Path, about: About, *, known: bool) -> Engine:
    """Make an empty index in the folder, in place of one that is ``known``."""
    if about.engine == "qdrant":
        _edge_store()  # raises before anything is replaced
    with replacing_folder(folder) as empty:
        write_about(empty, replace(about, complete=False))
        mark(empty, INDEX)
    try:
        return open_engine(folder)
    except TercetError:
        if not known:  # nothing of this call stays
            shutil.rmtree(folder)
        raise


def _begun_on_server(folder: Path, about: About, found: About | None) -> Engine:
    """Make an empty index on a server, in a new collection or in that of the folder's index."""
    same = found is not None and _place_of(found) == _place_of(about)
    about = replace(about, mark=found.mark if found and same else uuid4().hex, complete=False)
    store = _store_of(about)  # raises for a foreign collection before anything is changed
    try:
        if found and same:  # a kill from here on leaves an index that says it is incomplete
            write_about(folder, replace(found, complete=False))
        store.clear()
        with replacing_folder(folder) as empty:
            write_about(empty, about)
            mark(empty, INDEX)
    except BaseException:
        store.close()
        raise
    return QdrantEngine(store)


def _stored_of(about: About) -> Stored | None:
    """Return how dense vectors are stored; None if the index does not record it."""
    precision = about.settings.get("precision")
    return None if precision is None else stored_as(precision)


def weights_of_index(folder: Path) -> NumberType | None:
    """Return the type of the weights that made an index, float32 for codes; None if unknown."""
    if not (folder / FILE).is_file():
        return None
    precision = about_index(folder).settings.get("precision")
    if precision in STORED:
        return "float32"
    return next((kind for kind in NUMBER_TYPES if kind == precision), None)


def stored_as(precision: str) -> Stored:
    """Return how a precision stores dense vectors; a precision of weights means float32."""
    coded: dict[str, Stored] = {stored: stored for stored in STORED}
    return coded.get(precision, "float32")


def _place_of(about: About) -> tuple[str | None, ...]:
    return about.engine, about.url, about.collection


def _edge_store() -> Any:
    """Import the class; raise MissingExtraError if its package is not installed."""
    from tercet.search.qdrant.edge import EdgeStore

    return EdgeStore


def _store_of(about: About) -> Any:
    from tercet.search.qdrant.server import ClusterStore

    if about.url is None or about.collection is None or about.mark is None:
        raise RecipeError("an index on a server needs its URL, its collection's name and its mark")
    key = os.environ.get(API_KEY)
    stored = _stored_of(about)
    return ClusterStore(about.url, about.collection, mark=about.mark, api_key=key, stored=stored)


def open_engine(
    folder: Path | str, *, read_only: bool = False, like: Engine | None = None
) -> Engine:
    """Open the engine of an index folder; ``read_only`` lets several processes search an exact one.

    ``like`` is an open engine of the same folder: what both have is not read again.

    Raises:
        IndexFolderError: when the folder is not an index or damaged, or its collection is foreign.
        RecipeError: when another process has it open.
        MissingExtraError: when the engine's package is not installed.
    """
    folder = Path(folder)
    about = about_index(folder)
    for place in (folder, folder / "exact"):  # which holds segments
        if place.is_dir() and (problem := unreadable_inside(place)):
            raise _unusable(folder, problem)
    if about.engine == "qdrant":
        return QdrantEngine(_edge_store()(folder / "qdrant", stored=_stored_of(about)))
    if about.engine == "cluster":
        return QdrantEngine(_store_of(about))
    known = like if isinstance(like, ExactEngine) else None
    return ExactEngine(folder / "exact", stored=_stored_of(about), read_only=read_only, like=known)


@dataclass(frozen=True, slots=True)
class Verified:
    """What a check of a whole index found in order."""

    records: int
    checked: bool  # by checksums; not what earlier versions wrote
    complete: bool  # whether tercet index has finished it


def verify_index(folder: Path | str) -> Verified:
    """Check all files of an index by their checksums, and read every record.

    Of Qdrant's own files only the records are read.

    Raises:
        IndexFolderError: naming a file that is damaged or gone.
    """
    with closing(open_engine(folder, read_only=True)) as engine:  # which compares checksums
        found, held = sum(1 for _ in engine.scan()), engine.stats().records
        if found != held:
            raise _unusable(Path(folder), f"it holds {found} of {held} records")
        checked = isinstance(engine, ExactEngine) and engine.is_sealed
        return Verified(found, checked, about_index(folder).complete)


def _unusable(folder: Path, problem: str) -> IndexFolderError:
    return IndexFolderError(
        f"{folder}: the index cannot be used ({problem}); build it again with: tercet index --fresh"
    )
