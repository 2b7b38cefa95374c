"""A teacher's vectors of training texts, computed once, kept on disk, and read row by row.

A folder of the cache holds those of a few thousand texts of a source: ``vectors.npy``, float16, of
unit length. It is named by all that they depend on: the teacher, the file, the rows, how they are
read. Of a run that was killed only the last folder is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16
from torch import Tensor

from tercet import distributed
from tercet.data.batches.order import BatchRows
from tercet.data.files.sources import Source
from tercet.errors import StorageError
from tercet.files.arrays import mapped_array
from tercet.files.artifacts import KeptResults
from tercet.files.progress import Bars, bar
from tercet.models.embedder import Embedder
from tercet.models.zoo.zoo import cache_folder
from tercet.types import ReadAs, Role

SHARD: Final = 4096  # texts of a folder
_ARRAY: Final = "vectors"
_VERSION: Final = 1  # raise it when files change, or the same teacher gives other vectors


def role_of_row(row: int, read_as: ReadAs) -> Role:
    """Return how the text of a row is read; that of an odd row is a query if ``both`` are."""
    if read_as == "both":
        return "query" if row % 2 else "document"
    return read_as


@dataclass(frozen=True, slots=True, eq=False)
class TeacherVectors:
    """The vectors of all texts of some sources."""

    shards: Sequence[Sequence[Path]]  # of each source, the files with ``SHARD`` rows each
    dim: int

    def of(self, rows: BatchRows) -> Float[Tensor, "texts dim"]:
        """Return the vectors of these rows in float32."""
        found = np.empty((len(rows), self.dim), np.float32)
        places = np.stack([rows.source.astype(np.int64), rows.row // SHARD], axis=1)
        for source, shard in np.unique(places, axis=0).tolist():
            here = (places == (source, shard)).all(axis=1)
            values = mapped_array(self.shards[source][shard])
            found[here] = values[rows.row[here] - shard * SHARD]
        return torch.from_numpy(found)


def teacher_vectors(
    teacher: Embedder, sources: Sequence[Source], read_as: ReadAs, *, bars: Bars = bar
) -> TeacherVectors:
    """Return a teacher's vectors of all texts of some sources, after encoding what is missing.

    Several processes, which all call this, share the work; they need one cache folder.

    Raises:
        DataError: if a source has changed since it was opened.
        ModelError: if a vector contains NaN or infinity.
        StorageError: if the disk refuses, or the processes do not share the folder of the cache;
            TERCET_CACHE says where it is.
    """
    cache = KeptResults(cache_folder() / "teacher", _VERSION, teacher.fingerprint(), mapped=True)
    shards: list[list[Path]] = []
    for source in sources:
        starts = range(0, len(source), SHARD)
        keys = [(source.fingerprint, _task(teacher, source), read_as, start) for start in starts]
        own = list(zip(keys, starts, strict=True))[distributed.rank() :: distributed.world()]
        missing = [(key, start) for key, start in own if cache.find(*key) is None]
        if missing:
            with bars(f"teacher's vectors of {source.name}", len(source)) as advance:
                advance(distributed.world() * SHARD * (len(own) - len(missing)))
                for key, start in missing:
                    values = _encoded(teacher, source, start, read_as)
                    cache.keep({}, {_ARRAY: values}, *key)
                    advance(distributed.world() * len(values))
        distributed.barrier()  # after it, the folders of other processes are found
        if any(cache.find(*key) is None for key in keys):
            raise StorageError(cache_folder(), "vectors of another process are not there")
        shards.append([cache.path(*key) / f"{_ARRAY}.npy" for key in keys])
    return TeacherVectors(shards, teacher.dim)


def _task(teacher: Embedder, source: Source) -> str | None:
    """Return the task whose prompts the teacher puts before a source's texts, if it has any."""
    task = source.task or source.name
    return task if task in teacher.settings.task_prompts else None


def _encoded(
    teacher: Embedder, source: Source, start: int, read_as: ReadAs
) -> Float16[np.ndarray, "texts dim"]:
    rows = range(start, min(start + SHARD, len(source)))
    texts = [example.query for example in source.examples(rows)]
    roles = [role_of_row(row, read_as) for row in rows]
    found = np.empty((len(rows), teacher.dim), np.float16)
    for role in get_args(Role):
        here = [place for place, its in enumerate(roles) if its == role]
        if here:
            some = [texts[place] for place in here]
            vectors = torch.from_numpy(teacher.encode(some, role, task=_task(teacher, source)))
            found[here] = F.normalize(vectors, dim=1).numpy()
    return found
