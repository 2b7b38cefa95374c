"""Where ``benchmarks/judged.py`` finds its sets and keeps its results, and the sets themselves."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

from tercet.data.files.beir import Folder, read_folder
from tercet.data.files.conll import UNLABELLED, LabelledSentence, read_labelled
from tercet.data.files.similarity import SimilaritySet
from tercet.evaluate.measures.latent_words import word_baselines, word_probe
from tercet.evaluate.report.intervals import Interval, pooled_interval
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.suite import EvaluationSet, as_evaluation_set, open_set
from tercet.files.artifacts import read_json
from tercet.metrics import Judgements
from tercet.models.embedder import Embedder
from tercet.training.plan import CHECKPOINT
from tercet.types import Example

DEBIAN: Final = Path(__file__).parents[1] / "examples/data"  # packages.LANG.parquet
DEV: Final = 100  # training claims of SciFact that choose settings, and are not trained on
SPLIT_SEED: Final = 0  # that draws them
DATA: Final = "data"  # the folder of files that cells write for later ones

Answers = dict[str, np.ndarray]  # of a model, by the name of the set


@dataclass(frozen=True)
class Place:
    """Where a run finds its sets and keeps its results."""

    sets: Path
    out: Path
    peer: str = ""  # the Python that has sentence-transformers

    def result(self, cell: str, seed: int) -> Path:
        """The file of a cell's answers."""
        return self.out / "cells" / f"{cell}.{seed}.json"

    def kept(self, cell: str, seed: int = 0) -> dict[str, Any] | None:
        """What a cell answered, with its facts; None if it has not been run."""
        path = self.result(cell, seed)
        return read_json(path) if path.exists() else None

    def facts(self, cell: str) -> dict[str, Any]:
        """The facts of a cell that has been run with seed 0."""
        kept = self.kept(cell)
        assert kept is not None, f"{cell} has to be run first"
        return kept["facts"]

    def model(self, cell: str, seed: int = 0) -> Path:
        """The folder of the training of a cell."""
        return self.out / "models" / f"{cell}.{seed}"

    def file(self, name: str, **numbers: Any) -> Path:
        """A file that a cell writes for later ones; the numbers that decide it are in its name."""
        path = self.out / DATA / name
        decided = "".join(f".{key}-{value}" for key, value in numbers.items())
        return path.with_name(f"{path.stem}{decided}{path.suffix}")

    def best(self, cells: Iterable[str], dev: str) -> str:
        """The cell whose mean on a dev set is the highest; of equal ones the first."""
        figures = {cell: self._dev(cell, dev) for cell in cells}
        return max(figures, key=figures.__getitem__)

    def _dev(self, cell: str, dev: str) -> float:
        kept = self.kept(cell)
        assert kept is not None, f"{cell} has to be run first"
        return opened(self, dev).figure(np.array(kept["answers"][dev]), 0).mean


@dataclass(frozen=True)
class Found:
    """What a cell answers, and the facts that stand beside it."""

    answers: Answers = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    same_as: str = ""  # the cell of several that was chosen, whose record this is


@dataclass(frozen=True)
class Job:
    """A cell that is being run with a seed."""

    place: Place
    cell: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where it trains."""
        return self.place.model(self.cell, self.seed)

    @property
    def was_begun(self) -> bool:
        """Whether an earlier process has trained a part of it, of which no minutes are known."""
        return (self.folder / "model").exists() or any(self.folder.rglob(CHECKPOINT))

    def clean(self, *, keep_model: bool) -> None:
        """Delete what the training has written, but for a model that later cells need."""
        if not keep_model:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Cell:
    """A model to train and measure."""

    name: str  # PART/NAME
    run: "Callable[[Job], Found]"
    minutes: float  # of one core, estimated
    needs: tuple[str, ...] = ()  # cells that come before
    seeds: int = 1
    keeps_model: bool = False  # for later cells
    is_best_of: bool = False  # seed 0 is the best one of the cells that it needs

    def estimate(self, seed: int) -> float:
        """CPU minutes that a seed takes."""
        return 0.1 if self.is_best_of and not seed else self.minutes


# ---- sets ----------------------------------------------------------------------------------------

SCIFACT: Final = "scifact"
SCIFACT_DEV: Final = "scifact dev"
WORDS: Final = "words/en"
STS: Final = {"en": "en.stsb", "ko": "ko.korsts", "ja": "ja.jsts"}
XQUAD: Final = ("de-en", "zh-en", "ru-en", "es-en", "ar-en")
TATOEBA: Final = ("ko-en", "de-en", "ja-en", "zh-en", "fr-en", "ru-en")
DEBIAN_TESTED: Final = {"en": 1_000, "ko": 500, "ko-en": 500}  # queries at most
ACROSS: Final = (
    *(f"xquad/{name}" for name in XQUAD),
    *(f"tatoeba/{name}" for name in TATOEBA),
    *(f"debian/{name}" for name in DEBIAN_TESTED),
)


@cache
def opened(place: Place, name: str) -> EvaluationSet:
    """The evaluation set of a name, such as ``xquad/de-en`` or ``sts/ko dev``."""
    kind, _, rest = name.partition("/")
    if name.startswith(SCIFACT):
        return as_evaluation_set(both_claims(place.sets), ())
    if kind == "words":
        return word_set(place.sets)
    if kind == "debian":
        pairs = debian_pairs(rest, "test")[: DEBIAN_TESTED[rest]]
        return as_evaluation_set(RetrievalSet.from_examples(pairs, name), ())
    if kind == "sts":
        lang, _, split = rest.partition(" ")
        path = place.sets / "sts" / f"{STS[lang]}.{split or 'test'}.jsonl"
        return as_evaluation_set(SimilaritySet.from_file(path), ())
    folder = place.sets / name
    return open_set(folder if folder.is_dir() else folder.with_suffix(".jsonl"))


def both_claims(sets: Path) -> RetrievalSet:
    """SciFact's claims of the dev set and then those of the test, so that one encoding does both.

    The dev set is drawn from the training claims.
    """
    found: dict[str, Folder] = {s: read_folder(sets / SCIFACT, s) for s in ("train", "test")}
    train, test = found["train"], found["test"]
    chosen = {**{name: train for name in dev_claims(train)}, **dict.fromkeys(test.queries, test)}
    return RetrievalSet(
        name=SCIFACT,
        queries=tuple(of.queries[name] for name, of in chosen.items()),
        query_ids=tuple(f"claim {name}" for name in chosen),
        documents=tuple(train.documents.values()),
        document_ids=tuple(train.documents),
        judgements=Judgements.of([of.grades[name] for name, of in chosen.items()]),
    )


def dev_claims(train: Folder) -> list[str]:
    """Ids of the training claims that are put aside, in the order of their file."""
    names = list(train.queries)
    drawn = np.random.default_rng(SPLIT_SEED).permutation(len(names))[:DEV]
    return [names[row] for row in sorted(drawn)]


def split_answers(answers: np.ndarray) -> Answers:
    """Divide the answers to all claims into those of the dev set and of the test."""
    return {SCIFACT_DEV: answers[:DEV], SCIFACT: answers[DEV:]}


@cache
def labelled(sets: Path) -> tuple[list[LabelledSentence], list[LabelledSentence]]:
    """Sentences that the probe learns from, and those that it is tested on."""
    return tuple(read_labelled(sets / "ud" / f"en_ewt-ud-{s}.conllu") for s in ("dev", "test"))  # pyright: ignore[reportReturnType]


def word_set(sets: Path) -> EvaluationSet:
    """Parts of speech: for each sentence how many words have the right label, and how many count.

    A linear probe on vectors of words; intervals are over sentences.
    """
    learn, test = labelled(sets)

    def answers(embedder: Embedder, _: str | None) -> np.ndarray:
        return tallies(test, word_probe(embedder, learn, test).predicted)

    def words() -> np.ndarray:
        return tallies(test, word_baselines(learn, test)[1].predicted)

    def share(sums: np.ndarray) -> np.ndarray:
        return sums[:, 0] / sums[:, 1]

    def minus(one: np.ndarray, other: np.ndarray, seed: int) -> Interval:
        both = np.concatenate([one, other], axis=1).astype(np.float64)
        return pooled_interval(both, lambda s: share(s) - share(s[:, 2:]), seed=seed)

    return replace(
        as_evaluation_set(SimilaritySet.of(WORDS, []), ()),  # of which nothing is used
        category="Classification",
        metrics=("accuracy",),
        baseline_name="label of the word",
        answers=answers,
        words=words,
        figure=lambda found, seed: pooled_interval(found.astype(np.float64), share, seed=seed),
        minus=minus,
    )


def tallies(test: Sequence[LabelledSentence], predicted: Sequence[Sequence[str]]) -> np.ndarray:
    """Of each sentence, the words that were labelled correctly, and those that have a label."""
    rows = [
        [sum(a == b for a, b in zip(it.labels, guessed, strict=False) if a != UNLABELLED), counted]
        for it, guessed in zip(test, predicted, strict=True)
        for counted in [sum(label != UNLABELLED for label in it.labels)]
    ]
    return np.array(rows, np.int64).reshape(-1, 2)


@cache
def debian_pairs(name: str, split: str) -> tuple[Example, ...]:
    """One-line and full descriptions of packages; of ``ko-en``: Korean line, English text."""
    of_query, _, of_document = name.partition("-")
    full = packages(of_document or of_query)
    return tuple(
        Example(row["short"], (full[key]["long"],), task=f"debian-{name}")
        for key, row in packages(of_query).items()
        if row["split"] == split and key in full
    )


@cache
def packages(lang: str) -> dict[str, dict[str, Any]]:
    """Descriptions of packages in a language, by their id."""
    rows = pq.read_table(DEBIAN / f"packages.{lang}.parquet").to_pylist()
    return {row["id"]: row for row in rows}


def split() -> dict[str, int]:
    """The numbers that decide which claims are trained on."""
    return {"dev": DEV, "seed": SPLIT_SEED}
