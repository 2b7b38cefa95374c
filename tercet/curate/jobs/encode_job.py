"""Files of texts into files of vectors, a part of a file at a time, in any number of processes."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tercet.curate.jobs.job import DoUnit, UnitReport, WorkUnit, forget, run_units
from tercet.curate.jobs.runners import LOOP, Runner
from tercet.data.files.sources import Source
from tercet.data.files.texts import open_texts
from tercet.errors import RecipeError
from tercet.files.progress import bar
from tercet.models.embedder import Embedder
from tercet.search.export import Wanted, Written, write_dense, write_vectors

PART: Final = 100_000  # texts of a part; a larger file is cut
KINDS_OF_FILES: Final = (".jsonl", ".parquet", ".txt")
_MANIFEST: Final = ".manifest"
_AT_ONCE: Final = 4096  # texts that are read together
_VERSION: Final = 1  # of what is written


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """The job of encoding files; each part of one becomes a .npy file, or a folder of arrays.

    They are named as the file, with the number of the part where there are several.
    """

    load: Callable[[], Embedder]  # the model, in each process; it can be pickled
    about: Mapping[str, Any]  # plain values that say which model it is and how it reads
    sources: Mapping[str, Source]  # of texts, by the name of what is written
    out: Path
    wanted: Wanted
    arrays: bool  # a folder of arrays for each part, of all kinds that are wanted
    name: str = "encode"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the vectors hang on, besides the texts."""
        return {"version": _VERSION, "arrays": self.arrays, **self.about, **asdict(self.wanted)}

    def open(self) -> DoUnit:
        """The model is loaded."""
        return partial(self._do, self.load())

    def units(self, part: int) -> list[WorkUnit]:
        """Parts of so many texts."""
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
        """Where the vectors of a part are."""
        return self.out / (unit.name if self.arrays else f"{unit.name}.npy")

    def _do(self, embedder: Embedder, unit: WorkUnit) -> UnitReport:
        texts = _texts(self.sources[unit.reads["of"]], *unit.reads["rows"])
        if self.arrays:
            hidden = partial(bar, shown=False)
            written = write_vectors(
                embedder, texts, self.place(unit), self.wanted, unit.size, bars=hidden
            )
        else:
            written = write_dense(embedder, texts, self.place(unit), self.wanted, progress=False)
        return {"texts": written.texts, "bytes": dict(written.bytes)}


def encode_files(job: Encoding, *, part: int = PART, runner: Runner = LOOP) -> Written:
    """Encode what is not encoded yet; how much there is in all.

    Raises:
        DataError: when a file has changed since it was opened.
        ModelError: when a vector is not finite.
        RecipeError: when the folder holds other vectors, or another process writes there.
        StorageError: when the disk refuses.
    """
    if part < 1:
        raise RecipeError(f"a part of {part} texts is none; ask for 1 or more")
    units, manifest = job.units(part), job.out / _MANIFEST
    _refuse_others(job, units)
    for unit in units:
        if not job.place(unit).exists():
            forget(unit, manifest)
    written = Written(bytes=Counter())
    for _, report in run_units(job, units, manifest, runner=runner):
        written.texts += report["texts"]
        written.bytes.update(report["bytes"])
    return written


def open_files(paths: Sequence[Path], field: str) -> dict[str, Source]:
    """Files of texts, those of folders among them, by what their vectors are called.

    Raises:
        DataError: at the first record without a text, or for a folder without files.
        RecipeError: when two of them have one name.
    """
    found: dict[str, Source] = {}
    for path in paths:
        for file in _files(path) if path.is_dir() else [path]:
            inside = file.relative_to(path) if path.is_dir() else Path(file.name)
            name = str(inside.with_suffix(""))
            if name in found:
                raise RecipeError(
                    f"{file} and {found[name].path}: the vectors of both would be called {name}; "
                    "rename one, or encode them into two folders"
                )
            found[name] = open_texts(file, field=field, name=name, blank_lines=True)
    return found


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix in KINDS_OF_FILES)
    if not found:
        raise RecipeError(f"{folder}: holds no {', '.join(KINDS_OF_FILES)} file; name another")
    return found


def _texts(source: Source, start: int, stop: int) -> Iterator[str]:
    for first in range(start, stop, _AT_ONCE):
        rows = range(first, min(first + _AT_ONCE, stop))
        yield from (example.query for example in source.examples(rows))


def _refuse_others(job: Encoding, units: Sequence[WorkUnit]) -> None:
    """Vectors of an earlier command with other files or parts would pass for some of these."""
    own = {job.place(unit) for unit in units}
    for path in sorted(job.out.rglob("*.npy")) if job.out.is_dir() else ():
        if path not in own and path.parent not in own and not path.name.startswith("."):
            raise RecipeError(
                f"{path}: is of another file, or of parts of another size; delete it, or name "
                "another folder"
            )
