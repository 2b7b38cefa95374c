"""Pairs of texts with a similarity score given by people, to compare a model's cosines with."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64

from tercet.data.files.examples import as_object, finite, given, nonblank, text_of
from tercet.errors import DataError
from tercet.files.records import FileRecord, begins_with, iter_records, parsed

# The first name of each field is ours; the others are read as well.
TEXT1: Final = ("text1", "sentence1")
TEXT2: Final = ("text2", "sentence2")
SCORE: Final = ("score", "label", "similarity")

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
        """Read a .jsonl or .parquet file of records with ``text1``, ``text2`` and ``score``.

        Raises:
            DataError: at the first record that is not a scored pair, naming file and line, and
                if all scores are equal.
        """
        path = Path(path)
        fields, needs = (*TEXT1, *TEXT2, *SCORE), (TEXT1, TEXT2, SCORE)
        records = iter_records(path, fields, needs=needs, known=fields)
        data = cls.of(path.stem, (parsed(path, record, _scored_pair) for record in records))
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
    """Whether the first record of a file has the first text of a pair."""
    return begins_with(path, TEXT1)


def _scored_pair(record: FileRecord) -> tuple[str, str, float]:
    fields = as_object(record.value)
    texts = []
    for names in (TEXT1, TEXT2):
        name, value = given(fields, names)
        if value is None:
            raise ValueError(
                f'"{name}" is missing; a pair needs "{TEXT1[0]}", "{TEXT2[0]}" and "{SCORE[0]}"'
            )
        texts.append(nonblank(text_of(value, name), name))
    name, value = given(fields, SCORE)
    if value is None:
        raise ValueError(f'"{name}" is missing; give the similarity of the two texts as a number')
    return texts[0], texts[1], finite(value, name)
