"""Hard negatives that the model mines for itself while it learns (ANCE, arXiv 2007.00808, sec. 4).

At regular steps the documents are encoded again, and the examples' negatives are replaced. Rows,
and so the order of batches, do not change: a reader looks up the newest negatives.

A refresh is a folder ``refresh-STEP`` of the stage: parts of some thousand rows, written by all
processes, and ``refresh.json`` once they are all there. A run that was killed goes on with the
parts that it finds. The refresh before it is deleted, and so are the vectors.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tercet import distributed
from tercet.curate.mining import document_pools
from tercet.curate.mining.miner import Miner
from tercet.data.files.documents import read_documents
from tercet.data.files.examples import parse_example
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.data.files.texts import text_key
from tercet.errors import DataError, RecipeError
from tercet.files.artifacts import fingerprint_of_file, read_json, write_json
from tercet.files.atomic import clear_about
from tercet.files.progress import Bars, bar
from tercet.files.records import readable
from tercet.models.embedder import Embedder
from tercet.training.recipe import Refresh
from tercet.types import Example

FOLDER: Final = "refresh-{step}"
ABOUT: Final = "about.json"  # which model mines, from the beginning
DONE: Final = "refresh.json"  # what changed, at the end
VECTORS: Final = "vectors"


@dataclass(frozen=True, slots=True)
class RefreshCounts:
    """What a refresh changed."""

    rows: int
    negatives: int
    new: int  # negatives that the row did not have before
    empty: int  # rows without any

    @property
    def new_share(self) -> float:
        """The share of negatives that are new."""
        return self.new / max(self.negatives, 1)

    @property
    def summary(self) -> str:
        """All counts, for people."""
        return (
            f"{self.negatives:,} negatives for {self.rows:,} queries, {self.new_share:.0%} of them "
            f"new; {self.empty:,} queries have none"
        )


class Refresher:
    """The sources of a stage, with the negatives that were mined last.

    Raises:
        RecipeError: if a source has no examples, or a corpus file does not exist.
    """

    def __init__(
        self, refresh: Refresh, sources: Sequence[Source], folder: Path, seed: int
    ) -> None:
        _check(refresh, sources)
        self._refresh, self._given, self._folder, self._seed = refresh, sources, folder, seed
        self._files = {file: _digest(file) for file in refresh.corpus}
        size = document_pools.SHARD
        self._parts = [
            _MinedRows(number, range(start, min(start + size, len(source))))
            for number, source in enumerate(sources)
            for start in range(0, len(source), size)
        ]
        self._readers = [_NewestNegatives(source) for source in sources]
        self.sources = [
            replace(source, reader=reader, parse=_already_parsed)
            for source, reader in zip(sources, self._readers, strict=True)
        ]
        self.state: dict[str, Any] | None = None  # the refresh in force, for a checkpoint

    @property
    def read(self) -> dict[str, str]:
        """Fingerprints of the corpus files, as they were when the run began."""
        return {f"corpus {file}": digest for file, digest in self._files.items()}

    def due(self, step: int) -> bool:
        """Return whether new negatives are to be mined after ``step`` steps."""
        before = -1 if self._refresh.at_start else 0
        in_force = before if self.state is None else self.state["step"]
        every = self._refresh.every
        return step > in_force and (step % every == 0 if every else step == 0)

    def restore(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Read the negatives that were in force when a checkpoint was made after ``step`` steps.

        Raises:
            RecipeError: if they are gone.
        """
        if state is None:
            return
        self.state = dict(state)
        if self.due(step) and (self._of(step) / DONE).exists():
            return  # they are replaced before they are read, and may be deleted by now
        self._take(state["step"], state["model"])

    def mine(self, embedder: Embedder, step: int, bars: Bars = bar) -> RefreshCounts:
        """Mine with the current model, and read these negatives from now on.

        All processes have to call this. The result depends on the model, the seed, the step and
        the examples, not on the number of processes.

        Raises:
            StorageError: if the disk refuses; what was mined is still there.
            DataError: if a source has changed since it was opened.
        """
        folder, model = self._of(step), embedder.fingerprint()
        if distributed.is_main():
            _clear_unless_of(folder, model)
        distributed.barrier()
        if not (folder / DONE).exists():
            self._mine_parts(embedder, folder, step, bars)
            distributed.barrier()
            if distributed.is_main():
                counts = [_read(folder / part.counts) for part in self._parts]
                total = {name: sum(count[name] for count in counts) for name in counts[0]}
                write_json(folder / DONE, {"model": model, "step": step, **total})
        distributed.barrier()
        self._take(step, model)
        distributed.barrier()
        if distributed.is_main():
            self._sweep(step)
        record = _read(folder / DONE)
        return RefreshCounts(*(record[name] for name in RefreshCounts.__slots__))

    def _of(self, step: int) -> Path:
        return self._folder / FOLDER.format(step=step)

    def _mine_parts(self, embedder: Embedder, folder: Path, step: int, bars: Bars) -> None:
        """Write this process's share of the parts that are missing."""
        own = self._parts[distributed.rank() :: distributed.world()]
        missing = [part for part in own if not (folder / part.counts).exists()]
        self._refuse_changed_files()
        anywhere = distributed.gather_ints(torch.tensor([len(missing)]))
        if not int(anywhere.sum()):
            return
        mining = self._refresh.mining
        drawn = np.random.SeedSequence([mining.rule.seed, self._seed, step])
        seed = int(drawn.generate_state(1, np.uint32)[0])  # another one in each run and refresh
        mining = replace(mining, rule=replace(mining.rule, seed=seed))
        files = self._refresh.corpus
        texts = (document.text for file in files for document in read_documents(file))
        work = folder / VECTORS
        with closing(Miner(embedder, self._given, mining, texts, work, bars=bars)) as miner:
            reports = [miner.report(source) for source in self._given]
            miner.prepare()  # all processes encode, also one that has no part to write
            with bars("mine", sum(len(part.rows) for part in missing)) as advance:
                for part in missing:
                    block = self._given[part.source].examples(part.rows)
                    before = self._readers[part.source].current.examples(part.rows)
                    mined = miner.mined(block, reports[part.source])
                    assert len(mined) == len(block), "no row is left out"
                    # The model's own scores would be taken for those of a teacher.
                    bare = (replace(m, positive_scores=None, negative_scores=None) for m in mined)
                    write_examples(folder / part.name, bare)
                    write_json(folder / part.counts, asdict(_compared(before, mined)))
                    advance(len(part.rows))

    def _refuse_changed_files(self) -> None:
        for file, digest in self._files.items():
            if _digest(file) != digest:
                raise DataError(
                    file,
                    None,
                    "these documents have changed since the run began; put them back and give the "
                    "same command again, or start again in another --out",
                )

    def _take(self, step: int, model: str) -> None:
        folder = self._of(step)
        record = _read(folder / DONE) if (folder / DONE).exists() else {}
        if record.get("model") != model:
            raise RecipeError(
                f"{folder}: the negatives that this run was trained with are gone; put the folder "
                f"back, or delete {self._folder} to start again"
            )
        parts: list[list[Source]] = [[] for _ in self._given]
        for part in self._parts:
            name = self._given[part.source].name
            parts[part.source].append(open_source(folder / part.name, name=name))
        for reader, of_source in zip(self._readers, parts, strict=True):
            reader.current = _JoinedSources(of_source)
        self.state = {"step": step, "model": model}

    def _sweep(self, step: int) -> None:
        """Delete what is not read again: vectors, and the refreshes before."""
        shutil.rmtree(self._of(step) / VECTORS, ignore_errors=True)
        for other in self._folder.glob(FOLDER.format(step="*")):
            if other != self._of(step):
                shutil.rmtree(other, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _MinedRows:
    """Rows of a source that are mined and written together."""

    source: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.source}-{self.rows.start}.jsonl"

    @property
    def counts(self) -> str:
        """The file of what changed; it is written last, so the part is complete if it exists."""
        return f"{self.source}-{self.rows.start}.json"


class _NewestNegatives:
    """Reads the examples of a source with the negatives that are in force."""

    def __init__(self, source: Source) -> None:
        self.current: Source | _JoinedSources = source

    def read(self, rows: Sequence[int]) -> list[object]:
        """Return the examples of these rows."""
        return list(self.current.examples(rows))


class _JoinedSources:
    """Reads the examples of several files as if they were one."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts[:-1])])

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Return the examples of these rows, in this order."""
        rows = np.asarray(indices, np.int64)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        found: dict[int, Example] = {}
        for number in np.unique(owner).tolist():
            places = np.flatnonzero(owner == number)
            inside = (rows[places] - self._starts[number]).tolist()
            found.update(zip(places.tolist(), self._parts[number].examples(inside), strict=True))
        return [found[place] for place in range(len(rows))]


def _already_parsed(record: object, task: str) -> Example:
    assert isinstance(record, Example), "read by _NewestNegatives"
    return record


def _compared(before: Sequence[Example], after: Sequence[Example]) -> RefreshCounts:
    negatives = new = empty = 0
    for old, fresh in zip(before, after, strict=True):
        known = {text_key(text) for text in old.negatives}
        negatives += len(fresh.negatives)
        new += sum(text_key(text) not in known for text in fresh.negatives)
        empty += not fresh.negatives
    return RefreshCounts(len(after), negatives, new, empty)


def _digest(file: str) -> str:
    with readable(Path(file)):
        return fingerprint_of_file(Path(file))


def _check(refresh: Refresh, sources: Sequence[Source]) -> None:
    for source in sources:
        # With columns that are named, the function has these as an argument.
        if getattr(source.parse, "func", source.parse) is not parse_example:
            raise RecipeError(
                f"{source.path}: holds texts, and negatives are mined for examples; remove the "
                "refresh of this stage"
            )
    for file in refresh.corpus:
        if not Path(file).is_file():
            raise RecipeError(f"{file}: there is no such file of documents to mine; name another")


def _clear_unless_of(folder: Path, model: str) -> None:
    """Delete what another model mined there, such as one of an earlier run."""
    about = _read(folder / ABOUT) if (folder / ABOUT).exists() else {}
    if about.get("model") != model:
        with clear_about(folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        write_json(folder / ABOUT, {"model": model})


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: this file of an earlier run is damaged; delete {path.parent} to mine again"
        ) from error
