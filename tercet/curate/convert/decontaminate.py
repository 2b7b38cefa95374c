"""Removing the texts of evaluation data from training data."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar
from zlib import crc32

import numpy as np

from tercet.data.files.examples import QUERY
from tercet.data.files.inputs import local_path
from tercet.data.files.similarity import SimilaritySet, is_similarity_file
from tercet.data.files.sources import iter_examples
from tercet.data.files.texts import normal_form, read_texts
from tercet.errors import MissingExtraError, RecipeError
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.forms import RECORDS, is_of
from tercet.files.records import begins_with
from tercet.types import Example

SHINGLE: Final = 4  # characters
THRESHOLD: Final = 0.8  # Jaccard overlap |A & B| / |A | B| of two sets of shingles
PERMUTATIONS: Final = 128  # of a MinHash
RECALL: Final = 0.999  # least probability that a pair at the threshold becomes a candidate
CACHED: Final = 1 << 16  # texts whose result is cached: many rows often share a negative

Likeness: TypeAlias = Literal["exact", "near"]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Match:
    """The evaluation file that contains a text, and how alike the two texts are."""

    file: str
    likeness: Likeness


class EvaluationTexts:
    """The texts of evaluation files, searched for exact and near duplicates of other texts.

    Exact duplicates are equal in ``normal_form``. Near duplicates have a Jaccard overlap of their
    shingles of at least ``threshold``; candidates come from MinHash (128 permutations) and are
    checked exactly. A shingle is four characters of the normal form, spaces included: three words
    would miss one changed word in any text of fewer than 29. A ratio of BM25 scores would remove a
    long text that contains all words of a short one. Memory holds about 8 kB per evaluation text.
    """

    def __init__(self, threshold: float | int = THRESHOLD) -> None:
        """Start without texts.

        Raises:
            MissingExtraError: if datasketch is not installed.
            RecipeError: if the threshold is not between 0.3 and 1.
        """
        if not 0.3 <= threshold <= 1:
            raise RecipeError(
                f"threshold must be between 0.3 and 1, such as {THRESHOLD:g}; got {threshold:g}"
            )
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise MissingExtraError("finding near duplicates", "curate") from error
        self.threshold = threshold
        self._empty = MinHash(PERMUTATIONS, hashfunc=lambda shingle: crc32(shingle.encode()))
        self._near: Any = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(threshold))
        self._files: dict[str, str] = {}  # the first file that contains a normal form
        self._forms: list[str] = []
        self._search = lru_cache(CACHED)(self._find)

    @classmethod
    def read(
        cls, files: Iterable[Path | str], threshold: float | int = THRESHOLD
    ) -> "EvaluationTexts":
        """Read files of any kind that ``evaluation_texts`` supports.

        Raises:
            DataError: at the first record that cannot be read, with file and line.
        """
        texts = cls(threshold)
        for file in files:
            texts.add(Path(file).name, evaluation_texts(file))
        return texts

    def __len__(self) -> int:
        return len(self._forms)

    def add(self, file: str, texts: Iterable[str]) -> None:
        """Add the texts of a file; known texts stay with their first file."""
        self._search.cache_clear()
        for form in map(normal_form, texts):
            if form and form not in self._files:
                self._files[form] = file
                self._near.insert(len(self._forms), self._minhash(form))
                self._forms.append(form)

    def find(self, text: str) -> Match | None:
        """Return the first exact or near duplicate of a text."""
        return self._search(normal_form(text))

    def _find(self, form: str) -> Match | None:
        if form in self._files:
            return Match(self._files[form], "exact")
        own = shingles(form)
        for place in sorted(self._near.query(self._minhash(form))):
            other = self._forms[place]
            if overlap(own, shingles(other)) >= self.threshold:
                return Match(self._files[other], "near")
        return None

    def _minhash(self, form: str) -> Any:
        found = self._empty.copy()  # drawing new permutations would take as long as the rest
        found.update_batch(shingles(form))
        return found


def shingles(form: str) -> frozenset[str]:
    """Return all runs of four characters, or a shorter text; wide characters count twice."""
    if not form.isascii():
        wide = unicodedata.east_asian_width
        form = "".join(each * 2 if wide(each) == "W" else each for each in form)
    return frozenset(form[i : i + SHINGLE] for i in range(max(len(form) - SHINGLE + 1, 1)))


def overlap(first: frozenset[str], second: frozenset[str]) -> float:
    """Return Jaccard's |A & B| / |A | B| of two sets that are not both empty."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def evaluation_texts(path: Path | str) -> Iterator[str]:
    """Yield the texts of an evaluation file that must not occur in training data.

    Of examples or a folder in BEIR's layout: the queries and their relevant documents, as the
    others reveal no answer. Of scored pairs: both texts. Of labelled or plain texts: each text.

    Raises:
        DataError: at the first record that cannot be read, with file and line.
    """
    path = local_path(path)
    is_text = not is_of(path, RECORDS)
    if path.is_dir():
        data = RetrievalSet.from_folder(path)
        yield from data.queries
        relevant = np.unique(data.judgements.docs[data.judgements.grades > 0])
        yield from (data.documents[row] for row in relevant.tolist())
    elif not is_text and is_similarity_file(path):
        yield from SimilaritySet.from_file(path).texts
    elif not is_text and begins_with(path, QUERY):
        for example in iter_examples(path):
            yield from (example.query, *example.positives)
    else:
        yield from read_texts(path)


@dataclass(slots=True)
class Removal:
    """Counts of what was removed from training rows."""

    rows: int = 0  # read
    kept: int = 0  # rows, whole or with some texts removed
    without_negatives: int = 0  # rows removed because they had no negative left
    texts: Counter[tuple[str, str, Likeness]] = field(default_factory=Counter)  # removed, by field

    def matches(self, text: str, name: str, against: EvaluationTexts) -> bool:
        """Return whether a text of this field has a duplicate; count it if so."""
        found = against.find(text)
        if found is not None:
            self.texts[found.file, name, found.likeness] += 1
        return found is not None


def decontaminate(
    rows: Iterable[Example], against: EvaluationTexts, removal: Removal
) -> Iterator[Example]:
    """Yield the rows without texts of the evaluation; ``removal`` counts what is removed.

    A row is removed if its query is found or no positive is left. A negative is removed alone; a
    row without in-batch negatives is removed with its last negative.
    """
    for row in rows:
        removal.rows += 1
        clean = _clean(row, against, removal)
        if clean is not None:
            removal.kept += 1
            yield clean


def withhold(
    items: Iterable[Item],
    texts_of: Callable[[Item], Sequence[str]],
    *,
    against: EvaluationTexts,
    removal: Removal,
) -> Iterator[Item]:
    """Yield the items without texts of the evaluation; for data that is not yet rows."""
    for item in items:
        removal.rows += 1
        if not any(removal.matches(text, "text", against) for text in texts_of(item)):
            removal.kept += 1
            yield item


def _clean(row: Example, against: EvaluationTexts, removal: Removal) -> Example | None:
    if removal.matches(row.query, "query", against):
        return None
    fields = {
        "positives": (row.positives, row.positive_scores),
        "negatives": (row.negatives, row.negative_scores),
    }
    left: dict[str, Any] = {}
    for name, (texts, scores) in fields.items():
        places = [i for i, text in enumerate(texts) if not removal.matches(text, name, against)]
        left[name] = tuple(texts[i] for i in places)
        left[f"{name[:-1]}_scores"] = scores and tuple(scores[i] for i in places)
        if name == "positives" and not places:
            return None
    if row.in_batch == "none" and row.negatives and not left["negatives"]:
        removal.without_negatives += 1
        return None
    return replace(row, **left)


def _bands(threshold: float | int) -> tuple[int, int]:
    """Return the number of bands and the hashes per band, the most that keep the recall."""
    # Texts of overlap j agree in at least one of b bands of r hashes with chance 1 - (1 - j^r)^b.
    return next(
        (PERMUTATIONS // r, r)
        for r in range(PERMUTATIONS // 2, 0, -1)
        if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL
    )
