"""Documents indexed with a model, and questions answered from that index."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Final, Literal

import torch

from tercet.data.files.documents import Document
from tercet.errors import IndexFolderError, ModelError, RecipeError
from tercet.files.secrets import check_address
from tercet.kinds import Kind, Weights
from tercet.models.devices import find_device
from tercet.models.embedder import Embedder
from tercet.rank.quantized import Ranges
from tercet.search.engine.engine import Fusion, Hit, Weighted, Where
from tercet.search.exact.exact_engine import ExactEngine
from tercet.search.indexing import (
    Indexed,
    expected_bytes,
    index_documents,
    learned_ranges,
    settings_of,
)
from tercet.search.opening import (
    About,
    about_index,
    building,
    check_index_place,
    open_engine,
    require,
    stored_as,
)
from tercet.vectors import Vectors

_FEW: Final = 100  # documents; ranges learned from fewer may not suit later ones

Load = Callable[[str, str], Embedder]  # a model's name and the type of its weights
Documents = Callable[[], Iterable[Document]] | Sequence[Document]


def load_embedder(model: str, dtype: str) -> Embedder:
    """Load a model for encoding, frozen, on a GPU where there is one."""
    return Embedder.load(model, dtype=getattr(torch, dtype)).freeze().to(find_device())


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """Options of :func:`index`.

    Attributes:
        kinds: kinds of vectors to keep; None keeps all that the model makes.
        task: the task whose prompts and weights are used.
        dims: number of leading coordinates of dense vectors to keep; None keeps all.
        precision: "float32" or "bfloat16" for the model's weights; "int8", "int4", "binary" or
            "binary+int8" for the stored dense vectors.
        engine: "exact" scans all documents; "qdrant" uses a graph.
        url: address of a Qdrant server to store the vectors on.
        collection: name of the collection on that server.
        keep: keep documents of the index that are not among the given ones.
        fresh: discard an index that is in the folder already, once the new one is whole.
    """

    kinds: Sequence[Kind] | None = None
    task: str | None = None
    dims: int | None = None
    precision: str = "float32"
    engine: Literal["exact", "qdrant"] = "exact"
    url: str | None = None
    collection: str = "tercet"
    keep: bool = False
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class IndexReport:
    """Result of :func:`index`: documents in the index, what was done, and the vectors kept."""

    documents: int
    done: Indexed
    kinds: tuple[Kind, ...]
    dim: int


def index(
    documents: Documents,
    model: str,
    folder: Path | str,
    options: IndexOptions | None = None,
    *,
    load: Load = load_embedder,
    say: Callable[[str], None] = lambda line: None,
) -> IndexReport:
    """Encode documents and write an index folder that :func:`open_index` searches.

    A second call encodes only new or changed documents and removes those that are gone, so a call
    that was killed is resumed by the same call.

    Args:
        documents: a list of documents, or a function that reads them at each call.
        model: name of a packaged model, a model folder, or a hub id.
        folder: the index folder.
        options: see :class:`IndexOptions`.
        load: loads a model by its name and the type of its weights.
        say: receives lines about sizes and codes.

    Raises:
        DataError: if a document cannot be read.
        ModelError: if the model cannot be loaded.
        RecipeError: if the options do not fit the model or each other.
        StorageError: if the disk refuses; the batches written before are kept.

    Examples:
        >>> docs = [Document("1", "nginx serves files"), Document("2", "mpd plays music")]
        >>> index(docs, "minilm", "runs/index").documents
        2
    """
    options = options or IndexOptions()
    if options.url is not None and options.engine == "exact":
        raise RecipeError('url needs the engine "qdrant"; got the engine "exact"')
    if options.url is not None:
        check_address(options.url, "put the key into QDRANT_API_KEY", keeps_query=True)
    read: Callable[[], Iterable[Document]] = (
        documents if callable(documents) else partial(iter, documents)
    )
    check_index_place(Path(folder), [model], fresh=options.fresh)
    stored = stored_as(options.precision)
    embedder = load(model, options.precision if stored == "float32" else "float32")
    kinds = _kinds_to_keep(options, embedder.kinds)
    task, dims = options.task, options.dims

    def encode(texts: Sequence[str]) -> Vectors:
        return embedder.encode_vectors(texts, "document", kinds=kinds, task=task, dims=dims)

    count, sizes = expected_bytes(read(), encode, stored)
    parts = ", ".join(f"{kind} {readable_size(size)}" for kind, size in sizes.items())
    total = readable_size(sum(sizes.values()))
    say(f"{count:,} documents; their vectors will take about {total}: {parts}")
    made_with = {"model": model, "task": task, "dims": dims, "precision": options.precision}
    about = About(
        engine=options.engine if options.url is None else "cluster",
        url=options.url,
        collection=None if options.url is None else options.collection,
        settings=settings_of(embedder, kinds=kinds, **made_with),
    )
    width = dims or embedder.dim
    in_codes = stored != "float32" and about.engine == "exact" and count > 0
    learn = partial(learned_ranges, read(), encode, count)
    ranges = cache(partial(_ranges, embedder, width, learn, say))
    if in_codes and options.fresh:
        ranges()  # raises before the old index is replaced, where nothing can be learned
    with building(folder, about, fresh=options.fresh, say=say) as engine:
        if in_codes and isinstance(engine, ExactEngine) and not engine.is_settled:
            engine.settle(ranges())
        done = index_documents(engine, read(), encode, total=count, keep=options.keep)
        held = engine.stats().records
    return IndexReport(held, done, kinds, width)


def _kinds_to_keep(options: IndexOptions, made: Sequence[Kind]) -> tuple[Kind, ...]:
    chosen = tuple(options.kinds or made)
    if not set(chosen) <= set(made):
        raise RecipeError(
            f"kinds must be among {', '.join(made)}, which the model makes; got {', '.join(chosen)}"
        )
    if stored_as(options.precision) != "float32" and "dense" not in chosen:
        raise RecipeError(
            f"precision {options.precision} needs dense vectors; got the kinds {', '.join(chosen)}"
        )
    if options.dims is not None and "dense" not in chosen:
        raise RecipeError(f"dims is {options.dims}, and no dense vectors are kept; leave it out")
    return chosen


def _ranges(
    embedder: Embedder,
    width: int,
    learn: Callable[[], tuple[Ranges, int]],
    say: Callable[[str], None],
) -> Ranges:
    """Return the ranges that codes stand for: the model's for this width, or learned ones."""
    if width in embedder.settings.ranges:
        say(f"codes: by the ranges that the model keeps for {width} coordinates")
        return embedder.settings.ranges[width]
    found, count = learn()
    say(f"codes: learned from {count:,} of these documents, and kept with the index")
    if count < _FEW:
        say(
            f"{count} documents are few to learn codes from; give more, or keep ranges with the "
            f"model: tercet tune codes texts.jsonl --model MODEL --dims {width} --save"
        )
    return found


class TextIndex:
    """An index folder with its model: questions in, documents out.

    Use it in a ``with`` statement, or call :meth:`close`. Several processes may search one index of
    the exact engine at once.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        model: str | None = None,
        load: Load = load_embedder,
        like: "TextIndex | None" = None,
    ) -> None:
        """Open a folder; ``like`` is the same one opened before, to read only what is new.

        ``model`` reads the questions instead of the index's model, from which it was distilled.
        """
        self.folder = Path(folder)
        self.about = about = about_index(folder)
        names = ("model", "precision", "kinds", "task", "dims")
        own, precision, kinds, task, dims = (about.setting(folder, name) for name in names)
        weights = precision if stored_as(precision) == "float32" else "float32"
        try:
            self.embedder = load(model or own, weights)
        except ModelError as error:
            if model is not None:
                raise
            raise IndexFolderError(f"{folder}: its model cannot be loaded: {error}") from error
        if like is not None and like.embedder is self.embedder:
            self.fingerprint = like.fingerprint
        else:
            self.fingerprint = self.embedder.fingerprint()
        if model is None:
            require(folder, about, {"fingerprint": self.fingerprint})
        else:
            self.require_reader(model, self.embedder)
        self.kinds: tuple[Kind, ...] = tuple(kinds)
        self.task: str | None = task
        self.dims: int | None = dims
        tuned = self.embedder.settings.weights
        self.weights = tuned.get(task or "", tuned.get("", Weights()))
        self.engine = open_engine(
            folder, read_only=True, like=None if like is None else like.engine
        )

    def require_reader(self, model: str, embedder: Embedder) -> None:
        """Check that a model's vectors of questions can be compared with those of the index.

        Raises:
            RecipeError: unless it is the index's model, or was distilled from it and has what the
                index was made with.
        """
        folder, about = self.folder, self.about
        theirs, name = about.setting(folder, "fingerprint"), about.setting(folder, "model")
        own = self.fingerprint if embedder is self.embedder else embedder.fingerprint()
        if theirs == own:
            return
        settings = embedder.settings
        unchanged = own in settings.distilled_as
        if theirs not in settings.shares_space_with or not unchanged:
            raise RecipeError(
                f"{model} cannot search {folder}: it must be the index's model, {name}, or one "
                "that was distilled from it (tercet train distil), and both unchanged since"
            )
        kinds: Sequence[Kind] = about.setting(folder, "kinds")
        if others := [kind for kind in kinds if kind != "dense"]:
            raise RecipeError(
                f"{model} cannot search {folder}: it learned the dense vectors of {name} alone, "
                f"and the index has {' and '.join(others)} vectors; build one of dense vectors: "
                "tercet index --kind dense"
            )
        task: str | None = about.setting(folder, "task")
        if task is not None and task not in (*settings.task_prompts, *settings.prompts):
            raise RecipeError(
                f"{model} cannot search {folder}: the index was made for the task {task}, and the "
                "model has no prompt for it; build an index without --task"
            )

    def search(
        self,
        queries: Sequence[str],
        k: int = 5,
        *,
        fusion: Fusion | None = None,
        where: Where | None = None,
    ) -> list[list[Hit]]:
        """Return the ``k`` best documents of each query, best first.

        Args:
            queries: questions, none of them blank.
            k: number of hits for each query.
            fusion: how scores of several kinds are combined; None takes the weighted sum with the
                model's weights over 100 candidates of each kind.
            where: conditions by field: a document has one of the values of each.

        Raises:
            RecipeError: if a query is blank or not valid text.
        """
        check_texts(queries)
        vectors = self.embedder.encode_vectors(
            queries, "query", kinds=self.kinds, task=self.task, dims=self.dims
        )
        return self.nearest(vectors, k, fusion=fusion, where=where)

    def nearest(
        self,
        queries: Vectors,
        k: int = 5,
        *,
        fusion: Fusion | None = None,
        where: Where | None = None,
    ) -> list[list[Hit]]:
        """Return the ``k`` best documents of queries that are encoded already; see ``search``."""
        how = fusion or Weighted(weights=self.weights, candidates=100)
        return self.engine.search(queries, k, fusion=how, where=where)

    def close(self) -> None:
        """Close the engine's files."""
        self.engine.close()

    def __enter__(self) -> "TextIndex":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_index(
    folder: Path | str, *, model: str | None = None, load: Load = load_embedder
) -> TextIndex:
    """Open an index folder for searching, with the model that it was made with.

    Args:
        folder: the index folder.
        model: a model that reads the questions instead: a smaller one that was distilled from the
            index's model.
        load: loads a model by its name and the type of its weights.

    Raises:
        IndexFolderError: if it is not an index, is damaged, or its model has changed or is gone.
        RecipeError: if another process has it open, or ``model`` was not distilled from the one of
            the index.

    Examples:
        >>> with open_index("runs/index") as opened:
        ...     [hit.record.id for hit in opened.search(["a server for the web"], k=1)[0]]
        ['1']
    """
    return TextIndex(folder, model=model, load=load)


def check_texts(queries: Sequence[str]) -> None:
    """Raise RecipeError for a query that is blank or not valid text."""
    for query in queries:
        if not query.strip():
            raise RecipeError("a query is blank; say what to look for")
        try:
            query.encode()
        except UnicodeEncodeError as error:  # bytes that are not UTF-8 arrive as half characters
            raise RecipeError(
                f"query must be valid UTF-8; got {query!a}, wrong at position {error.start}"
            ) from error


def readable_size(count: int) -> str:
    """Return a number of bytes in a unit that leaves few digits."""
    size, units = float(count), ["bytes", "KB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:,.0f} {units[0]}"
