"""Pairs of texts with a similarity score given by people, to compare a model's cosines with."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64

from tercet.data.files.examples import SCORE, TEXT1, TEXT2, as_object, scored_texts
from tercet.data.files.inputs import local_path
from tercet.errors import DataError
from tercet.files.forms import bare_name
from tercet.files.records import FileRecord, begins_with, iter_records, parsed

BootstrapUnit: TypeAlias = Literal["pairs", "texts"]


@dataclass(frozen=True, slots=True, eq=False)
class SimilaritySet:
    """Pairs of texts and their scores; a higher score is more alike, on any scale."""

    name: str
    texts: tuple[str, ...]  # each once
    pairs: Int64[np.ndarray, "pairs 2"]  # places in ``texts``
    scores: Float64[np.ndarray, "pairs"]

    @classmethod
    def of(cls, name: str, scored: Iterable[tuple[str, str, float | int]]) -> "SimilaritySet":
        """Make a set from two texts and a score per pair. Equal texts are kept once."""
        rows: dict[str, int] = {}
        pairs, scores = [], []
        for first, second, score in scored:
            pairs.append([rows.setdefault(text, len(rows)) for text in (first, second)])
            scores.append(score)
        return cls(
            name=name,
            texts=tuple(rows),
            pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2),
            scores=np.array(scores, dtype=np.float64),
        )

    @classmethod
    def from_file(cls, path: Path | str) -> "SimilaritySet":
        """Read a file of records with ``text1``, ``text2`` and ``score``.

        Raises:
            DataError: at the first record that is not a scored pair, naming file and line, and
                if all scores are equal.
        """
        path, fields = local_path(path), (TEXT1, TEXT2, SCORE)
        records = iter_records(path, fields, needs=fields, known=())
        data = cls.of(bare_name(path), (parsed(path, record, _scored_pair) for record in records))
        if np.ptp(data.scores) == 0:
            raise DataError(
                path,
                None,
                f'every "score" is {data.scores[0]:g}; a correlation needs scores that differ',
            )
        return data

    @property
    def unit(self) -> BootstrapUnit:
        """What a bootstrap should resample: pairs, or texts if there are more pairs than texts.

        Pairs that share a text are not independent.
        """
        return "texts" if len(self.pairs) > len(self.texts) else "pairs"

    def count(self, unit: BootstrapUnit) -> int:
        """Return the number of pairs or texts."""
        return len(self.pairs) if unit == "pairs" else len(self.texts)


def is_similarity_file(path: Path | str) -> bool:
    """Whether the first record of a file has the first text of a pair and its score."""
    return begins_with(path, TEXT1[:1]) or begins_with(path, TEXT1, SCORE)


def _scored_pair(record: FileRecord) -> tuple[str, str, float]:
    return scored_texts(as_object(record.value))
