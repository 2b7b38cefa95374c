"""What the verb ``eval`` measures models on: a set of any sort, and what is asked of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tercet.errors import RecipeError
from tercet.files.console import say
from tercet.rank.quantized import Precision
from tercet.vectors import KINDS, Kind, Weights

if TYPE_CHECKING:
    from tercet.evaluate.measures.by_kind import KindsResult
    from tercet.evaluate.measures.retention import Retained


@dataclass(frozen=True, slots=True)
class Compared:
    """A set, and how models are measured on it."""

    what: str  # it holds
    metrics: Sequence[str]
    measure: Callable[..., Mapping[str, Any]]  # by name: the model's, or those of its kinds
    by_words: Callable[[], Mapping[str, Any]]
    minus: Callable[[Any, Any, str, int], Any] = lambda it, other, metric, seed: it.minus(
        other, metric, seed=seed
    )
    retrieval: bool = False
    notes: dict[str, Any] = field(default_factory=dict)  # by model: how its kinds were searched


@dataclass(frozen=True, slots=True)
class ByKinds:
    """What a user wants of a model's vectors; None: the usual."""

    kinds: tuple[Kind, ...] | None = None
    weights: Weights | None = None
    protocol: Literal["exact", "paper", "reference"] | None = None
    precision: Precision | None = None  # of documents' dense vectors


def open_set(
    data: Path,
    *,
    task: str | None,
    split: str | None,
    per_label: int | None,
    seed: int,
    by_kinds: ByKinds,
) -> Compared:
    """The set of a file or folder, of whichever sort it is.

    Raises:
        DataError: when it is none.
        RecipeError: when it is no retrieval set, and something is wanted of kinds of vectors; or
            no folder, and a split is wanted.
    """
    from tercet.data.files.labelled import is_labelled_file
    from tercet.data.files.similarity import is_similarity_file

    if split is not None and not data.is_dir():
        raise RecipeError(f"{data}: --split is of a folder, and this is none; leave it out")
    similar = not data.is_dir() and is_similarity_file(data)
    labelled = not similar and not data.is_dir() and is_labelled_file(data)
    if (similar or labelled) and by_kinds != ByKinds():
        raise RecipeError(
            f"{data}: is no retrieval set, so --kinds, --weights and --protocol say nothing of it, "
            "and its texts are not stored in codes; leave them out"
        )
    if similar:
        return _similarity(data)
    return _labels(data, per_label, seed) if labelled else _retrieval(data, task, split, by_kinds)


def _retrieval(data: Path, task: str | None, split: str | None, wanted: ByKinds) -> Compared:
    from tercet.evaluate.measures.bm25 import Split, by_tokens_of
    from tercet.evaluate.measures.prompts import task_names
    from tercet.evaluate.measures.retention import measure_coded
    from tercet.evaluate.measures.retrieval import (
        measure,
        measure_bm25,
        measure_kinds,
        tuned_weights,
    )
    from tercet.evaluate.report.intervals import paired_difference
    from tercet.evaluate.sets.retrieval_set import RetrievalSet

    if data.is_dir():
        examined = RetrievalSet.from_folder(data, split)
    else:
        examined = RetrievalSet.from_examples(data)
    splits: dict[str, Split] = {}
    notes: dict[str, Any] = {}

    def measured(name: str, embedder: Any, **how: Any) -> dict[str, Any]:
        if wanted.precision is not None:
            _require_dense(name, embedder.kinds, wanted)
            found = measure_coded(embedder, examined, wanted.precision, progress=True, **how)
            notes[name] = _coded(name, found)
            return {name: found.result}
        if embedder.kinds == ("dense",) and (wanted.kinds is None or notes):
            _say_idle(name, embedder.kinds, wanted)
            return {name: measure(embedder, examined, progress=True, **how).result}
        tasks = (task,) if task else task_names(data, examples=not data.is_dir())
        found = measure_kinds(
            embedder,
            examined,
            kinds=wanted.kinds,
            weights=wanted.weights or tuned_weights(embedder.settings, tasks),
            protocol=wanted.protocol,
            progress=True,
            **how,
        )
        notes[name] = _noted(name, found)
        _say_idle(name, [kind for kind in KINDS if kind in found.results], wanted)
        splits[f"BM25, tokens of {name}"] = by_tokens_of(embedder)
        return {f"{name} {kind}": result for kind, result in found.results.items()}

    def by_words() -> dict[str, Any]:
        own = {name: measure_bm25(examined, split) for name, split in splits.items()}
        return {"BM25": measure_bm25(examined), **own}

    return Compared(
        f"{len(examined.queries):,} queries, {len(examined.documents):,} documents",
        examined.metrics,
        measured,
        by_words,
        minus=lambda it, other, metric, seed: paired_difference(
            it.scores[metric], other.scores[metric], seed=seed
        ),
        retrieval=True,
        notes=notes,
    )


def _require_dense(name: str, kinds: Sequence[Kind], wanted: ByKinds) -> None:
    """Codes are of dense vectors, so a user has to want these alone."""
    if wanted.weights is not None or wanted.protocol is not None:
        raise RecipeError(
            f"--precision {wanted.precision} is of dense vectors alone; leave out --weights and "
            "--protocol"
        )
    if (wanted.kinds or tuple(kinds)) != ("dense",):
        raise RecipeError(
            f"{name}: --precision {wanted.precision} is of dense vectors, and "
            f"{', '.join(wanted.kinds or kinds)} are asked for; add --kinds dense"
        )


def _coded(name: str, found: "Retained") -> dict[str, Any]:
    """How documents were stored: said, and for the record."""
    how = f"documents in {found.stored}, {found.bytes:,} bytes each, queries as they are"
    if found.limit is not None:
        origin = "learned from these documents, not from queries; keep one with tercet calibrate"
        how += f"; range {found.limit:.4f}, {origin if found.learned else 'kept with the model'}"
    say(f"{name}: {how}")
    record = {"stored": found.stored, "bytes": found.bytes, "dims": found.dims}
    return record | {"limit": found.limit, "learned_here": found.learned}


def _noted(name: str, found: "KindsResult") -> dict[str, Any]:
    """How a model's kinds were searched and how many terms there are: said, and for the record."""
    weights = ", ".join(f"{k} {found.weights.of(k):g}" for k in KINDS if k in found.results)
    say(f"{name}: {found.how()}; weights: {weights}")
    for role, counts in found.terms.items():
        say(f"{name}: {role} terms: {counts}")
    return {"protocol": found.protocol, "weights": found.weights, "terms": dict(found.terms)}


def _say_idle(name: str, kinds: Sequence[Kind], wanted: ByKinds) -> None:
    """Say which flags change nothing for a model that is measured by one kind of vectors."""
    if len(kinds) > 1:
        return
    given = {
        "--kinds": wanted.kinds is not None and wanted.kinds != tuple(kinds),
        "--weights": wanted.weights is not None,
        "--protocol": wanted.protocol is not None and "sparse" not in kinds,
    }
    if idle := [flag for flag, is_idle in given.items() if is_idle]:
        change = "change" if len(idle) > 1 else "changes"
        say(f"{name}: measured by {kinds[0]} vectors alone: {' and '.join(idle)} {change} nothing")


def _similarity(data: Path) -> Compared:
    from tercet.data.files.similarity import SimilaritySet
    from tercet.evaluate.measures.similarity import METRICS, measure_overlap, measure_similarity

    examined = SimilaritySet.from_file(data)
    return Compared(
        f"{len(examined.pairs):,} pairs of {len(examined.texts):,} texts",
        METRICS,
        lambda name, embedder, **how: {
            name: measure_similarity(embedder, examined, progress=True, **how)
        },
        lambda: {"word overlap": measure_overlap(examined)},
    )


def _labels(data: Path, per_label: int | None, seed: int) -> Compared:
    from tercet.evaluate.measures import labels
    from tercet.evaluate.sets.label_sets import ClusteringSet, read_label_set

    examined = read_label_set(data)
    if isinstance(examined, ClusteringSet):
        return Compared(
            f"{len(examined.rows.texts):,} texts, {len(examined.labels):,} labels",
            labels.CLUSTERING_METRICS,
            lambda name, embedder, **how: {
                name: labels.measure_clustering(embedder, examined, progress=True, **how)
            },
            lambda: {"TF-IDF": labels.measure_clustering_by_words(examined)},
        )
    few = examined.sampled(per_label, seed=seed)
    return Compared(
        f"{len(few.test.texts):,} texts, {len(few.labels):,} labels, learned from "
        f"{len(few.train.texts):,}",
        labels.METRICS,
        lambda name, embedder, **how: {
            name: labels.measure_classification(embedder, few, progress=True, **how)
        },
        lambda: {"TF-IDF": labels.measure_classification_by_words(few)},
    )
