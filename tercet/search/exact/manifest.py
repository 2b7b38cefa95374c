"""Commits of an exact engine's folder.

A commit is one rename of ``manifest.json``. Segments and lists of deleted rows are written before
it under unused names; the next writer deletes those that no manifest names.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np

from tercet.errors import IndexFolderError
from tercet.files.artifacts import read_json, write_json
from tercet.files.atomic import replacing_file
from tercet.files.checksums import altered, checksums, note_absence, sealed, unsealed
from tercet.kinds import KINDS, Kind
from tercet.rank.quantized import STORED, Ranges, Stored
from tercet.search.exact.merging import LivePart, mapped, open_segment
from tercet.search.exact.segment import Coding, Segment, damaged

FILE: Final = "manifest.json"
VERSION: Final = 2
OURS: Final = ("segment-", "deleted-")

TokenPrecision: TypeAlias = Literal["float16", "float32"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One commit."""

    number: int = 0  # of the commit
    widths: Mapping[Kind, int] = field(default_factory=dict)  # of each kind; 0 for terms
    precision: TokenPrecision = "float16"  # of token vectors
    stored: Stored = "float32"  # the dense vectors
    ranges: Ranges | None = None  # of codes; None for float32 and before the first vector
    segments: Sequence[str] = ()
    deleted: str | None = None  # the file of rows, counted over all segments
    checksums: Mapping[str, str] = field(default_factory=dict)  # of its files, by their paths
    version: int = VERSION

    @property
    def names(self) -> list[str]:
        """Names of its files and folders."""
        return [*self.segments, *([] if self.deleted is None else [self.deleted])]

    @property
    def coding(self) -> Coding | None:
        """How dense vectors become codes; None for float32, or before ranges are known."""
        return None if self.ranges is None else Coding.by(self.stored, self.ranges)


def read(folder: Path) -> Manifest | None:
    """Return the last commit of a folder; None without one.

    Raises:
        IndexFolderError: when it cannot be read, or is of another version.
    """
    try:
        about = unsealed(read_json(folder / FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise damaged(folder, f"{FILE} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise damaged(folder, f"{FILE} is not of version {VERSION}")
    # Older ones say nothing of codes and checksums.
    about = {"stored": "float32", "ranges": None, "checksums": {}} | about
    if not _is_sound(about):
        raise damaged(folder, f"{FILE} has invalid content")
    about["ranges"] = _ranges_of(folder, about)
    return Manifest(**about)


def _ranges_of(folder: Path, about: Mapping[str, Any]) -> Ranges | None:
    """Read the ranges of codes, which vectors in codes need."""
    record, dims = about["ranges"], about["widths"].get("dense")
    if record is None:
        if about["stored"] != "float32" and about["segments"] and dims is not None:
            raise damaged(folder, f"{FILE} does not say what its codes stand for")
        return None
    try:
        found = Ranges.read(record)
    except ValueError as error:
        raise damaged(folder, f"the ranges of codes in {FILE} cannot be: {error}") from error
    if about["stored"] == "float32" or dims not in (None, len(found.centre)):
        raise damaged(folder, f"the ranges of codes in {FILE} are of other vectors")
    return found


def _is_sound(about: Mapping[str, Any]) -> bool:
    kinds = {"number": int, "widths": dict, "precision": str, "segments": list, "checksums": dict}
    return (
        set(about) == set(asdict(Manifest()))
        and all(isinstance(about[name], kind) for name, kind in kinds.items())
        and set(about["widths"]) <= set(KINDS)
        and all(isinstance(width, int) for width in about["widths"].values())
        and about["precision"] in get_args(TokenPrecision)
        and about["stored"] in STORED
        and all(_is_ours(name) for name in about["segments"])
        and len(set(about["segments"])) == len(about["segments"])
        and (about["deleted"] is None or _is_ours(about["deleted"]))
    )


def _is_ours(name: object) -> bool:
    if not isinstance(name, str) or not name.startswith(OURS):
        return False
    return Path(name).stem.rpartition("-")[2].isdecimal() and "/" not in name


def number_of(name: str) -> int:
    """Return the number in the name of a segment or of a list of deletions."""
    return int(Path(name).stem.rpartition("-")[2])


def open_parts(
    folder: Path, manifest: Manifest, known: Mapping[str, Segment] | None = None
) -> list[LivePart]:
    """Open the segments of a commit with the mask of their rows that are alive.

    ``known`` are those of its segments that are open already; their files are not read.

    Raises:
        IndexFolderError: when a file is missing or damaged.
    """
    known = known or {}
    unread = {k: v for k, v in manifest.checksums.items() if k.partition("/")[0] not in known}
    if (path := altered(folder, unread)) is not None:
        raise damaged(folder, f"{path.relative_to(folder)} is not as it was written")
    if not is_sealed(manifest):
        note_absence(folder)
    kinds = tuple(manifest.widths)
    parts = []
    for name in manifest.segments:
        segment = known.get(name) or open_segment(folder / name, kinds, manifest.coding)
        widths = {kind: w for kind, w in segment.widths.items() if manifest.widths[kind] != w}
        if widths:
            raise damaged(folder / name, f"its vectors have widths {widths}")
        if segment.multi is not None and segment.multi.vectors.dtype != manifest.precision:
            raise damaged(folder / name, f"its token vectors are not in {manifest.precision}")
        parts.append(LivePart(segment, np.ones(len(segment), dtype=np.bool_), folder / name))
    if manifest.deleted is not None:
        _mark(folder / manifest.deleted, parts)
    return parts


def same_segments(manifest: Manifest, other: Manifest) -> list[str]:
    """Return the names of segments whose files are the same in two commits, by their checksums."""

    def files(of: Manifest, name: str) -> dict[str, str]:
        return {k: v for k, v in of.checksums.items() if k.partition("/")[0] == name}

    if (manifest.widths, manifest.stored, manifest.ranges) != (
        other.widths,
        other.stored,
        other.ranges,
    ):
        return []
    return [name for name in manifest.segments if files(manifest, name) == files(other, name) != {}]


def is_sealed(manifest: Manifest) -> bool:
    """Return whether all files of a commit have checksums: not those of earlier versions."""
    return {*manifest.names} <= {name.partition("/")[0] for name in manifest.checksums}


def _mark(path: Path, parts: Sequence[LivePart]) -> None:
    rows = mapped(path)
    if rows.ndim != 1 or rows.dtype != np.int64 or not (rows[1:] > rows[:-1]).all():
        raise damaged(path.parent, f"{path.name} must hold ascending row numbers")
    if len(rows) and not 0 <= rows[0] <= rows[-1] < sum(len(part.segment) for part in parts):
        raise damaged(path.parent, f"{path.name} names rows that are not there")
    begin = 0
    for part in parts:
        end = begin + len(part.segment)
        part.alive[rows[(rows >= begin) & (rows < end)] - begin] = False
        begin = end


def commit(folder: Path, manifest: Manifest, parts: Sequence[LivePart]) -> Manifest:
    """Make these parts, whose files are in the folder, its current content.

    Raises:
        StorageError: when the disk refuses; the commit before it remains.
    """
    number = manifest.number + 1
    gone = np.concatenate([np.zeros(0, np.bool_), *(~part.alive for part in parts)])
    deleted = None
    if gone.any():
        deleted = f"deleted-{number}.npy"
        with replacing_file(folder / deleted) as fresh, fresh.open("wb") as file:
            np.save(file, gone.nonzero()[0])
    names = [part.folder.name for part in parts if part.folder is not None]
    made = replace(
        manifest, number=number, widths=dict(manifest.widths), segments=names, deleted=deleted
    )
    # Segments of the commit before keep theirs, or stay without: they may have been altered since.
    kept = {k: v for k, v in manifest.checksums.items() if k.partition("/")[0] in names}
    fresh = [name for name in made.names if name not in manifest.segments]
    made = replace(made, checksums={**kept, **(checksums(folder, *fresh) if fresh else {})})
    write_json(folder / FILE, sealed(asdict(made)))
    return made


def sweep(folder: Path, manifest: Manifest) -> None:
    """Delete files of killed writers and older commits; readers keep what they have mapped."""
    named = manifest.names
    for path in sorted(folder.iterdir()):
        if path.name.lstrip(".").startswith(OURS) and path.name not in named:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def check_place(folder: Path) -> None:
    """Raise IndexFolderError for a file, or a folder that holds other files."""
    if folder.exists() and (not folder.is_dir() or any(_foreign(folder))):
        raise IndexFolderError(
            f"{folder}: is not an index and would be overwritten; choose another folder"
        )


def _foreign(folder: Path) -> list[Path]:
    known = (".lock", f".{FILE}", *OURS, *(f".{name}" for name in OURS))
    return [path for path in folder.iterdir() if not path.name.startswith(known)]
