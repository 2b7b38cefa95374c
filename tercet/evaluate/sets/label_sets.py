"""Sets of labelled texts: some to learn from and others to tell, or all of them to group."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64

from tercet.data.files.labelled import LabelledText, read_labelled_texts
from tercet.errors import DataError
from tercet.evaluate.report.intervals import Interval

TRAIN_TEXTS: Final = 10_000  # to learn from, at most; more cost minutes and move little
_CELLS: Final = 1 << 20  # of one block of draws: 8 MB an array

Draws: TypeAlias = Int64[np.ndarray, "draws texts"]
Statistic: TypeAlias = Callable[[Draws], Float64[np.ndarray, "draws"]]

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True, eq=False)
class LabelledRows:
    """Texts, and for each the place of its label among the names of its set."""

    texts: tuple[str, ...]
    labels: Int64[np.ndarray, "texts"]

    @property
    def used(self) -> Int64[np.ndarray, "_"]:
        """The labels that occur."""
        return np.unique(self.labels)

    @property
    def once(self) -> Draws:
        """Each text once, as a draw."""
        return np.arange(len(self.texts))[None]

    def take(self, rows: Int64[np.ndarray, "_"]) -> "LabelledRows":
        """These rows, in this order."""
        return LabelledRows(tuple(self.texts[row] for row in rows), self.labels[rows])


@dataclass(frozen=True, slots=True, eq=False)
class ClassificationSet:
    """Texts to learn labels from, and others whose labels are asked for."""

    name: str
    labels: tuple[str, ...]
    train: LabelledRows
    test: LabelledRows

    def sampled(
        self, per_label: int | None = None, *, most: int = TRAIN_TEXTS, seed: int = 0
    ) -> "ClassificationSet":
        """With fewer texts to learn from: so many of each label, and ``most`` of all, at most.

        The seed decides which. The test texts stay the same.
        """
        rows = np.random.default_rng(seed).permutation(len(self.train.texts))
        if per_label is not None:
            labels = self.train.labels[rows]
            of_each = [rows[labels == each][:per_label] for each in self.train.used]
            rows = rows[np.isin(rows, np.concatenate(of_each))]
        return replace(self, train=self.train.take(np.sort(rows[:most])))


@dataclass(frozen=True, slots=True, eq=False)
class ClusteringSet:
    """Texts that people have put into groups."""

    name: str
    labels: tuple[str, ...]
    rows: LabelledRows


def read_label_set(path: Path | str) -> ClassificationSet | ClusteringSet:
    """The set of a .jsonl or .parquet file with ``text`` and ``label`` a record.

    Where records have a ``split``, ``train`` is learned from and ``test`` is asked for (others are
    left out); without it, it is a set for clustering. Of several labels the first one counts, and
    a text without any is left out.

    Raises:
        DataError: at the first record that is no labelled text, naming its line; for a file in
            which some records have a split and some have none, or with fewer than two labels.
    """
    path = Path(path)
    records = [record for record in read_labelled_texts(path) if record.labels]
    names: dict[str, int] = {}
    splits = {record.split for record in records}
    if not splits - {None}:
        rows = _rows(records, names)
        _need_two(path, names, rows, "the texts have")
        return ClusteringSet(path.stem, tuple(names), rows)
    if None in splits:
        problem = 'some records have a "split" and some have none; give it to all of them'
        raise DataError(path, None, problem)
    parts = {name: [it for it in records if it.split == name] for name in ("train", "test")}
    for name, part in parts.items():
        if not part:
            raise DataError(path, None, f'has no record whose "split" is "{name}"; add some')
    train, test = (_rows(part, names) for part in parts.values())
    _need_two(path, names, train, "the train texts have")
    known = set(train.texts)
    twice = sum(text in known for text in test.texts)
    if twice:
        log.warning("%s: %d test texts stand among the train texts too", path, twice)
    return ClassificationSet(path.stem, tuple(names), train, test)


def counted(
    codes: Int64[np.ndarray, "texts"], drawn: Draws, kinds: int
) -> Int64[np.ndarray, "draws {kinds}"]:
    """How often each code comes up in each draw."""
    places = codes[drawn]
    places += kinds * np.arange(len(drawn))[:, None]
    return np.bincount(places.ravel(), minlength=len(drawn) * kinds).reshape(len(drawn), kinds)


def drawn_interval(
    rows: LabelledRows, figure: Statistic, resamples: int, seed: int, *, centred: bool = False
) -> Interval:
    """A figure of all texts, and the middle 95 % of what it is for texts drawn anew.

    ``centred`` draws are moved until their mean is the figure of all.
    """
    texts, random = len(rows.texts), np.random.default_rng(seed)
    found = np.empty(resamples)
    cells = (int(rows.labels.max()) + 1) ** 2  # labels times groups, where these are counted
    at_once = max(1, _CELLS // max(texts, cells))
    for start in range(0, resamples, at_once):
        part = found[start : start + at_once]
        part[:] = figure(random.integers(0, texts, (len(part), texts)))
    whole = float(figure(rows.once)[0])
    if centred:
        found += whole - found.mean()
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(whole, float(low), float(high), texts, resamples, seed)


def _rows(records: Iterable[LabelledText], names: dict[str, int]) -> LabelledRows:
    """The texts; a label that is new gets the next place among the names."""
    kept = list(records)
    labels = [names.setdefault(record.labels[0], len(names)) for record in kept]
    return LabelledRows(
        tuple(record.text for record in kept), np.array(labels, dtype=np.int64).reshape(-1)
    )


def _need_two(path: Path, names: dict[str, int], rows: LabelledRows, have: str) -> None:
    used = [list(names)[each] for each in rows.used]
    if len(used) < 2:
        held = f"one label only, {used[0]!r}" if used else "no label"
        raise DataError(path, None, f"{have} {held}; two are needed")
