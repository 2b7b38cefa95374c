"""Keeping the texts that a model will be measured on out of what it learns from."""

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
from tercet.data.files.similarity import SimilaritySet, is_similarity_file
from tercet.data.files.sources import iter_examples
from tercet.data.files.texts import normal_form, read_texts
from tercet.errors import MissingExtraError, RecipeError
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.records import begins_with
from tercet.types import Example

SHINGLE: Final = 4  # characters
THRESHOLD: Final = 0.8  # of the Jaccard overlap |A & B| / |A | B| of two sets of shingles
PERMUTATIONS: Final = 128  # of a MinHash
RECALL: Final = 0.999  # least chance that a pair at the threshold becomes a candidate
REMEMBERED: Final = 1 << 16  # texts whose answer is kept: a negative often serves many rows

Likeness: TypeAlias = Literal["exact", "near"]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Found:
    """In which evaluation file a text was found, and how alike the two are."""

    file: str
    likeness: Likeness


class EvaluationTexts:
    """The texts of evaluation files, and whether another text is one of them or nearly so.

    Exact is equal in ``normal_form``. Near is a Jaccard overlap of the sets of shingles of at
    least ``threshold``; candidates come from MinHash (128 permutations) and are checked exactly.
    A shingle is four characters of the normal form, spaces included: that serves texts of four
    words as well as of a thousand, and scripts without spaces. Three words at a time would miss
    one changed word in any text of fewer than 29.

    MinHash takes the place of the BM25 rule (score over the test text's own score, at least 0.8).
    BM25 does not see the order of words, nor how much longer the training text is: a long one
    that happens to hold all words of a short test text would go. And it scores each training
    text against all test texts, where MinHash looks up a few.

    The evaluation side is held in memory, about 8 kB a text.
    """

    def __init__(self, threshold: float | int = THRESHOLD) -> None:
        """Start without a text.

        Raises:
            MissingExtraError: when datasketch is not installed.
            RecipeError: when the threshold is no overlap of two texts that are alike.
        """
        if not 0.3 <= threshold <= 1:
            raise RecipeError(
                f"a threshold of {threshold:g} is no overlap of near duplicates; "
                f"choose one from 0.3 to 1, such as {THRESHOLD:g}"
            )
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise MissingExtraError("finding near duplicates", "curate") from error
        self.threshold = threshold
        self._empty = MinHash(PERMUTATIONS, hashfunc=lambda shingle: crc32(shingle.encode()))
        self._near: Any = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(threshold))
        self._files: dict[str, str] = {}  # of each normal form, where it stands first
        self._forms: list[str] = []
        self._search = lru_cache(REMEMBERED)(self._find)

    @classmethod
    def read(
        cls, files: Iterable[Path | str], threshold: float | int = THRESHOLD
    ) -> "EvaluationTexts":
        """From files of any kind that ``evaluation_texts`` reads.

        Raises:
            DataError: at the first record that cannot be read, naming file and line.
        """
        texts = cls(threshold)
        for file in files:
            texts.add(Path(file).name, evaluation_texts(file))
        return texts

    def __len__(self) -> int:
        return len(self._forms)

    def add(self, file: str, texts: Iterable[str]) -> None:
        """Take in the texts of one more file; a text that is there already stays with its first."""
        self._search.cache_clear()
        for form in map(normal_form, texts):
            if form and form not in self._files:
                self._files[form] = file
                self._near.insert(len(self._forms), self._minhash(form))
                self._forms.append(form)

    def find(self, text: str) -> Found | None:
        """Where the text stands, or one nearly like it."""
        return self._search(normal_form(text))

    def _find(self, form: str) -> Found | None:
        if form in self._files:
            return Found(self._files[form], "exact")
        own = shingles(form)
        for place in sorted(self._near.query(self._minhash(form))):
            other = self._forms[place]
            if overlap(own, shingles(other)) >= self.threshold:
                return Found(self._files[other], "near")
        return None

    def _minhash(self, form: str) -> Any:
        found = self._empty.copy()  # drawing the permutations anew would take as long as the rest
        found.update_batch(shingles(form))
        return found


def shingles(form: str) -> frozenset[str]:
    """All runs of four characters; of a shorter text, the text itself.

    A wide character (Chinese, Japanese, Korean) says as much as two letters, and stands twice.
    """
    if not form.isascii():
        wide = unicodedata.east_asian_width
        form = "".join(each * 2 if wide(each) == "W" else each for each in form)
    return frozenset(form[i : i + SHINGLE] for i in range(max(len(form) - SHINGLE + 1, 1)))


def overlap(first: frozenset[str], second: frozenset[str]) -> float:
    """Jaccard's |A & B| / |A | B|, of two sets that are not both empty."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def evaluation_texts(path: Path | str) -> Iterator[str]:
    """The texts of an evaluation file that must not be learned from.

    Of a file of examples or a folder in BEIR's layout: the queries and the documents that answer
    them. The other documents there say nothing of an answer, and are often those of the training
    set too. Of pairs with a score: both texts. Of labelled or plain texts: each text, and no
    label.

    Raises:
        DataError: at the first record that cannot be read, naming file and line.
    """
    path = Path(path)
    if path.is_dir():
        data = RetrievalSet.from_folder(path)
        yield from data.queries
        relevant = np.unique(data.judgements.docs[data.judgements.grades > 0])
        yield from (data.documents[row] for row in relevant.tolist())
    elif path.suffix != ".txt" and is_similarity_file(path):
        yield from SimilaritySet.from_file(path).texts
    elif path.suffix != ".txt" and begins_with(path, QUERY):
        for example in iter_examples(path):
            yield from (example.query, *example.positives)
    else:
        yield from read_texts(path)


@dataclass(slots=True)
class Removal:
    """What was taken out of training rows, counted while they pass."""

    rows: int = 0  # that came
    kept: int = 0  # rows that are left, with or without a text less
    without_negatives: int = 0  # rows that went since no negative of their own was left
    texts: Counter[tuple[str, str, Likeness]] = field(default_factory=Counter)

    def count(self, found: Found, name: str) -> None:
        """One more text of this field was found."""
        self.texts[found.file, name, found.likeness] += 1


def decontaminate(
    rows: Iterable[Example], against: EvaluationTexts, removal: Removal
) -> Iterator[Example]:
    """The rows without texts of the evaluation, one by one; ``removal`` counts along.

    A row whose query is found goes, and one of whose positives none is left. A negative that is
    found goes alone; if it was the last of a row that has no negatives but its own, the row goes.
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
    """The items of which no text is found; for what is yet to become rows."""
    for item in items:
        removal.rows += 1
        found = next(filter(None, map(against.find, texts_of(item))), None)
        if found is not None:
            removal.count(found, "text")
            continue
        removal.kept += 1
        yield item


def _clean(row: Example, against: EvaluationTexts, removal: Removal) -> Example | None:
    found = against.find(row.query)
    if found is not None:
        removal.count(found, "query")
        return None
    fields = {
        "positives": (row.positives, row.positive_scores),
        "negatives": (row.negatives, row.negative_scores),
    }
    left: dict[str, Any] = {}
    for name, (texts, scores) in fields.items():
        places = [i for i, text in enumerate(texts) if not _counted(text, name, against, removal)]
        left[name] = tuple(texts[i] for i in places)
        left[f"{name[:-1]}_scores"] = scores and tuple(scores[i] for i in places)
        if name == "positives" and not places:
            return None
    if row.in_batch == "none" and row.negatives and not left["negatives"]:
        removal.without_negatives += 1
        return None
    return replace(row, **left)


def _counted(text: str, name: str, against: EvaluationTexts, removal: Removal) -> bool:
    found = against.find(text)
    if found is not None:
        removal.count(found, name)
    return found is not None


def _bands(threshold: float | int) -> tuple[int, int]:
    """How many bands of how many hashes: as long bands as still find a pair at the threshold.

    Two texts of overlap j agree in one of b bands of r hashes with chance 1 - (1 - j^r)^b.
    """
    fitting = [
        (PERMUTATIONS // r, r)
        for r in range(1, PERMUTATIONS // 2 + 1)
        if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL
    ]
    return fitting[-1]
