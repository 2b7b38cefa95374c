"""Exact search: every document is scored by inner product, in blocks that fit in memory.

The oracle for every other engine, and the engine of choice up to some ten thousand documents.
Equal scores are ranked by lower document row, with every block size and every library.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from tercet.errors import DataError, IndexFolderError, MissingExtraError, ModelError
from tercet.files import recover_folder, replacing_folder

_QUERY_BLOCK: Final = 256  # with 16,384 documents a block: 16 MB of scores
_ROWS_PER_GROUP: Final = 512  # documents that are read together for the sake of one hit
_VERSION: Final = 1  # of the index folder; a reader refuses any other
_BROKEN_MODEL: Final = "the model is broken, or it was run in a precision too low for it"
_SETTINGS, _VECTORS, _DOCUMENTS = "index.json", "vectors.npy", "documents.parquet"


@dataclass(frozen=True, slots=True)
class Hits:
    """The best documents of each query, best first."""

    scores: Float32[np.ndarray, "queries ranks"]
    rows: Int64[np.ndarray, "queries ranks"]


def top_k(
    queries: Float[np.ndarray, "queries dim"],
    docs: Float[np.ndarray, "docs doc_dim"],
    k: int,
    *,
    block: int = 16_384,
    use_faiss: bool | None = None,
) -> Hits:
    """The ``k`` documents of largest inner product with each query; all of them if ``k`` is more.

    ``docs`` may be a memory-mapped file larger than RAM: it is read in blocks of ``block`` rows.
    ``use_faiss`` None takes faiss where it is installed and measured to be faster (its kernels
    run at the speed of the matrix product); both ways rank equal scores by lower row. Vectors
    are compared in float32; scores of a document may differ in the last bit between the two.

    Raises:
        ModelError: when queries and documents differ in width, or hold NaN. (A document with NaN
            among good ones is not looked for, which would cost a search: ``build`` does that.)
        MissingExtraError: when faiss is asked for and not installed.
    """
    _check(queries, docs)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    k = min(k, len(docs))
    if not len(queries) or k < 1:
        shape = (len(queries), max(k, 0))
        return Hits(np.zeros(shape, np.float32), np.zeros(shape, np.int64))
    if use_faiss is None:
        use_faiss = find_spec("faiss") is not None and _faiss_is_faster(len(queries), docs)
    search = _by_faiss if use_faiss else _by_blocks
    hits = search(queries, docs, k, block)
    if np.isnan(hits.scores).any() or (hits.rows < 0).any():
        raise ModelError(f"the documents' vectors hold NaN; {_BROKEN_MODEL}")
    return hits


def _check(queries: np.ndarray, docs: np.ndarray) -> None:
    if queries.shape[1] != docs.shape[1]:
        raise ModelError(
            f"queries have {queries.shape[1]} dimensions and documents {docs.shape[1]}; "
            "embed both with the same model and the same number of dimensions"
        )
    finite = np.isfinite(queries).all(axis=1)
    if not finite.all():
        raise ModelError(
            f"the vector of query {int(finite.argmin())} holds NaN or infinity; {_BROKEN_MODEL}"
        )


def _by_blocks(queries: np.ndarray, docs: np.ndarray, k: int, block: int) -> Hits:
    found = [
        _search_block(queries[start : start + _QUERY_BLOCK], docs, k, block)
        for start in range(0, len(queries), _QUERY_BLOCK)
    ]
    return Hits(np.concatenate([h.scores for h in found]), np.concatenate([h.rows for h in found]))


def _search_block(queries: np.ndarray, docs: np.ndarray, k: int, block: int) -> Hits:
    best = torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(docs), block):
        part = np.asarray(docs[start : start + block], dtype=np.float32)
        scores = torch.from_numpy(part @ queries.T).T  # [queries, block]
        new, columns = largest(scores, k)
        # Earlier blocks stand to the left: at equal scores a lower column is a lower row.
        merged = torch.cat([best[0], new], dim=1)
        rows = torch.cat([best[1], columns + start], dim=1)
        top, columns = largest(merged, k)
        best = top, rows.gather(1, columns)
    return Hits(best[0].numpy(), best[1].numpy())


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row and their columns; the lower column first among equals.

    ``torch.topk`` picks any of several equal values. Whether that mattered shows in the value
    after the last: only if it equals the last one was there a choice, and that row is sorted.
    """
    k = min(k, scores.shape[1])
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    had_choice = values[:, k - 1] == values[:, k] if values.shape[1] > k else None
    columns = columns[:, :k].sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if had_choice is not None and had_choice.any():
        sure, order = scores[had_choice].sort(dim=1, descending=True, stable=True)
        values[had_choice], columns[had_choice] = sure[:, :k], order[:, :k]
    return values, columns


def _faiss_is_faster(queries: int, docs: np.ndarray) -> bool:
    """Whether faiss beats our blocks, as measured with faiss 1.15 and one thread.

    Up to three queries its direct kernel wins, by 3 for one query. From 128,000 query values on
    it takes the matrix product and selects while the scores are warm, and wins by 1.2 to 1.8.
    In between it runs the direct kernel query by query, and takes up to 4 times as long as we do.
    """
    if docs.dtype != np.float32 or not docs.flags.c_contiguous:
        return False  # faiss would copy all of it
    return queries <= 3 or queries * docs.shape[1] >= 128_000


def _by_faiss(queries: np.ndarray, docs: np.ndarray, k: int, block: int) -> Hits:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("search by faiss", "faiss") from error
    docs = np.ascontiguousarray(docs, dtype=np.float32)
    wanted = min(k + 1, len(docs))  # one more, to see whether the last place was a choice
    scores, rows = faiss.knn(queries, docs, wanted, metric=faiss.METRIC_INNER_PRODUCT)
    had_choice = _ends_in_a_tie(scores, k)
    order = np.lexsort((rows[:, :k], -scores[:, :k]), axis=1)
    hits = Hits(
        np.take_along_axis(scores[:, :k], order, axis=1),
        np.take_along_axis(rows[:, :k], order, axis=1).astype(np.int64),
    )
    if had_choice.any():
        sure = _by_blocks(queries[had_choice], docs, k, block)
        hits.scores[had_choice], hits.rows[had_choice] = sure.scores, sure.rows
    return hits


def _ends_in_a_tie(scores: np.ndarray, k: int) -> Bool[np.ndarray, "queries"]:
    if scores.shape[1] <= k:
        return np.zeros(len(scores), dtype=np.bool_)
    return scores[:, k - 1] == scores[:, k]


@dataclass(frozen=True, slots=True)
class Hit:
    """A document that was found."""

    id: str
    score: float
    title: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class ExactIndex:
    """Vectors and texts in a folder: ``vectors.npy``, ``documents.parquet``, ``index.json``.

    Vectors are mapped into memory and texts are read for the hits alone, so that opening is
    instant and an index may be larger than RAM. It may be searched from several threads.
    """

    vectors: Float32[np.ndarray, "docs dim"]
    settings: Mapping[str, Any]  # what the vectors were made with: model, fingerprint, task
    folder: Path
    documents: pq.ParquetFile
    _reading: Any = field(default_factory=Lock)

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def build(
        cls,
        folder: Path | str,
        *,
        vectors: np.ndarray | Iterable[np.ndarray],
        documents: Iterable[tuple[str, str, str]],
        settings: Mapping[str, Any],
    ) -> "ExactIndex":
        """Write an index of ``(id, title, text)`` documents and their vectors, and open it.

        ``vectors`` is one array or blocks of rows in the order of the documents; neither they
        nor the documents need fit in memory (all documents are read before the first block).
        The folder appears when it is complete; until then an older index in it stays in use.

        Raises:
            DataError: when there is no document, two share an id, or vectors are more or fewer.
            ModelError: when a vector is not finite, or blocks differ in width.
            IndexFolderError: when the folder holds something that is not an index.
            StorageError: when the disk refuses.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / _SETTINGS).is_file() and _holds_anything(folder):
            raise IndexFolderError(
                f"{folder}: is not an index and would be overwritten; choose another folder"
            )
        blocks = iter([vectors] if isinstance(vectors, np.ndarray) else vectors)
        with replacing_folder(folder) as fresh:
            count = _write_documents(fresh / _DOCUMENTS, documents)
            if count == 0:
                raise DataError("documents", None, "there are none; give at least one to index")
            with (fresh / _VECTORS).open("wb") as file:
                rows, dim = _write_vectors(file, blocks)
            if rows != count:
                raise DataError("documents", None, f"{count} documents but {rows} vectors")
            about = {"version": _VERSION, "dim": dim, "count": count, "settings": dict(settings)}
            (fresh / _SETTINGS).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path | str) -> "ExactIndex":
        """Open an index folder.

        Raises:
            IndexFolderError: when it is not one, is incomplete, or its files disagree.
        """
        folder = Path(folder)
        recover_folder(folder)
        about = _read_settings(folder)
        try:
            vectors = np.load(folder / _VECTORS, mmap_mode="r", allow_pickle=False)
            documents = pq.ParquetFile(folder / _DOCUMENTS)
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            raise _broken(folder, str(error)) from error
        if vectors.shape != (about["count"], about["dim"]) or vectors.dtype != np.float32:
            raise _broken(folder, f"{_VECTORS} is {vectors.dtype} {list(vectors.shape)}")
        if documents.metadata.num_rows != about["count"]:
            raise _broken(folder, f"{_DOCUMENTS} has {documents.metadata.num_rows} rows")
        if documents.schema_arrow.names != ["id", "title", "text"]:
            raise _broken(folder, f"{_DOCUMENTS} has columns {documents.schema_arrow.names}")
        return cls(vectors, about["settings"], folder, documents)

    def setting(self, name: str) -> Any:
        """What the index was made with.

        Raises:
            IndexFolderError: when the index does not say.
        """
        if name not in self.settings:
            raise IndexFolderError(
                f"{self.folder}: does not say with which {name} it was made; "
                "build it again with: tercet index"
            )
        return self.settings[name]

    def require(self, expected: Mapping[str, Any]) -> None:
        """Check that the index was made with these settings, such as the model's fingerprint.

        Raises:
            IndexFolderError: naming the first setting that differs.
        """
        for name, value in expected.items():
            if self.settings.get(name) != value:
                raise IndexFolderError(
                    f"{self.folder}: was built with {name} {self.settings.get(name)!r}, not "
                    f"{value!r}; search it with what it was built with, or build it again"
                )

    def search(self, queries: Float[np.ndarray, "queries dim"], k: int) -> list[list[Hit]]:
        """The ``k`` best documents of each query, best first; equal scores by order of building.

        Raises:
            ModelError: when the queries have not the width of the index.
        """
        hits = top_k(queries, self.vectors, k)
        texts = self._read(np.unique(hits.rows))
        return [
            [
                Hit(id=texts[row][0], score=score, title=texts[row][1], text=texts[row][2])
                for score, row in zip(scores, rows, strict=True)
            ]
            for scores, rows in zip(hits.scores.tolist(), hits.rows.tolist(), strict=True)
        ]

    def _read(self, rows: np.ndarray) -> dict[int, tuple[str, str, str]]:
        """The documents of these rows; each row group that holds one is read once."""
        metadata = self.documents.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        group_of = np.searchsorted(starts, rows, side="right") - 1
        found: dict[int, tuple[str, str, str]] = {}
        for group in np.unique(group_of).tolist():
            wanted = rows[group_of == group]
            with self._reading:
                table = self.documents.read_row_group(group)
            columns = table.take(pa.array(wanted - starts[group])).to_pydict()
            texts = zip(columns["id"], columns["title"], columns["text"], strict=True)
            found.update(zip(wanted.tolist(), texts, strict=True))
        return found


def _holds_anything(folder: Path) -> bool:
    return not folder.is_dir() or any(folder.iterdir())


def _write_documents(path: Path, documents: Iterable[tuple[str, str, str]]) -> int:
    """Write them in row groups; how many there were."""
    schema = pa.schema([(name, pa.string()) for name in ("id", "title", "text")])
    seen: set[str] = set()
    rest = iter(documents)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rest, _ROWS_PER_GROUP)):
            for number, (name, _, _) in enumerate(group, start=len(seen) + 1):
                if name in seen:
                    raise DataError(
                        "documents", number, f"id {name!r} occurs twice; give each its own"
                    )
                seen.add(name)
            columns = [list(column) for column in zip(*group, strict=True)]
            writer.write_table(pa.table(columns, schema=schema))
    return len(seen)


def _write_vectors(file: BinaryIO, blocks: Iterator[np.ndarray]) -> tuple[int, int]:
    """Write a .npy file block by block; rows and width.

    numpy leaves room in the header for the number of rows to grow, so it is written last.
    """
    rows, dim, start = 0, 0, 0
    for block in blocks:
        if start == 0:
            dim = block.shape[1]
            start = _write_header(file, rows, dim)
        if block.shape[1] != dim:
            raise ModelError(f"vectors of {dim} and of {block.shape[1]} dimensions in one index")
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            worst = rows + int(finite.argmin())
            raise ModelError(
                f"the vector of document {worst} holds NaN or infinity; {_BROKEN_MODEL}"
            )
        file.write(np.ascontiguousarray(block, dtype="<f4").data)
        rows += len(block)
    file.seek(0)
    assert _write_header(file, rows, dim) == start or start == 0, "the header has grown"
    return rows, dim


def _write_header(file: BinaryIO, rows: int, dim: int) -> int:
    """Write the header of a float32 array; where its data begin."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _read_settings(folder: Path) -> dict[str, Any]:
    """What ``index.json`` says, with all its fields in place."""
    try:
        about = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "is not an index" if folder.exists() else "no such folder"
        raise IndexFolderError(f"{folder}: {what}; build one with: tercet index") from error
    except (OSError, ValueError) as error:
        raise _broken(folder, f"{_SETTINGS} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("version") != _VERSION:
        raise _broken(folder, f"{_SETTINGS} is not of version {_VERSION}")
    kinds = {"dim": int, "count": int, "settings": dict}
    for name, kind in kinds.items():
        if not isinstance(about.get(name), kind):
            raise _broken(folder, f'{_SETTINGS} has no "{name}"')
    return about


def _broken(folder: Path, problem: str) -> IndexFolderError:
    return IndexFolderError(
        f"{folder}: the index is damaged ({problem}); build it again with: tercet index"
    )
