"""Indexes that a server offers, by name: searched while they change, and changed in groups.

An index of the exact engine is open for reading only, so that other processes may write to it. When
its files have changed, they are opened in the background and take the place of the old ones, which
are freed when the last search in them is done. A writer is open only while a commit runs; changes
that arrive meanwhile share the next one.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeAlias, TypeVar

import torch

from tercet.errors import RecipeError, TercetError
from tercet.models.embedder import Embedder
from tercet.search.engine.engine import Engine, Record
from tercet.search.exact.exact_engine import ExactEngine
from tercet.search.indexing import document_batches
from tercet.search.opening import about_index, open_engine
from tercet.search.text_index import TextIndex
from tercet.serve.queue import Answer, Need
from tercet.serve.requests import RequestError
from tercet.serve.served import Prepared, ServedModel
from tercet.vectors import Vectors

T = TypeVar("T")
ModelOf: TypeAlias = Callable[[str, str, str], ServedModel]
"""A function of a model's source, the type of its weights, and its fingerprint."""
Read: TypeAlias = Callable[[ServedModel, Prepared, Sequence[Need]], Awaitable[Answer]]
"""A function that reads texts through the queue of a model and counts them."""

_WATCHED: Final = ("index.json", "exact/manifest.json")  # every change of an index replaces one
_PATIENCE: Final = 2.0  # seconds that a commit waits for another process
_RETRY: Final = 5  # seconds after which a change that was refused may be sent again

log = logging.getLogger("tercet")


@dataclass(slots=True)
class Upserted:
    """Numbers of documents that were encoded and unchanged, and ids of those that were cut."""

    encoded: int = 0
    unchanged: int = 0
    cut: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Change:
    """What a commit is to do, for the vectors of which settings, and who waits for its number."""

    work: Callable[[Engine], int]
    settings: Mapping[str, Any]
    done: asyncio.Future[int]


class ServedIndex:
    """An index with its model; its methods are called in the event loop.

    Raises:
        IndexFolderError: if it is not an index, is damaged, or its model has changed or is gone.
        RecipeError: if it is of Qdrant Edge, and another process has it open.
    """

    def __init__(self, name: str, folder: Path, model_of: ModelOf) -> None:
        self.name, self.folder = name, folder
        self.error: str | None = None  # of the last change that could not be taken over
        found: list[ServedModel] = []

        def load(source: str, precision: str) -> Embedder:
            fingerprint = about_index(folder).setting(folder, "fingerprint")
            found.append(model_of(source, precision, fingerprint))
            return found[0].embedder

        stamp = self._stamp()
        self._index = TextIndex(folder, load=load)
        self._read_at, self._seen = stamp, stamp
        self.loaded = datetime.now(UTC)
        self.model = found[0]
        self._readers: dict[str, Mapping[str, Any]] = {}  # of which settings each was checked
        engine = self._index.engine
        self._is_exact = isinstance(engine, ExactEngine)
        # Qdrant's engines are open once, for searches and changes.
        self._turn: AbstractContextManager[Any] = nullcontext() if self._is_exact else Lock()
        self._changing = Lock()  # held by a thread that opens or changes the index
        self._waiting: list[_Change] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def close(self) -> None:
        """Close it after the commit that runs."""
        with self._changing:
            self._index.close()

    # ---- reading ---------------------------------------------------------------------------------

    def opened(self) -> TextIndex:
        """Return the open index; if its files have changed, open them in the background."""
        if self._stamp() != self._seen:
            self._start("reload", self._reload_in_thread)
        return self._index

    async def run(self, work: Callable[[TextIndex], T]) -> T:
        """Do something with the open index in a thread."""
        opened = self.opened()

        def work_in_turn() -> T:
            with self._turn:
                return work(opened)

        return await asyncio.to_thread(work_in_turn)

    async def require_reader(self, opened: TextIndex, model: ServedModel) -> None:
        """Check that a model may read the questions; see :meth:`TextIndex.require_reader`.

        Raises:
            RequestError: 422 if it may not.
        """
        settings = opened.about.settings
        if model is self.model or self._readers.get(model.name) == settings:
            return
        try:
            await asyncio.to_thread(opened.require_reader, model.name, model.embedder)
        except RecipeError as error:
            raise RequestError(422, str(error), field="model") from error
        self._readers[model.name] = settings

    async def encode(
        self,
        opened: TextIndex,
        texts: Sequence[str],
        role: str,
        read: Read,
        model: ServedModel | None = None,
    ) -> tuple[Vectors, Prepared]:
        """Return the vectors of texts as the index has them, and what was read of them.

        ``model`` None takes the model of the index.
        """
        model = model or self.model
        prepared = await model.prepare(texts, role, task=opened.task)
        answer = await read(model, prepared, opened.kinds)
        vectors = answer.vectors()
        if "dense" in opened.kinds:
            dense = torch.from_numpy(model.dense(answer, opened.dims))
            vectors = replace(vectors, dense=dense)
        return vectors, prepared

    def matches(
        self, opened: TextIndex, weights: Mapping[int, float], records: Sequence[Record]
    ) -> list[list[dict[str, Any]]]:
        """Return the tokens that a query shares with records, best first, and where they are."""
        assert isinstance(opened.engine, ExactEngine), "others do not return their terms"
        there = opened.engine.term_weights([record.id for record in records], list(weights))
        read = self.model.embedder.tokenizer.bare([record.text for record in records])
        found: list[list[dict[str, Any]]] = []
        for shared, text in zip(there, read, strict=True):
            spans: dict[int, list[tuple[int, int]]] = {}
            for token, span in zip(text.ids, text.offsets, strict=True):
                if token in shared:
                    spans.setdefault(token, []).append(span)
            matches = [
                {
                    "token": self.model.vocabulary[token],
                    "query": weights[token],
                    "document": weight,
                    "product": weights[token] * weight,
                    "spans": spans.get(token, []),
                }
                for token, weight in shared.items()
            ]
            found.append(sorted(matches, key=lambda match: -match["product"]))
        return found

    async def fetch(self, ids: Sequence[str]) -> list[Record | None]:
        """Return the records of these ids; None for an unknown id."""
        return await self.run(lambda opened: opened.engine.fetch(ids))

    async def state(self) -> dict[str, Any]:
        """Return what the index holds and how it is."""
        opened = self.opened()
        stats = await self.run(lambda opened: opened.engine.stats())
        return {
            "name": self.name,
            "model": self.model.name,
            "engine": opened.about.engine,
            "documents": stats.records,
            "kinds": opened.kinds,
            "dims": opened.dims or self.model.embedder.dim,
            "task": opened.task,
            "precision": opened.about.settings["precision"],
            "weights": {kind: opened.weights.of(kind) for kind in opened.kinds},
            "disk_bytes": stats.disk_bytes,
            "complete": opened.about.complete,
            "loaded": self.loaded.isoformat(timespec="seconds"),
            "error": self.error,
        }

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Return what changes with every change of the folder, without reading a file."""
        return tuple(_stamp_of(self.folder / name) for name in _WATCHED)

    def _start(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Start work in the background, unless it runs."""
        if name not in self._tasks or self._tasks[name].done():
            self._tasks[name] = asyncio.ensure_future(work())

    async def _reload_in_thread(self) -> None:
        await asyncio.to_thread(self._reload_reported)

    def _reload_reported(self) -> None:
        """Take over what another process wrote; if that fails, keep what is open and say so."""
        with self._changing:
            stamp = self._stamp()
            try:
                self._reload()
            except Exception as error:
                if stamp == self._stamp():  # else the folder changed meanwhile: try again
                    self._seen, self.error = stamp, str(error)
                    known = isinstance(error, TercetError)
                    log.error("index %s stays: %s", self.name, error, exc_info=not known)

    def _reload(self) -> None:
        """Open what is on the disk now, and let searches use that.

        While another process has not finished an index, the complete one before it stays.
        """
        stamp = self._stamp()
        fresh = TextIndex(self.folder, load=lambda *_: self.model.embedder, like=self._index)
        if stamp[0] != _stamp_of(self.folder / _WATCHED[0]):
            return  # the description may be of one index and the vectors of the next
        if fresh.about.complete or not self._index.about.complete:
            self._index, self._read_at = fresh, stamp  # the last search in the old one frees it
            self.error, self.loaded = None, datetime.now(UTC)
        self._seen = stamp

    # ---- changing --------------------------------------------------------------------------------

    async def upsert(self, records: Sequence[Record], read: Read) -> Upserted:
        """Add or replace documents; return when they are on the disk and found by searches.

        Unchanged ones are not encoded. Many documents are several commits, and after an error those
        before it are there.

        Raises:
            RequestError: 409 if the index has become another one, 503 if another process writes.
        """
        done = Upserted()
        for batch in document_batches(records, lambda record: len(record.text)):
            new = batch
            if self._read_at == self._stamp():
                there = await self.fetch([record.id for record in batch])
                new = [record for record, old in zip(batch, there, strict=True) if record != old]
            done.unchanged += len(batch) - len(new)
            if new:
                done.cut += await self._upsert(new, read)
                done.encoded += len(new)
        return done

    async def _upsert(self, records: list[Record], read: Read) -> list[str]:
        opened = self.opened()
        texts = [record.text for record in records]
        vectors, prepared = await self.encode(opened, texts, "document", read)

        def upsert(engine: Engine) -> int:
            engine.upsert(records, vectors)
            return len(records)

        await self._change(upsert, opened.about.settings)
        return [record.id for record, cut in zip(records, prepared.cut, strict=True) if cut]

    async def delete(self, ids: Sequence[str]) -> int:
        """Remove documents; return how many there were when that is on the disk.

        Raises:
            RequestError: 503 if another process writes.
        """
        settings = self.opened().about.settings
        return await self._change(lambda engine: engine.delete(ids), settings)

    async def _change(self, work: Callable[[Engine], int], settings: Mapping[str, Any]) -> int:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Change(work, settings, done))
        self._start("commit", self._commit_all)
        return await done

    async def _commit_all(self) -> None:
        """Commit what waits, and what comes while that runs."""
        while self._waiting:
            changes, self._waiting = self._waiting, []
            changes = [change for change in changes if not change.done.done()]
            results = await asyncio.to_thread(self._commit, changes) if changes else ()
            for change, result in zip(changes, results, strict=True):
                if change.done.done():  # nobody waits any more
                    continue
                if isinstance(result, int):
                    change.done.set_result(result)
                else:
                    change.done.set_exception(result)

    def _commit(self, changes: Sequence[_Change]) -> list[int | Exception]:
        """Do all changes, flush them, and let searches see them."""
        try:
            with self._changing, self._turn, self._writer() as engine:
                about = about_index(self.folder)
                if self._index.about.complete and not about.complete:
                    raise _changed("tercet index has not finished it; call it again")
                results = [_done(change, engine, about.settings) for change in changes]
                if any(isinstance(result, int) for result in results):
                    engine.flush()
                    if self._is_exact:
                        self._reload()
                return results
        except Exception as error:  # noqa: BLE001 (each request is answered with it)
            return [error] * len(changes)

    @contextmanager
    def _writer(self) -> Iterator[Engine]:
        if not self._is_exact:
            yield self._index.engine
            return
        with closing(self._open_writer()) as engine:
            yield engine

    def _open_writer(self) -> Engine:
        """Open the index for writing, when another process that writes a little is done."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                return open_engine(self.folder, like=self._index.engine)
            except RecipeError as error:
                if time.monotonic() > until:
                    log.warning("index %s: %s", self.name, error)
                    raise RequestError(
                        503,
                        f"another process, such as tercet index, is writing to the index "
                        f"{self.name}; send this again when it is done",
                        retry_after=_RETRY,
                    ) from error
            time.sleep(0.02)


def _done(change: _Change, engine: Engine, settings: Mapping[str, Any]) -> int | Exception:
    """Do one change; an error concerns its own request only."""
    if change.settings != settings:
        return _changed(
            "it was built again with another model or other settings; send this again when the "
            "server has loaded it, or restart the server if GET /v1/indexes reports an error"
        )
    try:
        return change.work(engine)
    except TercetError as error:
        return error


def _changed(what: str) -> RequestError:
    return RequestError(409, f"the index has changed: {what}", retry_after=_RETRY)


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


class Indexes:
    """The open indexes of a server; the first is taken where a request names none."""

    def __init__(self, indexes: Sequence[ServedIndex] = ()) -> None:
        self.by_name = {index.name: index for index in indexes}

    def __iter__(self) -> Iterator[ServedIndex]:
        return iter(self.by_name.values())

    def find(self, name: str | None) -> ServedIndex:
        """Return the index of a name.

        Raises:
            RequestError: 404 for an unknown name, or if there is no index.
        """
        if not self.by_name:
            raise RequestError(
                404,
                "this server has no index; make one with: tercet index FILE --model MODEL --out "
                "FOLDER, and start the server with: tercet serve --index FOLDER",
                field="index",
            )
        if name is None:
            return next(iter(self))
        if name not in self.by_name:
            known = ", ".join(self.by_name)
            raise RequestError(
                404, f'no index is named "{name}"; there are: {known}', field="index"
            )
        return self.by_name[name]

    def close(self) -> None:
        """Close all of them."""
        for index in self:
            index.close()


def open_indexes(folders: Mapping[str, Path], model_of: ModelOf) -> Indexes:
    """Open index folders, each with its model.

    Raises:
        IndexFolderError: if one is not an index, is damaged, or its model has changed or is gone.
    """
    found: list[ServedIndex] = []
    try:
        for name, folder in folders.items():
            found.append(ServedIndex(name, folder, model_of))
    except BaseException:
        Indexes(found).close()
        raise
    return Indexes(found)
