"""Documents into an engine: batch by batch, each on the disk before the next is encoded.

Documents that are there with the same text and fields are skipped, so that a killed job resumes,
and a file that has grown costs only its new documents.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from tercet.data.files.documents import Document
from tercet.data.files.texts import evenly_spaced
from tercet.files.arrays import KeySet
from tercet.files.progress import bar
from tercet.kinds import KINDS, Kind
from tercet.models.embedder import Embedder
from tercet.rank import quantized
from tercet.rank.quantized import Ranges, Stored
from tercet.search.engine.engine import Engine, Record
from tercet.segments import Item, batches_within
from tercet.vectors import Vectors

DOCUMENTS_AT_ONCE: Final = 256  # a kill loses at most these
CHARACTERS_AT_ONCE: Final = 200_000  # long documents have many token vectors
SAMPLE: Final = 32  # documents that an estimate is made of
_LEARNED: Final = (512, 2_048)  # documents that codes are learned from, of few and of many
_SHARE: Final = 20  # learn from one of 20

Encode = Callable[[Sequence[str]], Vectors]


def settings_of(
    embedder: Embedder,
    *,
    model: str,
    kinds: Sequence[Kind],
    task: str | None = None,
    dims: int | None = None,
    precision: str = "float32",
) -> dict[str, Any]:
    """Return what an index must remember to encode queries as its documents were."""
    return {
        "model": model,
        "fingerprint": embedder.fingerprint(),
        "kinds": list(kinds),
        "task": task,
        "dims": dims,
        "precision": precision,
    }


@dataclass(frozen=True, slots=True)
class Indexed:
    """Numbers of documents that were encoded, unchanged and removed."""

    encoded: int
    unchanged: int
    removed: int


def index_documents(
    engine: Engine,
    documents: Iterable[Document],
    encode: Encode,
    *,
    total: int | None = None,
    keep: bool = False,
) -> Indexed:
    """Index documents; without ``keep``, remove all others.

    Raises:
        ModelError: when the vectors are not those of the engine, or are broken.
        StorageError: when the disk refuses; all batches before are there.
    """
    seen = KeySet()  # of hashes of ids
    encoded = removed = 0
    with bar("index", total) as advance:
        records = (Record(each.id, each.text, each.title, each.fields) for each in documents)
        for batch in document_batches(records, lambda record: len(record.text)):
            for record in batch:
                seen.add(hash(record.id))
            there = engine.fetch([record.id for record in batch])
            new = [record for record, old in zip(batch, there, strict=True) if record != old]
            if new:
                engine.upsert(new, encode([record.text for record in new]))
                engine.flush()
            encoded += len(new)
            advance(len(batch))
    if not keep and engine.stats().records > len(seen):
        gone = [record.id for record in engine.scan() if hash(record.id) not in seen]
        removed = engine.delete(gone)
    engine.optimize()
    engine.flush()
    return Indexed(encoded, len(seen) - encoded, removed)


def expected_bytes(
    documents: Iterable[Document], encode: Encode, stored: Stored = "float32"
) -> tuple[int, Mapping[Kind, int]]:
    """Return the number of documents, and the estimated bytes of their vectors by kind.

    The first ones are encoded; terms and token vectors grow with the number of characters.
    """
    rest = iter(documents)
    sample = [document.text for document in islice(rest, SAMPLE)]
    count, characters = len(sample), sum(map(len, sample))
    if not sample:
        return 0, {}
    sizes = bytes_of(encode(sample), stored)
    by_characters = 1 / max(characters, 1)
    for document in rest:
        count, characters = count + 1, characters + len(document.text)
    factors = {"dense": count / len(sample)}
    return count, {
        kind: round(size * factors.get(kind, characters * by_characters))
        for kind, size in sizes.items()
    }


def learned_ranges(documents: Iterable[Document], encode: Encode, count: int) -> tuple[Ranges, int]:
    """Learn the ranges of codes; return them, and from how many of ``count`` documents.

    A twentieth of all documents, between 512 and 2,048 of them, evenly spaced, since neighbours in
    a file are often alike.

    Raises:
        ModelError: when no two of their vectors differ.
    """
    most = min(max(_LEARNED[0], count // _SHARE), _LEARNED[1])
    texts = evenly_spaced((document.text for document in documents), most)
    dense = encode(texts).dense
    assert dense is not None, "codes are of dense vectors"
    return Ranges.learned(dense.numpy()), len(texts)


def bytes_of(vectors: Vectors, stored: Stored = "float32") -> dict[Kind, int]:
    """Return the bytes of vectors on disk by kind.

    A term takes 8 bytes, a number of a token vector 2, a dense vector 4 a number or what its codes
    take.
    """
    found: dict[Kind, int] = {}
    for kind in KINDS:
        if kind == "dense" and vectors.dense is not None:
            count, dims = vectors.dense.shape
            found[kind] = count * quantized.bytes_of(stored, dims)
        if kind == "sparse" and vectors.sparse is not None:
            found[kind] = 8 * len(vectors.sparse.merged().ids)
        if kind == "multi" and vectors.multi is not None:
            found[kind] = 2 * vectors.multi.vectors.numel()
    return found


def document_batches(
    documents: Iterable[Item], characters_of: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Cut documents or texts into batches whose vectors of every kind fit into memory."""
    return batches_within(
        documents, CHARACTERS_AT_ONCE, characters_of, most=DOCUMENTS_AT_ONCE, overshoot=True
    )
