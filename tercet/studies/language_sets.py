"""Evaluation sets of files of examples, one for each language that their rows are in."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from tercet.data.files.languages import family_of, plain
from tercet.data.files.sources import Source, iter_examples
from tercet.errors import DataError, RecipeError
from tercet.evaluate.measures.retention import retention
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.suite import MAIN, EvaluationSet, as_evaluation_set
from tercet.files.artifacts import fingerprint
from tercet.files.forms import RECORDS, bare_name, is_of, listed
from tercet.models.embedder import Embedder
from tercet.types import Example

_CODE = re.compile(r"[a-z]{2,3}([_-][A-Z][A-Za-z]+)*")  # such as de, pt_BR, zh-Hans


def open_languages(
    paths: Sequence[Path],
    *,
    queries: int | None = None,
    documents: int | None = None,
    short: int | None = None,
) -> list[EvaluationSet]:
    """Open a retrieval set for each language of these files, or of the files in these folders.

    The language of a row is its own, or else the name of its file. ``queries`` and ``documents``
    limit each set to its first queries, and to the documents that answer them with the first of
    the others. With ``short``, answers have two columns: of whole vectors, and of their first
    ``short`` coordinates. Sets are in order of family and name.

    Raises:
        DataError: if a row is no example, or has no language.
        RecipeError: if there is no set, or a limit is below 1.
    """
    for name, limit in (("queries", queries), ("documents", documents)):
        if limit is not None and limit < 1:
            raise RecipeError(f"{name} is {limit}; give 1 or more")
    rows: dict[str, list[Example]] = {}
    tasks: dict[str, dict[str, None]] = {}
    for path in _files(paths):
        for number, example in enumerate(iter_examples(path), start=1):
            lang = example.lang or bare_name(path)
            if not _CODE.fullmatch(lang):
                raise DataError(
                    path,
                    number,
                    f'it has no language, and {lang!r} is not one; give rows a "lang", or name '
                    "the file by its language, such as de.jsonl",
                )
            rows.setdefault(lang, []).append(example)
            tasks.setdefault(lang, {}).update(dict.fromkeys((example.task, bare_name(path))))
    if not rows:
        raise RecipeError("there is no evaluation set; give a folder of LANG.jsonl files")
    found = []
    for lang in sorted(rows, key=lambda lang: (family_of(lang), lang)):
        data = RetrievalSet.from_examples(_limited(rows[lang], queries, documents), lang)
        examined = as_evaluation_set(data, tuple(filter(None, tasks[lang])))
        judged = (data.judgements.docs, data.judgements.grades, data.judgements.offsets)
        parts = (data.queries, data.documents, *(a.astype("<i8").tobytes() for a in judged))
        examined = replace(examined, fingerprint=fingerprint(*parts, short))
        if short is not None:
            examined = replace(examined, answers=partial(_at_both_widths, data, short))
        found.append(examined)
    return found


def english_and_others(sets: Sequence[EvaluationSet]) -> dict[str, tuple[str, ...]]:
    """Return the names of the English sets (``en``) and of all others, unless there are none.

    Raises:
        RecipeError: if no set is in English.
    """
    names = [each.name for each in sets]
    english = tuple(name for name in names if plain(name) == "en")
    if not english:
        raise RecipeError(
            f"no evaluation set is in English (there are {', '.join(names)}); add one"
        )
    others = tuple(name for name in names if name not in english)
    return {"en": english, "others": others} if others else {"en": english}


def language_of(source: Source) -> str:
    """Return the language of a source's examples, or of its file's name; empty if mixed."""
    if source.lang or source.path.is_dir():
        return source.lang
    languages = {example.lang for example in iter_examples(source.path, scored=True)}
    if languages == {""}:
        return bare_name(source.path)
    return languages.pop() if len(languages) == 1 else ""


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.glob("*") if is_of(p, RECORDS))
        if path.is_dir() and not inside:
            raise RecipeError(f"{path}: holds no {listed(RECORDS)} file of examples")
        found += inside if path.is_dir() else [path]
    return found


def _limited(rows: Sequence[Example], queries: int | None, documents: int | None) -> list[Example]:
    """Return the rows of the first queries, and as many other documents as there is room for."""
    chosen = {*list(dict.fromkeys(row.query for row in rows))[:queries]}
    kept = [row for row in rows if row.query in chosen]
    relevant = dict.fromkeys(text for row in kept for text in row.positives)
    others = dict.fromkeys(text for row in rows for text in (*row.positives, *row.negatives))
    rest = [text for text in others if text not in relevant]
    if documents is not None:
        rest = rest[: max(0, documents - len(relevant))]
    bare = [replace(row, negatives=(), negative_scores=None) for row in kept]
    return [*bare[:-1], replace(bare[-1], negatives=tuple(rest))]


def _at_both_widths(
    data: RetrievalSet, short: int, embedder: Embedder, task: str | None
) -> np.ndarray:
    """Return the nDCG@10 of each query by whole vectors, and by short ones."""
    found = retention(embedder, data, task=task, dims=[short], stored=["float32"], names=[MAIN])
    return np.stack([found[place].result.scores[MAIN] for place in (0, -1)], axis=1)
