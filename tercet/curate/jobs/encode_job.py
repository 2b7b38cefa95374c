"""Encoding files of texts into files of vectors, in parts, in any number of processes."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tercet.curate.jobs.job import DoUnit, UnitReport, WorkUnit, run_units
from tercet.curate.jobs.runners import LOOP, Runner
from tercet.data.files.sources import Source
from tercet.data.files.texts import open_texts
from tercet.errors import RecipeError
from tercet.files.forms import TEXTS, bare_name, is_of, listed
from tercet.files.outputs import FolderKind, check_output, mark
from tercet.files.progress import bar
from tercet.models.embedder import Embedder
from tercet.search.export import EncodeOptions, WrittenVectors, write_dense, write_vectors

PART: Final = 100_000  # texts per part of a file
_MANIFEST: Final = ".manifest"
ENCODED: Final = FolderKind(
    "a folder of vectors of files",
    shared=True,
    is_older=lambda folder: (folder / _MANIFEST).is_dir(),
)
_AT_ONCE: Final = 4096  # texts that are read together
_VERSION: Final = 1  # of the output


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeJob:
    """The job of encoding files; each part of a file becomes a .npy file or a folder of arrays.

    Outputs are named as the file, with the number of the part if there are several.
    """

    load: Callable[[], Embedder]  # loads the model in each process; can be pickled
    about: Mapping[str, Any]  # plain values that identify the model and how it reads
    sources: Mapping[str, Source]  # of texts, by the name of the output
    out: Path
    wanted: EncodeOptions
    arrays: bool  # write a folder of arrays, of all wanted kinds, for each part
    name: str = "encode"

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the vectors depend on, besides the texts."""
        return {"version": _VERSION, "arrays": self.arrays, **self.about, **asdict(self.wanted)}

    def open(self) -> DoUnit:
        """Load the model."""
        return partial(self._do, self.load())

    def files(self, unit: WorkUnit) -> Sequence[Path]:
        """Return the file or folder with the vectors of a part."""
        return [self.place(unit)]

    def units(self, part: int) -> list[WorkUnit]:
        """Cut the sources into parts of ``part`` texts."""
        units: list[WorkUnit] = []
        for name, source in self.sources.items():
            starts = range(0, len(source), part)
            for number, start in enumerate(starts):
                stop = min(start + part, len(source))
                reads = {"of": name, "texts": source.fingerprint, "rows": [start, stop]}
                label = name if len(starts) == 1 else f"{name}-{number:05}"
                units.append(WorkUnit(label, reads, size=stop - start))
        return units

    def place(self, unit: WorkUnit) -> Path:
        """Return the file or folder with the vectors of a part."""
        return self.out / (unit.name if self.arrays else f"{unit.name}.npy")

    def _do(self, embedder: Embedder, unit: WorkUnit) -> UnitReport:
        texts = _texts(self.sources[unit.reads["of"]], *unit.reads["rows"])
        place, no_bars = self.place(unit), partial(bar, shown=False)
        if self.arrays:
            written = write_vectors(embedder, texts, place, self.wanted, unit.size, bars=no_bars)
        else:
            written = write_dense(embedder, texts, place, self.wanted, progress=False)
        return {"texts": written.texts, "bytes": dict(written.bytes)}


def encode_files(job: EncodeJob, *, part: int = PART, runner: Runner = LOOP) -> WrittenVectors:
    """Encode the parts that are missing; return the size of all of them.

    Raises:
        DataError: if a file has changed since it was opened.
        ModelError: if a vector contains NaN or infinity.
        RecipeError: if the folder has other vectors, or another process writes there.
        StorageError: if the disk refuses.
    """
    if part < 1:
        raise RecipeError(f"texts per part must be at least 1; got {part}")
    units, manifest = job.units(part), job.out / _MANIFEST
    check_output(job.out, [source.path for source in job.sources.values()], ENCODED)
    _refuse_others(job, units)
    mark(job.out, ENCODED)
    written = WrittenVectors(bytes=Counter())
    for _, report in run_units(job, units, manifest, runner=runner):
        written.texts += report["texts"]
        written.bytes.update(report["bytes"])
    return written


def open_files(paths: Sequence[Path], field: str) -> dict[str, Source]:
    """Open files of texts, also those in folders, by the name of their output.

    Raises:
        DataError: at the first record without a text.
        RecipeError: for a folder without files, or two files with the same name.
    """
    found: dict[str, Source] = {}
    for path in paths:
        for file in _files_in(path) if path.is_dir() else [path]:
            inside = file.relative_to(path) if path.is_dir() else Path(file.name)
            name = str(inside.with_name(bare_name(inside)))
            if name in found:
                raise RecipeError(
                    f"{file} and {found[name].path}: the vectors of both would be named {name}; "
                    "rename one, or encode them into different folders"
                )
            found[name] = open_texts(file, field=field, name=name, blank_lines=True)
    return found


def _files_in(folder: Path) -> list[Path]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if is_of(path, TEXTS) and path.parent.name != "qrels"  # judgements, which are no texts
    )
    if not found:
        raise RecipeError(f"{folder}: has no {listed(TEXTS)} file; give another folder")
    return found


def _texts(source: Source, start: int, stop: int) -> Iterator[str]:
    for first in range(start, stop, _AT_ONCE):
        rows = range(first, min(first + _AT_ONCE, stop))
        yield from (example.query for example in source.examples(rows))


def _refuse_others(job: EncodeJob, units: Sequence[WorkUnit]) -> None:
    """Raise for vectors of another command, which would be mistaken for some of these."""
    own = {job.place(unit) for unit in units}
    for path in sorted(job.out.rglob("*.npy")) if job.out.is_dir() else ():
        if path not in own and path.parent not in own and not path.name.startswith("."):
            raise RecipeError(
                f"{path}: is of another file or another part size; delete it, or give another "
                "folder"
            )
