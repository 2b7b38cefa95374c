"""Formats of data files: what a name says, what the first bytes say, and unpacked content."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import pyarrow as pa

from tercet.errors import DataError
from tercet.files.limits import MAX_EXPANSION, MAX_UNPACKED

FormKind: TypeAlias = Literal["jsonl", "csv", "tsv", "parquet", "txt"]
Compression: TypeAlias = Literal["gzip", "zstd"]

TABLES: Final[tuple[FormKind, ...]] = ("csv", "tsv")
RECORDS: Final[tuple[FormKind, ...]] = ("jsonl", "csv", "tsv", "parquet")
TEXTS: Final[tuple[FormKind, ...]] = (*RECORDS, "txt")

_NAMES: Final[dict[FormKind, str]] = {
    "jsonl": "JSON lines",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "parquet",
    "txt": "text",
}
_COMPRESSIONS: Final[dict[str, Compression]] = {".gz": "gzip", ".zst": "zstd"}
_SUFFIXES: Final[dict[Compression | None, str]] = {None: "", "gzip": ".gz", "zstd": ".zst"}
_BUFFER: Final = 1 << 18
_HEAD: Final = 16  # bytes that show what a file is
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
_SHEETS: Final = (".xlsx", ".xls", ".ods", ".numbers")
_ARCHIVES: Final = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar")
_A_MODEL: Final = ("config.json", "tercet.json", "adapter_config.json", "modules.json")

# The first bytes of files, and what to do with one. {name} is the file's name, {bare} the same
# without an ending of a compression, {stem} without any ending.
_MAGIC: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PAR1", "is a parquet file; name it {stem}.parquet"),
    (b"PK\x03\x04", "is a zip archive or a spreadsheet; unpack it, or save the table as CSV"),
    (b"\xd0\xcf\x11\xe0", "is a document of Microsoft Office; save the table as CSV"),
    (b"BZh", "is a bzip2 file; unpack it: bunzip2 {name}"),
    (b"\xfd7zXZ", "is an xz file; unpack it: unxz {name}"),
    (b"\xff\xfe\x00\x00", "is UTF-32; convert it: iconv -f UTF-32 -t UTF-8 {name} > new-{name}"),
    (b"\xff\xfe", "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {name} > new-{name}"),
    (b"\xfe\xff", "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {name} > new-{name}"),
    (b"ARROW1", "is an Arrow (feather) file; save the table as parquet"),
    (b"%PDF-", "is a PDF; extract its text, and write one JSON object per line"),
    (b"\x93NUMPY", "is a numpy array; data are records of texts"),
    (b"GGUF", "holds the weights of a model; name the model with --model, and data here"),
)


@dataclass(frozen=True, slots=True)
class FileForm:
    """How a file holds records, as its name says."""

    kind: FormKind
    compression: Compression | None = None

    @property
    def is_seekable(self) -> bool:
        """Whether its records can be read in any order: lines that are not packed, or parquet."""
        return self.compression is None and self.kind not in TABLES

    @property
    def described(self) -> str:
        """The format for people, such as ``JSON lines, gzip``."""
        name = _NAMES[self.kind]
        return name if self.compression is None else f"{name}, {self.compression}"


def known_form(path: Path) -> FileForm | None:
    """Return the format that the name of a file says; None if it says none that is read."""
    bare, compression = _unpacked_name(path.name.lower())
    kind: FormKind | None = next(
        (it for it in TEXTS if bare.endswith(f".{it}") and bare != f".{it}"), None
    )
    if kind is None or (kind == "parquet" and compression is not None):
        return None
    return FileForm(kind, compression)


def form_of(path: Path, kinds: Sequence[FormKind] = RECORDS) -> FileForm:
    """Return the format of a file by its name.

    Raises:
        DataError: for a folder, and a file of none of these kinds; it says what to do.
    """
    form = known_form(path)
    if form is None or form.kind not in kinds or path.is_dir():
        raise DataError(path, None, _advice(path, kinds))
    return form


def is_of(path: Path, kinds: Sequence[FormKind]) -> bool:
    """Whether the name of a file says that it is of one of these kinds."""
    form = known_form(path)
    return form is not None and form.kind in kinds


def bare_name(path: Path) -> str:
    """Return the name of a file without its endings: ``pairs`` for ``pairs.jsonl.gz``."""
    return Path(_unpacked_name(path.name)[0]).stem if known_form(path) is not None else path.stem


def rows_name(path: Path) -> str:
    """Return the name of a file of examples that are made from those of a file or folder."""
    form = known_form(path)
    if path.is_dir():
        return f"{path.resolve().name}.jsonl"
    return path.name if form is None or form.is_seekable else f"{bare_name(path)}.jsonl"


def listed(kinds: Sequence[FormKind], last: str = "or") -> str:
    """Return the endings of these kinds for a message: ``.jsonl, .csv, .tsv or .parquet``."""
    names = [f".{kind}" for kind in kinds]
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds a model rather than data."""
    return any((path / name).is_file() for name in _A_MODEL)


A_MODEL: Final = "is the folder of a model; name the model with --model, and give data here"


class Content(io.RawIOBase):
    """The bytes of a file, unpacked if its name ends in .gz or .zst.

    Reading stops with a DataError where it unpacks to far more than files of texts do.
    """

    def __init__(self, path: Path) -> None:
        compression = _unpacked_name(path.name.lower())[1]
        self._path, self._limit, self._read = path, 0, 0
        self._file = path.open("rb")
        try:
            self._size = self._file.seek(0, io.SEEK_END)
            self._file.seek(0)
            problem = _wrong_content(self._file.read(_HEAD), path, compression)
            if problem is not None:
                raise DataError(path, None, problem)
            self._file.seek(0)
            self._unpacked: Any = (
                self._file
                if compression is None
                else pa.CompressedInputStream(self._file, compression)
            )
        except BaseException:
            self._file.close()
            raise
        if compression is not None:
            self._limit = max(MAX_UNPACKED, MAX_EXPANSION * self._size)

    @property
    def done(self) -> float:
        """The part of the file that was read."""
        return min(self._file.tell() / max(self._size, 1), 1.0)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, and return how many bytes were read."""
        read = self._unpacked.readinto(buffer)
        self._read += read
        if self._limit and self._read > self._limit:
            raise DataError(
                self._path,
                None,
                f"its {self._size:,} bytes unpack to more than {self._limit:,}; no texts do that. "
                "If it is right, unpack it yourself and give the file that comes out",
            )
        return read

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()

    def buffered(self) -> io.BufferedReader:
        """Return a reader of lines, which closes this too."""
        return io.BufferedReader(self, _BUFFER)


def check_parquet(path: Path) -> None:
    """Raise a DataError that says what a file under the name of a parquet file is instead."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head.startswith(b"PAR1") and (problem := _wrong_content(head, path, None)) is not None:
        raise DataError(path, None, problem)


def form_of_content(head: bytes) -> str:
    """Return the ending that fits the first bytes of a file without a name."""
    if head.startswith(b"PAR1"):
        return ".parquet"
    return next((f".jsonl{_SUFFIXES[it]}" for it in _of_magic(head)), ".jsonl")


def _unpacked_name(name: str) -> tuple[str, Compression | None]:
    for ending, compression in _COMPRESSIONS.items():
        if name.lower().endswith(ending):
            return name[: -len(ending)], compression
    return name, None


def _of_magic(head: bytes) -> list[Compression]:
    if head.startswith(b"\x1f\x8b"):
        return ["gzip"]
    return ["zstd"] if head.startswith(b"\x28\xb5\x2f\xfd") else []


def _wrong_content(head: bytes, path: Path, compression: Compression | None) -> str | None:
    """Return why a file that begins like this is not what its name says, and what to do."""
    name, bare = path.name, _unpacked_name(path.name)[0]
    found = next(iter(_of_magic(head)), None)
    if found == compression:
        return None if found else _of_other(head, name, bare)
    if found is not None:
        right = f"{Path(bare).stem if bare.endswith('.parquet') else bare}{_SUFFIXES[found]}"
        if bare.endswith(".parquet"):
            return f"is a {found} file; unpack it, or name it after what is in it, as in {right}"
        return f"is a {found} file; name it {right}"
    if not head:
        return None  # empty: who reads records says so
    return _of_other(head, name, bare) or f"is not a {compression} file; name it {bare}"


def _of_other(head: bytes, name: str, bare: str) -> str | None:
    words = next((words for magic, words in _MAGIC if head.startswith(magic)), None)
    if words is None and len(head) > 7 and not any(head[1:8:2]) and all(head[0:8:2]):
        words = "is UTF-16; convert it: iconv -f UTF-16LE -t UTF-8 {name} > new-{name}"
    return words and words.format(name=name, bare=bare, stem=Path(bare).stem)


def _advice(path: Path, kinds: Sequence[FormKind]) -> str:
    """Return what is wrong with a path that is not a file of these kinds, and what to do."""
    suffix, name = path.suffix.lower(), path.name
    if path.is_dir():
        return A_MODEL if is_model_folder(path) else "is a folder; give one of its files"
    if not path.exists() and not path.is_symlink():
        return "no such file"
    if suffix == ".json":
        return (
            f"is one JSON value, or lines of JSON; name a file of one object per line "
            f"{path.stem}.jsonl, and convert an array: jq -c '.[]' {name} > {path.stem}.jsonl"
        )
    if suffix in _SHEETS:
        return f"is a spreadsheet; save the table as CSV (UTF-8) and give {path.stem}.csv"
    if suffix in _WEIGHTS:
        return "holds the weights of a model; name the model with --model, and give data here"
    if suffix in _ARCHIVES:
        return "is an archive; unpack it and give the files in it"
    if suffix in _COMPRESSIONS:
        inside = Path(path.stem).suffix
        if inside == ".parquet":
            return "is packed twice, as parquet is packed inside; unpack it"
        return f"does not say what is packed; name it after that, as in {path.stem}.jsonl{suffix}"
    return f'unknown kind of file "{path.suffix}"; use {listed(kinds)}'
