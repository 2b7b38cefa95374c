"""Sets of labelled texts, for classification or clustering."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Int64

from tercet.data.files.inputs import local_path
from tercet.data.files.labelled import LabelledText, read_labelled_texts
from tercet.errors import DataError
from tercet.files.forms import bare_name

TRAIN_TEXTS: Final = 10_000  # to learn from, at most; more take minutes and change little

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True, eq=False)
class LabelledRows:
    """Texts, and for each the index of its label among the names of its set."""

    texts: tuple[str, ...]
    labels: Int64[np.ndarray, "texts"]

    @property
    def used(self) -> Int64[np.ndarray, "_"]:
        """The labels that occur."""
        return np.unique(self.labels)

    def take(self, rows: Int64[np.ndarray, "_"]) -> "LabelledRows":
        """Return these rows, in this order."""
        return LabelledRows(tuple(self.texts[row] for row in rows), self.labels[rows])


@dataclass(frozen=True, slots=True, eq=False)
class ClassificationSet:
    """Texts to learn labels from, and others whose labels are predicted."""

    name: str
    labels: tuple[str, ...]
    train: LabelledRows
    test: LabelledRows

    @property
    def size(self) -> str:
        """The number of texts and labels, for people."""
        return (
            f"{len(self.test.texts):,} texts, {len(self.labels):,} labels, "
            f"learned from {len(self.train.texts):,}"
        )

    def sampled(
        self, per_label: int | None = None, *, most: int = TRAIN_TEXTS, seed: int = 0
    ) -> "ClassificationSet":
        """Return the set with at most ``per_label`` train texts a label, and ``most`` altogether.

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

    @property
    def size(self) -> str:
        """The number of texts and labels, for people."""
        return f"{len(self.rows.texts):,} texts, {len(self.labels):,} labels"


def read_label_set(path: Path | str) -> ClassificationSet | ClusteringSet:
    """Read the set in a .jsonl or .parquet file whose records have ``text`` and ``label``.

    If records have a ``split``, labels are learned from ``train`` and predicted for ``test``
    (others are left out); without it, the set is for clustering. Of several labels the first one
    counts, and a text without labels is left out.

    Raises:
        DataError: at the first record that is not a labelled text, naming its line; for a file in
            which only some records have a split, or with fewer than two labels.
    """
    path = local_path(path)
    records = [record for record in read_labelled_texts(path) if record.labels]
    names: dict[str, int] = {}
    splits = {record.split for record in records}
    if not splits - {None}:
        rows = _rows(records, names)
        _need_two(path, names, rows, "the texts have")
        return ClusteringSet(bare_name(path), tuple(names), rows)
    if None in splits:
        problem = 'some records have a "split" and others do not; add it to all of them'
        raise DataError(path, None, problem)
    parts = {name: [it for it in records if it.split == name] for name in ("train", "test")}
    for name, part in parts.items():
        if not part:
            raise DataError(path, None, f'has no record whose "split" is "{name}"; add some')
    train, test = (_rows(part, names) for part in parts.values())
    _need_two(path, names, train, "the train texts have")
    known = set(train.texts)
    if twice := sum(text in known for text in test.texts):
        log.warning("%s: %d test texts are also train texts", path, twice)
    return ClassificationSet(bare_name(path), tuple(names), train, test)


def _rows(records: Sequence[LabelledText], names: dict[str, int]) -> LabelledRows:
    """Return the texts with their labels; a new label gets the next index among the names."""
    labels = [names.setdefault(record.labels[0], len(names)) for record in records]
    return LabelledRows(
        tuple(record.text for record in records), np.array(labels, dtype=np.int64).reshape(-1)
    )


def _need_two(path: Path, names: dict[str, int], rows: LabelledRows, have: str) -> None:
    used = [list(names)[each] for each in rows.used]
    if len(used) < 2:
        held = f"only one label, {used[0]!r}" if used else "no label"
        raise DataError(path, None, f"{have} {held}; at least two are needed")
