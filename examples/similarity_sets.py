"""Two sets of text pairs with similarity scores, for examples and benchmarks."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float32, Int64

from tercet.data.files.examples import as_object, shown, text_of
from tercet.data.files.similarity import SimilaritySet
from tercet.errors import DataError
from tercet.files.records import FileRecord, iter_records, parsed

LEE_PACKAGE: Final = "gensim==4.4.0"
_LEE_TEXTS: Final = "gensim/test/test_data/lee.cor"
_LEE_SCORES: Final = "gensim/test/test_data/similarities0-1.txt"

# Facets about how a package is made and run, which its one-line description does not mention.
_FORM: Final = frozenset(
    ("implemented-in", "interface", "made-of", "role", "scope", "uitoolkit", "x11")
)
_LEAST_TAGS: Final = 3  # with fewer, an overlap has hardly any values
_STEPS: Final = 10  # of the range of scores, each with equally many pairs if possible
_PAIRS_A_TEXT: Final = 10  # at most, or the most similar pairs would be those of one large family


def lee_similarity() -> SimilaritySet:
    """Return all 1,225 pairs of 50 short news texts, with the mean of some ten people's judgements.

    M. Lee, B. Pincombe and M. Welsh, "An empirical evaluation of models of text document
    similarity", CogSci 2005; scores from 0 to 1. The files are among gensim's tests. Their authors
    gave them to that project; as no licence of the texts is stated, they are not copied into this
    one.

    Raises:
        DataError: when gensim is not installed, with the command that installs it.
    """
    spec = importlib.util.find_spec("gensim")  # does not import it: that would need scipy
    homes = [Path(folder).parent for folder in (spec and spec.submodule_search_locations) or ()]
    found = [home for home in homes if (home / _LEE_TEXTS).is_file()]
    if not found:
        raise DataError(
            _LEE_TEXTS, None, f"is not here; install it: pip install --no-deps {LEE_PACKAGE}"
        )
    texts = (found[0] / _LEE_TEXTS).read_text(encoding="latin-1").splitlines()
    judged = np.loadtxt(found[0] / _LEE_SCORES)  # its lower triangle is empty
    first, second = np.triu_indices(len(texts), 1)
    if judged.shape != (len(texts), len(texts)):
        raise DataError(
            found[0] / _LEE_SCORES,
            None,
            f"does not fit {len(texts)} texts; install the known version: "
            f"pip install --no-deps {LEE_PACKAGE}",
        )
    return SimilaritySet.of(
        "lee",
        ((texts[i], texts[j], judged[i, j]) for i, j in zip(first, second, strict=True)),
    )


def debtags_similarity(
    path: Path | str, split: str = "test", *, pairs: int = 2_000, seed: int = 0
) -> SimilaritySet:
    """Return pairs of one-line package descriptions, scored by the overlap of their tags.

    A score is the Jaccard overlap |A & B| / |A | B| of the two packages' debtags: without those
    on form (role, interface, language of the code...), for packages with three others or more.
    Nearly all pairs share no tag; so each tenth of the range gets a tenth of ``pairs``, or as many
    as there are, with no text in more than ten. A missing tag is not a judgement: the scores are
    noisy, and no model comes near 1.

    Raises:
        DataError: when the file is no table of packages, or has no two such packages in the split.
    """
    path = Path(path)
    columns = ("short", "tags", "split")
    texts: list[str] = []
    tags: list[frozenset[str]] = []
    for record in iter_records(path, columns, needs=[(name,) for name in columns]):
        text, subjects, part = parsed(path, record, _package)
        if part == split and len(subjects) >= _LEAST_TAGS:
            texts.append(text)
            tags.append(subjects)
    if len(texts) < 2:
        raise DataError(
            path,
            None,
            f'has no two packages with {_LEAST_TAGS} tags on their subject in the split "{split}"',
        )
    overlap = _jaccard(tags)
    chosen = _spread_pairs(overlap, pairs, np.random.default_rng(seed))
    return SimilaritySet.of(
        "debtags",
        ((texts[i], texts[j], float(overlap[i, j])) for i, j in chosen),
    )


def _package(record: FileRecord) -> tuple[str, frozenset[str], str]:
    """Its line, its tags on the subject, and its split."""
    fields = as_object(record.value)
    tags = fields.get("tags") or []
    if not isinstance(tags, list):
        raise ValueError(f'"tags" must be a list of texts, got {shown(tags)}')
    subjects = frozenset(
        tag for tag in tags if text_of(tag, "tags").partition("::")[0] not in _FORM
    )
    return text_of(fields.get("short"), "short"), subjects, text_of(fields.get("split"), "split")


def _jaccard(sets: Sequence[frozenset[str]]) -> Float32[np.ndarray, "texts texts"]:
    """|A & B| / |A | B| of every two sets, none of them empty."""
    columns = {tag: column for column, tag in enumerate(sorted(frozenset().union(*sets)))}
    holds = np.zeros((len(sets), len(columns)), dtype=np.float32)
    for row, tags in enumerate(sets):
        holds[row, [columns[tag] for tag in tags]] = 1
    shared, sizes = holds @ holds.T, holds.sum(axis=1)
    return shared / (sizes[:, None] + sizes - shared)


def _spread_pairs(
    overlap: Float32[np.ndarray, "texts texts"], pairs: int, random: np.random.Generator
) -> Int64[np.ndarray, "pairs 2"]:
    """Pairs of texts, drawn alike from each step of the range; the rarest step chooses first."""
    first, second = np.triu_indices(len(overlap), 1)
    step = np.minimum((overlap[first, second] * _STEPS).astype(np.int64), _STEPS - 1)
    used = np.zeros(len(overlap), dtype=np.int64)
    chosen = []
    for each in np.argsort(np.bincount(step, minlength=_STEPS), kind="stable"):
        taken = 0
        for place in random.permutation(np.flatnonzero(step == each)):
            both = [first[place], second[place]]
            if taken == pairs // _STEPS:
                break
            if (used[both] < _PAIRS_A_TEXT).all():
                used[both] += 1
                taken += 1
                chosen.append(both)
    return np.array(chosen, dtype=np.int64).reshape(-1, 2)
