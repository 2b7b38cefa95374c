"""Hard negatives that the model mines for itself while it learns (ANCE, arXiv 2007.00808).

What was hard for the model that a run began with is easy for it soon. So every so many steps the
documents are encoded again, and the examples' negatives are replaced. Their rows, and so the order
of batches, stay as they are: a source is read through a view that looks up the newest negatives.

A refresh is a folder ``refresh-STEP`` of the stage: parts of some thousand rows, written one by
one by all processes, and ``refresh.json`` once they are all there. A run that was killed goes on
with the parts that it finds. The refresh before it is deleted, and so are the vectors.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tercet import distributed
from tercet.curate.mining import documents as mining_documents
from tercet.curate.mining.documents import text_key
from tercet.curate.mining.mine import Miner, Mining
from tercet.data.files.documents import read_documents
from tercet.data.files.examples import parse_example
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import DataError, RecipeError
from tercet.files.atomic import clear_about, replacing_file
from tercet.files.progress import Bars, bar
from tercet.files.records import readable
from tercet.models.embedder import Embedder
from tercet.train.recipe import Refresh
from tercet.types import Example

FOLDER: Final = "refresh-{step}"
ABOUT: Final = "about.json"  # of which model, from the beginning
DONE: Final = "refresh.json"  # what was found, at the end
VECTORS: Final = "vectors"


@dataclass(frozen=True, slots=True)
class Found:
    """What a refresh changed."""

    rows: int = 0
    negatives: int = 0
    new: int = 0  # of these; the row did not have them before
    empty: int = 0  # rows without any

    @property
    def new_share(self) -> float:
        """The share of negatives that are new."""
        return self.new / max(self.negatives, 1)

    @property
    def told(self) -> str:
        """All of it, for people."""
        return (
            f"{self.negatives:,} negatives for {self.rows:,} queries, {self.new_share:.0%} of them "
            f"new; {self.empty:,} queries have none"
        )

    def plus(self, other: "Found") -> "Found":
        """Both together."""
        return Found(*(a + b for a, b in zip(_numbers(self), _numbers(other), strict=True)))


class Refresher:
    """The sources of a stage, with the negatives that were mined last.

    Raises:
        RecipeError: for sources that are no examples, or a corpus that is not there.
    """

    def __init__(
        self, refresh: Refresh, sources: Sequence[Source], folder: Path, seed: int
    ) -> None:
        _check(refresh, sources)
        self._refresh, self._given, self._folder, self._seed = refresh, sources, folder, seed
        self._files = {file: _digest(file) for file in refresh.corpus}
        self._views = [_View(source) for source in sources]
        self.sources = [
            replace(source, reader=view, parse=_as_it_is)
            for source, view in zip(sources, self._views, strict=True)
        ]
        self._state: dict[str, Any] | None = None

    @property
    def read(self) -> dict[str, str]:
        """Fingerprints of the further files of documents, as they were when the run began."""
        return {f"corpus {file}": digest for file, digest in self._files.items()}

    def state(self) -> dict[str, Any] | None:
        """Which refresh is in force, for a checkpoint."""
        return self._state

    def due(self, step: int) -> bool:
        """Whether new negatives are to be mined after so many steps."""
        before = -1 if self._refresh.at_start else 0
        in_force = before if self._state is None else self._state["step"]
        every = self._refresh.every
        return step > in_force and (step % every == 0 if every else step == 0)

    def restore(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Take the negatives that were in force when a checkpoint was made after ``step`` steps.

        Raises:
            RecipeError: when they are gone.
        """
        if state is None:
            return
        self._state = dict(state)
        if self.due(step) and (self._of(step) / DONE).exists():
            return  # they are replaced before they are read, and may be deleted by now
        self._take(state["step"], state["model"])

    def mine(self, embedder: Embedder, step: int, bars: Bars = bar) -> Found:
        """Mine with the model as it is, and read these negatives from now on.

        All processes have to call this. What is found hangs on the model, the seed, the step and
        the examples, not on the number of processes.

        Raises:
            StorageError: when the disk refuses; what was mined is still there.
            DataError: when a source has changed since it was opened.
        """
        folder, model = self._of(step), embedder.fingerprint()
        if distributed.is_main():
            _clear_unless_of(folder, model)
        distributed.barrier()
        if not (folder / DONE).exists():
            self._mine_parts(embedder, folder, step, bars)
            distributed.barrier()
            if distributed.is_main():
                found = Found()
                for part in _parts(self._given):
                    found = found.plus(Found(**_read_json(folder / part.counts)))
                _write_json(folder / DONE, {"model": model, "step": step, **asdict(found)})
        distributed.barrier()
        self._take(step, model)
        distributed.barrier()
        if distributed.is_main():
            self._sweep(step)
        return _found_in(folder)

    def _of(self, step: int) -> Path:
        return self._folder / FOLDER.format(step=step)

    def _mine_parts(self, embedder: Embedder, folder: Path, step: int, bars: Bars) -> None:
        """Write the parts that are this process's turn and not there yet."""
        own = _parts(self._given)[distributed.rank() :: distributed.world()]
        missing = [part for part in own if not (folder / part.counts).exists()]
        self._refuse_changed_files()
        anywhere = distributed.gather_ints(torch.tensor([len(missing)]))
        if not int(anywhere.sum()):
            return
        mining = _seeded(self._refresh.mining, self._seed, step)
        texts = _texts(self._refresh.corpus)
        work = folder / VECTORS
        with closing(Miner(embedder, self._given, mining, texts, work, bars=bars)) as miner:
            reports = [miner.report(source) for source in self._given]
            miner.prepare()  # all processes encode, also one that has no part to write
            with bars("mine", sum(len(part.rows) for part in missing)) as advance:
                for part in missing:
                    block = self._given[part.source].examples(part.rows)
                    before = self._views[part.source].current.examples(part.rows)
                    mined = miner.mined(block, reports[part.source])
                    assert len(mined) == len(block), "no row is left out"
                    write_examples(folder / part.name, map(_unscored, mined))
                    _write_json(folder / part.counts, asdict(_compared(before, mined)))
                    advance(len(part.rows))

    def _refuse_changed_files(self) -> None:
        for file, digest in self._files.items():
            if _digest(file) != digest:
                raise DataError(
                    file,
                    None,
                    "these documents have changed since the run began; put them back and give the "
                    "same command again, or start anew in another --out",
                )

    def _take(self, step: int, model: str) -> None:
        folder = self._of(step)
        record = _read_json(folder / DONE) if (folder / DONE).exists() else {}
        if record.get("model") != model:
            raise RecipeError(
                f"{folder}: the negatives that this run was trained with are gone; put the folder "
                f"back, or delete {self._folder} to start anew"
            )
        parts: list[list[Source]] = [[] for _ in self._given]
        for part in _parts(self._given):
            name = self._given[part.source].name
            parts[part.source].append(open_source(folder / part.name, name=name))
        for view, of_source in zip(self._views, parts, strict=True):
            view.current = _Parts(of_source)
        self._state = {"step": step, "model": model}

    def _sweep(self, step: int) -> None:
        """Delete what is not read again: vectors, and the refreshes before."""
        shutil.rmtree(self._of(step) / VECTORS, ignore_errors=True)
        for other in self._folder.glob(FOLDER.format(step="*")):
            if other != self._of(step):
                shutil.rmtree(other, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of a source, mined and written together."""

    source: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.source}-{self.rows.start}.jsonl"

    @property
    def counts(self) -> str:
        """The file that says what changed; written last: with it, the part is whole."""
        return f"{self.source}-{self.rows.start}.json"


def _parts(sources: Sequence[Source]) -> list[_Part]:
    size = mining_documents.SHARD
    return [
        _Part(number, range(start, min(start + size, len(source))))
        for number, source in enumerate(sources)
        for start in range(0, len(source), size)
    ]


class _View:
    """Reads the examples of a source, with the negatives that hold now."""

    def __init__(self, source: Source) -> None:
        self.current: Source | _Parts = source

    def read(self, rows: Sequence[int]) -> list[object]:
        """The examples of these rows."""
        return list(self.current.examples(rows))


class _Parts:
    """The examples of several files as if they were one."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts[:-1])])

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """The examples of these rows, in this order."""
        rows = np.asarray(indices, np.int64)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        found: dict[int, Example] = {}
        for number in np.unique(owner).tolist():
            places = np.flatnonzero(owner == number)
            inside = (rows[places] - self._starts[number]).tolist()
            found.update(zip(places.tolist(), self._parts[number].examples(inside), strict=True))
        return [found[place] for place in range(len(rows))]


def _as_it_is(record: object, task: str) -> Example:
    """What a view has read is an example already."""
    assert isinstance(record, Example), "read by a view"
    return record


def _unscored(example: Example) -> Example:
    """Scores are those of a teacher; the model's own would be taken for them."""
    return replace(example, positive_scores=None, negative_scores=None)


def _compared(before: Sequence[Example], after: Sequence[Example]) -> Found:
    negatives = new = empty = 0
    for old, fresh in zip(before, after, strict=True):
        known = {text_key(text) for text in old.negatives}
        negatives += len(fresh.negatives)
        new += sum(text_key(text) not in known for text in fresh.negatives)
        empty += not fresh.negatives
    return Found(len(after), negatives, new, empty)


def _seeded(mining: Mining, seed: int, step: int) -> Mining:
    """What is drawn differs from run to run and from refresh to refresh."""
    drawn = np.random.SeedSequence([mining.rule.seed, seed, step]).generate_state(1, np.uint32)
    return replace(mining, rule=replace(mining.rule, seed=int(drawn[0])))


def _digest(file: str) -> str:
    """Changes when a byte of the file does."""
    with readable(Path(file)), open(file, "rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _texts(files: Sequence[str]) -> Iterator[str]:
    for file in files:
        for document in read_documents(file):
            yield document.text


def _check(refresh: Refresh, sources: Sequence[Source]) -> None:
    for source in sources:
        if source.parse is not parse_example:
            raise RecipeError(
                f"{source.path}: holds texts, and negatives are mined for examples; leave out the "
                "refresh in this stage"
            )
    for file in refresh.corpus:
        if not Path(file).is_file():
            raise RecipeError(f"{file}: there is no such file of documents to mine; name another")


def _clear_unless_of(folder: Path, model: str) -> None:
    """Forget what another model mined there, as an earlier run with the same folder may have."""
    about = _read_json(folder / ABOUT) if (folder / ABOUT).exists() else {}
    if about.get("model") != model:
        with clear_about(folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        _write_json(folder / ABOUT, {"model": model})


def _found_in(folder: Path) -> Found:
    record = _read_json(folder / DONE)
    return Found(*(record[name] for name in Found.__slots__))


def _numbers(found: Found) -> tuple[int, ...]:
    return found.rows, found.negatives, found.new, found.empty


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: this file of an earlier run is damaged; delete {path.parent} to mine again"
        ) from error


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    with replacing_file(path) as fresh:
        fresh.write_text(json.dumps(record) + "\n", encoding="utf-8")
